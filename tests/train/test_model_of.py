"""Runs in the architecture of a checkpoint, also one that no config can say."""

import dataclasses
import json
import shutil

import pytest

import gptjax
from gptjax import config as config_lib
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore, read_meta
from gptjax.data import tokenizer
from gptjax.nn import quant_spec, storage, transformer
from gptjax.nn.config import MLPConfig, ModelConfig
from gptjax.train.model_of import ModelOf
from gptjax.train.run import RunConfig, run
from tests.tiny import TINY, random_params


def strange(*, vocab_size: int = 300, **changes) -> ModelConfig:
    """Two layers of unequal width, norms by offsets, and a table with room that no tokenizer asks for."""
    spec = dataclasses.replace(TINY, vocab_size=vocab_size, seq_len=32)
    cfg = spec.build()
    (group,) = cfg.groups
    (block,) = group.pattern
    wide = dataclasses.replace(block, mlp=MLPConfig(d_ff=48, activation="swiglu"))
    groups = tuple(dataclasses.replace(group, pattern=(own,), repeats=1) for own in (block, wide))
    norm = dataclasses.replace(cfg.final_norm, zero_centered=True)
    return dataclasses.replace(cfg, groups=groups, final_norm=norm, **changes)


def saved(path, cfg: ModelConfig, params=None):
    meta = meta_lib.make(cfg, step=3, tokenizer=tokenizer.byte_level().fingerprint, lineage=[{"stage": "import"}])
    with CheckpointStore(path) as store:
        store.save(3, meta=meta, params=random_params(cfg, scale=0.1) if params is None else params)
    return str(path)


def of(path: str, **changes) -> dict:
    return {"checkpoint": path, "seq_len": 16} | changes


def test_whatever_a_checkpoint_has_is_trained_on_and_reads_as_far_as_before(run_config, tmp_path):
    cfg = strange()
    path = saved(tmp_path / "made", cfg)
    made = run_config(model=of(path), train__init_from=path)
    assert isinstance(made.model, ModelOf) and made.model.build() == cfg
    assert config_lib.from_dict(RunConfig, json.loads(json.dumps(config_lib.to_dict(made)))) == made
    first = run(made, tmp_path / "run")
    assert first["loss"] < run(run_config(model=of(path), train__num_steps=1), tmp_path / "scratch")["loss"]
    shutil.rmtree(path)
    longer = dataclasses.replace(made, train=dataclasses.replace(made.train, num_steps=8))
    assert run(longer, tmp_path / "run")["step"] == 8
    meta = read_meta(tmp_path / "run" / "ckpt" / "8")
    assert meta.model == cfg and [entry["stage"] for entry in meta.lineage] == ["import", "pretrain"]
    assert gptjax.load(tmp_path / "run").logits([list(range(32))]).shape == (1, 32, 300)


def test_only_what_a_run_decides_differs_from_the_checkpoint(run_config, tmp_path):
    cfg = strange()
    path = saved(tmp_path / "made", cfg)
    made = run_config(model=of(path, remat="full", dtype="bfloat16", quant="int8")).model.build()
    quant = quant_spec.parse("int8")
    assert made == dataclasses.replace(cfg, remat="full", dtype="bfloat16", quant=quant)
    trained = saved(tmp_path / "trained", dataclasses.replace(cfg, quant=quant))
    assert run_config(model=of(trained)).model.build().quant == quant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_len": 64},
            "model.seq_len=64: the model of .*made reads at most 32 tokens; set --config",
        ),
        ({"checkpoint": "/nowhere"}, "/nowhere: no checkpoint there"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made(run_config, tmp_path, changes, message):
    path = saved(tmp_path / "made", strange())
    with pytest.raises(ValueError, match=message):
        run(run_config(model=of(path, **changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_with_too_few_tokens_or_in_few_bits_is_refused(run_config, tmp_path):
    few = saved(tmp_path / "few", strange(vocab_size=200))
    with pytest.raises(ValueError, match=r"has \d+ pieces, the model of .*few 200; prepare data with its own"):
        run(run_config(model=of(few)), tmp_path / "run")
    cfg = strange()
    quant = dataclasses.replace(quant_spec.parse("int8"), stage="stored")
    params = storage.store(quant, random_params(cfg), transformer.layouts(cfg))
    stored = saved(tmp_path / "stored", dataclasses.replace(cfg, quant=quant), params)
    with pytest.raises(ValueError, match="stored: its kernels are in few bits, which do not train"):
        run(run_config(model=of(stored)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "checkpoint: missing; give a checkpoint or a workdir"),
        ({"seq_len": 0}, "seq_len=0: expected at least 1"),
        ({"quant": "int9"}, "int9"),
        ({"num_layers": 3}, r"config.model.num_layers: unknown key.*Known keys: checkpoint, dtype, quant"),
    ],
)
def test_a_key_that_says_nothing_is_refused(run_config, changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(model=of("runs/demo", **changes))
