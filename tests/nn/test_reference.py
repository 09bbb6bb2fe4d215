"""Layers beside their formulas, written out in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.nn import dispatch, rope
from gptjax.nn.block import Block
from gptjax.nn.config import GATED_ACTIVATIONS, MoEConfig, NormConfig, RopeConfig, RopeScaling
from gptjax.nn.mlp import activate
from gptjax.nn.moe import MoE, auxiliary, route
from gptjax.nn.norm import Norm
from tests.nn.zoo import GROUPED_MOE, MOE, TINY

RNG = np.random.default_rng(0)
ZERO = np.zeros((1, 1), np.int32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", lambda u, g: u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))),
        ("gelu_tanh", lambda u, g: 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))),
        ("relu2", lambda u, g: np.maximum(u, 0) ** 2),
        ("silu", lambda u, g: u * sigmoid(u)),
        ("swiglu", lambda u, g: g * sigmoid(g) * u),
        ("geglu", lambda u, g: g * 0.5 * (1 + np.vectorize(math.erf)(g / math.sqrt(2))) * u),
        ("relu", lambda u, g: np.maximum(u, 0)),
        ("reglu", lambda u, g: np.maximum(g, 0) * u),
        (
            "swiglu_clamped",
            lambda u, g: np.minimum(g, 7) * sigmoid(1.702 * np.minimum(g, 7)) * (np.clip(u, -7, 7) + 1),
        ),
    ],
)
def test_activations(name, expected):
    up, gate = 5 * normal(64), 5 * normal(64)
    gated = gate if name in GATED_ACTIVATIONS else None
    np.testing.assert_allclose(activate(name, up, gated), expected(up, gate), atol=1e-4)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(kind, zero_centered):
    cfg = NormConfig(kind=kind, eps=1e-5, bias=True, zero_centered=zero_centered)
    x, scale, bias = 3 + normal(4, 16), normal(16), normal(16)
    centered = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * (scale + zero_centered) + bias
    got = Norm(cfg).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rotation_turns_each_pair_by_position_times_frequency():
    cfg = RopeConfig(theta=100.0, fraction=0.5)
    x, positions = normal(1, 3, 2, 8), np.array([[0, 5, 100]], np.int32)
    got = np.asarray(rope.rotate(jnp.asarray(x), rope.tables(cfg, 8, positions)))
    for t, position in enumerate(positions[0]):
        for pair in range(2):
            angle = position * 100.0 ** (-pair / 2)
            turned = (x[0, t, :, pair] + 1j * x[0, t, :, pair + 2]) * np.exp(1j * angle)
            np.testing.assert_allclose(got[0, t, :, pair] + 1j * got[0, t, :, pair + 2], turned, atol=1e-4)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])


def test_llama3_scaling_follows_the_published_code():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    got = rope.frequencies(RopeConfig(theta=500_000.0, scaling=scaling), 128)
    for i, found in enumerate(got):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones():
    scaling = RopeScaling(kind="yarn", factor=40.0, original_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)
    cfg = RopeConfig(theta=10_000.0, scaling=scaling)
    got, plain = rope.frequencies(cfg, 64), rope.frequencies(RopeConfig(theta=10_000.0), 64)
    # Dimension pairs up to 10 turn over 32 times within 4,096 positions, those from 23 on less than once.
    np.testing.assert_allclose(got[:11], plain[:11], rtol=1e-6)
    np.testing.assert_allclose(got[23:], plain[23:] / 40, rtol=1e-6)
    assert np.all(np.diff(got / plain) < 1e-6)
    assert rope.attention_factor(scaling) == 1.0
    alone = dataclasses.replace(scaling, mscale=0.0, mscale_all_dim=0.0)
    assert math.isclose(rope.attention_factor(alone), 0.1 * math.log(40) + 1)
    cos, _ = rope.tables(dataclasses.replace(cfg, scaling=dataclasses.replace(alone, attention_factor=0.5)), 64, ZERO)
    np.testing.assert_allclose(cos, 0.5)  # the cosine of 0, halved


def test_linear_scaling_divides_positions():
    scaled = RopeConfig(theta=100.0, scaling=RopeScaling(kind="linear", factor=4.0))
    positions = np.array([[0, 4, 40]], np.int32)
    got, expected = rope.tables(scaled, 8, positions), rope.tables(RopeConfig(theta=100.0), 8, positions // 4)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_where_norms_are(placement):
    class Branch(Block):
        @nn.compact
        def __call__(self, x):
            return self._branch("mlp", lambda x: 3 * x + 1, x)

    cfg = dataclasses.replace(TINY.build().blocks[0], norm_placement=placement)
    x, scales = normal(2, 5, 16), {"mlp_norm": normal(16), "mlp_out_norm": normal(16)}

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm.eps) * scales[name]

    expected = {
        "pre": lambda: x + 3 * norm("mlp_norm", x) + 1,
        "post": lambda: norm("mlp_norm", x + 3 * x + 1),
        "sandwich": lambda: x + norm("mlp_out_norm", 3 * norm("mlp_norm", x) + 1),
    }[placement]()
    params = {name: {"scale": scale} for name, scale in scales.items()}
    np.testing.assert_allclose(Branch(cfg, 1.0).apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def expert_weights(cfg, d_model):
    def one(fan, out):
        return normal(cfg.num_experts, fan, out) / 4, normal(cfg.num_experts, out) if cfg.bias else None

    return {"gate": one(d_model, cfg.d_ff), "up": one(d_model, cfg.d_ff), "down": one(cfg.d_ff, d_model)}


def all_experts(cfg, x, index, weight, weights):
    """Every expert on every token, of which the chosen ones count."""

    def project(name, spec, rows):
        kernel, bias = weights[name]
        return jnp.einsum(spec, rows, kernel) + (0 if bias is None else bias)

    hidden = activate(cfg.activation, project("up", "BTD,EDF->BTEF", x), project("gate", "BTD,EDF->BTEF", x))
    share = (jax.nn.one_hot(index, cfg.num_experts) * weight[..., None]).sum(2)
    return jnp.einsum("BTED,BTE->BTD", project("down", "BTEF,EFD->BTED", hidden), share)


# Few tokens, many of an even load, and many of which most go to one expert: three ways on CPU.
@pytest.mark.parametrize(("length", "favour"), [(6, 0.0), (96, 0.0), (96, 4.0)])
@pytest.mark.parametrize("cfg", [MOE, GROUPED_MOE, dataclasses.replace(MOE, capacity_factor=8.0)])
def test_experts_are_a_weighted_sum_over_the_chosen(cfg, length, favour):
    x, logits = normal(2, length, 16), normal(2, length, cfg.num_experts)
    logits[..., 0] += favour
    weights, g = expert_weights(cfg, 16), normal(2, length, 16)
    index, weight, _ = route(cfg, jnp.asarray(logits), None)

    def run(apply):
        loss = jax.jit(lambda x, weights: (apply(cfg, x, index, weight, weights) * g).sum())
        return apply(cfg, x, index, weight, weights), jax.grad(loss, (0, 1))(x, weights)

    got, expected = run(dispatch.apply_experts), run(all_experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, expected)


def test_capacity_drops_the_latest_assignments_of_a_full_expert():
    cfg = MoEConfig(num_experts=2, num_experts_per_token=1, d_ff=4, activation="swiglu", capacity_factor=0.5)
    x, weights = normal(1, 8, 4), expert_weights(cfg, 4)
    index = np.array([0, 0, 1, 0, 0, 1, 1, 0], np.int32).reshape(1, 8, 1)
    weight = np.ones((1, 8, 1), np.float32)
    assert dispatch.capacity(cfg, 8) == 2
    got = np.asarray(dispatch.apply_experts(cfg, x, index, weight, weights))
    np.testing.assert_array_equal(np.abs(got[0]).sum(-1) > 0, [1, 1, 1, 0, 0, 1, 0, 0])
    logits = jnp.where(jnp.asarray(index) == jnp.arange(2), 1.0, 0.0)
    aux = auxiliary(cfg, logits, jax.nn.softmax(logits), jnp.asarray(index), jnp.ones((1, 8)), None)
    assert aux["dropped"] == 4 and aux["load"].tolist() == [5, 3]


def test_routing_limited_to_groups():
    # Groups {0,1}, {2,3}, {4,5}, {6,7}; the best single expert, 6, is in a group with a poor second.
    scores = np.array([0.5, 0.6, 0.7, 0.7, 0.1, 0.1, 0.9, 0.01])
    logits = jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)[None, None]
    index, weight, _ = route(GROUPED_MOE, logits, None)
    assert sorted(index[0, 0].tolist()) == [2, 3]
    np.testing.assert_allclose(weight[0, 0], 1.5 * 0.7, rtol=1e-5)
    free, _, _ = route(dataclasses.replace(GROUPED_MOE, groups_per_token=4), logits, None)
    assert 6 in free[0, 0].tolist()


def test_the_balance_bias_chooses_but_does_not_weigh():
    bias = jnp.zeros(8).at[5].set(10.0)
    logits = jnp.zeros((1, 1, 8))
    index, weight, _ = route(GROUPED_MOE, logits, bias)
    assert 5 in index[0, 0].tolist()
    np.testing.assert_allclose(weight[0, 0], 1.5 * 0.5, rtol=1e-5)


def test_balancing_losses():
    cfg = dataclasses.replace(MOE, balance_rate=0.5, z_loss=0.0)
    logits = normal(2, 6, 4)
    valid = np.ones((2, 6), np.float32)
    valid[1, 4:] = 0
    index, _, probs = route(cfg, jnp.asarray(logits), None)
    aux = auxiliary(cfg, jnp.asarray(logits), probs, index, jnp.asarray(valid), None)
    expected = 0.0
    for row in range(2):
        kept = valid[row] > 0
        n = kept.sum()
        share = np.bincount(np.asarray(index)[row, kept].ravel(), minlength=4) * 4 / (2 * n)
        expected += 0.5 * n * np.sum(share * np.asarray(probs)[row, kept].mean(0))
    np.testing.assert_allclose(aux["loss"], expected, rtol=1e-5)
    assert aux["tokens"] == 10 and aux["load"].sum() == 20
    z = auxiliary(
        dataclasses.replace(cfg, balancing="none", z_loss=0.1), logits, probs, index, jnp.asarray(valid), None
    )
    log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(z["loss"], 0.1 * np.sum(log_z**2 * valid), rtol=1e-5)


def test_the_gradient_of_the_balance_bias_is_the_violation_of_an_even_load():
    layer = MoE(GROUPED_MOE, out_scale=1.0)
    x, valid = normal(2, 6, 16), jnp.ones((2, 6))
    shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, valid))
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)

    def loss(p):
        aux = layer.apply(p, x, valid)[1]
        return aux["loss"], aux["load"]

    (value, load), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert value == 0.0
    np.testing.assert_allclose(gradient["params"]["balance_bias"], load - load.mean(), atol=1e-5)
