"""What a run carries from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gptjax.types import Array, Params


@flax.struct.dataclass
class TrainState:
    """The whole of a run's memory, and so of its checkpoint.

    There is no random key in it: step `k` draws from `fold_in(key(seed), k)`, so that a resumed run
    draws what the uninterrupted one would have.

    Attributes:
      step: int32, optimizer steps taken.
      params: float32 parameters.
      opt_state: the state of the gradient transformation.
      extra: whatever else an experiment carries, by name; empty in plain pretraining.
    """

    step: Array
    params: Params
    opt_state: Any
    extra: dict[str, Any]


def create(
    init_fn: Callable[[Array], Params],
    tx: optax.GradientTransformation,
    *,
    seed: int,
    shardings: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> TrainState:
    """A fresh state, computed where it will live: no device and no host ever holds a whole copy.

    Args:
      init_fn: key -> parameters.
      tx: what trains them.
      seed: of the parameters; the values do not depend on the shardings.
      shardings: a `TrainState` of shardings; None leaves everything on the default device.
      extra: shapes of what `TrainState.extra` begins with, as zeros.
    """

    def build() -> TrainState:
        return _fresh(init_fn(jax.random.key(seed)), tx, extra)

    return jax.jit(build, out_shardings=shardings)()


def from_params(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    shardings: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> TrainState:
    """A state at step 0 that starts from existing parameters, for fine-tuning, recovery or distillation."""
    return jax.jit(lambda params: _fresh(params, tx, extra), out_shardings=shardings)(params)


def abstract_state(
    abstract_params: Params, tx: optax.GradientTransformation, *, extra: Mapping[str, Any] | None = None
) -> TrainState:
    """The shapes and dtypes of `create`'s result; takes no memory."""
    return jax.eval_shape(lambda params: _fresh(params, tx, extra), abstract_params)


def shardings_of(tree: Any) -> Any:
    """Where each array of a tree is laid out."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _fresh(params: Params, tx: optax.GradientTransformation, extra: Mapping[str, Any] | None) -> TrainState:
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), dict(extra or {}))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), extra=zeros)
