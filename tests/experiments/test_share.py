"""`experiments.share` on a small checkpoint, and what the other commands make of its result."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax
from gptjax import config as config_lib
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import families
from gptjax.interop.table import family_of
from gptjax.nn import cost
from gptjax.nn.spec import ModelSpec
from tests.tiny import TINY, random_params

REPOSITORY = Path(__file__).parents[2]
SPEC = dataclasses.replace(TINY, vocab_size=384, seq_len=64, d_model=32, num_layers=4, d_ff=64, tie_embeddings=False)
TOKENIZER = tokenizer_lib.byte_level()


def run(*flags):
    command = [sys.executable, "-m", "experiments.share", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    cfg = SPEC.build()
    meta = meta_lib.make(cfg, step=5, tokenizer=TOKENIZER.fingerprint, lineage=[{"stage": "pretrain"}])
    with CheckpointStore(path) as store:
        store.save(5, meta=meta, params=random_params(cfg), assets={"tokenizer.model": TOKENIZER.to_bytes()})
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return path


def test_everything_at_once_leaves_a_model_that_a_config_can_say(source, tmp_path):
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    result = run(
        f"--ckpt={source}", f"--dst={tmp_path}/out", "--kv_every=2", "--pattern=cyclic", "--unique=2", "--tie=average",
        "--rank=0.5", "--leave=mlp/down", f"--calibration={source}/text.txt", "--calibration_rows=4",
        "--calibration_length=32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
    assert f"to train it: experiments.distill or pretrain with --init={tmp_path}/out\n" in result.stdout
    assert "one layer, influential" in result.stdout
    for said in ("layers 1, 3", "of the layer before", "one table, average", "rank ", "left: asked to", "parameters "):
        assert said in result.stdout
    model = gptjax.load(tmp_path / "out")
    first, entry = model.meta.lineage
    assert first == {"stage": "pretrain"} and entry["stage"] == "share" and entry["calibration"]["rows"] == 4
    keys = {name: entry[name] for name in ("sharing", "kv_every", "low_rank")} | {"tie_embeddings": True}
    spec = config_lib.from_dict(ModelSpec, config_lib.to_dict(SPEC) | keys)
    assert spec.build() == model.config
    assert cost.count(model.config).total < cost.count(SPEC.build()).total / 2
    assert len(model.complete(["The"], max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(ValueError, match="no model family of other frameworks has this architecture"):
        family_of(model.config, families.FAMILIES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pattern=cyclic", "--unique=3"], "unique=3 does not divide 4 layers evenly; expected one of 1, 2"),
        (["--rank=1"], "--rank, --energy or --init=influential looks at text: give --calibration"),
        (["--rank=1", "--svd=weights"], "rank=1: expected above 0 and below 1"),
        (["--unique=2"], "--unique without --pattern: has no effect; give --pattern too, or leave it out"),
        (["--tie=input", "--init=first"], "--init without --pattern: has no effect"),
    ],
)
def test_a_mistake_is_one_line(source, tmp_path, flags, message):
    result = run(f"--ckpt={source}", f"--dst={tmp_path}/out", *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
