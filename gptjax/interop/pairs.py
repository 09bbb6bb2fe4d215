"""Rotations of neighbouring pairs, or of the halves of a head: the order of the dimensions that are rotated."""

from __future__ import annotations

import numpy as np


def to_halves(x: np.ndarray, *, num_heads: int = 1, axis: int = 0) -> np.ndarray:
    """`num_heads` heads along an axis, each with 0, 1, 2, 3, ... there: then with 0, 2, ..., 1, 3, ... ."""
    return _swapped(x, (num_heads, -1, 2), axis % x.ndim)


def to_pairs(x: np.ndarray, *, num_heads: int = 1, axis: int = 0) -> np.ndarray:
    """The inverse of `to_halves`."""
    return _swapped(x, (num_heads, 2, -1), axis % x.ndim)


def _swapped(x: np.ndarray, split: tuple[int, int, int], axis: int) -> np.ndarray:
    shape = (*x.shape[:axis], *split, *x.shape[axis + 1 :])
    return x.reshape(shape).swapaxes(axis + 1, axis + 2).reshape(x.shape)
