"""Kernels in few bits: what is stored, what it stands for, and a whole model of them."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore, restore_params
from gptjax.infer.generate import GenerateConfig, generate
from gptjax.infer.layout import for_decoding
from gptjax.nn import quantized, transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.nn.quantized import Layout
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn import zoo
from tests.tiny import random_params

FORMATS = [
    WeightFormat(dtype=dtype, group_size=group, symmetric=symmetric)
    for dtype, group, symmetric in itertools.product(
        ("int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3"), (None, 16), (True, False)
    )
    if symmetric or dtype != "fp8_e4m3"
]
INT8 = WeightFormat(dtype="int8")
INT4 = WeightFormat(dtype="int4", group_size=8, symmetric=False)


def quantized_model(name: str, format: WeightFormat, *, activations="none", stage="stored", **changes):
    rule = KernelRule(pattern="^(?!.*router)", weights=format, activations=activations)
    return dataclasses.replace(zoo.build(name, **changes), quant=QuantConfig(rules=(rule,), stage=stage))


def stored(cfg, params):
    return transformer.store(cfg, params)


def floats(params):
    def leaf(x):
        return quantized.dequantize(x) if quantized.is_quantized(x) else x

    return jax.tree.map(leaf, params, is_leaf=quantized.is_quantized)


def logits(cfg, params, tokens):
    return np.asarray(transformer.logits(cfg, params, transformer.forward(cfg, params, tokens).hidden_BTD))


def tokens_for(cfg, *, batch=2, length=12):
    return np.random.default_rng(1).integers(0, cfg.vocab_size, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("size", [48, 64, 80])
def test_rounding_twice_is_rounding_once_and_nothing_moves_further_than_half_a_step(format, size):
    random = np.random.default_rng(size)
    kernel = jnp.asarray(random.standard_t(3, (3, size, 2, 5)), jnp.float32).at[0, :, 0, 0].set(0.0)
    kernel = jnp.where(jnp.asarray(random.random(kernel.shape)) < 0.3, 0.0, kernel)  # pruned values
    layout = Layout((size,), (2, 5))
    leaf = quantized.quantize(kernel, format=format, layout=layout)
    assert leaf.shape == kernel.shape and leaf.ndim == kernel.ndim
    once = quantized.dequantize(leaf)
    assert np.all(np.asarray(once)[np.asarray(kernel) == 0] == 0)
    again = quantized.quantize(once, format=format, layout=layout)
    assert np.array_equal(once, quantized.dequantize(again))
    error = jnp.abs(layout.to_rows(once - kernel)).reshape(*leaf.scale.shape, -1).max(-1)
    if format.dtype != "fp8_e4m3":
        # The zero of an asymmetric group is rounded too, which can cut off up to half a step at its end.
        assert np.all(error <= leaf.scale.astype(jnp.float32) * (0.5 if format.symmetric else 1.0) + 1e-3)
    else:
        assert np.all(np.abs(once - kernel) <= np.abs(kernel) / 16 + leaf.scale.max() * 2**-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [8, 16, 43, 48, 96, 172])
def test_codes_are_packed_without_gaps(bits, size):
    format = WeightFormat(dtype=f"int{bits}", symmetric=False)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, size)).astype(np.int32)
    scale, zero = jnp.ones((2, 3, 1), jnp.float32), jnp.zeros((2, 3, 1), jnp.uint8)
    leaf = quantized.pack(jnp.asarray(codes), scale, zero, format=format, layout=Layout((size,), (3,)))
    num_codes = size if bits == 8 else -(-size // 8) * 8
    assert sum(plane.nbytes for plane in leaf.planes) * 8 == num_codes * 2 * 3 * bits
    assert np.array_equal(quantized.unpack(leaf), codes)


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("dtype, symmetric", [("int8", True), ("int4", True), ("int4", False), ("int3", False)])
def test_float16_holds_scales_and_of_four_bits_their_product_with_the_zero(dtype, symmetric, size):
    """So that blocks of ggml have the very values, down to where float16 itself has fewer digits."""
    rows = np.random.default_rng(0).normal(size=(64, 64)) * np.logspace(-5, 3, 64)[:, None]
    format = WeightFormat(dtype=dtype, group_size=size, symmetric=symmetric)
    scale, zero = quantized.group_scale(jnp.asarray(rows, jnp.float32), format)
    scale = np.asarray(scale, np.float32)
    normal = scale > 2.0**-14 if size is None else scale >= 0
    assert np.array_equal(scale[normal].astype(np.float16).astype(np.float32), scale[normal])
    if dtype == "int4" and zero is not None:
        offset = (scale * np.asarray(zero, np.float32))[normal]
        assert np.array_equal(offset.astype(np.float16).astype(np.float32), offset)


def test_four_bits_lie_as_in_q4_0():
    gguf = pytest.importorskip("gguf")
    rows = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    format = WeightFormat(dtype="int4", group_size=32)
    raw = gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_0).reshape(4, 3, 18)
    codes = np.ascontiguousarray(raw[..., 2:])
    leaf = quantized.pack(
        jnp.zeros((4, 96), jnp.int32), jnp.zeros((4, 3), jnp.float16), None, format=format, layout=Layout((96,), (4,))
    )
    scale = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
    leaf = dataclasses.replace(leaf, planes=(jnp.asarray(codes.reshape(4, 48)),), scale=jnp.asarray(scale))
    wanted = gguf.dequantize(raw.reshape(4, 54), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(quantized.dequantize_rows(leaf), wanted)


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("format", [INT8, INT4, WeightFormat(dtype="int3", group_size=8)], ids=str)
def test_a_model_in_few_bits_computes_what_its_values_do(name, format):
    if name.startswith("mla"):
        format = INT8  # 12 latents
    cfg = quantized_model(name, format)
    params = stored(cfg, random_params(dataclasses.replace(cfg, quant=None)))
    shapes = transformer.abstract_params(cfg)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(params)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(shapes)
    ]
    plain = dataclasses.replace(cfg, quant=None)
    tokens = tokens_for(cfg)
    wanted, got = logits(plain, floats(params), tokens), logits(cfg, params, tokens)
    assert np.abs(wanted - got).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    config = GenerateConfig(max_new_tokens=6)
    prompts = [tokens[0, :5].tolist()]
    assert (
        generate(*for_decoding(cfg, params), prompts=prompts, config=config)[0].tokens
        == generate(*for_decoding(plain, floats(params)), prompts=prompts, config=config)[0].tokens
    )


@pytest.mark.parametrize("activations", ["none", "int8", "fp8_e4m3"])
def test_training_rounds_as_storing_does(activations):
    cfg = quantized_model("dense", INT4, activations=activations)
    params = random_params(dataclasses.replace(cfg, quant=None))
    training = dataclasses.replace(cfg, quant=dataclasses.replace(cfg.quant, stage="train"))
    tokens = tokens_for(cfg)
    # Kernels are the same to the bit (tests/train/test_qat.py); two programs may sum in other orders.
    np.testing.assert_allclose(
        logits(training, params, tokens), logits(cfg, stored(cfg, params), tokens), rtol=1e-5, atol=2e-6
    )
    gradients = jax.grad(lambda p: jnp.square(transformer.forward(training, p, tokens).hidden_BTD).mean())(params)
    kernel = gradients["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert np.isfinite(kernel).all() and np.abs(kernel).max() > 0


def test_activations_of_8_bits_are_multiplied_as_such_where_a_platform_has_it(monkeypatch):
    from gptjax.nn import few_bits

    cfg = quantized_model("dense", INT8, activations="int8")
    params = stored(cfg, random_params(dataclasses.replace(cfg, quant=None)))
    tokens = tokens_for(cfg)
    wanted = logits(cfg, params, tokens)
    monkeypatch.setattr(few_bits, "_multiplies", lambda kernel: kernel.format.group_size is None)
    text = jax.jit(lambda p: transformer.forward(cfg, p, tokens).hidden_BTD).lower(params).as_text()
    assert "tensor<2x12x16xi8>" in text and "i32" in text
    assert np.abs(logits(cfg, params, tokens) - wanted).max() < 1e-4


@pytest.mark.parametrize("format", [INT8, INT4, WeightFormat(dtype="fp8_e4m3")], ids=str)
def test_a_checkpoint_is_as_small_as_its_numbers_and_comes_back(tmp_path, format):
    cfg = quantized_model("moe", format, d_model=64, d_ff=128, num_layers=4)
    params = stored(cfg, random_params(dataclasses.replace(cfg, quant=None)))
    with CheckpointStore(tmp_path) as store:
        store.save(0, meta=meta_lib.make(cfg), params=params)
    meta, again = restore_params(tmp_path, dtype=jnp.bfloat16)
    assert meta.model == cfg and jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert np.array_equal(np.asarray(a, b.dtype), b)
    kernel = again["group_0"]["block_0"]["attention"]["query"]["kernel"]
    assert kernel.scale.dtype == params["group_0"]["block_0"]["attention"]["query"]["kernel"].scale.dtype
    on_disk = sum(f.stat().st_size for f in pathlib.Path(tmp_path).rglob("*") if f.is_file())
    in_memory = sum(x.nbytes for x in jax.tree.leaves(params))
    assert on_disk < 1.1 * in_memory + 120_000


@pytest.mark.parametrize("name", ["dense", "moe", "moe_capacity", "mla"])
def test_eight_devices_compute_what_one_does(name):
    cfg = quantized_model(name, INT8 if name != "dense" else INT4, d_ff=64, num_heads=4)
    params = stored(cfg, random_params(dataclasses.replace(cfg, quant=None)))
    tokens = tokens_for(cfg, batch=4)
    wanted = logits(cfg, params, tokens)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        shardings = rules.tree_shardings(mesh, transformer.param_axes(cfg), transformer.abstract_params(cfg))
        placed = jax.tree.map(jax.device_put, params, shardings)
        got = jax.jit(lambda p, t: transformer.logits(cfg, p, transformer.forward(cfg, p, t).hidden_BTD))(
            placed, tokens
        )
    assert np.abs(np.asarray(got) - wanted).max() < 1e-4


def test_what_cannot_be_stored_so_is_refused_by_name():
    with pytest.raises(ValueError, match=r"group_size=24 does not divide its 16 inputs; expected one of 4, 8, 16"):
        transformer.abstract_params(quantized_model("dense", WeightFormat(dtype="int4", group_size=24)))
    with pytest.raises(ValueError, match="group_size=2: expected none or at least 4"):
        WeightFormat(dtype="int4", group_size=2)
