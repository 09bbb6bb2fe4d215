"""What a method is shown of a model, and where what it gives back goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import calibrate
from gptjax.nn import quantized, transformer
from gptjax.nn.config import LayerGroup
from gptjax.nn.formats import WeightFormat
from tests.nn import zoo
from tests.tiny import random_params

INT8 = WeightFormat(dtype="int8")
NAMES = [name for name in zoo.ZOO if name != "moe_capacity"]


def batches(cfg, *, num=2, rows=2, length=12):
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (num, rows, length)).astype(np.int32)
    return [jnp.asarray(batch) for batch in tokens]


def unchanged(site, kernel, inputs):
    return kernel


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_but_routers_is_seen_once_with_all_its_rows(name):
    cfg = zoo.build(name)
    params, text = random_params(cfg), batches(cfg)
    seen = {}

    def treat(site, kernel, inputs):
        assert (site.path, site.layer) not in seen
        seen[site.path, site.layer] = (kernel, inputs)
        lead = kernel.shape[: kernel.ndim - len(site.layout.in_shape) - len(site.layout.out_shape)]
        size = site.layout.num_inputs
        assert inputs.hessian.shape == (*lead, size, size) and inputs.abs_max.shape == (*lead, size)
        np.testing.assert_allclose(inputs.hessian, jnp.swapaxes(inputs.hessian, -1, -2), atol=1e-4)
        rows = 2 * 2 * 12 * (cfg.blocks[site.layer].mlp.num_experts_per_token if "experts_" in site.path else 1)
        assert float(inputs.count.sum()) == rows
        return kernel

    done = calibrate.walk(cfg, params, text, treat)
    assert jax.tree.all(jax.tree.map(np.array_equal, done, params))
    kernels = {path for path in transformer.layouts(cfg) if path.startswith("group_") and "router" not in path}
    assert {path for path, _ in seen} == kernels
    assert len(seen) == sum(cfg.groups[int(path.split("/")[0][6:])].repeats for path in kernels)


def test_the_hessian_is_that_of_the_inputs():
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg, num=1)
    found = {}

    def treat(site, kernel, inputs):
        found[site.path, site.layer] = inputs
        return kernel

    calibrate.walk(cfg, params, text, treat)
    x_BTD = transformer.residuals(cfg, params, text[0])[1]
    layer = jax.tree.map(lambda leaf: leaf[1], params["group_0"]["block_0"])
    scale = layer["attention_norm"]["scale"]
    rows = np.asarray(x_BTD / np.sqrt(np.mean(np.square(x_BTD), -1, keepdims=True) + 1e-6) * scale).reshape(-1, 16)
    inputs = found["group_0/block_0/attention/value/kernel", 1]
    np.testing.assert_allclose(inputs.hessian, rows.T @ rows, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(inputs.abs_sum, np.abs(rows).sum(0), rtol=1e-4)
    np.testing.assert_allclose(inputs.abs_max, np.abs(rows).max(0), rtol=1e-4)


@pytest.mark.parametrize("sequence", ["stage", "layer", "none"])
def test_inputs_are_those_of_what_came_before(sequence):
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg)

    def run(damage):
        found = {}

        def treat(site, kernel, inputs):
            found[site.path.split("/", 2)[2], site.layer] = inputs.hessian
            return 0.5 * kernel if damage in (site.path.split("/", 2)[2], None) and site.layer == 0 else kernel

        calibrate.walk(cfg, params, text, treat, sequence=sequence)
        return found

    plain, hurt = run("nothing"), run("attention/value/kernel")
    changed = {key for key in plain if not np.allclose(plain[key], hurt[key], rtol=1e-5)}
    later = {key for key in plain if key[1] == 1}
    in_layer = {key for key in plain if key[1] == 0 and key[0].split("/")[1] in ("out", "gate", "up", "down")}
    assert changed == {"stage": later | in_layer, "layer": later, "none": set()}[sequence]


@pytest.mark.parametrize("name", ["dense", "moe", "mla"])
def test_what_is_given_back_in_few_bits_is_a_model(name):
    cfg = zoo.build(name)
    params, text = random_params(cfg), batches(cfg)

    def treat(site, kernel, inputs):
        return quantized.quantize(kernel, format=INT8, layout=site.layout)

    done = calibrate.walk(cfg, params, text, treat)
    hidden = transformer.forward(cfg, done, text[0]).hidden_BTD
    assert np.abs(hidden - transformer.forward(cfg, params, text[0]).hidden_BTD).mean() < 0.05


def test_shared_layers_see_the_inputs_of_all_their_uses():
    block = zoo.build("dense").blocks[0]
    cfg = dataclasses.replace(zoo.build("dense"), groups=(LayerGroup(pattern=(block,), repeats=3, shared=True),))
    params, text = random_params(cfg), batches(cfg)
    counts = {}

    def treat(site, kernel, inputs):
        counts[site.path] = float(inputs.count)
        return kernel

    done = calibrate.walk(cfg, params, text, treat)
    assert set(counts.values()) == {3 * 2 * 2 * 12} and jax.tree.all(jax.tree.map(np.array_equal, done, params))
