"""Which layers of a model use the same weights, as layer groups.

all        one layer for all (Dehghani et al. 2018, arXiv:1807.03819; ALBERT, arXiv:1909.11942)
cyclic     `unique` layers in turn, again and again: 0 1 2 0 1 2 (Takase & Kiyono 2021, arXiv:2104.06022, section 3)
adjacent   each layer several times in a row: 0 0 1 1 2 2 (MobileLLM-LS, arXiv:2402.14905, section 3.2)
sandwich   first and last are used once, those between are shared by neighbours; with 3 by all (Reid et al. 2021,
           arXiv:2101.00234, section 3.1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptjax import config
from gptjax.nn.config import BlockConfig, LayerGroup

Pattern = Literal["all", "cyclic", "adjacent", "sandwich"]


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """Weights that several layers use.

    Attributes:
      unique: layers that have weights of their own; None where the pattern says it: 1 for `all`, 3 for `sandwich`.
    """

    pattern: Pattern
    unique: int | None = None

    def __post_init__(self) -> None:
        if self.pattern == "all" and self.unique not in (None, 1):
            raise ValueError(f"pattern='all' has one layer's weights, got unique={self.unique}; leave it out")
        if self.pattern in ("cyclic", "adjacent") and self.unique is None:
            raise ValueError(
                f"pattern={self.pattern!r}: expected unique, the number of layers with weights of their own"
            )

    def num_unique(self, num_layers: int) -> int:
        """Layers with weights of their own.

        Raises:
          ValueError: if the pattern does not come out even.
        """
        unique = self.unique or (1 if self.pattern == "all" else 3)
        ends = 2 if self.pattern == "sandwich" else 0
        between, shared = num_layers - ends, unique - ends
        if not 1 <= shared <= between or between % shared:
            kind = f"the {between} layers between first and last" if ends else f"{num_layers} layers"
            fitting = [n + ends for n in range(1, between) if between % n == 0]
            raise ValueError(
                f"pattern={self.pattern!r}: unique={unique} does not divide {kind} evenly; expected "
                + (f"one of {', '.join(map(str, fitting))}" if fitting else "more layers")
            )
        return unique


def groups(blocks: Sequence[BlockConfig], cfg: SharingConfig) -> tuple[LayerGroup, ...]:
    """The layers `blocks` with shared weights.

    Raises:
      ValueError: if the pattern does not come out even, or layers that would share weights are not alike.
    """
    num, unique = len(blocks), cfg.num_unique(len(blocks))
    match cfg.pattern:
        case "all" | "cyclic":
            return (_shared(blocks, 0, num, unique),)
        case "adjacent":
            return _runs(blocks, 0, num, unique)
        case "sandwich":
            between = _runs(blocks, 1, num - 1, unique - 2)
            return (LayerGroup(pattern=(blocks[0],), repeats=1), *between, LayerGroup(pattern=(blocks[-1],), repeats=1))
    raise AssertionError(cfg.pattern)


def _runs(blocks: Sequence[BlockConfig], start: int, stop: int, num: int) -> tuple[LayerGroup, ...]:
    length = (stop - start) // num
    return tuple(_shared(blocks, first, first + length, 1) for first in range(start, stop, length))


def _shared(blocks: Sequence[BlockConfig], start: int, stop: int, num: int) -> LayerGroup:
    """Layers `start` to `stop` as `num` blocks in turn."""
    pattern, repeats = tuple(blocks[start : start + num]), (stop - start) // num
    for layer in range(start, stop):
        first = start + (layer - start) % num
        if blocks[layer] != blocks[first]:
            raise ValueError(
                f"layers {first + 1} and {layer + 1} would share weights, but are not alike: "
                f"{_differences(blocks, first, layer)}; choose a pattern in which only equal layers share"
            )
    return LayerGroup(pattern=pattern, repeats=repeats, shared=repeats > 1)


def _differences(blocks: Sequence[BlockConfig], a: int, b: int) -> str:
    return "; ".join(config.diff(blocks[a], blocks[b])[:3])
