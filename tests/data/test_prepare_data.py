import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gptjax import lock
from gptjax.data import store, tokenizer

REPOSITORY = pathlib.Path(__file__).parents[2]


def command(out, *flags):
    return [sys.executable, "-m", "experiments.prepare_data", f"--out={out}", *flags]


def prepare(out, *flags):
    return subprocess.run(command(out, *flags), cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def texts(tmp_path):
    directory = tmp_path / "texts"
    directory.mkdir()
    for i in range(120):
        (directory / f"{i:03d}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * (1 + i % 5))
    (directory / "again.py").write_text((directory / "000.py").read_text())
    return directory


def test_trains_a_tokenizer_and_writes_both_parts(tmp_path, texts):
    out = tmp_path / "out"
    result = prepare(out, f"--source={texts}", "--vocab_size=320", "--eval_fraction=0.1")
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    pieces = tokenizer.load(out)
    assert pieces.vocab_size == summary["vocab_size"] == 320
    for part in ("train", "eval"):
        opened = store.open_store(out / part, fingerprint=pieces.fingerprint)
        counts = summary[part]
        assert (counts["documents"], counts["tokens"]) == (opened.num_documents, opened.num_tokens)
        assert f"{part} documents" in result.stdout
    assert summary["train"]["documents"] + summary["eval"]["documents"] == 120  # the copy is left out
    assert 4 <= summary["eval"]["documents"] <= 25
    assert summary["seconds"] > 0
    # Once more changes nothing; with other settings it says what is in the way.
    before = {path: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    assert prepare(out, f"--source={texts}", "--vocab_size=320", "--eval_fraction=0.1").returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    other = prepare(out, f"--source={texts}", "--vocab_size=330", "--eval_fraction=0.1")
    assert other.returncode != 0
    assert "has 320 pieces, not 330" in other.stderr
    with lock.exclusive(out):
        second = prepare(out, f"--source={texts}", "--vocab_size=320", "--eval_fraction=0.1")
    assert second.returncode == 2 and "another process is working there" in second.stderr


def test_a_bucket_is_refused_before_anything_is_written(texts):
    result = prepare("gs://bucket/data", f"--source={texts}", "--tokenizer=bytes")
    assert result.returncode != 0
    assert "gs://bucket/data: stores are memory-mapped" in result.stderr
    assert not (REPOSITORY / "gs:").exists()


def test_characters_of_one_text_split_at_its_end(tmp_path):
    (tmp_path / "book.txt").write_text("the cat sat on the mat; " * 50 + "zebra")
    out = tmp_path / "out"
    result = prepare(out, f"--source={tmp_path}/book.txt", "--tokenizer=characters", "--eval_fraction=0.1")
    assert result.returncode == 0, result.stderr
    letters = tokenizer.load(out)
    train, held_out = (store.open_store(out / part).document(0).tolist() for part in ("train", "eval"))
    assert letters.decode(train + held_out) == (tmp_path / "book.txt").read_text()
    assert len(held_out) == pytest.approx(0.1 * (len(train) + len(held_out)), abs=1)


def test_killed_while_writing_goes_on_to_the_same_files(tmp_path):
    flags = ("--source=stdlib", "--tokenizer=bytes")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert prepare(straight, *flags).returncode == 0
    process = subprocess.Popen(command(killed, *flags), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (killed / "train.partial" / "00000.tokens").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "train").exists()
    assert prepare(killed, *flags).returncode == 0
    for path in [*straight.glob("*/*")]:
        assert (killed / path.relative_to(straight)).read_bytes() == path.read_bytes()


def test_bad_text_is_named_and_leaves_no_store(tmp_path, texts):
    (texts / "050.py").write_bytes(b"caf\xe9")
    result = prepare(tmp_path / "out", f"--source={texts}", "--tokenizer=bytes")
    assert result.returncode != 0
    assert "050.py: not UTF-8 at byte 3 (0xe9)" in result.stderr
    assert not (tmp_path / "out" / "train").exists()


def test_nothing_held_out_is_noticed_before_the_work_and_can_be_put_right(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text("one document")
    flags = (f"--source={tmp_path}/few", "--tokenizer=bytes")
    result = prepare(tmp_path / "out", *flags)
    assert result.returncode == 2
    assert "out/eval: no document that has text falls into this part" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []
    result = prepare(tmp_path / "out", *flags, "--eval_fraction=0")
    assert result.returncode == 0, result.stderr
    assert store.open_store(tmp_path / "out" / "train").num_documents == 1
