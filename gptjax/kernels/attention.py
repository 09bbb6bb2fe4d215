"""Softmax attention over positions, documents and windows.

    o[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]    over the s that t may attend

Masks are data: which pairs are allowed follows from positions and segment ids, so packed
rows, padded caches and ring buffers are one code path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.types import Array

_NEVER = float(jnp.finfo(jnp.float32).min)


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_positions_BT: Array,
    kv_positions_BS: Array,
    q_segments_BT: Array | None = None,
    kv_segments_BS: Array | None = None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks_N: Array | None = None,
) -> Array:
    """Grouped-query attention; query head n reads key/value head n // (N / K).

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values; their head size may differ from the keys'.
      q_positions_BT: int32 position of each query within its document.
      kv_positions_BS: int32 position of each key; negative marks an empty cache slot.
      q_segments_BT: int32 document of each query, 0 for padding; None is one document.
      kv_segments_BS: the same for keys.
      causal: keys after the query's position are hidden.
      window: keys at a distance of `window` or more are hidden; None hides none.
      scale: multiplies the scores.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      sinks_N: one logit a head that joins the softmax and carries no value.

    Returns:
      `[B, T, N, H]` in the queries' dtype with the values' head size; zeros where a query
      may attend nothing.
    """
    mask_BTS = allowed(
        q_positions_BT,
        kv_positions_BS,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        causal=causal,
        window=window,
    )
    return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS=mask_BTS, scale=scale, softcap=softcap, sinks_N=sinks_N)


def allowed(
    q_positions_BT: Array,
    kv_positions_BS: Array,
    *,
    q_segments_BT: Array | None,
    kv_segments_BS: Array | None,
    causal: bool,
    window: int | None,
) -> Array:
    """Bool `[B, T, S]`: which keys each query may attend."""
    q_pos, kv_pos = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    mask_BTS = kv_pos >= 0
    if causal:
        mask_BTS &= kv_pos <= q_pos
    if window is not None:
        mask_BTS &= jnp.abs(q_pos - kv_pos) < window
    if q_segments_BT is not None and kv_segments_BS is not None:
        mask_BTS &= (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]) & (kv_segments_BS[:, None, :] > 0)
    return jnp.broadcast_to(mask_BTS, (q_pos.shape[0], q_pos.shape[1], kv_pos.shape[2]))


def reference(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    mask_BTS: Array,
    scale: float,
    softcap: float | None = None,
    sinks_N: Array | None = None,
) -> Array:
    """The definition, with scores and softmax in float32; keys and values are never repeated."""
    num_kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], num_kv_heads, -1, q_BTNH.shape[3])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = mask_BTS[:, None, None]
    scores = jnp.where(mask, scores, _NEVER)
    peak = scores.max(axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1)[:, :, None, None]
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(peak)
    # The second mask keeps a row without any allowed key at zero, where exp(min - min) is 1.
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks_N is not None:
        total = total + jnp.exp(sinks - peak)
    weights = weights / jnp.where(total > 0, total, 1.0)
    o = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)
    return o.reshape(*q_BTNH.shape[:3], v_BSKH.shape[3]).astype(q_BTNH.dtype)
