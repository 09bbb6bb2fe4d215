"""Skips the steps that would harm: non-finite ones, and spikes of loss or gradient norm.

A skipped step leaves parameters and optimizer state as they were. It is a spike if loss or
gradient norm exceeds `mean + sigma * deviation` of the last `WINDOW` finite steps:
spikes enter the statistics too, so a lasting change of level is accepted after a few
steps. The step count goes on through skips, so the learning rate keeps to its schedule.

Source: the idea of OLMo 2's SkipStepOptimizer (arXiv:2501.00656, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.kernels import rows
from gptjax.types import Array, Params

WINDOW = 128
MIN_STEPS = WINDOW // 2
"""Finite steps before spikes are judged: the first losses fall too fast to be a reference."""


class GuardState(NamedTuple):
    """State of `guard`; counters are int32 scalars.

    Attributes:
      inner: state of the wrapped transformation.
      step: updates so far, skipped ones included.
      applied: updates that were not skipped; 0 after a first step means the run began non-finite.
      nonfinite: steps skipped for a non-finite loss or gradient.
      nonfinite_streak: those of them since the last finite step.
      spikes: steps skipped as spikes.
      grad_norm: of the last step, before clipping.
      losses, grad_norms: float32 `[WINDOW]`, a ring over the finite steps.
    """

    inner: Any
    step: Array
    applied: Array
    nonfinite: Array
    nonfinite_streak: Array
    spikes: Array
    grad_norm: Array
    losses: Array
    grad_norms: Array


class GuardStats(NamedTuple):
    """What the loop reads; see `GuardState`."""

    grad_norm: Array
    applied: Array
    nonfinite: Array
    nonfinite_streak: Array
    spikes: Array


def guard(
    inner: optax.GradientTransformation,
    *,
    sigma: float | None,
    norm_fn: Callable[[Params], Array] = rows.norm,
    finite_fn: Callable[[Params], Array] = lambda grads: jnp.isfinite(rows.norm(grads)),
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`, whose update gets two extra arguments: `step`, and `keep`, false where the step is skipped.

    `inner` must return its state unchanged where `keep` is false; wrap it in `keeping` if it does not.

    The update takes `loss=` (a scalar) as an extra argument; without it only gradients are judged.

    Args:
      sigma: deviations above the mean that make a spike; None skips non-finite steps only.
      norm_fn: the gradient norm that is judged and kept.
      finite_fn: whether all gradients that are used are finite.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init(params: Params) -> GuardState:
        zero, ring = jnp.zeros((), jnp.int32), jnp.zeros((WINDOW,), jnp.float32)
        return GuardState(wrapped.init(params), zero, zero, zero, zero, zero, jnp.zeros(()), ring, ring)

    def update(
        grads: Params, state: GuardState, params: Params | None = None, *, loss: Array | None = None, **extra: Any
    ) -> tuple[Params, GuardState]:
        norm = norm_fn(grads).astype(jnp.float32)
        judged_loss = jnp.zeros(()) if loss is None else loss.astype(jnp.float32)
        finite = finite_fn(grads) & jnp.isfinite(norm) & jnp.isfinite(judged_loss)
        num_seen = state.step - state.nonfinite
        spike = jnp.zeros((), bool)
        if sigma is not None:
            spike = _is_spike(norm, state.grad_norms, num_seen, sigma)
            if loss is not None:
                spike |= _is_spike(judged_loss, state.losses, num_seen, sigma)
        keep = finite & ~spike

        updates, new_inner = wrapped.update(grads, state.inner, params, step=state.step, keep=keep, **extra)
        # where, not cond: it fuses into the update and lets donated buffers be reused.
        updates = jax.tree.map(lambda u: jnp.where(keep, u, jnp.zeros_like(u)), updates)
        slot = num_seen % WINDOW
        return updates, GuardState(
            inner=new_inner,
            step=state.step + 1,
            applied=state.applied + keep,
            nonfinite=state.nonfinite + ~finite,
            nonfinite_streak=jnp.where(finite, 0, state.nonfinite_streak + 1),
            spikes=state.spikes + (finite & spike),
            grad_norm=norm,
            losses=state.losses.at[slot].set(jnp.where(finite, judged_loss, state.losses[slot])),
            grad_norms=state.grad_norms.at[slot].set(jnp.where(finite, norm, state.grad_norms[slot])),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def keeping(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state stays as it is where the extra argument `keep` is false."""
    wrapped = optax.with_extra_args_support(inner)

    def update(
        grads: Params, state: Any, params: Params | None = None, *, keep: Array, **extra: Any
    ) -> tuple[Params, Any]:
        updates, new = wrapped.update(grads, state, params, **extra)
        return updates, jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def stats(opt_state: Any) -> GuardStats:
    """The guard's counters, wherever in the optimizer state it sits.

    Raises:
      ValueError: if the state has no guard.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_guard) if _is_guard(s)]
    if len(found) != 1:
        raise ValueError(f"expected one guard in the optimizer state, found {len(found)}; is it made by optim.build?")
    return GuardStats(*(getattr(found[0], name) for name in GuardStats._fields))


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


def _is_spike(value: Array, ring: Array, num_seen: Array, sigma: float) -> Array:
    valid = jnp.arange(WINDOW) < num_seen
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(jnp.where(valid, ring, 0.0)) / count
    variance = jnp.sum(jnp.where(valid, jnp.square(ring - mean), 0.0)) / count
    # The floor keeps rounding noise around a constant from being a spike.
    deviation = jnp.maximum(jnp.sqrt(variance), 1e-3 * jnp.abs(mean))
    return (num_seen >= MIN_STEPS) & (value > mean + sigma * deviation)
