import json
import math
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto import event_pb2

from gptjax.train import metrics
from gptjax.train.metrics import MetricsWriter, read_metrics


def events(file):
    """The records of a TensorBoard file: length, its checksum, the message, its checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += 12 + size + 4


def write(workdir, steps, *, start_step=0, loss=float):
    writer = MetricsWriter(workdir, start_step=start_step)
    for step in steps:
        writer.on_values(step, {"loss": loss(step)})
    writer.close()


def test_a_resumed_record_drops_the_lines_past_the_checkpoint(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 10), start_step=4, loss=lambda step: step + 0.5)
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5), (7, 7.5), (8, 8.5), (9, 9.5),
    ]  # fmt: skip


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2, 3]
    write(tmp_path, [4], start_step=3)
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{x", '{"loss": 1.0}', "[1]", '{"step": "2"}', "\0\0"])
def test_a_damaged_line_is_named(tmp_path, line):
    write(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl:2: expected a JSON object with a step.*; remove that line"):
        MetricsWriter(tmp_path, start_step=1)


def test_figures_that_are_not_finite_are_written_without_a_warning_each(tmp_path, caplog):
    write(tmp_path, [1, 2], loss=lambda step: math.nan)
    assert caplog.records == []


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, start_step=0)
    writer.on_values(1, {"loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    writer.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    write(tmp_path, [1, 2], loss=lambda step: math.nan if step == 1 else math.inf)
    assert [x["loss"] for x in read_metrics(tmp_path)] == [None, None]


def test_an_object_store_gets_the_whole_file_now_and_then(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    path = metrics.epath.Path(tmp_path / "run" / "metrics.jsonl")
    lines = metrics._RemoteLines(path, [{"step": 1}])
    lines.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    lines.append({"step": 3})
    assert path.read_text().count("\n") == 2
    now[0] += 61
    lines.append({"step": 4})
    assert path.read_text().count("\n") == 4
    lines.append({"step": 5})
    lines.close()
    assert path.read_text().count("\n") == 5


def test_tensorboard_has_the_same_figures(tmp_path):
    write(tmp_path, range(1, 8), loss=lambda step: step + 0.5)
    (first,) = (tmp_path / "tensorboard").iterdir()
    shown = [(event.step, value.tag, value.simple_value) for event in events(first) for value in event.summary.value]
    assert shown == [(step, "loss", step + 0.5) for step in range(1, 8)]
    first.unlink()  # files are named after the second, and this one is not over yet
    write(tmp_path, [5], start_step=4)
    (second,) = (tmp_path / "tensorboard").iterdir()
    # What tells TensorBoard to forget the steps from 5 on that it was shown before.
    starts = [event.step for event in events(second) if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [5]


def test_a_full_disk_ends_the_run_and_does_not_hang_it(tmp_path):
    script = f"""
import resource
from gptjax.train.metrics import MetricsWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writer = MetricsWriter({str(tmp_path)!r}, start_step=0)
writer._file.append = lambda line: None
for step in range(10_000):
    writer.on_values(step, {{"loss": 1.0}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "File too large" in done.stderr
