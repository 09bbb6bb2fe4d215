from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.optim import ema

PARAMS = {"moved": jnp.array([1.0, 2.0]), "still": jnp.array([5.0])}


def test_follows_the_updated_parameters_by_hand():
    tx = ema.ema(optax.sgd(1.0), decay=0.5)
    params, state = PARAMS, tx.init(PARAMS)
    expected = np.array([1.0, 2.0])
    for t in range(6):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        rate = min(0.5, (1 + t) / (10 + t))
        expected = rate * expected + (1 - rate) * np.asarray(params["moved"])
    np.testing.assert_allclose(ema.averaged_params(state, params)["moved"], expected, rtol=1e-6)


def test_the_start_is_forgotten():
    tx = ema.ema(optax.identity(), decay=0.999)
    state = tx.init({"w": jnp.array(1e3)})
    step = jax.jit(tx.update)
    for _ in range(60):
        _, state = step({"w": jnp.array(0.0)}, state, {"w": jnp.array(1.0)})
    assert float(ema.averaged_params(state, {"w": jnp.array(1.0)})["w"]) == pytest.approx(1.0, abs=1e-3)


def test_parameters_that_are_not_averaged_take_no_memory_and_read_as_they_are():
    tx = ema.ema(optax.identity(), decay=0.9, averaged_fn=lambda path: path != "still")
    state = tx.init(PARAMS)
    assert [leaf.shape for leaf in jax.tree.leaves(state.average)] == [(2,)]
    assert ema.averaged_params(state, PARAMS)["still"] is PARAMS["still"]


def test_the_average_has_its_own_buffers():
    state = ema.ema(optax.identity(), decay=0.9).init(PARAMS)
    assert state.average["moved"].unsafe_buffer_pointer() != PARAMS["moved"].unsafe_buffer_pointer()


def test_a_state_without_an_average_is_refused():
    with pytest.raises(ValueError, match="ema_decay"):
        ema.averaged_params(optax.adam(0.1).init(PARAMS), PARAMS)
