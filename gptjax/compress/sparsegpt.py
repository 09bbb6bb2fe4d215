"""SparseGPT: weights are removed a column at a time, and the columns after it take over what they did.

With `H = sum x x'` of a kernel's inputs (damped) and `U` the upper Cholesky factor of its inverse, removing `w_j` of a
row costs `(w_j / U_jj)^2`, and the best change of the inputs that follow is `-(w_j / U_jj) U_j,j+1..`. Which weights of
a block of inputs go is decided when the block is reached, over all its rows; of n:m when a group is.

Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import logging

from gptjax.optim import sparsity as sparsity_lib
from gptjax.optim.sparsity import Sparsity
from gptjax.types import Array

BLOCK_SIZE = 128
DAMPING = 0.01
_MAX_DAMPING = 10.0


def prune(
    rows: Array, hessian: Array, sparsity: Sparsity, *, damping: float = DAMPING, block_size: int = BLOCK_SIZE
) -> Array:
    """The rows with weights removed and the others moved.

    A Hessian that has no Cholesky factor is damped ten times more, again and again, with a line that says so. Inputs
    that the text never had are removed; a kernel that it never reached is pruned by magnitude.

    Args:
      rows: `[*lead, outputs, inputs]`.
      hessian: `sum x x'`, `[*lead, inputs, inputs]`.
      damping: added to the Hessian's diagonal, as a fraction of its mean.
      block_size: inputs of a block; for n:m the nearest multiple of m below.

    Raises:
      ValueError: if no damping helps.
    """
    lead = rows.shape[:-2]
    flat, hessians = rows.reshape(-1, *rows.shape[-2:]), hessian.reshape(-1, *hessian.shape[-2:])
    while True:
        found = _prune(flat.astype(jnp.float32), hessians, damping, sparsity, block_size)
        if bool(jnp.isfinite(found).all()):
            return found.reshape(*lead, *rows.shape[-2:]).astype(rows.dtype)
        if damping >= _MAX_DAMPING:
            raise ValueError(f"SparseGPT: the Hessian is singular even damped by {damping:g}; give more or other text")
        damping *= 10
        logging.warning("SparseGPT: a singular Hessian; damped by %g of its mean diagonal.", damping)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _prune(rows: Array, hessian: Array, damping: float, sparsity: Sparsity, block_size: int) -> Array:
    return jax.vmap(lambda w, h: _prune_one(w, h, damping, sparsity, block_size))(rows, hessian)


def _prune_one(rows_RI: Array, hessian: Array, damping: float, sparsity: Sparsity, block_size: int) -> Array:
    num_rows, size = rows_RI.shape
    block = min(block_size, size) // (sparsity.group or 1) * (sparsity.group or 1)
    num_blocks = -(-size // block)
    diagonal = jnp.diagonal(hessian)
    seen = (diagonal > 0) | ~(diagonal > 0).any()
    rows_RI = jnp.where(seen, rows_RI, 0.0)
    upper = _upper(hessian + jnp.diag(jnp.where(diagonal > 0, 0.0, 1.0)), damping)
    # Inputs are first so that a column is contiguous; those that fill up the last block have no weight and no effect.
    pad = num_blocks * block - size
    w_IR = jnp.pad(rows_RI.T, ((0, pad), (0, 0)))
    upper = jax.scipy.linalg.block_diag(upper, jnp.eye(pad)) if pad else upper
    real = jnp.arange(size + pad) < size

    def do_block(index: Array, w_IR: Array) -> Array:
        start = index * block
        own = jax.lax.dynamic_slice(w_IR, (start, 0), (block, num_rows))
        right = jax.lax.dynamic_slice(upper, (start, 0), (block, size + pad))
        inner = jax.lax.dynamic_slice(right, (0, start), (block, block))
        valid = jax.lax.dynamic_slice(real, (start,), (block,))
        done, error = _block(own, inner, valid, sparsity)
        later = jnp.arange(size + pad) >= start + block
        w_IR = w_IR - jnp.where(later, right, 0.0).T @ error
        return jax.lax.dynamic_update_slice(w_IR, done, (start, 0))

    return jax.lax.fori_loop(0, num_blocks, do_block, w_IR)[:size].T


def _block(w_BR: Array, upper_BB: Array, valid_B: Array, sparsity: Sparsity) -> tuple[Array, Array]:
    """The block's weights, and each column's error over its diagonal."""
    block, num_rows = w_BR.shape
    diagonal_B = jnp.diagonal(upper_BB)
    group = sparsity.group or block

    def score(w: Array, diagonal: Array) -> Array:
        return jnp.square(w / diagonal[:, None])

    def decide(start: Array, w: Array) -> Array:
        """Which weights of `group` inputs stay."""
        some = jax.lax.dynamic_slice(w, (start, 0), (group, num_rows))
        scores = score(some, jax.lax.dynamic_slice(diagonal_B, (start,), (group,)))
        if sparsity.group is not None:
            return sparsity_lib.kept(scores.T, sparsity, scope="row").T
        scores = jnp.where(valid_B[:, None], scores, jnp.inf)
        num = jnp.floor(valid_B.sum() * num_rows * sparsity.fraction).astype(jnp.int32)
        return sparsity_lib.keep_highest(scores.reshape(-1), num).reshape(scores.shape)

    def do_group(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start = index * group
        stay = decide(start, carry[0])

        def do_column(offset: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            w, errors = carry
            column = start + offset
            row = jax.lax.dynamic_slice(upper_BB, (column, 0), (1, block))[0]
            value = jnp.where(stay[offset], w[column], 0.0)
            error = (w[column] - value) / row[column]
            later = jnp.arange(block) > column
            w = w - jnp.where(later, row, 0.0)[:, None] * error
            return w.at[column].set(value), errors.at[column].set(error)

        return jax.lax.fori_loop(0, group, do_column, carry)

    return jax.lax.fori_loop(0, block // group, do_group, (w_BR, jnp.zeros_like(w_BR)))


def _upper(hessian: Array, damping: float) -> Array:
    """The upper Cholesky factor of the inverse."""
    damped = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(hessian.shape[0])
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(hessian.shape[0]))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
