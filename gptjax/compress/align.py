"""A layer with its hidden units and heads in another order, the one that is most like another layer's.

The order of hidden units, of heads within a group that shares a key/value head, and of the groups means nothing to
what a layer computes; to an average of two layers it does. Units are matched by the sum over their weights of cosine
similarities, one linear assignment a layer (Ainsworth et al. 2022, arXiv:2209.04836, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from gptjax.nn.config import AttentionConfig, BlockConfig, MLPConfig
from gptjax.types import Params


def aligned(block: BlockConfig, weights: Params, *, like: Params) -> Params:
    """`weights` in the order of `like`, computing what they did; experts and latent attention stay as they are."""
    out = dict(weights)
    if isinstance(block.mlp, MLPConfig):
        out["mlp"] = _mlp(weights["mlp"], like["mlp"])
    if isinstance(block.attention, AttentionConfig):
        out["attention"] = _attention(block.attention, weights["attention"], like["attention"])
    return out


def _mlp(own: Params, like: Params) -> Params:
    dims = {"up": -1, "gate": -1, "down": -2}
    order = _order(sum(_likeness(own[n]["kernel"], like[n]["kernel"], dim) for n, dim in dims.items() if n in own))
    out = {name: {**part, "kernel": jnp.take(part["kernel"], order, dims[name])} for name, part in own.items()}
    for name in out.keys() - {"down"}:  # whose bias is of outputs
        if "bias" in out[name]:
            out[name]["bias"] = jnp.take(own[name]["bias"], order, -1)
    return _like(own, out)


def _attention(cfg: AttentionConfig, own: Params, like: Params) -> Params:
    """Groups first, each pair of them as like as its best order of heads makes it."""
    num, size = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads
    heads = _likeness(own["query"]["kernel"], like["query"]["kernel"], -2)
    heads = (heads + _likeness(own["out"]["kernel"], like["out"]["kernel"], -3)).reshape(num, size, num, size)
    inner = {(a, b): _order(heads[a, :, b]) for a in range(num) for b in range(num)}
    groups = np.array([[heads[a, np.arange(size), b, inner[a, b]].sum() for b in range(num)] for a in range(num)])
    for name in ("key", "value"):
        if name in own:
            groups = groups + _likeness(own[name]["kernel"], like[name]["kernel"], -2)
    order = _order(groups)
    queries = np.concatenate([b * size + inner[a, b] for a, b in enumerate(order)])
    out = {name: dict(part) if isinstance(part, Mapping) else part for name, part in own.items()}
    for name, index in (("query", queries), ("key", order), ("value", order)):
        for leaf in ("kernel", "bias"):
            if leaf in out.get(name, {}):
                out[name][leaf] = jnp.take(own[name][leaf], index, -2)
    out["out"]["kernel"] = jnp.take(own["out"]["kernel"], queries, -3)
    if "sinks" in out:
        out["sinks"] = jnp.take(own["sinks"], queries, -1)
    return _like(own, out)


def _likeness(own: Any, like: Any, dim: int) -> np.ndarray:
    """Cosine similarities `[units of like, units of own]` of what belongs to a unit of dimension `dim`."""
    a, b = (
        np.moveaxis(np.asarray(kernel, np.float32), dim, 0).reshape(kernel.shape[dim], -1) for kernel in (like, own)
    )
    lengths = [np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in (a, b)]
    return (a / lengths[0]) @ (b / lengths[1]).T


def _order(likeness: Any) -> np.ndarray:
    """For each unit of the other layer the one of our own that takes its place."""
    return linear_sum_assignment(likeness, maximize=True)[1]


def _like(own: Params, out: Params) -> Params:
    return jax.tree.map(lambda old, new: new.astype(old.dtype), own, out)
