"""`make demo` in small: killed in the middle of training, it goes on and leaves everything it promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEXT = "def f{0}(x):\n\treturn x + {0}  # größer\n\n\nclass C{0}:\n    value = {0}\n\n" * 12


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(40):
        (folder / f"module_{number}.py").write_text(TEXT.format(number), encoding="utf-8")
    return f"dir:{folder}/*.py"


def start(workdir: Path, source: str, *, minutes: float = 0.001) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.demo", f"--workdir={workdir}", "--config=tests/e2e/tiny.py",
         f"--source={source}", "--vocab_size=400", f"--train_minutes={minutes}"],
        cwd=REPOSITORY, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def steps_of(workdir: Path) -> list[int]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines()[:-1] if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def test_killed_and_started_again_it_leaves_everything(tmp_path, source):
    workdir = tmp_path / "demo"
    process = start(workdir, source)
    while 8 not in steps_of(workdir) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (workdir / "summary.json").exists(), "it was over before it could be killed"

    process = start(workdir, source)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert "Going on from step" in output

    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["step"] == json.loads((workdir / "plan.json").read_text())["num_steps"] == 40
    assert not (workdir / "trial").exists()
    assert 0.9 < summary["train_tokens"] / (40 * 8 * 128) <= 1  # the last row of an epoch is not full
    assert {"model", "gzip", "bz2", "xz", "xz_given_train"} <= summary["bits_per_byte"].keys()
    assert all(value > 0 for value in summary["bits_per_byte"].values())
    for key in ("wall_seconds", "peak_memory_bytes", "num_params"):
        assert summary[key] > 0, key
    assert len(summary["samples"]) == 4
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 41))
    page = (workdir / "report.html").read_text()
    for part in ("Loss", "Learning rate", "Throughput", "Samples", "embed/tokens"):
        assert part in page, part

    process = start(workdir, source)
    again = process.communicate()[0].decode()
    assert process.returncode == 0 and "finished already" in again and "experiments.evaluate" not in again
    assert json.loads((workdir / "summary.json").read_text())["wall_seconds"] == pytest.approx(
        summary["wall_seconds"], rel=0.2
    )

    refused = start(workdir, source, minutes=7)
    assert "planned for 0.001 minutes, got --train_minutes=7" in refused.communicate()[0].decode()
    assert refused.returncode == 2
