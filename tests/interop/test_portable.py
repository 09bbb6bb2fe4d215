"""The programs that exporters write, run here: what they compute does not depend on the form that they take."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import arrays
from gptjax.infer.layout import for_decoding
from gptjax.interop import exporting
from gptjax.interop.portable import WeightReader, plan
from gptjax.interop.runner import GptjaxRunner
from gptjax.nn import transformer
from gptjax.nn.config import MoEConfig
from gptjax.parallel import mesh
from tests.interop.portable_models import MODELS, WINDOW, write_checkpoint
from tests.tiny import TINY, random_params


@pytest.mark.parametrize("form", ["any", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_agree_with_our_logits(name, form, tmp_path):
    """A padded prompt, then tokens one at a time past the window."""
    checkpoint = write_checkpoint(name, tmp_path)
    portable = plan(checkpoint, form=form)
    reader = WeightReader(checkpoint, portable.weights)
    weights = [reader.read(weight)[0] for weight in portable.weights]
    length, prompt = 2 * WINDOW + 5, WINDOW + 3
    tokens = np.random.default_rng(0).integers(0, 64, (2, length)).astype(np.int32)
    ours = GptjaxRunner.load(checkpoint)
    expected = np.stack([ours.logits(row.tolist()) for row in tokens])
    np.testing.assert_allclose(jax.jit(portable.logits)(tokens, weights), expected, atol=2e-4)
    cache = [
        jnp.full(entry.shape(batch=2, cache_len=length + 1), entry.fill, entry.dtype)
        for entry in portable.cache.values()
    ]
    step = jax.jit(portable.step)
    padded = np.pad(tokens[:, :prompt], ((0, 0), (0, 2)))
    positions = np.tile(np.pad(np.arange(prompt), (0, 2), constant_values=-1), (2, 1)).astype(np.int32)
    wanted = np.tile(np.arange(prompt, dtype=np.int32), (2, 1))
    logits, cache = step(padded, positions, wanted, cache, weights)
    np.testing.assert_allclose(logits, expected[:, :prompt], atol=2e-4)
    for at in range(prompt, length):
        one = np.full((2, 1), at, np.int32)
        logits, cache = step(tokens[:, at : at + 1], one, np.zeros_like(one), cache, weights)
        np.testing.assert_allclose(logits[:, 0], expected[:, at], atol=2e-4)


@pytest.mark.parametrize("form", ["any", "plain"])
def test_what_has_no_room_is_no_number(form, tmp_path):
    """A row may be at its end while another goes on; windows alone never fill, but the context ends."""
    for name, cache_len, room in (("latent attention", 5, 5), ("grouped queries in a window", 200, 128)):
        checkpoint = write_checkpoint(name, tmp_path / name)
        portable = plan(checkpoint, form=form)
        reader = WeightReader(checkpoint, portable.weights)
        weights = [reader.read(weight)[0] for weight in portable.weights]
        cache = [
            jnp.full(entry.shape(batch=2, cache_len=cache_len), entry.fill, entry.dtype)
            for entry in portable.cache.values()
        ]
        tokens = np.ones((2, room), np.int32)
        positions = np.stack([np.arange(room), np.arange(room) - 1]).astype(np.int32)
        logits, cache = jax.jit(portable.step)(tokens, positions, positions.clip(0), cache, weights)
        assert np.isfinite(logits).all()
        one, last = np.ones((2, 1), np.int32), np.array([[room], [room - 1]], np.int32)
        logits, _ = jax.jit(portable.step)(one, last, np.zeros_like(one), cache, weights)
        assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    logits = jax.jit(portable.logits)(np.ones((1, room + 2), np.int32), weights)
    assert np.isfinite(logits[0, :room]).all() and np.isnan(logits[0, room:]).all()


def test_weights_are_those_of_the_decoding_layout(tmp_path):
    checkpoint = write_checkpoint("experts", tmp_path)
    ours = GptjaxRunner.load(checkpoint)
    portable = plan(checkpoint, form="any")
    _, laid_out = for_decoding(dataclasses.replace(ours.model, dtype="float32"), ours.params)
    reader, expected = WeightReader(checkpoint, portable.weights), arrays.flatten(laid_out)
    assert list(portable.weights) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(reader.read(name)[0], value)


def test_layers_that_share_weights_stay_together(tmp_path):
    checkpoint = write_checkpoint("layers that share weights", tmp_path)
    portable = plan(checkpoint, form="any")
    assert {weight.index for weight in portable.weights.values()} == {()}
    assert {dims.dims[0] for dims in portable.cache.values()} == {3}


def test_only_windowless_caches_grow_with_the_length(tmp_path):
    checkpoint = write_checkpoint("local and global, caps and sinks", tmp_path)
    rings = plan(checkpoint, form="any")
    keys = [entry.dims for name, entry in rings.cache.items() if name.endswith("/keys")]
    assert keys == [(1, "batch", 2, size, 8) for size in (WINDOW, "cache_len", WINDOW, "cache_len")]
    plain = plan(checkpoint, form="plain")
    assert {entry.dims[3] for name, entry in plain.cache.items() if name.endswith("/keys")} == {"cache_len"}


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype=float16: programs compute in float32 or bfloat16"):
        plan(write_checkpoint("experts", tmp_path), form="any", dtype=np.dtype(np.float16))


def test_a_capacity_has_no_portable_form():
    moe = MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=8, activation="swiglu", capacity_factor=1.0)
    model = dataclasses.replace(TINY, moe=moe).build()
    with mesh.portable("any"), pytest.raises(ValueError, match="capacity_factor=1.0"):
        transformer.forward(model, random_params(model), jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize(
    ("format", "module"), [("saved_model", "tensorflow"), ("onnx", "onnx"), ("stablehlo", "flatbuffers")]
)
def test_a_missing_package_leaves_nothing_behind(format, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    run = write_checkpoint("experts", tmp_path / "run")
    with pytest.raises(ImportError, match="pip install"):
        exporting.export(run, tmp_path / "theirs", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
