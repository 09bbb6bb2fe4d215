"""Matrix products of rows grouped by expert: the core of a dropless mixture of experts.

TPU and GPU have a kernel behind `jax.lax.ragged_dot`. XLA:CPU expands it to one product of
all rows for each expert, so there the rows of each expert are cut into blocks of a few fixed
sizes, largest first, and only those are multiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.types import Array

# A block must be large for an efficient product and small for few masked rows at a group's end.
_BLOCK_ROWS = (256, 64, 16)


@jax.custom_vjp
def grouped_matmul(x_MD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    """Multiplies each row by the matrix of its expert.

    Differentiable in reverse mode only.

    Args:
      x_MD: rows sorted by expert.
      w_EDF: one matrix per expert.
      group_sizes_E: int32 rows of each expert, in order. Rows past their sum belong to no
        expert: their result is unspecified and must not be used.

    Returns:
      `[M, F]`.
    """
    return jax.lax.platform_dependent(x_MD, w_EDF, group_sizes_E, cpu=_blocked_rows, default=jax.lax.ragged_dot)


def _forward(x_MD: Array, w_EDF: Array, group_sizes_E: Array) -> tuple[Array, Any]:
    return grouped_matmul(x_MD, w_EDF, group_sizes_E), (x_MD, w_EDF, group_sizes_E)


def _backward(residuals: Any, dy_MF: Array) -> tuple[Array, Array, Any]:
    dx_MD, dw_EDF = jax.lax.platform_dependent(*residuals, dy_MF, cpu=_blocked_gradients, default=_ragged_gradients)
    return dx_MD, dw_EDF, np.zeros(residuals[2].shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def _ragged_gradients(x_MD: Array, w_EDF: Array, group_sizes_E: Array, dy_MF: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, group_sizes_E), x_MD, w_EDF)[1](dy_MF)


def _blocked_gradients(x_MD: Array, w_EDF: Array, group_sizes_E: Array, dy_MF: Array) -> tuple[Array, Array]:
    # Transposing all weights once is cheaper than a product with a transposed one per block.
    dx_MD = _blocked_rows(dy_MF, jnp.swapaxes(w_EDF, 1, 2), group_sizes_E)
    return dx_MD, _blocked_weights(x_MD, dy_MF, group_sizes_E).astype(w_EDF.dtype)


def _blocked_rows(x_MD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    def expert(y_MF: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_DF, start, end = group

        def block(y_MF: Array, at: Array, num_rows: int, mine: Array | None) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(x_MD, at, num_rows) @ w_DF
            if mine is not None:
                rows = jnp.where(mine, rows, jax.lax.dynamic_slice_in_dim(y_MF, at, num_rows))
            return jax.lax.dynamic_update_slice_in_dim(y_MF, rows, at, 0)

        return _for_blocks(block, y_MF, start, end, num_rows=x_MD.shape[0]), None

    ends_E = jnp.cumsum(group_sizes_E)
    y_MF = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return jax.lax.scan(expert, y_MF, (w_EDF, ends_E - group_sizes_E, ends_E))[0]


def _blocked_weights(x_MD: Array, dy_MF: Array, group_sizes_E: Array) -> Array:
    def expert(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        def block(dw_DF: Array, at: Array, num_rows: int, mine: Array | None) -> Array:
            x = jax.lax.dynamic_slice_in_dim(x_MD, at, num_rows)
            dy = jax.lax.dynamic_slice_in_dim(dy_MF, at, num_rows)
            if mine is not None:
                # Both: a row of no expert may hold anything, infinities included.
                x, dy = jnp.where(mine, x, 0), jnp.where(mine, dy, 0)
            return dw_DF + jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        dw_DF = jnp.zeros((x_MD.shape[1], dy_MF.shape[1]), jnp.float32)
        return None, _for_blocks(block, dw_DF, *group, num_rows=x_MD.shape[0])

    ends_E = jnp.cumsum(group_sizes_E)
    return jax.lax.scan(expert, None, (ends_E - group_sizes_E, ends_E))[1]


def _for_blocks(block: Callable[..., Array], carry: Array, start: Array, end: Array, *, num_rows: int) -> Array:
    """Folds `block(carry, first row, rows, mask or None)` over blocks that cover `start..end`."""
    sizes = [size for size in _BLOCK_ROWS if size <= num_rows] or [num_rows]

    def whole(size: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] + size, block(state[1], state[0], size, None)

    def partial(size: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        # Stay inside the array: a slice that starts too late would be moved silently.
        at = jnp.minimum(state[0], num_rows - size)
        row = at + jnp.arange(size)
        mine = (row >= state[0]) & (row < end)
        return state[0] + size, block(state[1], at, size, mine[:, None])

    state = (start, carry)
    for size in sizes:
        fits = functools.partial(lambda size, state: state[0] + size <= end, size)
        state = jax.lax.while_loop(fits, functools.partial(whole, size), state)
    return jax.lax.while_loop(lambda state: state[0] < end, functools.partial(partial, sizes[-1]), state)[1]
