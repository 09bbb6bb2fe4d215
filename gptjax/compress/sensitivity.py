"""How much a model's loss turns on its weights: what an output's error costs, and how many weights a kernel can spare.

With a row's gradient G of the loss with respect to a kernel, removing its weight w changes the loss by about
`w^2 E[G^2] / 2` (the expected Hessian of a likelihood is that of its gradients). As `G_oi = sum_t g_to x_ti`, with the
inputs `x_t` and the gradients `g_t` of the outputs, what is summed over inputs is for each output proportional to
`E[g_o^2]`: what an error of it costs.

Sources: LeCun et al. 1990 (Optimal Brain Damage), section 2, for the first; Martens & Grosse 2015 (K-FAC),
arXiv:1503.05671, section 3, for the second, of which this is the diagonal of one factor; that pruning gains from both,
van der Ouderaa et al. 2023 (LLM Surgeon), arXiv:2312.17244.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.compress import calibrate
from gptjax.eval import perplexity
from gptjax.nn.config import ModelConfig
from gptjax.nn.quantized import Layout
from gptjax.types import Array, Batch, Params

_MAX_ROWS = 32
"""More rows say hardly more, and each costs as much as three of calibration."""

_STRENGTH = 0.5
"""Estimates of single weights know nothing of what the others make good, so kernels differ by half of what they say."""

_SAMPLE = 1 << 14

Key = tuple[str, int]
"""A kernel's path and its layer; layers that share it have the number of the first of them."""


class Sensitivity(NamedTuple):
    """Of the kernels in layers.

    Attributes:
      outputs: what the squared error of each output costs, in one kernel's own unit: `[*experts, outputs]`.
      fractions: of a kernel's weights that are to go, of all experts together.
    """

    outputs: dict[Key, Array]
    fractions: dict[Key, float]


def measure(
    cfg: ModelConfig, params: Params, batches: Sequence[Array], layouts: Mapping[str, Layout], *, fraction: float
) -> Sensitivity:
    """Looks at the gradients of the first rows of text, each alone.

    Takes the memory of two more models.

    Args:
      cfg: of float parameters, causal.
      batches: int32 tokens `[B, T]` each.
      layouts: of the kernels.
      fraction: of all their weights that are to go.
    """
    rows = [tokens_BT[i : i + 1] for tokens_BT in batches for i in range(len(tokens_BT))][:_MAX_ROWS]
    kernels = tuple(layouts.items())
    total = functools.reduce(_add, (_squares(cfg, kernels, params, row) for row in rows))
    outputs: dict[Key, Array] = {}
    costs: dict[Key, np.ndarray] = {}
    sizes: dict[Key, int] = {}
    for path, layer, index in _places(cfg, layouts):
        rows_OI = layouts[path].to_rows(calibrate.at(params, path))
        weights, squares = (rows_OI, total[path]) if index is None else (rows_OI[index], total[path][index])
        lead = squares.ndim - 1 - len(layouts[path].out_shape)
        outputs[path, layer] = squares.sum(-1).reshape(*squares.shape[:lead], -1)
        chosen = np.random.default_rng(0).integers(squares.size, size=_SAMPLE)
        costs[path, layer] = np.asarray((squares * jnp.square(weights)).reshape(-1)[chosen])
        sizes[path, layer] = squares.size
    return Sensitivity(outputs, _fractions(costs, sizes, fraction))


def _fractions(costs: Mapping[Key, np.ndarray], sizes: Mapping[Key, int], fraction: float) -> dict[Key, float]:
    """Half the way from the same of each kernel to where the cheapest weights of all would lie, and not too far."""
    size = np.array([sizes[key] for key in costs], np.float64)
    cost = np.stack([costs[key] for key in costs])
    # A kernel counts by its size, its sampled weights alike.
    order = np.argsort(cost, axis=None)
    passed = np.cumsum(np.repeat(size, cost.shape[1])[order])
    limit = cost.reshape(-1)[order[min(np.searchsorted(passed, fraction * passed[-1]), len(order) - 1)]]
    wanted = fraction + _STRENGTH * ((cost < limit).mean(1) - fraction)

    def found(shift: float) -> np.ndarray:
        return np.clip(wanted + shift, fraction / 2, (1 + fraction) / 2)

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (found(middle) * size).sum() > fraction * size.sum() else (middle, high)
    return dict(zip(costs, found(low).tolist(), strict=True))


def _places(cfg: ModelConfig, layouts: Mapping[str, Layout]) -> list[tuple[str, int, int | None]]:
    """`(path, layer, index in the stacked kernel)` of every kernel."""
    found: list[tuple[str, int, int | None]] = []
    first = 0
    for i, group in enumerate(cfg.groups):
        for j in range(len(group.pattern)):
            for path in (path for path in layouts if path.startswith(f"group_{i}/block_{j}/")):
                if group.shared:
                    found.append((path, first + j, None))
                else:
                    found += [(path, first + r * len(group.pattern) + j, r) for r in range(group.repeats)]
        first += group.num_layers
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(cfg: ModelConfig, layouts: tuple[tuple[str, Layout], ...], params: Params, tokens_1T: Array) -> dict:
    """The squared gradients of one row's loss, as rows of the kernels."""
    mask_1T = jnp.ones(tokens_1T.shape).at[:, -1].set(0.0)
    batch = Batch(
        tokens=tokens_1T,
        targets=jnp.roll(tokens_1T, -1, axis=1),
        loss_mask=mask_1T,
        segment_ids=jnp.ones_like(tokens_1T),
        positions=jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None],
    )

    def loss(params: Params) -> Array:
        return (perplexity.token_nll(cfg, params, batch)[0] * mask_1T).sum()

    found = jax.grad(loss)(params)
    return {path: jnp.square(layout.to_rows(calibrate.at(found, path)).astype(jnp.float32)) for path, layout in layouts}


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: dict, squares: dict) -> dict:
    return jax.tree.map(jnp.add, total, squares)
