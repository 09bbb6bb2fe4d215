"""Key/value caches: explicit values, given to the model and returned updated.

A cache is a nested dict `group_<i>/block_<j>/{entries..., positions}` with the layers of a
group stacked on a leading axis. Entries are `keys, values [B, K, S, H]`, heads first as
attention reads them (a step would else transpose the whole cache), or `latents [B, S, R]`
and `rotated_keys [B, S, H]` for latent attention. `positions [B, S]` holds the position of
every slot, -1 where empty, so that attention masks follow from data: rows may stand at
different positions, and a windowed layer keeps a ring of its last `window` positions. A layer that
uses the keys and values of the one before it has no entries.

In few bits (`ModelConfig.quant.kv_cache`) an entry is a `QuantizedArray` whose rows are those of one
head, or latent, of one position. A token is rounded once, when it comes, and everything reads it as
rounded: later tokens, the others of its call and itself, with a cache or without. So decoding equals the
forward pass, and what a forward pass scores is what a cache of that format is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.nn import quantized
from gptjax.nn.config import AttentionConfig, BlockConfig, ModelConfig, uses_others_kv
from gptjax.nn.formats import CacheFormat
from gptjax.nn.linear import compute_dtype
from gptjax.nn.quantized import Layout, QuantizedArray
from gptjax.parallel.mesh import platform
from gptjax.types import Array

KVCache = Mapping[str, Any]
_KEYS = ("keys", "rotated_keys")


def init_cache(cfg: ModelConfig, *, batch_size: int, max_len: int, dtype: Any = None) -> KVCache:
    """An empty cache for positions below `max_len`.

    Args:
      max_len: a position at or past it is dropped by full-attention layers, so callers check.
      dtype: of the entries where they are floats; None is the model's compute dtype.

    Raises:
      ValueError: for a format that the entries cannot have.
    """
    check(cfg)
    if cfg.kv_cache is not None and platform() == "plain":
        raise ValueError(f"kv_cache={cfg.kv_cache.dtype}: programs of elementary operations keep a cache of floats")
    dtype = compute_dtype(cfg.dtype, platform()) if dtype is None else dtype
    cache: dict[str, Any] = {}
    for i, group in enumerate(cfg.groups):
        cache[f"group_{i}"] = {
            f"block_{j}": _empty(block, (group.repeats, batch_size), max_len, dtype, cfg.kv_cache)
            for j, block in enumerate(group.pattern)
        }
    return cache


def check(cfg: ModelConfig) -> None:
    """Whether keys and values can have the format that the model asks for.

    Raises:
      ValueError: naming the entry and the size that does not fit.
    """
    if cfg.kv_cache is None:
        return
    for i, group in enumerate(cfg.groups):
        for j, block in enumerate(group.pattern):
            for name, shape in _entry_shapes(block, 1).items():
                layout, path = Layout(shape[-1:], ()), f"kv_cache of group_{i}/block_{j}, {name}"
                quantized.check(cfg.kv_cache.numbers(shape[-1]), layout, path=path)
                if cfg.kv_cache.keys == "rotated" and name in _KEYS and shape[-1] & (shape[-1] - 1):
                    raise ValueError(f"{path}: {shape[-1]} values, no power of two, are not rotated; add `:plain`")


def turned(x: Array, format: CacheFormat | None) -> Array:
    """Queries or keys `[..., H]` as they are multiplied with each other where keys are in this format.

    `x @ A` with the orthogonal `A[i, j] = (-1) ** (number of ones in i & j) / sqrt(H)` (Sylvester 1867).
    """
    if format is None or format.keys == "plain":
        return x
    index = np.arange(x.shape[-1])
    ones = np.array([[int(i & j).bit_count() for j in index] for i in index])
    matrix = np.where(ones % 2, -1, 1) / np.sqrt(len(index))
    return jnp.einsum("...h,hg->...g", x, jnp.asarray(matrix, x.dtype), preferred_element_type=jnp.float32).astype(
        x.dtype
    )


def attended(
    cache: Mapping[str, Any] | None,
    entries: Mapping[str, Array],
    positions_BT: Array,
    *,
    ring: bool,
    format: CacheFormat | None,
) -> tuple[dict[str, Any] | None, dict[str, Array]]:
    """Writes one layer's new entries, where there is a cache, and gives what to attend to.

    Args:
      cache: one layer's cache, without the stacked axis; None: the new tokens attend each other alone.
      entries: new values `[B, T, ...]`, by the names of the cache.
      positions_BT: their positions; a negative one is padding and is not written.
      ring: slot is `position % slots`, so that old positions are overwritten.
      format: what entries are rounded to; gradients pass through.

    Returns:
      `(cache, view)`: the updated cache, and the entries, slots first, and positions to attend to. The view of a
      ring that takes several tokens at once is the old ring followed by the new tokens: the first
      of them still sees positions that the last has overwritten.

    Raises:
      ValueError: if the cache was made in another format.
    """
    if cache is None:
        return None, {**_rounded(entries, format), "positions": positions_BT}
    _check_formats(cache, entries, format)
    (dtype,) = {value.dtype for value in entries.values()}
    written = entries if format is None else {name: _quantized(value, format) for name, value in entries.items()}
    return _append(cache, written, positions_BT, ring=ring, dtype=dtype)


def _rounded(entries: Mapping[str, Array], format: CacheFormat | None) -> Mapping[str, Array]:
    if format is None:
        return entries
    return {
        name: quantized.fake_quantize(value, format.numbers(value.shape[-1]), Layout(value.shape[-1:], ()))
        for name, value in entries.items()
    }


def _quantized(entry: Array, format: CacheFormat) -> QuantizedArray:
    width = entry.shape[-1]
    return quantized.quantize(entry, format=format.numbers(width), layout=Layout((width,), ()))


def _check_formats(cache: Mapping[str, Any], entries: Mapping[str, Array], format: CacheFormat | None) -> None:
    for name, value in entries.items():
        wanted = None if format is None else format.numbers(value.shape[-1])
        found = cache[name].format if quantized.is_quantized(cache[name]) else None
        if found != wanted:
            raise ValueError(
                f"the cache's {name} are {found or 'floats'}, the model's {wanted or 'floats'}; make the cache with "
                "nn.cache.init_cache and the same ModelConfig"
            )


def _entry_shapes(block: BlockConfig, slots: int) -> dict[str, tuple[int, ...]]:
    """Of one row's entries, heads first."""
    cfg = block.attention
    if uses_others_kv(block):
        return {}
    if isinstance(cfg, AttentionConfig):
        return dict.fromkeys(("keys", "values"), (cfg.num_kv_heads, slots, cfg.head_dim))
    return {"latents": (slots, cfg.kv_latent), "rotated_keys": (slots, cfg.rope_head_dim)}


def _empty(
    block: BlockConfig, lead: tuple[int, int], max_len: int, dtype: Any, format: CacheFormat | None
) -> dict[str, Any]:
    window = block.attention.window
    slots = max_len if window is None or platform() == "plain" else min(window, max_len)
    shapes = {name: (*lead, *shape) for name, shape in _entry_shapes(block, slots).items()}
    entries: dict[str, Any] = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    if format is not None:
        entries = {
            name: jax.tree.map(
                lambda part: jnp.zeros(part.shape, part.dtype),
                quantized.abstract(shape, format.numbers(shape[-1]), Layout(shape[-1:], ()), activations="none"),
            )
            for name, shape in shapes.items()
        }
    return {**entries, "positions": jnp.full((*lead, slots), -1, jnp.int32)} if entries else {}


def _append(
    cache: Mapping[str, Any], entries: Mapping[str, Any], positions_BT: Array, *, ring: bool, dtype: Any
) -> tuple[dict[str, Any], dict[str, Array]]:
    """As `attended`, of entries in the cache's format; `dtype` is that of the view of codes."""
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
    updated = {
        name: jax.tree.map(lambda cached, value: _written(cached, value, slot_BT), cache[name], new[name])
        for name in new
    }
    if ring and num_new != 1:
        old = {name: _slots_first(_values(cache[name], dtype)) for name in new}
        view = {
            name: jnp.concatenate([old[name], _values(value, dtype).astype(old[name].dtype)], axis=1)
            for name, value in new.items()
        }
        return updated, view
    return updated, {name: _slots_first(_values(value, dtype)) for name, value in updated.items()}


def _written(cached: Array, value: Array, slot_BT: Array) -> Array:
    row_B1 = jnp.arange(slot_BT.shape[0])[:, None]
    slots_of_rows: tuple[Array, ...] = (row_B1, slot_BT)
    if value.ndim == 4:
        # Heads are indexed too: one update of a whole slice would become a copy of the cache.
        head_K = jnp.arange(value.shape[2])
        slots_of_rows = (row_B1[:, :, None], head_K, slot_BT[:, :, None])
    return cached.at[slots_of_rows].set(value.astype(cached.dtype), mode="drop")


def _selected(cached: Array, value: Array, hit_BST: Array) -> Array:
    """`cached`, slots first, with the `value` of the token that hits a slot: a write that every format has."""
    if value.ndim == 2:
        new, kept = jnp.where(hit_BST, value[:, None], -1).max(axis=2), cached
    else:
        new = jnp.einsum("BST,BT...->BS...", hit_BST.astype(cached.dtype), value.astype(cached.dtype))
        kept = _slots_first(cached)
    written = hit_BST.any(axis=2).reshape(*hit_BST.shape[:2], *(1,) * (new.ndim - 2))
    return jnp.where(written, new, kept)


def _values(entry: Array | QuantizedArray, dtype: Any) -> Array:
    return quantized.dequantize_rows(entry, dtype) if isinstance(entry, QuantizedArray) else entry


def _slots_first(cached: Array) -> Array:
    return cached.swapaxes(1, 2) if cached.ndim == 4 else cached
