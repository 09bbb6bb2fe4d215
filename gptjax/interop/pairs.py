"""Rows of a projection for rotations of neighbouring pairs, or of the halves of a head."""

from __future__ import annotations

import numpy as np


def to_halves(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    """`[N*H, ...]` whose heads have rows 0, 1, 2, 3, ...: rows 0, 2, ..., 1, 3, ... of each."""
    return _swapped(rows, (num_heads, -1, 2))


def to_pairs(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    """The inverse of `to_halves`."""
    return _swapped(rows, (num_heads, 2, -1))


def _swapped(rows: np.ndarray, split: tuple[int, int, int]) -> np.ndarray:
    rest = rows.shape[1:]
    return rows.reshape(*split, *rest).swapaxes(1, 2).reshape(rows.shape)
