"""GPTQ: rounding a kernel's inputs one after another, each error made good by the inputs that are still to come.

For a row `w` of a kernel and the Hessian `H = sum x x'` of its inputs, the squared error of the output is
`(w - q) H (w - q)'`. With `U` the upper triangle of `inv(H) = U' U`, input j is rounded to q_j and then

    w_k -= (w_j - q_j) / U_jj * U_jk    for all k > j,

which is the best that the later inputs can do about it.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; orders and static groups: IST-DASLab/gptq, `gptq.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from gptjax.compress import scales
from gptjax.nn import quantized
from gptjax.nn.formats import WeightFormat
from gptjax.types import Array

_MAX_BLOCK = 128
# Below this part of the mean diagonal a pivot is the rounding error of float32.
_LEAST_PIVOT = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """How kernels are rounded.

    Attributes:
      order: in which inputs are rounded. `none`: as they are; `activation`: large ones first, with the scales of the
        kernel as it was; `group`: groups of large ones first, and large ones first in them, so that a group's scale is
        that of its values when they are reached.
      scales: of a group: `reach` its largest value, or `search` for those of least error.
      damping: part of the mean diagonal of the Hessian that is added to it.
    """

    order: Literal["none", "activation", "group"] = "group"
    scales: Literal["reach", "search"] = "search"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping < 1.0:
            raise ValueError(f"damping={self.damping}: expected 0 to below 1")


class Rounded(NamedTuple):
    """Rows in few bits, as `nn.quantized.pack` takes them.

    Attributes:
      damping: what it took to factor the Hessian; more than was asked for where that is singular.
    """

    codes: Array
    scale: Array
    zero: Array | None
    damping: Array


def round_rows(rows: Array, hessian: Array, *, format: WeightFormat, config: GPTQ) -> Rounded:
    """Rounds the rows `[*lead, outputs, inputs]` of kernels with the Hessians `[*lead, inputs, inputs]`.

    Weights that are exactly 0 stay so. Inputs that calibration never saw are rounded to nearest.
    """
    fn = functools.partial(_round_rows, format=format, config=config)
    for _ in range(hessian.ndim - 2):
        fn = jax.vmap(fn)
    return fn(rows.astype(jnp.float32), hessian)


@functools.partial(jax.jit, static_argnames=("strength", "damping"))
def aimed(rows_OI: Array, hessian_II: Array, drift_II: Array, *, strength: float, damping: float) -> Array:
    """Rows whose outputs are, in least squares, part of the way to those of the model as it was.

    With the inputs `x` of a kernel and `x0` what they were before any kernel was treated, these are

        w + strength * w D inv(H),    D = sum (x0 - x) x',    H = sum x x' (damped).

    Weights that are exactly 0 stay so. A singular Hessian is damped as for the rounding.

    Source: Arai & Ichikawa 2025, arXiv:2504.09629, section 5.
    """
    hessian_II = _without_unseen(hessian_II)
    right, _ = _factor(hessian_II, max(damping, 1e-4))
    missed_IO = jnp.matmul(rows_OI, drift_II, precision="highest").T
    halfway = solve_triangular(right, missed_IO, lower=False)
    change = solve_triangular(right, halfway, lower=False, trans="T").T
    return jnp.where(rows_OI == 0, 0.0, rows_OI + strength * change)


@functools.partial(jax.jit, static_argnames=("format", "config"))
def _round_rows(rows_OI: Array, hessian_II: Array, *, format: WeightFormat, config: GPTQ) -> Rounded:
    num_inputs = rows_OI.shape[1]
    hessian_II = _without_unseen(hessian_II)
    order_I = _order(jnp.diagonal(hessian_II), config.order, format.group_size)
    upper_II, damping = _inverse_factor(hessian_II[order_I][:, order_I], config.damping)
    size = format.group_size or num_inputs
    is_static = config.order == "activation" or size == num_inputs
    cost = scales.weighted(jnp.diagonal(hessian_II), format)
    static = _scales(rows_OI, format, config, cost) if is_static else quantized.group_scale(rows_OI, format)
    block = _divisor(num_inputs) if is_static else size

    def round_block(index: Array, state: tuple) -> tuple:
        weights_IO, codes_IO, scale_OG, zero_OG = state
        start = index * block
        own_BO = jax.lax.dynamic_slice_in_dim(weights_IO, start, block)
        upper_BI = jax.lax.dynamic_slice_in_dim(upper_II, start, block)
        upper_BB = jax.lax.dynamic_slice_in_dim(upper_BI, start, block, axis=1)
        inputs_B = jax.lax.dynamic_slice_in_dim(order_I, start, block)
        kept_BO = rows_OI.T[inputs_B] != 0
        if not is_static:
            # The errors of an input count by what the later inputs cannot make good.
            cost = scales.weighted(jnp.diagonal(upper_BB) ** -2, format)
            scale_O1, zero_O1 = _scales(jnp.where(kept_BO, own_BO, 0.0).T, format, config, cost)
            scale_OG = scale_OG.at[:, inputs_B[0] // size].set(scale_O1[:, 0])
            if zero_O1 is not None:
                zero_OG = zero_OG.at[:, inputs_B[0] // size].set(zero_O1[:, 0])
        group_B = inputs_B // size
        zero_BO = None if zero_OG is None else zero_OG.T[group_B]
        found = _round_inputs(own_BO, upper_BB, kept_BO, scale_OG.T[group_B], zero_BO, format)
        weights_IO = weights_IO - jnp.matmul(upper_BI.T, found[1], precision="highest")
        return weights_IO, codes_IO.at[inputs_B].set(found[0]), scale_OG, zero_OG

    codes_IO = jnp.zeros(rows_OI.T.shape, _code_dtype(format))
    state = (rows_OI.T[order_I], codes_IO, *static)
    _, codes_IO, scale_OG, zero_OG = jax.lax.fori_loop(0, num_inputs // block, round_block, state)
    return Rounded(codes_IO.T, scale_OG, zero_OG, damping)


def _round_inputs(
    weights_BO: Array, upper_BB: Array, kept_BO: Array, scale_BO: Array, zero_BO: Array | None, format: WeightFormat
) -> tuple[Array, Array]:
    """The codes of a block's inputs, and their errors over `U_jj`, both `[B, O]`."""
    each = dataclasses.replace(format, group_size=None)

    def at(array: Array | None, index: Array) -> Array | None:
        return None if array is None else array[index][:, None]

    def round_one(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights_BO, codes_BO, errors_BO = state
        scale, zero = scale_BO[index][:, None], at(zero_BO, index)
        # A pruned weight has the code of 0 whatever the others' errors made of it; what that costs is an error too.
        value = jnp.where(kept_BO[index], weights_BO[index], 0.0)
        codes = quantized.encode(value[:, None], scale, zero, each)
        rounded = quantized.decode(codes, scale, zero, each)[:, 0]
        error = (weights_BO[index] - rounded) / upper_BB[index, index]
        weights_BO = weights_BO - upper_BB[index][:, None] * error  # left of the diagonal there are zeros
        return weights_BO, codes_BO.at[index].set(codes[:, 0]), errors_BO.at[index].set(error)

    codes_BO = jnp.zeros(weights_BO.shape, _code_dtype(format))
    state = (weights_BO, codes_BO, jnp.zeros_like(weights_BO))
    return jax.lax.fori_loop(0, weights_BO.shape[0], round_one, state)[1:]


def _scales(rows_OI: Array, format: WeightFormat, config: GPTQ, cost: scales.Cost) -> tuple[Array, Array | None]:
    if config.scales == "reach":
        return quantized.group_scale(rows_OI, format)
    return scales.searched(rows_OI, format, cost)


def _without_unseen(hessian_II: Array) -> Array:
    """With something on the diagonal of inputs that were always 0, so that it can be factored and they stay apart."""
    diagonal = jnp.diagonal(hessian_II)
    seen = diagonal > 0
    mean = jnp.where(seen.any(), diagonal.sum() / jnp.maximum(seen.sum(), 1), 1.0)
    return hessian_II + jnp.diag(jnp.where(seen, 0.0, mean))


def _order(diagonal_I: Array, order: str, group_size: int | None) -> Array:
    """The inputs in the order in which they are rounded."""
    if order == "none":
        return jnp.arange(diagonal_I.shape[0])
    if order == "activation" or group_size is None:
        return jnp.argsort(-diagonal_I)
    grouped = diagonal_I.reshape(-1, group_size)
    groups = jnp.argsort(-grouped.sum(1))
    within = jnp.argsort(-grouped, axis=1)
    return (groups[:, None] * group_size + within[groups]).reshape(-1)


def _inverse_factor(hessian_II: Array, damping: float) -> tuple[Array, Array]:
    """The upper triangular U of `inv(H + damping) = U' U`, and the damping."""
    right, damping_used = _factor(hessian_II, damping)  # H = R R', hence U = inv(R)
    return solve_triangular(right, jnp.eye(hessian_II.shape[0]), lower=False), damping_used


def _factor(hessian_II: Array, damping: float) -> tuple[Array, Array]:
    """The upper triangular R of `H + damping = R R'`, with ten times the damping until there is one."""
    mean = jnp.diagonal(hessian_II).mean()
    eye = jnp.eye(hessian_II.shape[0], dtype=jnp.float32)

    def factor(damping: Array) -> Array:
        # The factor of the matrix read backwards, read backwards, is upper.
        lower = jnp.linalg.cholesky((hessian_II + damping * mean * eye)[::-1, ::-1])
        return lower[::-1, ::-1]

    def fails(state: tuple[Array, Array]) -> Array:
        pivots = jnp.square(jnp.diagonal(state[0]))
        return ~(pivots.min() > _LEAST_PIVOT * mean) & (state[1] < 1e3)

    def damped(state: tuple[Array, Array]) -> tuple[Array, Array]:
        more = jnp.maximum(10 * state[1], 1e-4)
        return factor(more), more

    asked = jnp.asarray(damping, jnp.float32)
    return jax.lax.while_loop(fails, damped, (factor(asked), asked))


def _divisor(num_inputs: int) -> int:
    return next(size for size in range(min(num_inputs, _MAX_BLOCK), 0, -1) if num_inputs % size == 0)


def _code_dtype(format: WeightFormat) -> jnp.dtype:
    return jnp.dtype(jnp.float8_e4m3fn) if format.dtype == "fp8_e4m3" else jnp.dtype(jnp.int32)
