"""Factors that move from inputs to kernels leave the model as it is, and take AWQ's and SmoothQuant's values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import calibrate, folding, scaling
from gptjax.nn import quantized, transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from tests.compress.test_calibrate import batches
from tests.nn import zoo
from tests.tiny import random_params

INT4 = WeightFormat(dtype="int4", group_size=8, symmetric=False)


def keep(site, kernel, inputs):
    return kernel


def hidden(cfg, params, tokens):
    return np.asarray(transformer.forward(cfg, params, tokens).hidden_BTD)


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in ("moe_capacity", "kv_shared")])
def test_folded_factors_change_nothing(name):
    cfg = zoo.build(name)
    params, text = random_params(cfg), batches(cfg, num=1)
    seen = set()

    def prepare(block, weights, inputs):
        random = np.random.default_rng(len(seen))
        for place in folding.folds(block):
            seen.add(place.maker)
            like = place.pooled(
                folding.all_but(inputs[f"{place.readers[0]}/kernel"].abs_max, place.lead, by=jnp.max), by=jnp.max
            )
            factor = jnp.asarray(np.exp(random.normal(size=like.shape, scale=0.7)), jnp.float32)
            weights = folding.fold(block, weights, place, factor)
        return weights

    done = calibrate.walk(cfg, params, text, keep, prepare=prepare)
    assert not jax.tree.all(jax.tree.map(np.array_equal, done, params))
    wanted = hidden(cfg, params, text[0])
    assert np.abs(hidden(cfg, done, text[0]) - wanted).max() < 2e-3 * np.abs(wanted).max()
    expected = {
        "dense": {"attention_norm", "attention/value", "mlp_norm", "mlp/up"},
        "gpt2": {"attention_norm", "attention/value", "mlp_norm"},
        "post": {"attention/value"},
        "mla": {"attention_norm", "attention/query_norm", "attention/kv_norm", "attention/value_up", "mlp_norm"}
        | {"mlp/up"},
        "moe_grouped": {"attention_norm", "attention/value", "mlp_norm"},
    }  # fmt: skip
    if name in expected:
        assert seen == expected[name]
    if name == "moe":
        assert {"moe/experts_up", "moe/shared/up"} <= seen


def looked_at(cfg, params, text, place_of):
    """A layer's weights, one of its places, and the inputs there."""
    found = []

    def prepare(block, weights, inputs):
        found.append((weights, place_of(folding.folds(block)), inputs))
        return weights

    calibrate.walk(cfg, params, text, keep, prepare=prepare)
    return found[0]


def test_candidates_are_the_papers_formulas():
    cfg = zoo.build("dense")
    weights, place, inputs = looked_at(cfg, random_params(cfg), batches(cfg), lambda places: places[2])
    assert place.maker == "mlp_norm"
    seen = inputs["mlp/up/kernel"]
    x, mean = np.asarray(seen.abs_max), np.asarray(seen.abs_sum / seen.count)
    w = np.abs(np.concatenate([np.asarray(weights["mlp"][name]["kernel"]) for name in ("gate", "up")], 1)).max(1)
    for family, wanted in [("smoothquant", x**0.3 / w**0.7), ("awq", mean**0.3)]:
        found = np.asarray(scaling.candidates(weights, place, inputs, family=family))
        assert np.all(found[0] == 1) and len(found) == 1 + len(scaling.ALPHAS)
        np.testing.assert_allclose(found[4] / found[4][0], wanted / wanted[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_smoothing_lowers_what_rounding_inputs_really_costs(name):
    cfg = zoo.build(name, d_model=32)
    uneven = np.exp(np.random.default_rng(1).normal(size=32) * 1.5).astype(np.float32)
    params = random_params(cfg)
    params["group_0"]["block_0"]["mlp_norm"]["scale"] *= uneven
    text = batches(cfg, num=4, rows=4, length=16)
    wanted = hidden(cfg, params, text[0])

    def error(params):
        quant = QuantConfig(rules=(KernelRule(pattern="^group_", activations="int8"),), stage="train")
        return np.square(hidden(dataclasses.replace(cfg, quant=quant), params, text[0]) - wanted).mean()

    rule = KernelRule(pattern=".", weights=WeightFormat(dtype="int8"), activations="int8")
    done = calibrate.walk(cfg, params, text, keep, prepare=scaling.prepare(rule, "smoothquant"))
    assert error(done) < 0.8 * error(params)


def test_the_cost_of_rounded_inputs_is_that_of_rounding_them():
    cfg = zoo.build("dense", d_ff=64)
    text = batches(cfg, num=4, rows=8, length=16)
    weights, place, inputs = looked_at(cfg, random_params(cfg), text, lambda places: places[3])
    seen = inputs["mlp/down/kernel"]
    x, t = np.asarray(seen.sample_SI), np.exp(np.random.default_rng(0).normal(size=64) * 0.3).astype(np.float32)
    rows = np.asarray(folding.rows(weights, "mlp/down", 64))
    step = np.abs(x / t).max(1, keepdims=True) / 127
    error = (np.round(x / t / step) * step - x / t) @ (rows * t).T
    wanted = np.square(error).sum() * float(seen.count) / len(x)
    assert float(scaling._inputs_cost(rows, seen, t)) == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("name", ["dense", "moe", "mla"])
def test_awq_never_loses_to_rounding_and_chooses_the_least_true_error(name):
    format = dataclasses.replace(INT4, group_size=None) if name == "mla" else INT4  # 12 latents
    cfg = zoo.build(name)
    params, text = random_params(cfg), batches(cfg)
    params = jax.tree.map(
        lambda leaf: (
            leaf * np.exp(np.random.default_rng(leaf.size).normal(size=leaf.shape[-1]))
            if leaf.shape[-1] == 16 and leaf.ndim == 2
            else leaf
        ),
        params,
    )  # uneven norms
    gains = []

    def prepare(block, weights, inputs):
        for place in folding.folds(block):
            factor = scaling.factor(weights, place, inputs, rule=KernelRule(pattern=".", weights=format), family="awq")

            def error(factor, weights=weights, place=place):
                spread, total = place.spread(factor), 0.0
                for path in place.readers:
                    hessian = np.asarray(inputs[f"{path}/kernel"].hessian, np.float64)
                    rows = folding.rows(weights, path, hessian.shape[-1])
                    scaled = rows * spread[..., None, :]
                    codes = quantized.encode(scaled, *quantized.group_scale(scaled, format), format)
                    back = (
                        quantized.decode(codes, *quantized.group_scale(scaled, format), format) / spread[..., None, :]
                    )
                    difference = np.asarray(back - rows, np.float64)
                    total += np.sum(difference @ hessian * difference)
                return total

            gains.append(error(factor) / error(jnp.ones_like(factor)))
            weights = folding.fold(block, weights, place, factor)
        return weights

    calibrate.walk(cfg, params, text, keep, prepare=prepare)
    assert max(gains) <= 1 + 1e-5 and min(gains) < 0.95
