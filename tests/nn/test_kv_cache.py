"""Keys and values in few bits: what is stored, and that every way through the model reads the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.eval import perplexity
from gptjax.infer.generate import GenerateConfig, generate
from gptjax.nn import cache, cost, quant_spec, quantized, transformer
from gptjax.nn.config import LayerGroup
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import rules
from gptjax.types import Batch
from tests.nn import zoo
from tests.tiny import random_params

LENGTH = 12
TOKENS_BT = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
POSITIONS_BT = np.arange(LENGTH, dtype=np.int32)[None].repeat(2, 0)
PROMPTS = [[5, 9, 33], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [60]]


def model(name, format, **changes):
    cfg = quant_spec.with_cache(zoo.build(name, **changes), quant_spec.cache_format(format))
    return cfg, random_params(cfg)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(cfg, params, tokens_BT):
    return transformer.logits(cfg, params, transformer.forward(cfg, params, tokens_BT).hidden_BTD)


@functools.partial(jax.jit, static_argnums=0)
def step(cfg, params, tokens_BT, positions_BT, kv):
    out = transformer.forward(cfg, params, tokens_BT, positions_BT=positions_BT, cache=kv)
    return transformer.logits(cfg, params, out.hidden_BTD), out.cache


def cached_logits(cfg, params, spans):
    """Of `TOKENS_BT`, read span by span; the second row begins three tokens later."""
    kv, start, parts = cache.init_cache(cfg, batch_size=2, max_len=LENGTH), np.array([[0], [-3]]), []
    for first, last in spans:
        index = np.arange(first, last)[None] + start
        positions = np.where((index >= 0) & (index < LENGTH), index, -1).astype(np.int32)
        tokens = np.take_along_axis(TOKENS_BT, np.maximum(positions, 0), axis=1)
        logits, kv = step(cfg, params, tokens, positions, kv)
        parts.append(np.asarray(logits))
    joined = np.concatenate(parts, axis=1)
    return np.stack([joined[0, :LENGTH], joined[1, 3:]]), kv


ONE_BY_ONE = [(t, t + 1) for t in range(LENGTH + 3)]
MIXED = [(0, 6), (6, 9), *((t, t + 1) for t in range(9, LENGTH + 3))]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("dense", "int4"), ("window", "int8"), ("sandwich", "int4:g4:sym"), ("mla", "int8"),
        ("mla_window", "int4:g4:asym"), ("moe", "int8"),
    ],
)  # fmt: skip
def test_decoding_reads_what_the_forward_pass_reads(name, format):
    cfg, params = model(name, format)
    full = np.asarray(full_logits(cfg, params, TOKENS_BT))
    floats = np.asarray(full_logits(quant_spec.with_cache(cfg, None), params, TOKENS_BT))
    assert np.abs(full - floats).max() > 1e-3, "nothing was rounded"
    for spans in (MIXED, ONE_BY_ONE):
        np.testing.assert_allclose(cached_logits(cfg, params, spans)[0], full, atol=1e-4)


def test_layers_that_share_weights_have_keys_and_values_of_their_own():
    cfg = zoo.build("dense")
    cfg = dataclasses.replace(cfg, groups=(LayerGroup(pattern=cfg.groups[0].pattern, repeats=3, shared=True),))
    cfg = quant_spec.with_cache(cfg, quant_spec.cache_format("int8"))
    params = random_params(cfg)
    logits, kv = cached_logits(cfg, params, MIXED)
    np.testing.assert_allclose(logits, full_logits(cfg, params, TOKENS_BT), atol=1e-4)
    assert kv["group_0"]["block_0"]["keys"].planes[0].shape[0] == 3


def by_hand(x, bits, *, group_size, symmetric):
    """The nearest of the format's numbers, written down from its definition."""
    grouped = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, group_size)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = (np.abs(grouped).max(-1, keepdims=True) / np.float32(most)).astype(np.float16).astype(np.float32)
        rounded = np.clip(np.round(grouped / np.where(scale == 0, 1, scale)), -most, most) * scale
    else:
        low, high = np.minimum(grouped.min(-1, keepdims=True), 0), np.maximum(grouped.max(-1, keepdims=True), 0)
        mantissa, exponent = np.frexp((high - low) / np.float32(2**bits - 1))
        scale = np.ldexp(np.floor(mantissa * 2**7 + 0.5) / 2**7, exponent)  # 7 digits, see `quantized.stored_scale`
        zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
        rounded = (np.clip(np.round(grouped / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return rounded.reshape(x.shape)


@pytest.mark.parametrize(
    ("format", "bits", "group_size"), [("int8", 8, 8), ("int4:g4:sym:plain", 4, 4), ("int4:plain", 4, 8)]
)
def test_what_is_stored_is_the_rounding_of_each_head_and_position(format, bits, group_size):
    cfg, params = model("dense", format)
    _, kv = cached_logits(cfg, params, MIXED)
    _, floats = cached_logits(quant_spec.with_cache(cfg, None), params, MIXED)
    for name in ("keys", "values"):  # of the first layer, whose inputs nothing has rounded
        stored, exact = kv["group_0"]["block_0"][name], floats["group_0"]["block_0"][name][0]
        assert stored.planes[0].dtype == (jnp.int8 if bits == 8 else jnp.uint8)
        expected = by_hand(exact, bits, group_size=group_size, symmetric=cfg.kv_cache.symmetric)
        np.testing.assert_allclose(quantized.dequantize_rows(stored)[0], expected, atol=1e-6)


def num_bytes(cfg, **sizes):
    kv = jax.block_until_ready(cache.init_cache(cfg, batch_size=2, max_len=64, **sizes))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(kv))


@pytest.mark.parametrize(("format", "most"), [("int8", 0.53), ("int4", 0.29), ("int4:g32:sym", 0.29)])
@pytest.mark.parametrize("name", ["dense", "window", "mla"])
def test_bytes_of_live_arrays_beside_bfloat16(name, format, most):
    """Positions included, which are the same in all formats."""
    sizes = {"head_dim": 64} if name != "mla" else {}
    if name == "mla":
        sizes["mla"] = dataclasses.replace(zoo.ZOO["mla"]["mla"], kv_latent=128, rope_head_dim=64)
    cfg, params = model(name, format, **sizes)
    floats = quant_spec.with_cache(cfg, None)
    assert num_bytes(cfg) <= most * num_bytes(floats, dtype=jnp.bfloat16)
    assert cost.cache_bytes_per_token(cfg) < most * cost.cache_bytes_per_token(floats, dtype=jnp.bfloat16)
    if format == "int8":
        _, kv = step(cfg, params, TOKENS_BT, POSITIONS_BT, cache.init_cache(cfg, batch_size=2, max_len=64))
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(kv)) == num_bytes(cfg)


def test_what_is_scored_is_what_a_cache_of_that_format_is_worth():
    cfg, params = model("dense", "int4")
    targets = np.roll(TOKENS_BT, -1, 1)
    batch = Batch(TOKENS_BT, targets, np.ones((2, LENGTH), np.float32), np.ones((2, LENGTH), np.int32), POSITIONS_BT)
    nll_BT, _ = perplexity.token_nll(cfg, params, batch)
    logits = jax.nn.log_softmax(cached_logits(cfg, params, ONE_BY_ONE)[0])
    np.testing.assert_allclose(
        nll_BT, -np.take_along_axis(np.asarray(logits), targets[..., None], 2)[..., 0], atol=1e-4
    )


@pytest.mark.parametrize("name", ["window", "mla"])
def test_generation_is_the_same_alone_in_a_batch_and_on_a_mesh(name):
    cfg, params = model(name, "int8")
    config = GenerateConfig(max_new_tokens=8)
    together = generate(cfg, params, prompts=PROMPTS, config=config)
    assert together == generate(cfg, params, prompts=PROMPTS, config=config)
    assert [generate(cfg, params, prompts=[prompt], config=config)[0].tokens for prompt in PROMPTS] == [
        completion.tokens for completion in together
    ]
    with mesh_lib.use(dataclasses.replace(mesh_lib.all_devices("data"), data=1, fsdp=4, tensor=2)) as mesh:
        layouts = rules.tree_shardings(mesh, transformer.param_axes(cfg), params)
        spread = generate(cfg, jax.device_put(params, layouts), prompts=PROMPTS, config=config)
    for one, other in zip(together, spread, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)


def test_gradients_pass_through_the_rounding():
    cfg, params = model("dense", "int8")

    def loss(cfg, params):
        return jnp.square(transformer.forward(cfg, params, TOKENS_BT).hidden_BTD * jnp.arange(16)).sum()

    rounded, exact = (
        jax.jit(jax.grad(functools.partial(loss, cfg)))(params)["group_0"]["block_0"]["attention"]
        for cfg in (cfg, quant_spec.with_cache(cfg, None))
    )
    for name in ("key", "value"):
        ours, theirs = rounded[name]["kernel"], exact[name]["kernel"]
        assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


def test_a_cache_of_another_format_is_refused():
    cfg, params = model("dense", "int8")
    for made_by in (None, quant_spec.cache_format("int4")):
        kv = cache.init_cache(quant_spec.with_cache(cfg, made_by), batch_size=2, max_len=LENGTH)
        with pytest.raises(ValueError, match="the cache's keys are .*, the model's WeightFormat.*int8"):
            step(cfg, params, TOKENS_BT, POSITIONS_BT, kv)
    with mesh_lib.portable("plain"), pytest.raises(ValueError, match="programs of elementary operations keep a cache"):
        cache.init_cache(cfg, batch_size=1, max_len=4)


def test_turning_leaves_products_as_they_are_and_spreads_what_is_large():
    format = quant_spec.cache_format("int4")
    q_NH, k_SH = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    k_SH[:, 3] *= 50
    turned_q, turned_k = (cache.turned(x, format) for x in (q_NH, k_SH))
    np.testing.assert_allclose(turned_q @ turned_k.T, q_NH @ k_SH.T, rtol=1e-4, atol=1e-3)
    assert np.abs(turned_k).max() < 0.5 * np.abs(k_SH).max()
    odd = zoo.build("dense", head_dim=12)
    with pytest.raises(ValueError, match="keys: 12 values, no power of two, are not rotated; add `:plain`"):
        quant_spec.with_cache(odd, format)
    assert quant_spec.with_cache(odd, quant_spec.cache_format("int4:plain")).kv_cache.keys == "plain"


def test_groups_that_do_not_divide_a_head_are_refused_by_name():
    with pytest.raises(ValueError, match="group_0/block_0, keys: group_size=5 does not divide its 8 inputs"):
        model("dense", "int4:g5")
    with pytest.raises(ValueError, match="rotated_keys: group_size=8 does not divide its 4 inputs"):
        model("mla", "int4:g8")
    broken = dataclasses.replace(zoo.build("dense"), quant=quant_spec.parse("kv_cache=int4:g5"))
    with pytest.raises(ValueError, match="group_size=5"):
        transformer.abstract_params(broken)
