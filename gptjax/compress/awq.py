"""AWQ: inputs that carry much get finer steps, by factors searched for the least error of the outputs.

    t_j = mean |x_j| ** alpha,    alpha of least sum over kernels of (Q(w t) / t - w) H (Q(w t) / t - w)'

with Q rounding to nearest and H = sum x x', which makes it the true squared error of the outputs. The factors then go
where they cost nothing (`compress.folding`); alpha = 0 is among those tried.

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2; its reference searches on outputs of samples instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.compress import folding, scales
from gptjax.compress.calibrate import Inputs, Prepare
from gptjax.nn import quantized
from gptjax.nn.config import BlockConfig, WeightFormat
from gptjax.types import Array, Params

ALPHAS = tuple(0.1 * step for step in range(11))
# Inputs that are next to never there would get steps without end.
_LEAST_MEAN = 1e-4


def prepare(format: WeightFormat) -> Prepare:
    """For `calibrate.walk`: scales every place for kernels that are to be stored in `format`."""

    def scaled(block: BlockConfig, weights: Params, inputs: Mapping[str, Inputs]) -> Params:
        for place in folding.folds(block):
            weights = folding.fold(block, weights, place, factor(weights, place, inputs, format=format))
        return weights

    return scaled


def factor(weights: Params, place: folding.Fold, inputs: Mapping[str, Inputs], *, format: WeightFormat) -> Array:
    """The factor of each input `[*lead, inputs]` at a place."""
    first = inputs[f"{place.readers[0]}/kernel"]
    mean = first.abs_sum / jnp.maximum(first.count[..., None], 1.0)
    mean = place.pooled(folding.all_but(mean, place.lead, by=jnp.mean), by=jnp.mean)
    mean = jnp.maximum(mean, jnp.maximum(_LEAST_MEAN * mean.max(-1, keepdims=True), 1e-20))
    readers = []
    for path in place.readers:
        hessian = inputs[f"{path}/kernel"].hessian
        if hessian.shape[-1] % (format.group_size or 1) == 0:  # others were left as they are
            readers.append((folding.rows(weights, path, hessian.shape[-1]), hessian))
    if not readers:
        return jnp.ones_like(mean)

    def candidate(alpha: float) -> Array:
        powers = mean**alpha
        return powers / jnp.sqrt(powers.max(-1, keepdims=True) * powers.min(-1, keepdims=True))

    def cost(alpha: float) -> Array:
        spread = place.spread(candidate(alpha))
        costs = [folding.all_but(_cost(rows, hessian, spread, format), place.lead, by=jnp.sum, keep=0)
                 for rows, hessian in readers]  # fmt: skip
        return jnp.stack(costs).sum(0)

    costs = jnp.stack([cost(alpha) for alpha in ALPHAS])  # experts choose for themselves
    best = jnp.argmin(costs, axis=0)
    candidates = jnp.stack([candidate(alpha) for alpha in ALPHAS])
    return jnp.take_along_axis(candidates, best[None, ..., None], axis=0)[0]


@functools.partial(jax.jit, static_argnames="format")
def clipped_scales(rows: Array, hessian: Array, *, format: WeightFormat) -> tuple[Array, Array | None]:
    """Scales of rows `[*lead, outputs, inputs]` that cut off what pays, by the error of each group's own outputs."""

    def of_one(rows_OI: Array, hessian_II: Array) -> tuple[Array, Array | None]:
        return scales.searched(rows_OI, format, scales.by_hessian(hessian_II, format))

    fn = of_one
    for _ in range(hessian.ndim - 2):
        fn = jax.vmap(fn)
    return fn(rows, hessian)


@functools.partial(jax.jit, static_argnames="format")
def _cost(rows: Array, hessian: Array, factor: Array, format: WeightFormat) -> Array:
    """Squared error of the outputs `[*lead]` of rows `[*lead, outputs, inputs]`."""
    scaled = rows * factor[..., None, :]
    codes = quantized.encode(scaled, *quantized.group_scale(scaled, format), format)
    rounded = quantized.decode(codes, *quantized.group_scale(scaled, format), format)
    return output_error(rounded / factor[..., None, :] - rows, hessian)


def output_error(error: Array, hessian: Array) -> Array:
    """`tr(E H E')` of `[*lead, outputs, inputs]`: the squared error of all outputs on the calibration text."""
    return jnp.sum(jnp.matmul(error, hessian, precision="highest") * error, axis=(-2, -1))
