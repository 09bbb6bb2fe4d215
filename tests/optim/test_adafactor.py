from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from gptjax.optim import adafactor
from gptjax.optim.groups import MatrixLayout


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(tx, grads):
    step = jax.jit(tx.update)
    state = tx.init({"w": grads[0]})
    for grad in grads:
        update, state = step({"w": grad}, state, {"w": grads[0]})
    return update["w"], state


@pytest.mark.parametrize("shape", [(128, 160), (160, 128), (16, 256), (200,)])
def test_equals_optax(shape):
    grads = [normal(*shape, seed=seed) for seed in range(3)]
    theirs = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    ours = adafactor.scale_by_adafactor({"w": MatrixLayout(0, 1) if len(shape) == 2 else None}, b2=0.999)
    np.testing.assert_allclose(run(ours, grads)[0], run(theirs, grads)[0], rtol=2e-5, atol=1e-6)


def test_a_stack_is_as_many_adafactors_and_heads_are_one_side():
    grads = [normal(2, 128, 4, 40, seed=seed) for seed in range(2)]
    grads[1][0] *= 10.0  # only this layer's update is to be clipped
    stacked, state = run(adafactor.scale_by_adafactor({"w": MatrixLayout(1, 1)}, b2=0.999), grads)
    assert state.rows["w"].shape == (2, 128)
    assert state.columns["w"].shape == (2, 4, 40)
    for layer in range(2):
        flat = [grad[layer].reshape(128, 160) for grad in grads]
        single, _ = run(adafactor.scale_by_adafactor({"w": MatrixLayout(0, 1)}, b2=0.999), flat)
        np.testing.assert_allclose(stacked[layer].reshape(128, 160), single, rtol=1e-5, atol=1e-6)


def test_small_matrices_are_not_factored():
    tx = adafactor.scale_by_adafactor({"w": MatrixLayout(0, 1)}, b2=0.999)
    shapes = [leaf.shape for leaf in jax.tree.leaves(tx.init({"w": normal(64, 256)}))]
    assert shapes == [(), (64, 256)]


def test_b2_caps_the_memory():
    grads = [normal(8, seed=seed) for seed in range(4)]
    uncapped, _ = run(adafactor.scale_by_adafactor({"w": None}, b2=0.999), grads)
    capped, _ = run(adafactor.scale_by_adafactor({"w": None}, b2=0.1), grads)
    assert not np.allclose(uncapped, capped, rtol=1e-2)
