"""The table of methods on a tiny model, with the figures of its first line and of one line by another way."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptjax
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from tests.tiny import TINY, random_params

REPOSITORY = Path(__file__).parents[2]
CFG = dataclasses.replace(TINY, vocab_size=384, seq_len=64, d_model=32, d_ff=64, num_layers=2).build()


def run(*flags):
    command = [sys.executable, "-m", "tools.compression_table", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path):
    tokenizer = tokenizer_lib.byte_level()
    with CheckpointStore(tmp_path / "run") as store:
        meta = meta_lib.make(CFG, step=0, tokenizer=tokenizer.fingerprint)
        store.save(0, meta=meta, params=random_params(CFG), assets={"tokenizer.model": tokenizer.to_bytes()})
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path


def test_it_scores_what_it_makes_on_the_texts_first_rows_and_says_what_cannot_be_made(source):
    flags = [f"--ckpt={source}/run", f"--calibration={source}/text.txt", f"--test={source}/text.txt", "--length=32"]
    flags += ["--test_rows=18", "--calibration_rows=4", "--batch=4", f"--out={source}/table.json"]
    result = run(*flags, "--only=^int8 rtn|int4 64 zeros rtn|50 % magnitude", f"--also=again={source}/run")
    assert result.returncode == 0, result.stderr
    assert "18 rows of 32 tokens" in result.stdout
    assert "int4 64 zeros rtn" in result.stdout and "group_size=64 does not divide its 32 inputs" in result.stdout
    lines = {line["name"]: line for line in json.loads((source / "table.json").read_text())}
    assert lines.keys() == {"as it is", "int8 rtn", "50 % magnitude", "again"}
    model = gptjax.load(source / "run")
    tokens = model.tokenizer.encode((source / "text.txt").read_text())
    rows = np.stack([tokens[32 * row : 32 * row + 33] for row in range(18)])
    logits = np.asarray(model.logits(rows[:, :-1]), np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    assert lines["as it is"]["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    assert lines["again"]["ratio"] == lines["as it is"]["ratio"] == 1.0
    assert 0 < abs(lines["int8 rtn"]["ratio"] - 1) < abs(lines["50 % magnitude"]["ratio"] - 1)
    assert lines["int8 rtn"]["memory"] < 1 and lines["int8 rtn"]["start"] != lines["int8 rtn"]["ratio"]


def test_a_configuration_alone_is_timed(tmp_path):
    (tmp_path / "tiny.py").write_text(
        "from configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    sizes = dict(vocab_size=128, seq_len=32, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, d_ff=64)\n"
        "    config.model = base.llama(**sizes, tie_embeddings=True)\n"
        "    return config\n"
    )
    flags = [f"--random={tmp_path}/tiny.py", "--only=int4 32 gptq", "--length=16", "--calibration_rows=4"]
    result = run(*flags, f"--out={tmp_path}/table.json")
    assert result.returncode == 0, result.stderr
    _, line = json.loads((tmp_path / "table.json").read_text())
    assert line["name"] == "int4 32 gptq" and line["seconds"] > 0 and line["peak_bytes"] > 0
