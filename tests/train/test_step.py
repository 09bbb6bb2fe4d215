import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.train import state as state_lib
from gptjax.train import step as step_lib
from gptjax.types import Loss, Mean
from tests.train import toy


def run(batch, *, accumulate_steps=1, objective=toy.objective):
    optimizer = toy.optimizer()
    run_step = step_lib.jit_train_step(
        objective, optimizer, state := toy.new_state(optimizer.tx), accumulate_steps=accumulate_steps
    )
    return run_step(state, (), batch)


def test_accumulation_equals_the_large_batch_when_microbatches_have_different_weights():
    batch = toy.batch(rows=8, mask=0.3)
    weights = batch.loss_mask.reshape(2, 4, -1).sum((0, 2))
    assert len(set(weights)) > 1, "equal weights would hide a mean of means"
    whole_state, whole = run(batch)
    for num in (2, 4, 8):
        parts_state, parts = run(batch, accumulate_steps=num)
        assert whole.keys() == parts.keys()
        for name in whole:
            np.testing.assert_allclose(whole[name].value, parts[name].value, rtol=1e-6, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole_state.params, parts_state.params)


def test_the_gradient_is_that_of_the_mean_over_targets():
    optimizer = toy.guarded(optax.sgd(1.0), 1.0)
    before = toy.new_state(optimizer.tx)
    batch = toy.batch()

    def mean_loss(params):
        loss = toy.objective(params, (), batch, None, None)
        return loss.total / loss.weight

    expected = jax.jit(jax.grad(mean_loss))(before.params)
    after, metrics = jax.jit(step_lib.train_step(toy.objective, optimizer))(before, (), batch)
    got = jax.tree.map(jnp.subtract, before.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    np.testing.assert_allclose(metrics["grad_norm"].value, optax.tree.norm(expected), rtol=1e-6)
    np.testing.assert_allclose(metrics["param_norm"].value, optax.tree.norm(after.params), rtol=1e-6)
    assert int(after.step) == 1


def test_a_batch_without_targets_changes_nothing():
    batch = dataclasses.replace(toy.batch(), loss_mask=np.zeros((8, 12), np.float32))
    optimizer = toy.guarded(optax.sgd(1.0), 1.0)
    before = toy.new_state(optimizer.tx)
    after, _ = jax.jit(step_lib.train_step(toy.objective, optimizer))(before, (), batch)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_each_step_and_microbatch_draws_its_own_random_numbers_and_a_rerun_the_same():
    def objective(params, frozen, batch, rng, step):
        draw = jax.random.uniform(rng)
        loss = toy.objective(params, frozen, batch, rng, step)
        return Loss(loss.total, loss.weight, {"draw": Mean(draw, 1.0), "square": Mean(draw**2, 1.0)})

    optimizer = toy.optimizer()
    state = toy.new_state(optimizer.tx)
    step_fn = jax.jit(step_lib.train_step(objective, optimizer, accumulate_steps=2, seed=3))
    state_1, first = step_fn(state, (), toy.batch())
    _, again = step_fn(state, (), toy.batch())
    _, second = step_fn(state_1, (), toy.batch())
    assert first["draw"].value == again["draw"].value != second["draw"].value
    mean, square = float(first["draw"].value), float(first["square"].value)
    assert square - mean**2 > 1e-6, "both microbatches drew the same number"


def test_the_state_is_donated_and_keeps_its_layout():
    optimizer = toy.optimizer()
    state = toy.new_state(optimizer.tx)
    step_fn = step_lib.jit_train_step(toy.objective, optimizer, state)
    old, shardings = state.params["embed"], state_lib.shardings_of(state)
    state, _ = step_fn(state, (), toy.batch())
    assert old.is_deleted()
    assert state_lib.shardings_of(state) == shardings


def test_the_step_compiles_once():
    optimizer = toy.optimizer()
    state = toy.new_state(optimizer.tx)
    step_fn = step_lib.jit_train_step(toy.objective, optimizer, state)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **kwargs: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        for i in range(3):
            state, _ = step_fn(state, (), toy.batch(i))
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(compiled) == 1


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match="accumulate_steps=3 does not divide the batch of 8 rows"):
        run(toy.batch(rows=8), accumulate_steps=3)


def test_eval_step_returns_sums_that_add_up():
    params = jax.jit(toy.init)(jax.random.key(0))
    evaluate = jax.jit(step_lib.eval_step(toy.objective))
    first, second = toy.batch(0, mask=0.2), toy.batch(1, mask=0.9)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
    rng = jax.random.key(0)
    parts = [evaluate(params, (), batch, rng)["loss"] for batch in (first, second)]
    np.testing.assert_allclose((parts[0] + parts[1]).value, evaluate(params, (), both, rng)["loss"].value, rtol=1e-6)
