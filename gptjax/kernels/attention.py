"""Softmax attention over positions, documents and windows.

    o[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]    over the s that t may attend

Masks are data: which pairs are allowed follows from positions and segment ids, so packed
rows, padded caches and ring buffers are one code path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from gptjax.kernels import attention_fused
from gptjax.kernels.attend import attend
from gptjax.parallel import rules
from gptjax.parallel.mesh import platform
from gptjax.types import Array

# Queries are cut into up to this many chunks, each with the keys that it can see: 8 chunks do 9/16 of
# the work of one. Chunks below this length cost more in overhead than they save.
_MAX_CHUNKS = 8
_MIN_CHUNK = 128
# In `reference`, as in `attend`: hidden scores, a maximum below that of any model's scores, and no division by zero.
_NEVER, _LOWEST_PEAK, _SMALLEST_TOTAL = float(jnp.finfo(jnp.float32).min), -1e30, 1e-30


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

    Giving the very same array for both positions promises self-attention in order: query and
    key t are one token, and within a document positions go up by one a token. Only then can
    the hidden part of the scores be skipped, and the fused kernels of accelerators be used.

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
    in_order = q_positions_BT is kv_positions_BS

    def mask(queries: slice, keys: slice) -> Array:
        return allowed(
            q_positions_BT[:, queries],
            kv_positions_BS[:, keys],
            q_segments_BT=None if q_segments_BT is None else q_segments_BT[:, queries],
            kv_segments_BS=None if kv_segments_BS is None else kv_segments_BS[:, keys],
            causal=causal,
            window=window,
        )

    request = attention_fused.Request(
        in_order=in_order, causal=causal, window=window, scale=scale, softcap=softcap, sinks_N=sinks_N
    )
    fused = attention_fused.pick(platform(), request, q_BTNH, k_BSKH, v_BSKH)
    if fused is not None:
        everything = slice(None)
        return fused(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, lambda: mask(everything, everything))
    return _plain(request, q_BTNH, k_BSKH, v_BSKH, mask)


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
    mask_BTS = jnp.broadcast_to(kv_pos >= 0, (q_pos.shape[0], q_pos.shape[1], kv_pos.shape[2]))
    if causal:
        mask_BTS &= kv_pos <= q_pos
    if window is not None:
        mask_BTS &= jnp.abs(q_pos - kv_pos) < window
    if q_segments_BT is not None and kv_segments_BS is not None:
        kv_seg = kv_segments_BS[:, None, :]
        mask_BTS &= (q_segments_BT[:, :, None] == kv_seg) & (kv_seg > 0)
    return mask_BTS


def reference(request: attention_fused.Request, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """The formula alone, in operations that every other format has."""
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_BSKH.shape[2], -1, q_BTNH.shape[3])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * request.scale
    if request.softcap is not None:
        scores = request.softcap * jnp.tanh(scores / request.softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, _NEVER)
    peak = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST_PEAK)
    if request.sinks_N is not None:
        sinks = request.sinks_N.astype(jnp.float32).reshape(k_BSKH.shape[2], -1)[:, :, None, None]
        peak = jnp.maximum(peak, sinks)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    if request.sinks_N is not None:
        total = total + jnp.exp(sinks - peak)
    weights = (weights / jnp.maximum(total, _SMALLEST_TOTAL)).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return o_BTKGH.reshape(*q_BTNH.shape[:3], v_BSKH.shape[3]).astype(q_BTNH.dtype)


def _plain(
    request: attention_fused.Request, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Callable[[slice, slice], Array]
) -> Array:
    if platform() == "plain":
        return reference(request, q_BTNH, k_BSKH, v_BSKH, mask(slice(None), slice(None)))
    # Heads first, once: every chunk then reads its keys and values as they lie.
    q_BKTGH = jnp.moveaxis(q_BTNH.reshape(*q_BTNH.shape[:2], k_BSKH.shape[2], -1, q_BTNH.shape[3]), 2, 1)
    k_BKSH, v_BKSH = jnp.moveaxis(k_BSKH, 2, 1), jnp.moveaxis(v_BSKH, 2, 1)
    sinks_KG = None if request.sinks_N is None else request.sinks_N.reshape(k_BKSH.shape[1], -1)
    spans = _chunks(q_BTNH.shape[1], in_order=request.in_order and request.causal, window=request.window)
    # Split and joined, not sliced: the gradient of a slice is padded to the whole before it is added.
    q_parts, k_parts, v_parts = (jnp.split(x, len(spans), axis=2) for x in (q_BKTGH, k_BKSH, v_BKSH))
    chunks = []
    for i, (first, queries, keys) in enumerate(spans):
        k, v = (_join(parts[first : i + 1]) for parts in (k_parts, v_parts))
        operands = q_parts[i], k, v, mask(queries, keys), sinks_KG
        chunks.append(attend(*operands, scale=request.scale, softcap=request.softcap))
    return jnp.moveaxis(_join(chunks), 1, 2).reshape(*q_BTNH.shape[:3], v_BSKH.shape[3])


def _chunks(length: int, *, in_order: bool, window: int | None) -> list[tuple[int, slice, slice]]:
    """For each chunk of queries: the first chunk of keys that it can see, its positions, and those of its keys."""
    num = next(n for n in range(_MAX_CHUNKS, 0, -1) if n == 1 or (length % n == 0 and length // n >= _MIN_CHUNK))
    mesh = rules.current_mesh()
    # A sequence that is split over the mesh has all chunks at work at once; cutting it again would move it.
    if not in_order or num == 1 or (mesh is not None and rules.axis_size(mesh, "act_length") > 1):
        return [(0, slice(None), slice(None))]
    size = length // num
    starts = range(0, length, size)
    firsts = [0 if window is None else max(0, start - window + 1) // size for start in starts]
    return [
        (first, slice(start, start + size), slice(first * size, start + size))
        for first, start in zip(firsts, starts, strict=True)
    ]


def _join(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
