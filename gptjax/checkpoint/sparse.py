"""Arrays with many zeros on disk: which values are not zero, a bit each, and those values.

An array `a/kernel` of shape `[..., n]` is then two, `a/kernel/nonzero_bitmap_n` (such as `_576`), uint8 with `n` bits
in as few bytes, the first in the lowest bit, and `a/kernel/nonzero_values`, in the order of the array. Shape and dtype
follow from them. Zero is what has no bit set, so -0.0 comes back as such, and the checksum of the values is that of the
array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gptjax.types import Array

VALUES = "/nonzero_values"
_BITMAP = "/nonzero_bitmap_"

_MIN_SIZE = 4096
_MAX_FRACTION = 0.9
"""Smaller arrays, and those that would not get smaller than this, are stored as they are."""


class Packed(NamedTuple):
    """An array as it is stored; see the module. `size` is its last dimension."""

    bitmap: np.ndarray
    values: np.ndarray
    size: int


def pack(array: np.ndarray) -> Packed:
    """The parts of an array of at least one dimension."""
    nonzero = _bits(array) != 0
    return Packed(np.packbits(nonzero, axis=-1, bitorder="little"), array[nonzero], array.shape[-1])


def unpack(packed: Packed) -> np.ndarray:
    """The inverse of `pack`.

    Raises:
      ValueError: if there are more or fewer values than bits.
    """
    nonzero = np.unpackbits(packed.bitmap, axis=-1, count=packed.size, bitorder="little").astype(bool)
    if int(nonzero.sum()) != packed.values.size:
        raise ValueError(f"{packed.values.size:,} values for {int(nonzero.sum()):,} bits of the bitmap")
    array = np.zeros(nonzero.shape, packed.values.dtype)
    array[nonzero] = packed.values
    return array


def bitmaps(stored: Iterable[str]) -> dict[str, str]:
    """Of the arrays that are stored in two parts, the paths of their bitmaps, from the paths of what is stored."""
    return {path.rpartition(_BITMAP)[0]: path for path in stored if _BITMAP in path}


def size_of(bitmap: str) -> int:
    """The last dimension of the array, from the path of its bitmap."""
    return int(bitmap.rpartition(_BITMAP)[2])


def shapes(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of the arrays, from those of what is stored."""
    found = {path: leaf for path, leaf in stored.items() if _BITMAP not in path and not path.endswith(VALUES)}
    for path, bitmap in bitmaps(stored).items():
        shape = (*stored[bitmap].shape[:-1], size_of(bitmap))
        found[path] = jax.ShapeDtypeStruct(shape, stored[path + VALUES].dtype)
    return found


def stored(flat: Mapping[str, Array]) -> dict[str, Any]:
    """What to write in place of the arrays: in two parts those that become smaller so, on the host."""
    candidates = {path: leaf for path, leaf in flat.items() if _may_be_packed(leaf)}
    counts = jax.device_get({path: _count(leaf) for path, leaf in candidates.items()})
    chosen = {path for path, count in counts.items() if 0 < count and _pays(candidates[path], int(count))}
    if elsewhere := {path for path in chosen if not flat[path].is_fully_addressable}:
        logging.info("%d arrays with many zeros are stored dense: they are spread over hosts.", len(elsewhere))
    found: dict[str, Any] = {}
    for path, leaf in flat.items():
        if path in chosen - elsewhere:
            packed = pack(np.asarray(leaf))
            found[f"{path}{_BITMAP}{packed.size}"], found[path + VALUES] = packed.bitmap, packed.values
        else:
            found[path] = leaf
    return found


def _may_be_packed(leaf: Array) -> bool:
    return leaf.ndim >= 2 and leaf.size >= _MIN_SIZE


def _pays(leaf: Array, count: int) -> bool:
    return count * leaf.dtype.itemsize + leaf.size / 8 <= _MAX_FRACTION * leaf.size * leaf.dtype.itemsize


@jax.jit
def _count(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    # By rows first: an int32 holds no more than 2^31 values.
    return jnp.sum(jnp.count_nonzero(leaf, axis=-1).astype(jnp.float32))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


class Slices:
    """Slices of a packed array, each read without the others.

    Args:
      bitmap, values: arrays that are read when they are indexed and `read` is called on what that gives.
      size: the array's last dimension.
      sliced_dims: how many leading dimensions a slice has an index for.
    """

    def __init__(self, bitmap: Any, values: Any, *, size: int, sliced_dims: int) -> None:
        self._bitmap, self._values, self._size = bitmap, values, size
        self._lead = tuple(bitmap.shape[:sliced_dims])
        self._starts: np.ndarray | None = None

    def read(self, index: tuple[int, ...]) -> np.ndarray:
        """`array[index]`."""
        starts = self._found_starts()
        number = int(np.ravel_multi_index(index, self._lead)) if index else 0
        values = self._values[int(starts[number]) : int(starts[number + 1])].read().result()
        return unpack(Packed(self._bitmap[index].read().result(), values, self._size))

    def _found_starts(self) -> np.ndarray:
        """Where the values of each slice begin: after those of all before it, which the bitmap counts."""
        if self._starts is None:
            counts = []
            for index in np.ndindex(self._lead):
                counts.append(int(np.unpackbits(self._bitmap[index].read().result()).sum()))
            self._starts = np.concatenate([[0], np.cumsum(counts)])
            assert len(self._starts) == math.prod(self._lead) + 1, "one slice an index"
        return self._starts
