"""Coordinate descent over the codes and scales of a rounded kernel.

For a row `w` of a kernel, what it was rounded to `q` and the Hessian `H` of its inputs, the squared error of the output
is `(w - q) H (w - q)'`. With `g = (w - q) H`, the best value of input j for all the others as they are is
`q_j + g_j / H_jj`, and the nearest code to it is the best code. For a group with values `q = s d` the best scale is

    s + (g d') / (d H d').

GPTQ can make an error good only by inputs that are still to come; this goes on with all of them, and never to more.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.nn import quantized
from gptjax.nn.config import WeightFormat
from gptjax.types import Array

_MAX_BLOCK = 128


def descended(
    rows_OI: Array,
    codes_OI: Array,
    scale_OG: Array,
    zero_OG: Array | None,
    hessian_II: Array,
    *,
    format: WeightFormat,
    sweeps: int,
) -> tuple[Array, Array, Array | None]:
    """Better `(codes, scale, zero)`; weights that are exactly 0 stay so, and so do the scales of whole rows."""
    num_inputs = rows_OI.shape[1]
    size = format.group_size or divisor(num_inputs)
    num_blocks = num_inputs // size
    each = dataclasses.replace(format, group_size=None)

    def sweep_block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes_IO, scale_GO, gradient_IO = state
        group = 0 if format.group_size is None else index % num_blocks

        def own(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, index % num_blocks * size, size)

        hessian_BI = own(hessian_II)
        hessian_BB = own(hessian_BI.T)
        rows_BO, codes_BO, gradient_BO = own(rows_OI.T), own(codes_IO), own(gradient_IO)
        zero = None if zero_OG is None else zero_OG.T[group][:, None]

        def decoded(codes_BO: Array, scale_O: Array) -> Array:
            return quantized.decode(codes_BO.T, scale_O[:, None], zero, each).T

        scale_O = scale_GO[group]
        before_BO = values_BO = decoded(codes_BO, scale_O)
        if format.group_size is not None:
            steps_BO = decoded(codes_BO, jnp.ones_like(scale_O))
            curvature_O = jnp.sum(steps_BO * jnp.matmul(hessian_BB, steps_BO, precision="highest"), 0)
            change_O = jnp.sum(steps_BO * gradient_BO, 0) / jnp.where(curvature_O > 0, curvature_O, 1)
            better_O = scale_O.astype(jnp.float32) + jnp.where(curvature_O > 0, change_O, 0)
            scale_O = quantized.stored_scale(better_O, format)
            values_BO = decoded(codes_BO, scale_O)
            gradient_BO = gradient_BO - jnp.matmul(hessian_BB, values_BO - before_BO, precision="highest")

        def one(b: Array, inner: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            codes_BO, values_BO, gradient_BO = inner
            best_O = jnp.where(rows_BO[b] == 0, 0.0, values_BO[b] + gradient_BO[b] / hessian_BB[b, b])
            codes_O1 = quantized.encode(best_O[:, None], scale_O[:, None], zero, each)
            values_O = quantized.decode(codes_O1, scale_O[:, None], zero, each)[:, 0]
            gradient_BO = gradient_BO - hessian_BB[:, b, None] * (values_O - values_BO[b])
            return codes_BO.at[b].set(codes_O1[:, 0]), values_BO.at[b].set(values_O), gradient_BO

        codes_BO, values_BO, _ = jax.lax.fori_loop(0, size, one, (codes_BO, values_BO, gradient_BO))
        gradient_IO = gradient_IO - jnp.matmul(hessian_BI.T, values_BO - before_BO, precision="highest")
        codes_IO = jax.lax.dynamic_update_slice_in_dim(codes_IO, codes_BO, index % num_blocks * size, axis=0)
        return codes_IO, scale_GO.at[group].set(scale_O), gradient_IO

    error_OI = rows_OI - quantized.decode(codes_OI, scale_OG, zero_OG, format)
    gradient_IO = jnp.matmul(hessian_II, error_OI.T, precision="highest")
    state = (codes_OI.T, scale_OG.T, gradient_IO)
    codes_IO, scale_GO, _ = jax.lax.fori_loop(0, sweeps * num_blocks, sweep_block, state)
    return codes_IO.T, scale_GO.T, zero_OG


def divisor(num_inputs: int) -> int:
    """The largest number of inputs up to 128 that divides them."""
    return next(size for size in range(min(num_inputs, _MAX_BLOCK), 0, -1) if num_inputs % size == 0)
