"""Factors that move from inputs to kernels leave the model as it is, and take AWQ's and SmoothQuant's values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import awq, calibrate, folding, smooth
from gptjax.nn import quantized, transformer
from gptjax.nn.config import WeightFormat
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


def test_smoothing_is_the_papers_formula():
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg)
    found = {}

    def prepare(block, weights, inputs):
        if not found:
            place = folding.folds(block)[2]
            assert place.maker == "mlp_norm"
            found["factor"] = smooth.factor(weights, place, inputs, alpha=0.3)
            x = np.asarray(inputs["mlp/up/kernel"].abs_max)
            kernels = [np.asarray(weights["mlp"][name]["kernel"]) for name in ("gate", "up")]
            found["wanted"] = x**0.3 / np.abs(np.concatenate(kernels, 1)).max(1) ** 0.7
        return weights

    calibrate.walk(cfg, params, text, keep, prepare=prepare)
    np.testing.assert_allclose(found["factor"], found["wanted"], rtol=1e-5)


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
            factor = awq.factor(weights, place, inputs, format=format)

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
