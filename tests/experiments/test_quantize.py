"""The command from a checkpoint to one in few bits, and what it says of mistakes."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore, read_meta
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import exporting
from gptjax.model import load
from gptjax.nn import quant_spec
from tests.nn import zoo
from tests.tiny import random_params

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*flags):
    command = [sys.executable, "-m", "experiments.quantize", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_help_is_no_error():
    result = run("--help")
    assert result.returncode == 0 and "python -m experiments.quantize" in result.stdout and "--method" in result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    tokenizer = tokenizer_lib.byte_level()
    cfg = zoo.build("moe", vocab_size=tokenizer.vocab_size, d_model=32)
    meta = meta_lib.make(cfg, step=7, tokenizer=tokenizer.fingerprint, lineage=({"stage": "pretrain"},))
    with CheckpointStore(directory / "run") as store:
        store.save(7, meta=meta, params=random_params(cfg), assets={tokenizer_lib.FILE_NAME: tokenizer.to_bytes()})
    (directory / "book.txt").write_text("It was a bright cold day in April. " * 60)
    return directory


def test_it_writes_a_checkpoint_that_generates_and_tells_every_leaf(source, tmp_path):
    flags = ("--method=gptq", "--weights=int4", "--group_size=8", f"--calibration={source / 'book.txt'}")
    sizes = ("--calibration_rows=6", "--calibration_length=32", "--calibration_batch=4")
    result = run(f"--ckpt={source / 'run'}", f"--dst={tmp_path / 'small'}", *flags, *sizes)
    assert result.returncode == 0, result.stderr
    model = load(tmp_path / "small")
    meta = read_meta(tmp_path / "small")
    assert meta.step == 7 and [entry["stage"] for entry in meta.lineage] == ["pretrain", "quantize"]
    entry = meta.lineage[1]
    assert entry["calibration"]["rows"] == 6 and len(entry["source"]["params_sha256"]) == 64
    assert entry["method"]["rounding"] == "gptq" and json.dumps(entry)
    assert len(model.generate("It", max_new_tokens=4)) > 0
    lines = result.stdout.splitlines()
    assert any("router" in line and "decides by small differences" in line for line in lines)
    assert any(
        "experts_up/kernel" in line and "gptq, not aimed at the original's outputs  output error" in line
        for line in lines
    )
    assert lines[-1].startswith("bytes ")


def test_the_cache_alone_is_changed_and_everything_reads_it_so(source, tmp_path):
    result = run(f"--ckpt={source / 'run'}", f"--dst={tmp_path / 'cached'}", "--weights=none", "--kv_cache=int4")
    assert result.returncode == 0, result.stderr
    model, before = load(tmp_path / "cached"), load(source / "run")
    assert model.config.kv_cache == quant_spec.cache_format("int4") and before.config.kv_cache is None
    jax.tree.map(np.testing.assert_array_equal, model.params, before.params)
    assert "keys and values, int4:rows:asym:rotated: 256 -> 56 bytes a token" in result.stdout
    tokens = np.arange(16)[None]
    assert np.abs(model.logits(tokens) - before.logits(tokens)).max() > 1e-3
    entry = read_meta(tmp_path / "cached").lineage[-1]
    assert entry["kv_cache"]["dtype"] == "int4" and entry["method"] is None and entry["rules"] == []
    with pytest.raises(ValueError, match="keys and values are in few bits, which no format says"):
        exporting.export(tmp_path / "cached", tmp_path / "hf", format="hf")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights=int4"], "error: missing: --method"),
        (["--method=gptq", "--weights=int4"], "--method=gptq looks at text: give --calibration"),
        (
            ["--method=rtn", "--weights=int4"],
            "group_size=128 does not divide its 32 inputs; expected one of 4, 8, 16, 32",
        ),
        (
            ["--method=rtn", "--weights=int8", "--calibration=x"],
            "--method=rtn looks at no text; leave out --calibration",
        ),
        (["--method=awq", "--weights=int8", "--calibration=x", "--damping=0.1"], "does not read --damping"),
        (["--method=smoothquant", "--weights=int8", "--calibration=x"], "give activations=int8"),
        (["--method=rtn", "--weights=none", "--kv_cache=int8"], "leaves kernels as they are; leave out --method"),
        (["--weights=none", "--kv_cache=int4:g5"], "keys: group_size=5 does not divide its 8 inputs"),
        (
            ["--method=gptq", "--weights=int8", "--calibration=BOOK", "--calibration_length=999"],
            "exceed the model's context",
        ),
        (
            ["--method=gptq", "--weights=int8", "--calibration=BOOK", "--calibration_length=32"],
            "too few for 128 calibration rows of 32",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(source, tmp_path, flags, message):
    flags = [flag.replace("BOOK", str(source / "book.txt")) for flag in flags]
    result = run(f"--ckpt={source / 'run'}", f"--dst={tmp_path / 'small'}", *flags)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_made_is_named(source):
    result = run(f"--ckpt={source / 'run'}", "--dst=/proc/small", "--method=rtn", "--weights=int8")
    assert result.returncode == 2 and "error: /proc/small: cannot be made" in result.stderr
