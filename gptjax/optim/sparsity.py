"""How many weights of a kernel stay, and which: those of the highest scores.

A kernel's rows are its outputs, each of all its inputs. A fraction is taken of the whole kernel or of each row; n:m
keeps n weights of every m consecutive inputs of a row, which is what sparse units of hardware read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from gptjax.types import Array

Scope = Literal["kernel", "row"]


@dataclass(frozen=True)
class Sparsity:
    """Attributes:
    fraction: of the weights that become 0.
    group: consecutive inputs of which each lot has that fraction; None: they may lie anywhere in the scope.
    """

    fraction: float
    group: int | None = None

    def __str__(self) -> str:
        return f"{self.fraction:g}" if self.group is None else f"{self.group - self.num_pruned}:{self.group}"

    @property
    def num_pruned(self) -> int:
        """Weights of a group that become 0."""
        assert self.group is not None, "only n:m has groups"
        return round(self.fraction * self.group)


def parse(text: float | str) -> Sparsity:
    """What `0.5` (half of the weights become 0) or `2:4` (2 weights of every 4 stay) means.

    Raises:
      ValueError: for anything else, and where all weights or none would stay.
    """
    if groups := re.fullmatch(r"\s*(\d+):(\d+)\s*", str(text)):
        kept, size = int(groups[1]), int(groups[2])
        if not 0 < kept < size:
            raise ValueError(f"sparsity={text}: expected n:m with 0 < n < m, n weights of every m that stay, as 2:4")
        return Sparsity(1.0 - kept / size, size)
    try:
        fraction = float(text)
    except (TypeError, ValueError):
        fraction = -1.0
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"sparsity={text}: expected above 0 and below 1, as 0.5, or n:m, as 2:4")
    return Sparsity(fraction)


def check(sparsity: Sparsity, num_inputs: int, *, path: str) -> None:
    """Raises:
    ValueError: naming a kernel whose inputs are not whole groups.
    """
    if sparsity.group is not None and num_inputs % sparsity.group:
        raise ValueError(
            f"{path}: sparsity={sparsity}: its {num_inputs} inputs are not a multiple of {sparsity.group}; "
            "expected an m that divides them, or a fraction"
        )


def kept(score: Array, sparsity: Sparsity, *, scope: Scope, fraction: Array | float | None = None) -> Array:
    """Which weights stay: exactly as many as are to, the first of equal ones going first.

    Args:
      score: `[..., outputs, inputs]`; leading dimensions count separate kernels.
      scope: what a fraction is taken of; n:m is always of a group.
      fraction: in place of the sparsity's own, on the way to it.
    """
    part = sparsity.fraction if fraction is None else fraction
    if sparsity.group is not None:
        grouped = score.reshape(*score.shape[:-1], -1, sparsity.group)
        num = sparsity.num_pruned if fraction is None else jnp.floor(part * sparsity.group + 1e-4)
        return (_rank(grouped) >= num).reshape(score.shape)
    lots = score if scope == "row" else score.reshape(*score.shape[:-2], -1)
    size = lots.shape[-1]
    num = int(part * size) if isinstance(part, float) else jnp.floor(part * size).astype(jnp.int32)
    return keep_highest(lots, num).reshape(score.shape)


def keep_highest(score: Array, num_dropped: Array | int) -> Array:
    """All of the last dimension but the `num_dropped` lowest, of equal ones the first."""
    # Sorting values alone is several times faster than sorting their positions along.
    last = jnp.take(jnp.sort(score, axis=-1), jnp.maximum(num_dropped, 1) - 1, axis=-1)[..., None]
    below, equal = score < last, score == last
    missing = num_dropped - below.sum(-1, keepdims=True)
    dropped = below | (equal & (jnp.cumsum(equal, axis=-1) <= missing))
    return ~dropped | (jnp.asarray(num_dropped) == 0)


def _rank(score: Array) -> Array:
    """The position of each of the few values of the last dimension in ascending order, equal ones as they come."""
    a, b = score[..., :, None], score[..., None, :]
    size = score.shape[-1]
    earlier = jnp.arange(size)[None, :] < jnp.arange(size)[:, None]
    return ((b < a) | ((b == a) & earlier)).sum(-1)
