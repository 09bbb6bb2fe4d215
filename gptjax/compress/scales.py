"""Scales of groups of weights under which rounding costs least, where just reaching the largest weight costs more."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.nn import quantized
from gptjax.nn.formats import WeightFormat
from gptjax.types import Array

Cost = Callable[[Array], Array]
"""Of the errors `[outputs, inputs]` of a kernel's rows, for each group: `[outputs, groups]`."""

SHRINKS = tuple(1.0 - 0.03 * step for step in range(21))
"""Parts of a group's range that are tried: the rest is cut off, and what is kept has finer steps."""


def searched(
    rows_OI: Array, format: WeightFormat, cost: Cost, *, shrinks: tuple[float, ...] = SHRINKS
) -> tuple[Array, Array | None]:
    """The scales and zeros of least cost, of those that just reach the largest values and of shrunken ones.

    Without zero codes a negative scale is tried too: there is one code more below the middle than above it.

    Returns:
      `(scale, zero)` as `nn.quantized.group_scale` gives them.
    """
    grouped = _grouped(rows_OI, format)
    signs = (1.0, -1.0) if format.symmetric and format.bits < 8 else (1.0,)
    tries = jnp.asarray([(shrink, sign) for shrink in shrinks for sign in signs], jnp.float32)

    def costs(scale: Array, zero: Array | None) -> Array:
        codes = quantized.encode(rows_OI, scale, zero, format)
        return cost(quantized.decode(codes, scale, zero, format) - rows_OI)

    def better(best: tuple, candidate: Array) -> tuple[tuple, None]:
        scale, zero = _shrunken(grouped, format, candidate[0], candidate[1])
        found = costs(scale, zero)
        is_less = found < best[0]
        return jax.tree.map(lambda new, old: jnp.where(is_less, new, old), (found, scale, zero), best), None

    scale, zero = quantized.group_scale(rows_OI, format)
    (_, scale, zero), _ = jax.lax.scan(better, (costs(scale, zero), scale, zero), tries)
    return scale, zero


@functools.partial(jax.jit, static_argnames="format")
def clipped(rows: Array, hessian: Array, *, format: WeightFormat) -> tuple[Array, Array | None]:
    """Scales of rows `[*lead, outputs, inputs]` that cut off what pays, by the error of each group's own outputs."""

    def of_one(rows_OI: Array, hessian_II: Array) -> tuple[Array, Array | None]:
        return searched(rows_OI, format, by_hessian(hessian_II, format))

    fn = of_one
    for _ in range(hessian.ndim - 2):
        fn = jax.vmap(fn)
    return fn(rows, hessian)


def weighted(weight_I: Array, format: WeightFormat) -> Cost:
    """`sum_j weight_j error_j ** 2` of each group."""
    return lambda error_OI: _grouped(jnp.square(error_OI) * weight_I, format).sum(-1)


def by_hessian(hessian_II: Array, format: WeightFormat) -> Cost:
    """`error H error'` of each group alone, H being the block of the Hessian that is the group's."""
    size = hessian_II.shape[0] if format.group_size is None else format.group_size
    num = hessian_II.shape[0] // size
    blocks_GIJ = hessian_II.reshape(num, size, num, size)[jnp.arange(num), :, jnp.arange(num)]

    def cost(error_OI: Array) -> Array:
        error_OGI = _grouped(error_OI, format)
        return jnp.einsum("ogi,gij,ogj->og", error_OGI, blocks_GIJ, error_OGI, precision="highest")

    return cost


def _shrunken(grouped: Array, format: WeightFormat, shrink: Array, sign: Array) -> tuple[Array, Array | None]:
    codes = 2.0**format.bits - 1
    if format.symmetric:
        largest = float(jnp.finfo(jnp.float8_e4m3fn).max) if format.dtype == "fp8_e4m3" else (codes - 1) / 2
        return quantized.stored_scale(sign * shrink * jnp.abs(grouped).max(-1) / largest, format), None
    low, high = shrink * jnp.minimum(grouped.min(-1), 0.0), shrink * jnp.maximum(grouped.max(-1), 0.0)
    scale = quantized.stored_scale((high - low) / codes, format)
    steps = scale.astype(jnp.float32)
    zero = jnp.round(-low / jnp.where(steps == 0, 1, steps))
    return scale, jnp.clip(zero, 0, codes).astype(jnp.uint8)


def _grouped(rows_OI: Array, format: WeightFormat) -> Array:
    """`[outputs, inputs]` as `[outputs, groups, inputs of a group]`."""
    size = rows_OI.shape[-1] if format.group_size is None else format.group_size
    return rows_OI.reshape(rows_OI.shape[0], -1, size)
