"""How much a model's loss turns on each output of its kernels.

For a kernel with inputs `x_t` and the gradients `g_t` of a row's loss with respect to its outputs, an error e of output
o changes the loss by about `e^2 E[g_o^2] / 2` (the expected Hessian of a likelihood is that of its gradients). What is
found here is proportional to it within a kernel, and needs no more than the gradients of the kernels themselves:

    sum over inputs i, mean over rows, of (sum_t g_to x_ti)^2.

Source: Martens & Grosse 2015 (K-FAC), arXiv:1503.05671, section 3, of which this is the diagonal of one factor; that
pruning gains from it, van der Ouderaa et al. 2023 (LLM Surgeon), arXiv:2312.17244.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gptjax.eval import perplexity
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.quantized import Layout
from gptjax.types import Array, Batch, Params

MAX_ROWS = 32
"""More rows say hardly more, and each costs as much as three of calibration."""


def of_outputs(
    cfg: ModelConfig, params: Params, batches: Sequence[Array], layouts: Mapping[str, Layout]
) -> dict[tuple[str, int], Array]:
    """Of every output of the kernels in `layouts`, by path and layer: `[*experts, outputs]`.

    Args:
      cfg: of float parameters, causal.
      batches: int32 tokens `[B, T]` each; the first `MAX_ROWS` rows are looked at, each alone.
      layouts: of kernels in layers; those that layers share have the number of the first of them.
    """
    rows = [tokens_BT[i : i + 1] for tokens_BT in batches for i in range(len(tokens_BT))][:MAX_ROWS]
    squares = (_of_row(cfg, tuple(layouts.items()), params, row) for row in rows)
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), squares)
    found, first = {}, 0
    for i, group in enumerate(cfg.groups):
        for j in range(len(group.pattern)):
            for path in (path for path in total if path.startswith(f"group_{i}/block_{j}/")):
                layers = [total[path]] if group.shared else list(total[path])
                found |= {(path, first + r * len(group.pattern) + j): layer for r, layer in enumerate(layers)}
        first += group.num_layers
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_row(cfg: ModelConfig, layouts: tuple[tuple[str, Layout], ...], params: Params, tokens_1T: Array) -> dict:
    mask_1T = jnp.ones(tokens_1T.shape).at[:, -1].set(0.0)
    positions_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    batch = Batch(
        tokens=tokens_1T,
        targets=jnp.roll(tokens_1T, -1, axis=1),
        loss_mask=mask_1T,
        segment_ids=jnp.ones_like(tokens_1T),
        positions=positions_1T,
    )
    found = jax.grad(lambda p: (perplexity.token_nll(cfg, p, batch)[0] * mask_1T).sum())(params)
    squared = {}
    for path, layout in layouts:
        rows = layout.to_rows(functools.reduce(lambda tree, name: tree[name], path.split("/"), found))
        lead = rows.ndim - 1 - len(layout.out_shape)
        squared[path] = jnp.square(rows).sum(-1).reshape(*rows.shape[:lead], -1)
    return squared
