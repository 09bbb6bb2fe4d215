"""How one tensor on disk lies in the parameters here: moves of values, invertible to the bit.

A layout turns one tensor of theirs into one or several of ours and back. Shapes come from our
side, so that a file is checked before a value of it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptjax.interop.pairs import to_halves, to_pairs

Shape = tuple[int, ...]

_TILE = 64


class Layout(Protocol):
    """Both directions; `shapes` are those of our tensors."""

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape: ...
    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]: ...
    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray: ...


@dataclass(frozen=True)
class Same:
    """The same shape on both sides."""

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0]


@dataclass(frozen=True)
class Flat:
    """Theirs joins our dimensions: `in_dims` of them to the first, the rest to the last; `[D, N, H] -> [D, N*H]`.

    With `in_dims=0` theirs is a vector.
    """

    in_dims: int = 0

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        shape = shapes[0]
        outputs = math.prod(shape[self.in_dims :])
        return (math.prod(shape[: self.in_dims]), outputs) if self.in_dims else (outputs,)

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs.reshape(shapes[0])]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0].reshape(self.theirs_shape([ours[0].shape]))


@dataclass(frozen=True)
class Linear:
    """PyTorch's `[out, in]` for our `[in..., out...]` with `in_dims` input dimensions."""

    in_dims: int = 1

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        return Flat(self.in_dims).theirs_shape(shapes)[::-1]

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [_transposed(theirs).reshape(shapes[0])]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return _transposed(Flat(self.in_dims).to_theirs(ours))


@dataclass(frozen=True)
class Joined:
    """Several of ours, each in its own layout, one after the other along `axis` of theirs."""

    parts: tuple[Layout, ...]
    axis: int

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        parts = self._part_shapes(shapes)
        whole = list(parts[0])
        whole[self.axis] = sum(part[self.axis] for part in parts)
        return tuple(whole)

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([part[self.axis] for part in self._part_shapes(shapes)])[:-1]
        pieces = np.split(theirs, ends, axis=self.axis)
        return [part.to_ours(piece, [shape])[0] for part, piece, shape in zip(self.parts, pieces, shapes, strict=True)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(
            [part.to_theirs([value]) for part, value in zip(self.parts, ours, strict=True)], axis=self.axis
        )

    def _part_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [part.theirs_shape([shape]) for part, shape in zip(self.parts, shapes, strict=True)]


@dataclass(frozen=True)
class Alternating:
    """Two of ours of one shape, their last dimension taking turns in theirs (gpt-oss: gate, up, gate, ...)."""

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], 2 * shapes[0][-1])

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs[..., 0::2], theirs[..., 1::2]]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(ours, axis=-1).reshape(self.theirs_shape([ours[0].shape]))


@dataclass(frozen=True)
class JoinedHeads:
    """Several of ours `[D, N, H_i]`, one after the other within each of the N heads of PyTorch's `[out, in]`."""

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (shapes[0][1] * sum(shape[2] for shape in shapes), shapes[0][0])

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([shape[2] for shape in shapes])
        (joined,) = Linear().to_ours(theirs, [(*shapes[0][:2], int(ends[-1]))])
        return np.split(joined, ends[:-1], axis=2)

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return Linear().to_theirs([np.concatenate(ours, axis=2)])


@dataclass(frozen=True)
class PairedRotation:
    """Theirs rotates neighbouring pairs of the last `rotated` dimensions of a head, ours its halves.

    `inner` lays out the rest; our tensor has heads of `head_dim` in its last dimension, of which `offset` come
    before those that are rotated. A kernel `[..., D + rotated]` without heads is one head.
    """

    inner: Layout
    rotated: int
    offset: int = 0

    def theirs_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.inner.theirs_shape(shapes)

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [self._moved(self.inner.to_ours(theirs, shapes)[0], to_halves)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return self.inner.to_theirs([self._moved(ours[0], to_pairs)])

    def _moved(self, x: np.ndarray, move: Callable[..., np.ndarray]) -> np.ndarray:
        before, rotated, after = np.split(x, [self.offset, self.offset + self.rotated], axis=-1)
        return np.concatenate([before, move(rotated, axis=-1), after], axis=-1)


def _transposed(x_MN: np.ndarray) -> np.ndarray:
    """`x.T`, contiguous. By tiles that a cache holds: numpy's own copy takes three times as long."""
    if x_MN.dtype.kind == "V" or x_MN.dtype.itemsize == 2:
        bits = x_MN.view(f"u{x_MN.dtype.itemsize}")  # numpy copies its own dtypes faster
    else:
        bits = x_MN
    out = np.empty(x_MN.shape[::-1], bits.dtype)
    for row in range(0, x_MN.shape[0], _TILE):
        for column in range(0, x_MN.shape[1], _TILE):
            rows, columns = slice(row, row + _TILE), slice(column, column + _TILE)
            out[columns, rows] = bits[rows, columns].T
    return out.view(x_MN.dtype)
