"""Flags of pruning: what is taken out, and how much of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from gptjax.compress.prune import Method
    from gptjax.optim.sparsity import Sparsity

_METHOD = flags.DEFINE_enum(
    "method", "sparsegpt", ["magnitude", "wanda", "sparsegpt"], "How weights are chosen; sparsegpt also moves the rest."
)
_SPARSITY = flags.DEFINE_string("sparsity", None, "Fraction of weights that become 0, or n:m that stay, as 0.5 or 2:4.")
_WIDTH = flags.DEFINE_float("width", None, "Part of each feed-forward layer's hidden units that stays, as 0.75.")
_HEADS = flags.DEFINE_integer("heads", None, "Attention heads that stay, by groups that share a key/value head.")
_DEPTH = flags.DEFINE_integer("depth", None, "Layers that stay.")
_EXPERTS = flags.DEFINE_integer("experts", None, "Experts of a mixture that stay.")


def method() -> Method:
    """How single weights are chosen."""
    return _METHOD.value  # type: ignore[return-value]


def sparsity() -> Sparsity | None:
    """How many single weights go; None for none."""
    from gptjax.optim import sparsity as sparsity_lib

    return None if _SPARSITY.value is None else sparsity_lib.parse(_SPARSITY.value)


def cut() -> dict[str, float]:
    """What whole parts stay, in the order in which the others go: layers that go need not be cut first."""
    given = {"depth": _DEPTH.value, "experts": _EXPERTS.value, "heads": _HEADS.value, "width": _WIDTH.value}
    return {name: value for name, value in given.items() if value is not None}
