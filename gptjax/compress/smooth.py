"""SmoothQuant: inputs of a few large channels made even, by factors that kernels take over.

    t_j = max |x_j| ** alpha / max |w_j| ** (1 - alpha),    x / t,  w * t

so that rounding a row of inputs to 8 bits does not spend its steps on one channel.

Source: Xiao et al. 2023, arXiv:2211.10438, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from gptjax.compress import folding
from gptjax.compress.calibrate import Inputs, Prepare
from gptjax.nn.config import BlockConfig
from gptjax.types import Array, Params


def prepare(*, alpha: float) -> Prepare:
    """For `calibrate.walk`.

    Args:
      alpha: how much of the inputs' range goes over to the kernels, 0 to 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: expected 0 to 1")

    def smoothed(block: BlockConfig, weights: Params, inputs: Mapping[str, Inputs]) -> Params:
        for place in folding.folds(block):
            weights = folding.fold(block, weights, place, factor(weights, place, inputs, alpha=alpha))
        return weights

    return smoothed


def factor(weights: Params, place: folding.Fold, inputs: Mapping[str, Inputs], *, alpha: float) -> Array:
    """SmoothQuant's factor of each input `[*lead, inputs]` at a place; 1 where calibration saw none."""
    lead = place.lead
    largest_w, largest_x = [], []
    for path in place.readers:
        seen = inputs[f"{path}/kernel"]
        rows = folding.rows(weights, path, seen.abs_max.shape[-1])
        largest_w.append(folding.all_but(jnp.abs(rows).max(-2), lead, by=jnp.max))
        largest_x.append(folding.all_but(seen.abs_max, lead, by=jnp.max))
    w, x = (place.pooled(jnp.stack(parts).max(0), by=jnp.max) for parts in (largest_w, largest_x))
    is_there = (w > 0) & (x > 0)
    return jnp.where(is_there, jnp.where(is_there, x, 1.0) ** alpha / jnp.where(is_there, w, 1.0) ** (1 - alpha), 1.0)
