"""`experiments.prune` on a small checkpoint, and what other commands make of its result."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptjax
from gptjax.checkpoint import arrays, sparse
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from tests.tiny import TINY, random_params

REPOSITORY = Path(__file__).parents[2]
CFG = dataclasses.replace(TINY, vocab_size=384, seq_len=64, d_model=32, d_ff=128, num_layers=3).build()
TOKENIZER = tokenizer_lib.byte_level()


def run(*flags):
    command = [sys.executable, "-m", "experiments.prune", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    meta = meta_lib.make(CFG, step=5, tokenizer=TOKENIZER.fingerprint, lineage=[{"stage": "pretrain"}])
    with CheckpointStore(path) as store:
        store.save(5, meta=meta, params=random_params(CFG), assets={"tokenizer.model": TOKENIZER.to_bytes()})
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return path


def test_it_leaves_a_smaller_sparse_model_and_the_source_as_it_was(source, tmp_path):
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    result = run(
        f"--ckpt={source}", f"--dst={tmp_path}/out", "--width=0.5", "--depth=2", "--sparsity=2:4",
        f"--calibration={source}/text.txt", "--calibration_rows=4", "--calibration_length=32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
    (up,) = (line for line in result.stdout.splitlines() if line.startswith("group_0/block_0/mlp/up/kernel "))
    assert up.endswith(" 50.0%")
    assert "layers that stay, of 0 to 2: " in result.stderr
    assert f"pretrain with --init={tmp_path}/out --config.optim.zeros=kept" in result.stdout
    assert "embeddings and head stay" in result.stdout and "on disk" in result.stdout
    model = gptjax.load(tmp_path / "out")
    assert (model.config.num_layers, model.config.blocks[0].mlp.d_ff) == (2, 64)
    up = np.asarray(model.params["group_0"]["block_0"]["mlp"]["up"]["kernel"]).swapaxes(-1, -2)
    assert np.all((up.reshape(-1, 4) != 0).sum(-1) == 2)
    first, entry = model.meta.lineage
    assert first == {"stage": "pretrain"} and entry["stage"] == "prune" and entry["calibration"]["rows"] == 4
    assert entry["done"] == ["depth=2", "width=0.5", "sparsegpt, sparsity=2:4"]
    assert json.dumps(entry) and len(model.complete(["The"], max_new_tokens=3)[0].tokens) == 3
    assert sparse.bitmaps(arrays._files(tmp_path / "out" / "params"))


def test_the_source_is_only_read(source):
    result = run(f"--ckpt={source}", f"--dst={source}/ckpt/5/out", "--sparsity=0.5", "--method=magnitude")
    assert result.returncode == 2 and "is inside of" in result.stderr and "which is only read" in result.stderr
    assert not (source / "ckpt" / "5" / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to do: give --sparsity"),
        (["--sparsity=1"], "sparsity=1: expected above 0 and below 1"),
        (["--sparsity=3:5", "--method=magnitude"], "32 inputs are not a multiple of 5"),
        (["--heads=1", "--calibration=x"], "heads=1: 4 heads are in groups of 2"),
        (["--sparsity=0.5"], "--method=sparsegpt looks at text: give --calibration"),
        (["--sparsity=0.5", "--method=magnitude", "--calibration=x"], "looks at no text; leave out --calibration"),
        (["--sparsity=0.5", "--method=wanda", "--aim=0"], "--aim has no effect: --method=wanda does not read it"),
        (["--width=0.5", "--costs=loss"], "--costs has no effect: there is no --sparsity"),
        (["--sparsity=0.5", "--aim=2", "--calibration=x"], "aim=2: expected 0"),
        (["--width=0.5", "--method=wanda"], "--method=wanda is of single weights: give --sparsity"),
        (["--width=0.5", "--surplus_experts=merged"], "no effect without --experts; leave it out"),
    ],
)
def test_a_mistake_is_one_line_before_the_work(source, tmp_path, flags, message):
    result = run(f"--ckpt={source}", f"--dst={tmp_path}/out", *flags)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
