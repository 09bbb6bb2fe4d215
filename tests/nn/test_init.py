"""Initial values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.nn import init, transformer
from gptjax.nn.config import LayerGroup
from tests.nn.zoo import build


def test_values_are_normal_and_independent():
    values = np.asarray(init.normal((4, 256, 256), jnp.array([0, 7], jnp.uint32), 3)).reshape(4, -1)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    # Kolmogorov's distance to the normal distribution; 1.95 / sqrt(n) is exceeded once in a thousand times.
    below = 0.5 * (1 + np.vectorize(math.erf)(np.sort(values.ravel()) / math.sqrt(2)))
    assert np.abs(below - (np.arange(values.size) + 0.5) / values.size).max() < 1.95 / math.sqrt(values.size)
    neighbours = [values[:, :-1], values[:, 1:], np.roll(values, 1, 0)[:, 1:], np.roll(values, 256, 1)[:, 1:]]
    correlation = np.corrcoef([part.ravel() for part in neighbours])
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.01)


def test_seeds_and_names_give_other_values():
    shape = (64, 64)
    draws = [
        init.normal(shape, jnp.array(seed, jnp.uint32), salt) for seed, salt in [((0, 0), 1), ((0, 1), 1), ((0, 0), 2)]
    ]
    correlation = np.corrcoef([np.ravel(draw) for draw in draws])
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.06)


def test_kernels_keep_the_scale_of_their_input():
    cfg = build("dense", d_model=64, d_ff=256)
    params = transformer.init(cfg, jax.random.key(0))
    block = params["group_0"]["block_0"]
    assert abs(np.std(block["attention"]["query"]["kernel"]) - 64**-0.5) < 0.005
    # Residual branches are scaled by the depth: two layers with two branches each.
    assert abs(np.std(block["mlp"]["down"]["kernel"]) - 256**-0.5 / 2) < 0.002
    assert np.all(block["mlp_norm"]["scale"] == 1)
    assert abs(np.std(params["embed"]["tokens"]) - 0.02) < 0.001


def test_layers_of_a_stack_differ_and_a_shared_group_has_one():
    cfg = build("dense")
    kernel = transformer.init(cfg, jax.random.key(0))["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert np.std(kernel[0] - kernel[1]) > 0.1
    group = cfg.groups[0]
    shared = dataclasses.replace(cfg, groups=(LayerGroup(pattern=group.pattern, repeats=2, shared=True),))
    assert transformer.abstract_params(shared)["group_0"]["block_0"]["mlp"]["up"]["kernel"].shape == kernel.shape[1:]


def test_golden_values():
    """Changing these changes every run started from a seed: say so in docs/log.md, then update them."""
    values = init.normal((2, 3), jnp.array([0, 0], jnp.uint32), 1)
    np.testing.assert_allclose(np.asarray(values).ravel(), GOLDEN, atol=1e-6)


GOLDEN = [-0.255474, 1.465764, -0.570574, 0.700617, -1.499689, -0.288374]
