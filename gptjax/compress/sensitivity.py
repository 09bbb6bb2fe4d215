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

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.compress import calibrate
from gptjax.eval import perplexity
from gptjax.nn.config import ModelConfig
from gptjax.nn.quantized import Layout
from gptjax.nn.taps import Weighed
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


class _Figures(NamedTuple):
    """Of one kernel: what each output's error costs `[*experts, outputs]`, and what removing sampled weights does."""

    outputs: Array
    costs: Array


def measure(
    cfg: ModelConfig, params: Params, batches: Sequence[Array], layouts: Mapping[str, Layout], *, fraction: float
) -> Sensitivity:
    """Looks at the gradients of the first rows of text, each alone and summed up as it arises, layer by layer.

    Of a kernel that several layers use, what it costs is the sum over its uses.

    Args:
      cfg: of float parameters, causal.
      batches: int32 tokens `[B, T]` each.
      layouts: of the kernels.
      fraction: of all their weights that are to go.
    """
    # The gradients of a layer need what it computed, which is cheaper made again than kept for all layers.
    cfg = dataclasses.replace(cfg, remat="full")
    rows = [tokens_BT[i : i + 1] for tokens_BT in batches for i in range(len(tokens_BT))][:_MAX_ROWS]
    kernels = tuple(layouts.items())
    total = functools.reduce(_add, (_of_row(cfg, kernels, params, row) for row in rows))
    outputs: dict[Key, Array] = {}
    costs: dict[Key, np.ndarray] = {}
    sizes: dict[Key, int] = {}
    for path, layer, index in _places(cfg, layouts):
        shape = calibrate.at(params, path).shape
        found = total[path] if index is None else jax.tree.map(operator.itemgetter(index), total[path])
        outputs[path, layer] = found.outputs
        costs[path, layer] = np.asarray(found.costs)
        sizes[path, layer] = math.prod(shape if index is None else shape[1:])
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
def _of_row(
    cfg: ModelConfig, layouts: tuple[tuple[str, Layout], ...], params: Params, tokens_1T: Array
) -> dict[str, _Figures]:
    """By path, stacked as the kernels are."""
    mask_1T = jnp.ones(tokens_1T.shape).at[:, -1].set(0.0)
    batch = Batch(
        tokens=tokens_1T,
        targets=jnp.roll(tokens_1T, -1, axis=1),
        loss_mask=mask_1T,
        segment_ids=jnp.ones_like(tokens_1T),
        positions=jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None],
    )
    stacks = {path: () if index is None else (-1,) for path, _, index in _places(cfg, dict(layouts))}

    def none(path: str, layout: Layout) -> _Figures:
        kernel = calibrate.at(params, path)
        stack = kernel.shape[: len(stacks[path])]
        one = jax.eval_shape(
            functools.partial(_figures, layout), *[jax.ShapeDtypeStruct(kernel.shape[len(stack) :], kernel.dtype)] * 2
        )
        return jax.tree.map(lambda part: jnp.zeros((*stack, *part.shape), part.dtype), one)

    def loss(figures: dict[str, _Figures]) -> Array:
        weighed = params
        for path, layout in layouts:
            leaf = Weighed(calibrate.at(params, path), figures[path], functools.partial(_figures, layout))
            weighed = calibrate.replaced(weighed, path, leaf)
        return (perplexity.token_nll(cfg, weighed, batch)[0] * mask_1T).sum()

    return jax.grad(loss)({path: none(path, layout) for path, layout in layouts})


def _figures(layout: Layout, kernel: Array, gradient: Array) -> _Figures:
    """Of one layer's kernel, and its gradient of one row's loss."""
    lead = kernel.ndim - len(layout.in_shape) - len(layout.out_shape)
    squares = jnp.square(layout.to_rows(gradient).astype(jnp.float32))
    outputs = squares.sum(-1).reshape(*kernel.shape[:lead], -1)
    chosen = np.random.default_rng(0).integers(kernel.size, size=_SAMPLE)
    rows = layout.to_rows(kernel).astype(jnp.float32)
    return _Figures(outputs, squares.reshape(-1)[chosen] * jnp.square(rows.reshape(-1)[chosen]))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: dict[str, _Figures], row: dict[str, _Figures]) -> dict[str, _Figures]:
    return jax.tree.map(jnp.add, total, row)
