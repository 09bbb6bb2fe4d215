"""Every config builds, has the size it says, and stays within the number of keys a person can know."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.nn import cost
from gptjax.nn.spec import ModelSpec
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.train import setup, step
from gptjax.train.setup import RunConfig
from gptjax.types import Batch

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")
MAX_KEYS = 50


def get(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def spec_of(name: str) -> ModelSpec:
    return config_lib.from_dict(ModelSpec, get(name).model, path="model")


def llama_size(*, vocab, d, layers, heads, kv_heads, ff, experts=0, used=None, tied=False) -> int:
    """`used` of the `experts` are counted, by default all."""
    head_dim = d // heads
    attention = d * heads * head_dim * 2 + d * kv_heads * head_dim * 2
    mlp = 3 * d * ff * max(experts if used is None else used, 1) + d * experts
    return vocab * d * (1 if tied else 2) + layers * (attention + mlp + 2 * d) + d


def gpt2_size(*, vocab: int, context: int, d: int, layers: int, biases: bool) -> int:
    attention, mlp = 4 * d * d, 8 * d * d
    biases_size = 4 * d + 5 * d if biases else 0
    return (vocab + context) * d + layers * (attention + mlp + biases_size + 4 * d) + 2 * d


SIZES = {
    "base": llama_size(vocab=4096, d=256, layers=4, heads=4, kv_heads=4, ff=768, tied=True),
    "shakespeare_char": gpt2_size(vocab=65, context=64, d=128, layers=4, biases=False),
    # Two norms of 64 in each layer, for queries and keys.
    "demo": llama_size(vocab=4096, d=256, layers=4, heads=4, kv_heads=4, ff=384, tied=True) + 4 * 2 * 64,
    "gpt2_124m": 124_439_808,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "moe_8x7b": 46_702_792_704,
    "gpt4_1t8_moe": llama_size(vocab=100_352, d=12_288, layers=120, heads=96, kv_heads=8, ff=24_576, experts=16),
}


ACTIVE = {
    "moe_8x7b": 12_879_925_248,
    "gpt4_1t8_moe": llama_size(
        vocab=100_352, d=12_288, layers=120, heads=96, kv_heads=8, ff=24_576, experts=16, used=2
    ),
}
NUM_DEVICES = {"llama_1b": 64, "llama_8b": 256, "llama_70b": 1024, "moe_8x7b": 256, "gpt4_1t8_moe": 4096}


def test_formulas_agree_with_published_sizes():
    assert gpt2_size(vocab=50_257, context=1024, d=768, layers=12, biases=True) == SIZES["gpt2_124m"]
    assert llama_size(vocab=128_256, d=4096, layers=32, heads=32, kv_heads=8, ff=14_336) == SIZES["llama_8b"]
    assert llama_size(vocab=32_000, d=4096, layers=32, heads=32, kv_heads=8, ff=14_336, experts=8) == SIZES["moe_8x7b"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_the_architecture_has(name):
    counts = cost.count(spec_of(name).build())
    assert (counts.total, counts.active) == (SIZES[name], ACTIVE.get(name, SIZES[name]))


def test_the_largest_is_the_scale_it_is_named_for():
    assert 1.7e12 < SIZES["gpt4_1t8_moe"] < 1.9e12
    assert round(ACTIVE["gpt4_1t8_moe"] / 1e9) == 259
    spec = spec_of("gpt4_1t8_moe")
    assert (spec.num_layers, spec.moe.num_experts, spec.moe.num_experts_per_token) == (120, 16, 2)


@pytest.mark.parametrize("name", NAMES)
def test_its_training_step_traces_without_memory(name):
    cfg = config_lib.from_dict(RunConfig, get(name))
    one_device = MeshConfig(data=1, fsdp=1, expert=1, context=1, tensor=1, rules=cfg.mesh.rules)
    mesh = make_mesh(one_device)
    shape = (cfg.train.accumulate_steps, cfg.model.seq_len)
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
    batch = Batch(tokens=ints, targets=ints, loss_mask=floats, segment_ids=ints, positions=ints)
    with jax.set_mesh(mesh), rules.use(one_device.rules):
        parts = setup.make(dataclasses.replace(cfg, mesh=one_device), mesh)
        run = step.train_step(parts.task.objective, parts.optimizer, accumulate_steps=cfg.train.accumulate_steps)
        state, metrics = jax.eval_shape(run, parts.shapes, (), batch)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, parts.shapes)
    assert {"loss", "accuracy", "grad_norm", "learning_rate"} <= metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_its_mesh_fits_the_hardware_it_names(name):
    cfg = config_lib.from_dict(RunConfig, get(name))
    data, fsdp, expert, context, _ = cfg.mesh.resolve(NUM_DEVICES.get(name, 1))
    assert cfg.data.batch_size % (data * fsdp * expert * cfg.train.accumulate_steps) == 0
    assert cfg.model.seq_len % context == 0


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_few_and_locked(name):
    config = get(name)
    keys = [key for key, _ in config_lib.flatten(config)]
    assert len(keys) <= MAX_KEYS, keys
    with pytest.raises((AttributeError, KeyError)):
        config.train.num_stepz = 3


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"base"}))
def test_says_how_it_is_run(name):
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    for heading in ("Command", "Hardware", "Time", "Metric", "Source"):
        assert f"\n{heading} " in text, heading
    assert get(name).name == name
