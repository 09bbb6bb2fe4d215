"""What general-purpose compressors need on the same bytes: the figures to be beaten.

A language model's loss is a compressed size (Shannon 1948; Delétang et al. 2024,
arXiv:2309.10668), so both are given in bits per byte of the held-out text.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import Any

from gptjax.data.store import Store

_MIN_DICT_BYTES = 64 << 20  # what xz -9 uses


def bits_per_byte(heldout: bytes, *, train: bytes | None = None) -> dict[str, float]:
    """Compressed bits per byte of `heldout` by `gzip -9`, `bz2 -9` and `xz -9e`.

    With `train`, also `xz_given_train`: what the held-out text adds to the compressed training
    text, `size(xz(train + heldout)) - size(xz(train))`, with a dictionary that holds both.

    Raises:
      ValueError: if `heldout` is empty.
    """
    if not heldout:
        raise ValueError("bits per byte of nothing: the held-out text is empty")
    sizes = {
        "gzip": len(gzip.compress(heldout, compresslevel=9)),
        "bz2": len(bz2.compress(heldout, compresslevel=9)),
        "xz": _xz_size(heldout),
    }
    if train is not None:
        dict_bytes = max(_MIN_DICT_BYTES, len(train) + len(heldout))
        sizes["xz_given_train"] = _xz_size(train + heldout, dict_bytes) - _xz_size(train, dict_bytes)
    return {name: 8 * size / len(heldout) for name, size in sizes.items()}


def text_of(store: Store) -> bytes:
    """The text of a token store, its documents joined: what the compressors are given."""
    decode = store.tokenizer.decode_bytes
    return b"".join(decode(store.document(index).tolist()) for index in range(store.num_documents))


def _xz_size(data: bytes, dict_bytes: int = _MIN_DICT_BYTES) -> int:
    filters: list[dict[str, Any]] = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(dict_bytes, 3 << 29)}
    ]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))
