"""An exponential moving average of the parameters, kept in the optimizer state.

    ema_t = d_t ema_{t-1} + (1 - d_t) params_t,     d_t = min(decay, (1 + t) / (10 + t))

It starts from the initial parameters; the small first `d_t` forget them (their weight falls
as t^-9), so the average needs no bias correction and can be evaluated at any time.

Source: the `num_updates` rule of `tf.train.ExponentialMovingAverage`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.groups import path_of
from gptjax.types import Array, Params


class EmaState(NamedTuple):
    """`average` is like the parameters, with `optax.MaskedNode` in the place of those not averaged."""

    inner: Any
    average: Params
    num_updates: Array


def ema(
    inner: optax.GradientTransformation, *, decay: float, averaged_fn: Callable[[str], bool] = lambda path: True
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` and averages the parameters that its updates lead to.

    Args:
      averaged_fn: of the parameter's path; the others take no memory and read as they are.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init(params: Params) -> EmaState:
        def start(key_path: tuple[Any, ...], p: Array) -> Any:
            # A copy: the same buffer in params and state could not be donated twice.
            return jnp.array(p, copy=True) if averaged_fn(path_of(key_path)) else optax.MaskedNode()

        averages = jax.tree_util.tree_map_with_path(start, params)
        return EmaState(wrapped.init(params), averages, jnp.zeros((), jnp.int32))

    def update(grads: Params, state: EmaState, params: Params, **extra: Any) -> tuple[Params, EmaState]:
        updates, new_inner = wrapped.update(grads, state.inner, params, **extra)
        t = state.num_updates.astype(jnp.float32)
        rate = jnp.minimum(decay, (1.0 + t) / (10.0 + t))

        def average(old: Any, p: Array, u: Array) -> Any:
            return old if _is_masked(old) else rate * old + (1.0 - rate) * (p + u)

        averages = jax.tree.map(average, state.average, params, updates, is_leaf=_is_masked)
        return updates, EmaState(new_inner, averages, state.num_updates + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: Any, params: Params) -> Params:
    """The averaged parameters; those that are not averaged come from `params`.

    Raises:
      ValueError: if the optimizer keeps no average.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(s)]
    if len(found) != 1:
        raise ValueError("the optimizer state has no average of the parameters; set ema_decay above 0")
    return jax.tree.map(lambda e, p: p if _is_masked(e) else e, found[0].average, params, is_leaf=_is_masked)


def _is_ema(node: Any) -> bool:
    return isinstance(node, EmaState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
