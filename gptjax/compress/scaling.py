"""Factors `t` of a kernel's inputs, `x / t` and `w * t`, under which rounding costs least.

Two families, of which the best exponent is searched for at every place of every layer:

    AWQ            t_j = mean |x_j| ** alpha                           inputs that carry much get finer steps
    SmoothQuant    t_j = max |x_j| ** alpha / max |w_j| ** (1 - alpha)    channels that are large are made even

The cost is the squared error of the outputs: of rounded kernels exactly, `(Q(w t) / t - w) H (Q(w t) / t - w)'` with
`H = sum x x'`, and of inputs that are rounded row by row to 8 bits, as noise spread evenly over a step,

    sum_r max_j (x_rj / t_j) ** 2 / (12 * 127 ** 2) * sum_j t_j ** 2 |w_j| ** 2.

The factors go where they cost nothing (`compress.folding`); none at all is always tried.

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, who search on outputs of samples; Xiao et al. 2023,
arXiv:2211.10438, section 4, with one alpha for a model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.compress import folding
from gptjax.compress.calibrate import Inputs, Prepare
from gptjax.nn import quantized
from gptjax.nn.config import BlockConfig
from gptjax.nn.formats import KernelRule, WeightFormat
from gptjax.types import Array, Params

Family = Literal["awq", "smoothquant"]
ALPHAS = tuple(0.1 * step for step in range(11))
# Inputs that are next to never there would get steps without end.
_LEAST_MEAN = 1e-4
_LEAST_MAX = 1e-5
_NOISE = 1.0 / (12 * 127.0**2)


def prepare(rule: KernelRule, family: Family) -> Prepare:
    """For `calibrate.walk`: scales every place for kernels that are to be stored by `rule`."""

    def scaled(block: BlockConfig, weights: Params, inputs: Mapping[str, Inputs]) -> Params:
        for place in folding.folds(block):
            weights = folding.fold(block, weights, place, factor(weights, place, inputs, rule=rule, family=family))
        return weights

    return scaled


def factor(
    weights: Params, place: folding.Fold, inputs: Mapping[str, Inputs], *, rule: KernelRule, family: Family
) -> Array:
    """The factor of each input `[*lead, inputs]` at a place; experts choose theirs for themselves."""
    assert rule.weights is not None, "kernels are stored in some format"
    found = candidates(weights, place, inputs, family=family)
    readers = []
    for path in place.readers:
        seen = inputs[f"{path}/kernel"]
        if seen.abs_sum.shape[-1] % (rule.weights.group_size or 1) == 0:  # others were left as they are
            readers.append((folding.rows(weights, path, seen.abs_sum.shape[-1]), seen))
    if not readers:
        return jnp.ones_like(found[0])

    def cost(candidate: Array) -> Array:
        spread = place.spread(candidate)
        costs = []
        for rows, seen in readers:
            costs.append(_kernel_cost(rows, seen.hessian, spread, rule.weights))
            if rule.activations == "int8":
                costs.append(_inputs_cost(rows, seen, spread))
        return jnp.stack([folding.all_but(own, place.lead, by=jnp.sum, keep=0) for own in costs]).sum(0)

    best = jnp.argmin(jnp.stack([cost(candidate) for candidate in found]), axis=0)
    return jnp.take_along_axis(found, best[None, ..., None], axis=0)[0]


def candidates(weights: Params, place: folding.Fold, inputs: Mapping[str, Inputs], *, family: Family) -> Array:
    """`[candidates, *lead, inputs]`: ones, and the family's factors for each of `ALPHAS`."""
    first = inputs[f"{place.readers[0]}/kernel"]
    if family == "awq":
        mean = first.abs_sum / jnp.maximum(first.count[..., None], 1.0)
        mean = place.pooled(folding.all_but(mean, place.lead, by=jnp.mean), by=jnp.mean)
        found = [_floored(mean, _LEAST_MEAN) ** alpha for alpha in ALPHAS]
    else:
        largest_x = folding.all_but(first.abs_max, place.lead, by=jnp.max)
        rows = [folding.rows(weights, path, first.abs_max.shape[-1]) for path in place.readers]
        largest_w = jnp.stack([folding.all_but(jnp.abs(w).max(-2), place.lead, by=jnp.max) for w in rows]).max(0)
        x, w = (_floored(place.pooled(part, by=jnp.max), _LEAST_MAX) for part in (largest_x, largest_w))
        found = [x**alpha / w ** (1 - alpha) for alpha in ALPHAS]
    even = [powers / jnp.sqrt(powers.max(-1, keepdims=True) * powers.min(-1, keepdims=True)) for powers in found]
    return jnp.stack([jnp.ones_like(even[0]), *even])


def _floored(values: Array, part: float) -> Array:
    return jnp.maximum(values, jnp.maximum(part * values.max(-1, keepdims=True), 1e-20))


@functools.partial(jax.jit, static_argnames="format")
def _kernel_cost(rows: Array, hessian: Array, factor: Array, format: WeightFormat) -> Array:
    """Squared error `[*lead]` of the outputs of rounded rows `[*lead, outputs, inputs]`."""
    scaled = rows * factor[..., None, :]
    scale, zero = quantized.group_scale(scaled, format)
    rounded = quantized.decode(quantized.encode(scaled, scale, zero, format), scale, zero, format)
    return output_error(rounded / factor[..., None, :] - rows, hessian)


@jax.jit
def _inputs_cost(rows: Array, seen: Inputs, factor: Array) -> Array:
    """What rounding the inputs to 8 bits costs, `[*lead]`."""
    energy = jnp.sum(jnp.square(rows * factor[..., None, :]), axis=(-2, -1))
    share = seen.count.sum() / seen.sample_SI.shape[0]
    if seen.expert_S is None:
        return _NOISE * share * energy * jnp.sum(jnp.square(jnp.abs(seen.sample_SI) / factor).max(-1))
    own = factor if factor.ndim == 1 else jnp.concatenate([factor, factor[:1]])[seen.expert_S]
    squares = jnp.square(jnp.abs(seen.sample_SI) / own).max(-1)
    return _NOISE * share * energy * jax.ops.segment_sum(squares, seen.expert_S, energy.shape[0] + 1)[:-1]


def output_error(error: Array, hessian: Array) -> Array:
    """`tr(E H E')` of `[*lead, outputs, inputs]`: the squared error of all outputs on the calibration text."""
    return jnp.sum(jnp.matmul(error, hessian, precision="highest") * error, axis=(-2, -1))
