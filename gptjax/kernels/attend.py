"""Softmax attention of a block of queries, with its gradient written out.

The formula, with `m` the mask, `c` the soft cap and `z` a sink's logit:

    s = scale q . k,   s' = c tanh(s / c),   e = m exp(s' - max),   o = sum_s e v / (sum_s e + exp(z - max))

and from the gradient g of o, with p = e / total and d = g . o:

    dv = p^T g,   ds = scale p (g . v - d) (1 - (s' / c)^2),   dq = ds k,   dk = ds^T q,   dz = -p_z d

Scores are the largest arrays of a model, so each pass over them counts where memory is slow. Here the
forward pass has two (maximum, exponential) besides its products and the backward pass one;
differentiating the forward pass line by line would take three times as many.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.kernels import rows
from gptjax.types import Array

_NEVER = float(jnp.finfo(jnp.float32).min)
# Below every score that a model can have and above `_NEVER`: a query without any allowed key has weights
# exp(_NEVER - _LOWEST_PEAK) = 0 instead of exp(0) = 1.
_LOWEST_PEAK = -1e30


class _Residuals(NamedTuple):
    """What the backward pass reads; `slope` is `1 - (s' / c) ** 2`, None without a soft cap."""

    q_BKXH: Array
    k_BKSH: Array
    v_BKSH: Array
    weights_BKXS: Array
    total_BKX1: Array
    o_BKXH: Array
    slope_BKXS: Array | None
    sinks_BKX1: Array | None


def attend(
    q_BKTGH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    mask_BTS: Array,
    sinks_KG: Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> Array:
    """Attention of grouped queries, `[B, K, T, G, H]`, with scores and softmax in float32.

    Differentiable in reverse mode only. Keys and values are never repeated for their queries.

    Args:
      q_BKTGH: the `G` queries of each key/value head together.
      mask_BTS: bool, which keys each query may attend; a query with none gets zeros.
      sinks_KG: one logit a head that joins the softmax and carries no value, or None.
      scale: multiplies the scores.
      softcap: scores become `softcap * tanh(scores / softcap)`; None leaves them.
    """
    num_groups = q_BKTGH.shape[3]
    # One dimension for all queries of a key/value head: products over two would be transposed first.
    q_BKXH = q_BKTGH.reshape(*q_BKTGH.shape[:2], -1, q_BKTGH.shape[4])
    o_BKXH = _attend(scale, softcap, num_groups, q_BKXH, k_BKSH, v_BKSH, mask_BTS, sinks_KG)
    return o_BKXH.reshape(*q_BKTGH.shape[:4], v_BKSH.shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, softcap, num_groups, q_BKXH, k_BKSH, v_BKSH, mask_BTS, sinks_KG):
    return _forward(scale, softcap, num_groups, q_BKXH, k_BKSH, v_BKSH, mask_BTS, sinks_KG)[0]


def _forward(scale, softcap, num_groups, q_BKXH, k_BKSH, v_BKSH, mask_BTS, sinks_KG):
    scores = _product("BKXH,BKSH->BKXS", q_BKXH, k_BKSH) * scale
    slope = None
    if softcap is not None:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, (1.0 - bent * bent).astype(q_BKXH.dtype)
    scores = jnp.where(_of_queries(mask_BTS, num_groups), scores, _NEVER)
    peak_BKX1 = jnp.maximum(rows.row_max(scores)[..., None], _LOWEST_PEAK)
    sinks_BKX1 = None
    if sinks_KG is not None:
        logits_BKX1 = _sinks_of_queries(sinks_KG, scores.shape[2] // num_groups)
        peak_BKX1 = jnp.maximum(peak_BKX1, logits_BKX1)
        sinks_BKX1 = jnp.exp(logits_BKX1 - peak_BKX1)
    weights = jnp.exp(scores - peak_BKX1).astype(v_BKSH.dtype)
    total = rows.row_sum(weights)[..., None]
    if sinks_BKX1 is not None:
        total = total + sinks_BKX1
    total = jnp.where(total > 0, total, 1.0)
    o_BKXH = (_product("BKXS,BKSH->BKXH", weights, v_BKSH) / total).astype(q_BKXH.dtype)
    return o_BKXH, _Residuals(q_BKXH, k_BKSH, v_BKSH, weights, total, o_BKXH, slope, sinks_BKX1)


def _backward(scale: float, softcap: float | None, num_groups: int, saved: _Residuals, g_BKXH: Array) -> tuple:
    del softcap
    dtype = saved.q_BKXH.dtype
    delta_BKX1 = jnp.sum(g_BKXH.astype(jnp.float32) * saved.o_BKXH, axis=-1, keepdims=True) / saved.total_BKX1
    # Dividing the small gradient once, not the large weights.
    g_BKXH = (g_BKXH / saved.total_BKX1).astype(dtype)
    d_scores = saved.weights_BKXS * (_product("BKXH,BKSH->BKXS", g_BKXH, saved.v_BKSH) - delta_BKX1) * scale
    if saved.slope_BKXS is not None:
        d_scores = d_scores * saved.slope_BKXS
    d_scores = d_scores.astype(dtype)
    d_q = _product("BKXS,BKSH->BKXH", d_scores, saved.k_BKSH)
    # Scores second: XLA:CPU is faster at [H, X] by [X, S] than at its transpose, and no platform is slower.
    d_k = jnp.swapaxes(_product("BKXH,BKXS->BKHS", saved.q_BKXH, d_scores), 2, 3)
    d_v = jnp.swapaxes(_product("BKXH,BKXS->BKHS", g_BKXH, saved.weights_BKXS), 2, 3)
    d_sinks = None
    if saved.sinks_BKX1 is not None:
        d_BKX = -(saved.sinks_BKX1 * delta_BKX1)[..., 0]
        d_sinks = d_BKX.reshape(*d_BKX.shape[:2], -1, num_groups).sum((0, 2))
    no_gradient = np.zeros(_mask_shape(saved, num_groups), jax.dtypes.float0)
    return d_q.astype(dtype), d_k.astype(saved.k_BKSH.dtype), d_v.astype(saved.v_BKSH.dtype), no_gradient, d_sinks


_attend.defvjp(_forward, _backward)


def _product(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _of_queries(mask_BTS: Array, num_groups: int) -> Array:
    """The mask of every query, `[B, 1, T * G, S]`."""
    batch, length, kv_length = mask_BTS.shape
    repeated = jnp.broadcast_to(mask_BTS[:, None, :, None], (batch, 1, length, num_groups, kv_length))
    return repeated.reshape(batch, 1, length * num_groups, kv_length)


def _sinks_of_queries(sinks_KG: Array, length: int) -> Array:
    """The sink of every query, float32 `[1, K, T * G, 1]`."""
    num_heads, num_groups = sinks_KG.shape
    repeated = jnp.broadcast_to(sinks_KG.astype(jnp.float32)[:, None], (num_heads, length, num_groups))
    return repeated.reshape(1, num_heads, length * num_groups, 1)


def _mask_shape(saved: _Residuals, num_groups: int) -> tuple[Any, ...]:
    batch, _, num_queries, kv_length = saved.weights_BKXS.shape
    return batch, num_queries // num_groups, kv_length
