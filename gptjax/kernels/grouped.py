"""Matrix products of rows grouped by expert: the core of a dropless mixture of experts.

TPU and GPU have a kernel behind `jax.lax.ragged_dot`. XLA:CPU expands it to one product of
all rows for each expert. There, as long as the load is nearly even, every expert has an equal part
of the rows with some room to spare, and all products are one batched product. Otherwise the rows of each
expert are cut into blocks of a few fixed sizes, largest first, and only those are multiplied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.parallel import rules
from gptjax.parallel.mesh import is_portable, platform
from gptjax.types import Array

# A block must be large for an efficient product and small for few masked rows at a group's end.
_BLOCK_ROWS = (256, 64, 16)
# Room for an expert over its share, which a batched product of padded rows wins back twice over loops, and the
# share below which reading the weights of experts without rows would cost more.
_ROOM, _MIN_SHARE = 1.75, 32


class Groups(NamedTuple):
    """Where the rows of each expert lie, in the order of experts.

    Attributes:
      starts_E, sizes_E: int32 first row and number of rows of each.
      is_even: bool scalar, whether each expert has an equal part of all rows, some of them unused; None means never,
        and starts are the sums of the sizes before.
    """

    starts_E: Array
    sizes_E: Array
    is_even: Array | None


def contiguous(sizes_E: Array) -> Groups:
    """Groups one after the other from row 0."""
    return Groups(jnp.cumsum(sizes_E) - sizes_E, sizes_E, None)


def place(sizes_E: Array, num_rows: int) -> tuple[int, Groups]:
    """Lays out `num_rows` rows: how many rows the buffer has, and where the groups lie in it."""
    num_groups = sizes_E.shape[0]
    share = num_rows / num_groups
    groups = contiguous(sizes_E)
    # Over a mesh some rows are of experts elsewhere, and have no place in any part.
    if platform() != "cpu" or rules.current_mesh() is not None or share < _MIN_SHARE:
        return num_rows, groups
    part = math.ceil(share * _ROOM / _BLOCK_ROWS[-1]) * _BLOCK_ROWS[-1]
    # A program traced here may be compiled for another platform, whose kernel takes contiguous groups.
    is_even = jax.lax.platform_dependent(
        sizes_E, cpu=lambda sizes: jnp.max(sizes) <= part, default=lambda sizes: jnp.zeros((), bool)
    )
    starts_E = jnp.where(is_even, part * jnp.arange(num_groups, dtype=sizes_E.dtype), groups.starts_E)
    return part * num_groups, Groups(starts_E, sizes_E, is_even)


@jax.custom_vjp
def grouped_matmul(x_MD: Array, w_EDF: Array, groups: Groups) -> Array:
    """Multiplies each row by the matrix of its expert.

    Differentiable in reverse mode only.

    Args:
      x_MD: rows sorted by expert.
      w_EDF: one matrix per expert.
      groups: rows outside all of them belong to no expert: their result is unspecified and must not be used.
        Where groups may be even, such rows must be finite.

    Returns:
      `[M, F]`.
    """
    if is_portable():
        return _ragged_rows(x_MD, w_EDF, groups)
    return jax.lax.platform_dependent(x_MD, w_EDF, groups, cpu=_rows, default=_ragged_rows)


def _forward(x_MD: Array, w_EDF: Array, groups: Groups) -> tuple[Array, Any]:
    return grouped_matmul(x_MD, w_EDF, groups), (x_MD, w_EDF, groups)


def _backward(residuals: Any, dy_MF: Array) -> tuple[Array, Array, Any]:
    dx_MD, dw_EDF = jax.lax.platform_dependent(*residuals, dy_MF, cpu=_gradients, default=_ragged_gradients)
    return dx_MD, dw_EDF, jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), residuals[2])


grouped_matmul.defvjp(_forward, _backward)


def _ragged_rows(x_MD: Array, w_EDF: Array, groups: Groups) -> Array:
    return jax.lax.ragged_dot(x_MD, w_EDF, groups.sizes_E)


def _ragged_gradients(x_MD: Array, w_EDF: Array, groups: Groups, dy_MF: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, w: _ragged_rows(x, w, groups), x_MD, w_EDF)[1](dy_MF)


def _rows(x_MD: Array, w_EDF: Array, groups: Groups) -> Array:
    if groups.is_even is None:
        return _blocked_rows(x_MD, w_EDF, groups)
    return jax.lax.cond(groups.is_even, _even_rows, _blocked_rows, x_MD, w_EDF, groups)


def _gradients(x_MD: Array, w_EDF: Array, groups: Groups, dy_MF: Array) -> tuple[Array, Array]:
    if groups.is_even is None:
        return _blocked_gradients(x_MD, w_EDF, groups, dy_MF)
    return jax.lax.cond(groups.is_even, _even_gradients, _blocked_gradients, x_MD, w_EDF, groups, dy_MF)


def _even_rows(x_MD: Array, w_EDF: Array, groups: Groups) -> Array:
    del groups
    return jnp.einsum("EMD,EDF->EMF", _parts(x_MD, w_EDF), w_EDF).reshape(x_MD.shape[0], -1)


def _even_gradients(x_MD: Array, w_EDF: Array, groups: Groups, dy_MF: Array) -> tuple[Array, Array]:
    dx_MD = _even_rows(dy_MF, jnp.swapaxes(w_EDF, 1, 2), groups)
    part = x_MD.shape[0] // w_EDF.shape[0]
    used_M = (jnp.arange(part) < groups.sizes_E[:, None]).reshape(-1)
    dy_MF = jnp.where(used_M[:, None], dy_MF, 0)
    dw_EDF = jnp.einsum("EMD,EMF->EDF", _parts(x_MD, w_EDF), _parts(dy_MF, w_EDF), preferred_element_type=jnp.float32)
    return dx_MD, dw_EDF.astype(w_EDF.dtype)


def _parts(x_MD: Array, w_EDF: Array) -> Array:
    return x_MD.reshape(w_EDF.shape[0], -1, x_MD.shape[1])


def _blocked_gradients(x_MD: Array, w_EDF: Array, groups: Groups, dy_MF: Array) -> tuple[Array, Array]:
    # Transposing all weights once is cheaper than a product with a transposed one per block.
    dx_MD = _blocked_rows(dy_MF, jnp.swapaxes(w_EDF, 1, 2), groups)
    return dx_MD, _blocked_weights(x_MD, dy_MF, groups).astype(w_EDF.dtype)


def _blocked_rows(x_MD: Array, w_EDF: Array, groups: Groups) -> Array:
    def expert(y_MF: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_DF, start, end = group

        def block(y_MF: Array, at: Array, num_rows: int, mine: Array | None) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(x_MD, at, num_rows) @ w_DF
            if mine is not None:
                rows = jnp.where(mine, rows, jax.lax.dynamic_slice_in_dim(y_MF, at, num_rows))
            return jax.lax.dynamic_update_slice_in_dim(y_MF, rows, at, 0)

        return _for_blocks(block, y_MF, start, end, num_rows=x_MD.shape[0]), None

    y_MF = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return jax.lax.scan(expert, y_MF, (w_EDF, groups.starts_E, groups.starts_E + groups.sizes_E))[0]


def _blocked_weights(x_MD: Array, dy_MF: Array, groups: Groups) -> Array:
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

    return jax.lax.scan(expert, None, (groups.starts_E, groups.starts_E + groups.sizes_E))[1]


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
