"""SparseGPT: weights are removed a column at a time, and the columns after it take over what they did.

With `H = sum x x'` of a kernel's inputs (damped) and `U` the upper Cholesky factor of its inverse, removing `w_j` of a
row costs `(w_j / U_jj)^2`, and the best change of the inputs that follow is `-(w_j / U_jj) U_j,j+1..`. Which weights of
a block of inputs go is decided when the block is reached, over all its rows; of n:m when a group is.

Columns that are done are not moved again there. With the places of the zeros known, what is left can be: the `w` of a
row that least changes its outputs solves `M H M w = M H w_0` (M has ones where weights stay), which conjugate gradients
do for all rows at once, beginning with what the algorithm left.

Two more things are not of that paper. A kernel is aimed at what the whole model made of its own inputs, part of the way
(`gptq.aimed`), so that layers make good what those before them lost. And weights of several outputs and kernels compete
by what errors cost the loss (`sensitivity`).

Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1; that weights are better fitted after the choice, Boza
2024, arXiv:2401.02938, who does it by another iteration.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from absl import logging

from gptjax.optim import sparsity as sparsity_lib
from gptjax.optim.sparsity import Sparsity
from gptjax.types import Array

_MAX_DAMPING = 10.0
_LEAST_WEIGHT = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """How weights are chosen and the others moved.

    Attributes:
      aim: how far, 0 to 1, a kernel's outputs are aimed at those of the model as it was; see `gptq.aimed`.
      costs: of removing a weight are the error of its `outputs`, within one kernel as published, or what that does to
        the `loss` (see `sensitivity`), in which outputs and kernels differ.
      refit_steps: of conjugate gradients at the end.
      damping: added to the Hessian's diagonal, as a fraction of its mean.
      block_size: inputs of a block; for n:m the nearest multiple of m below.
    """

    aim: float = 0.5
    costs: Literal["loss", "outputs"] = "loss"
    refit_steps: int = 10
    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0.0 <= self.aim <= 1.0:
            raise ValueError(
                f"aim={self.aim:g}: expected 0, at what a kernel's own inputs give, to 1, at the original's"
            )
        if self.damping < 0.0:
            raise ValueError(f"damping={self.damping:g}: expected 0 or more, a part of the Hessian's mean diagonal")


PUBLISHED = SparseGPT(aim=0.0, costs="outputs", refit_steps=0)


def prune(
    rows: Array,
    hessian: Array,
    sparsity: Sparsity,
    *,
    config: SparseGPT,
    weight: Array | None = None,
    fraction: float | None = None,
) -> Array:
    """The rows with weights removed and the others moved.

    A Hessian that has no Cholesky factor is damped ten times more, again and again, with a line that says so. Inputs
    that the text never had are removed; a kernel that it never reached is pruned by magnitude.

    Args:
      rows: `[*lead, outputs, inputs]`.
      hessian: `sum x x'`, `[*lead, inputs, inputs]`.
      weight: what the squared error of an output counts, `[*lead, outputs]`; all count the same without.
      fraction: in place of the sparsity's own; not of n:m.

    Raises:
      ValueError: if no damping helps.
    """
    lead, damping = rows.shape[:-2], config.damping
    flat, hessians = rows.reshape(-1, *rows.shape[-2:]), hessian.reshape(-1, *hessian.shape[-2:])
    weights = jnp.ones(flat.shape[:2]) if weight is None else weight.reshape(flat.shape[:2])
    part = jnp.asarray(sparsity.fraction if fraction is None else fraction, jnp.float32)
    while True:
        found = _prune(flat.astype(jnp.float32), hessians, weights, part, damping, sparsity, config)
        if bool(jnp.isfinite(found).all()):
            return found.reshape(*lead, *rows.shape[-2:]).astype(rows.dtype)
        if damping >= _MAX_DAMPING:
            raise ValueError(f"SparseGPT: the Hessian is singular even damped by {damping:g}; give more or other text")
        damping *= 10
        logging.warning("SparseGPT: a singular Hessian; damped by %g of its mean diagonal.", damping)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _prune(
    rows: Array,
    hessian: Array,
    weight: Array,
    fraction: Array,
    damping: float,
    sparsity: Sparsity,
    config: SparseGPT,
) -> Array:
    def one(rows_RI: Array, hessian: Array, weight_R: Array) -> Array:
        # A row is moved alike whatever its scale, so an output's weight is that of its row while weights are chosen.
        scale_R1 = jnp.sqrt(weight_R / jnp.maximum(weight_R.mean(), 1e-30))[:, None]
        scale_R1 = jnp.where(weight_R.any(), jnp.maximum(scale_R1, _LEAST_WEIGHT), 1.0)
        scaled = _prune_one(rows_RI * scale_R1, hessian, fraction, damping, sparsity, config.block_size)
        pruned = scaled / scale_R1
        return _refit(rows_RI, pruned, _damped(hessian, damping), config.refit_steps) if config.refit_steps else pruned

    return jax.vmap(one)(rows, hessian, weight)


def _prune_one(
    rows_RI: Array, hessian: Array, fraction: Array, damping: float, sparsity: Sparsity, block_size: int
) -> Array:
    num_rows, size = rows_RI.shape
    block = min(block_size, size) // (sparsity.group or 1) * (sparsity.group or 1)
    num_blocks = -(-size // block)
    diagonal = jnp.diagonal(hessian)
    seen = (diagonal > 0) | ~(diagonal > 0).any()
    rows_RI = jnp.where(seen, rows_RI, 0.0)
    upper = _upper(_damped(hessian, damping))
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
        done, error = _block(own, inner, valid, fraction, sparsity)
        later = jnp.arange(size + pad) >= start + block
        w_IR = w_IR - jnp.where(later, right, 0.0).T @ error
        return jax.lax.dynamic_update_slice(w_IR, done, (start, 0))

    return jax.lax.fori_loop(0, num_blocks, do_block, w_IR)[:size].T


def _block(w_BR: Array, upper_BB: Array, valid_B: Array, fraction: Array, sparsity: Sparsity) -> tuple[Array, Array]:
    """The block's weights, and each column's error over its diagonal.

    A column is brought up to date when its turn comes, by a product with the errors so far: moving all later ones each
    time would write the whole block for every column.
    """
    block, num_rows = w_BR.shape
    diagonal_B1 = jnp.diagonal(upper_BB)[:, None]
    weight_BB = jnp.triu(upper_BB, 1).T  # row c: what the errors before c add to column c

    def updated(errors: Array, start: Array | int, size: int) -> Array:
        """Columns `start` to `start + size` after the errors so far; those of later columns are 0."""
        return _slice(w_BR, start, size) - _slice(weight_BB, start, size) @ errors

    def do_column(column: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, stay = carry
        value = updated(errors, column, 1) / _slice(diagonal_B1, column, 1)
        error = jnp.where(_slice(stay, column, 1), 0.0, value)
        return jax.lax.dynamic_update_slice(errors, error, (column, 0)), stay

    def do_group(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, stay = carry
        assert sparsity.group is not None, "only n:m has groups"
        start = index * sparsity.group
        cost = jnp.square(updated(errors, start, sparsity.group) / _slice(diagonal_B1, start, sparsity.group))
        own = sparsity_lib.kept(cost.T, sparsity, scope="row").T
        stay = jax.lax.dynamic_update_slice(stay, own, (start, 0))
        return jax.lax.fori_loop(start, start + sparsity.group, do_column, (errors, stay))

    errors = jnp.zeros_like(w_BR)
    if sparsity.group is not None:
        everything = jnp.ones(w_BR.shape, bool)
        errors, stay = jax.lax.fori_loop(0, block // sparsity.group, do_group, (errors, everything))
    else:
        cost = jnp.where(valid_B[:, None], jnp.square(w_BR / diagonal_B1), jnp.inf)
        num = jnp.floor(valid_B.sum() * num_rows * fraction).astype(jnp.int32)
        stay = sparsity_lib.keep_highest(cost.reshape(-1), num).reshape(cost.shape)
        errors, stay = jax.lax.fori_loop(0, block, do_column, (errors, stay))
    return jnp.where(stay, updated(errors, 0, block), 0.0), errors


def _slice(array: Array, start: Array | int, size: int) -> Array:
    """Rows `start` to `start + size`."""
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _refit(rows_RI: Array, start_RI: Array, hessian: Array, num_steps: int) -> Array:
    """The weights that are not 0 in `start_RI` moved to where the outputs change least from those of `rows_RI`."""
    mask = start_RI != 0
    scale = 1.0 / jnp.diagonal(hessian)

    def product(x: Array) -> Array:
        return jnp.where(mask, jnp.matmul(x, hessian, precision="highest"), 0.0)

    def dot(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=1, keepdims=True)

    def step(_: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, residual, direction, length = carry
        image = product(direction)
        along = dot(direction, image)
        size = jnp.where(along > 0, length / jnp.where(along > 0, along, 1.0), 0.0)
        x, residual = x + size * direction, residual - size * image
        new = dot(residual, scale * residual)
        direction = scale * residual + jnp.where(length > 0, new / jnp.where(length > 0, length, 1.0), 0.0) * direction
        return x, residual, direction, new

    residual = product(rows_RI - start_RI)
    first = (start_RI, residual, scale * residual, dot(residual, scale * residual))
    return jax.lax.fori_loop(0, num_steps, step, first)[0]


def _damped(hessian: Array, damping: float) -> Array:
    """Positive: inputs that never were have a diagonal of 1, and no weights."""
    diagonal = jnp.diagonal(hessian)
    filled = hessian + jnp.diag(jnp.where(diagonal > 0, 0.0, 1.0))
    return filled + damping * jnp.mean(jnp.diagonal(filled)) * jnp.eye(hessian.shape[0])


def _upper(damped: Array) -> Array:
    """The upper Cholesky factor of the inverse."""
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(damped.shape[0]))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
