"""Key/value caches: explicit values, given to the model and returned updated.

A cache is a nested dict `group_<i>/block_<j>/{entries..., positions}` with the layers of a
group stacked on a leading axis. Entries are `keys, values [B, K, S, H]`, heads first as
attention reads them (a step would else transpose the whole cache), or `latents [B, S, R]`
and `rotated_keys [B, S, H]` for latent attention. `positions [B, S]` holds the position of
every slot, -1 where empty, so that attention masks follow from data: rows may stand at
different positions, and a windowed layer keeps a ring of its last `window` positions. A layer that
uses the keys and values of the one before it has no entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gptjax.nn.config import AttentionConfig, BlockConfig, ModelConfig, uses_others_kv
from gptjax.nn.linear import compute_dtype
from gptjax.parallel.mesh import platform
from gptjax.types import Array

KVCache = Mapping[str, Any]


def init_cache(cfg: ModelConfig, *, batch_size: int, max_len: int, dtype: Any = None) -> KVCache:
    """An empty cache for positions below `max_len`.

    Args:
      max_len: a position at or past it is dropped by full-attention layers, so callers check.
      dtype: of the entries; None is the model's compute dtype.
    """
    dtype = compute_dtype(cfg.dtype, platform()) if dtype is None else dtype
    cache: dict[str, Any] = {}
    for i, group in enumerate(cfg.groups):
        cache[f"group_{i}"] = {
            f"block_{j}": _empty(block, (group.repeats, batch_size), max_len, dtype)
            for j, block in enumerate(group.pattern)
        }
    return cache


def _empty(block: BlockConfig, lead: tuple[int, int], max_len: int, dtype: Any) -> dict[str, Array]:
    cfg = block.attention
    if uses_others_kv(block):
        return {}
    has_ring = cfg.window is not None and platform() != "plain"
    slots = min(cfg.window, max_len) if has_ring else max_len  # type: ignore[type-var]
    if isinstance(cfg, AttentionConfig):
        shape = (*lead, cfg.num_kv_heads, slots, cfg.head_dim)
        entries = {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}
    else:
        entries = {
            "latents": jnp.zeros((*lead, slots, cfg.kv_latent), dtype),
            "rotated_keys": jnp.zeros((*lead, slots, cfg.rope_head_dim), dtype),
        }
    return {**entries, "positions": jnp.full((*lead, slots), -1, jnp.int32)}


def append(
    cache: Mapping[str, Array], entries: Mapping[str, Array], positions_BT: Array, *, ring: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Writes one layer's new entries.

    Args:
      cache: one layer's cache, without the stacked axis.
      entries: new values `[B, T, ...]`, by the names of the cache.
      positions_BT: their positions; a negative one is padding and is not written.
      ring: slot is `position % slots`, so that old positions are overwritten.

    Returns:
      `(cache, view)`: the updated cache, and the entries and positions to attend to. The view of a
      ring that takes several tokens at once is the old ring followed by the new tokens: the first
      of them still sees positions that the last has overwritten.
    """
    new = {**entries, "positions": positions_BT}
    slots = cache["positions"].shape[1]
    ring = ring and platform() != "plain"
    num_new = positions_BT.shape[1]
    kept = positions_BT >= 0
    if ring:
        kept &= positions_BT > positions_BT.max(axis=1, keepdims=True) - slots
        slot_BT = jnp.where(kept, positions_BT % slots, slots)
    else:
        slot_BT = jnp.where(kept, positions_BT, slots)
    if platform() == "plain":
        hit_BST = slot_BT[:, None] == jnp.arange(slots, dtype=jnp.int32)[:, None]
        view = {name: _selected(cache[name], value, hit_BST) for name, value in new.items()}
        return {name: _slots_first(value) for name, value in view.items()}, view
    row_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    updated = {}
    for name, value in new.items():
        slots_of_rows: tuple[Array, ...] = (row_B1, slot_BT)
        if value.ndim == 4:
            # Heads are indexed too: one update of a whole slice would become a copy of the cache.
            head_K = jnp.arange(value.shape[2])
            slots_of_rows = (row_B1[:, :, None], head_K, slot_BT[:, :, None])
        updated[name] = cache[name].at[slots_of_rows].set(value.astype(cache[name].dtype), mode="drop")
    if ring and num_new != 1:
        view = {
            name: jnp.concatenate([_slots_first(cache[name]), value.astype(cache[name].dtype)], axis=1)
            for name, value in new.items()
        }
        return updated, view
    return updated, {name: _slots_first(value) for name, value in updated.items()}


def _selected(cached: Array, value: Array, hit_BST: Array) -> Array:
    """`cached`, slots first, with the `value` of the token that hits a slot: a write that every format has."""
    if value.ndim == 2:
        new, kept = jnp.where(hit_BST, value[:, None], -1).max(axis=2), cached
    else:
        new = jnp.einsum("BST,BT...->BS...", hit_BST.astype(cached.dtype), value.astype(cached.dtype))
        kept = _slots_first(cached)
    written = hit_BST.any(axis=2).reshape(*hit_BST.shape[:2], *(1,) * (new.ndim - 2))
    return jnp.where(written, new, kept)


def _slots_first(cached: Array) -> Array:
    return cached.swapaxes(1, 2) if cached.ndim == 4 else cached
