from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.optim import guard

PARAMS = {"w": jnp.ones((4,))}


class Run:
    """A guarded Adam, fed one gradient (and loss) at a time."""

    def __init__(self, sigma=None, inner=None):
        self.tx = guard.guard(guard.keeping(inner or optax.adam(0.1)), sigma=sigma)
        self.state = self.tx.init(PARAMS)
        self.step = jax.jit(lambda grads, state, loss: self.tx.update(grads, state, PARAMS, loss=loss))

    def feed(self, grad, loss=1.0):
        update, self.state = self.step({"w": jnp.full((4,), grad)}, self.state, jnp.float32(loss))
        return np.asarray(update["w"])

    @property
    def stats(self):
        return guard.GuardStats(*(float(value) for value in guard.stats(self.state)))


@pytest.mark.parametrize(("grad", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (0.5, np.nan), (0.5, np.inf)])
def test_a_non_finite_step_changes_nothing_and_is_counted(grad, loss):
    run = Run()
    run.feed(0.5)
    before = jax.tree.leaves(run.state.inner)
    assert not np.any(run.feed(grad, loss))
    for old, new in zip(before, jax.tree.leaves(run.state.inner), strict=True):
        np.testing.assert_array_equal(old, new)
    assert run.stats[1:] == (1, 1, 1, 0)


def test_goes_on_after_a_skip_as_if_it_had_not_been():
    run, clean = Run(), Run()
    updates = [run.feed(grad) for grad in (0.5, np.nan, np.nan, 0.25)]
    expected = [clean.feed(grad) for grad in (0.5, 0.25)]
    np.testing.assert_array_equal([updates[0], updates[3]], expected)
    assert run.stats.nonfinite == 2
    assert run.stats.nonfinite_streak == 0


def test_non_finite_from_the_first_step_is_detectable():
    run = Run()
    for _ in range(3):
        run.feed(np.nan)
    assert run.stats.applied == 0
    assert run.stats.nonfinite_streak == 3


def noisy(run, num):
    for value in np.random.default_rng(0).normal(1.0, 0.1, num):
        run.feed(value, 2.0 + value)


@pytest.mark.parametrize(("grad", "loss"), [(5.0, 3.0), (1.0, 9.0)])
def test_spikes_of_gradient_or_loss_are_skipped_once_there_is_a_reference(grad, loss):
    run = Run(sigma=6.0)
    noisy(run, guard.MIN_STEPS - 1)
    assert np.any(run.feed(grad, loss)), "too early to judge"
    run = Run(sigma=6.0)
    noisy(run, guard.MIN_STEPS)
    assert not np.any(run.feed(grad, loss))
    assert np.any(run.feed(1.0, 3.0))
    assert run.stats.spikes == 1


def test_without_sigma_spikes_pass():
    run = Run()
    noisy(run, guard.MIN_STEPS)
    assert np.any(run.feed(100.0, 100.0))


def test_a_lasting_change_of_level_is_accepted():
    run = Run(sigma=6.0)
    noisy(run, guard.WINDOW)
    skipped = sum(not np.any(run.feed(1.0, 9.0)) for _ in range(20))
    assert 1 <= skipped < 10


def test_rounding_noise_around_a_constant_is_no_spike():
    run = Run(sigma=3.0)
    for _ in range(guard.MIN_STEPS):
        run.feed(1.0, 2.0)
    assert np.any(run.feed(1.0, 2.001))


def test_the_window_forgets():
    run = Run(sigma=6.0)
    for _ in range(guard.MIN_STEPS):
        run.feed(100.0, 100.0)
    noisy(run, guard.WINDOW)
    assert not np.any(run.feed(50.0, 50.0))


def test_keeps_the_norm_of_the_last_step():
    run = Run()
    run.feed(3.0)
    assert run.stats.grad_norm == pytest.approx(6.0)


def test_the_wrapped_transformation_sees_every_step_counted():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda grads, state, params=None, *, step, **extra: (jax.tree.map(lambda g: g * step, grads), state),
    )
    run = Run(inner=seen)
    run.feed(1.0)
    run.feed(np.nan)
    np.testing.assert_array_equal(run.feed(1.0), 2.0)


def test_the_loss_is_optional():
    tx = guard.guard(guard.keeping(optax.sgd(1.0)), sigma=6.0)
    update, state = tx.update({"w": jnp.full((4,), 2.0)}, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(update["w"], -2.0)
    assert guard.stats(state).applied == 1


def test_a_state_without_a_guard_is_refused():
    with pytest.raises(ValueError, match="found 0"):
        guard.stats(optax.adam(0.1).init(PARAMS))
