"""Flags of pruning: what is taken out, and how much of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from gptjax.compress.prune import Method
    from gptjax.compress.sparsegpt import SparseGPT
    from gptjax.compress.structured import Cut
    from gptjax.optim.sparsity import Sparsity

_METHOD = flags.DEFINE_enum(
    "method", "sparsegpt", ["magnitude", "wanda", "sparsegpt"], "How weights are chosen; sparsegpt also moves the rest."
)
_SPARSITY = flags.DEFINE_string("sparsity", None, "Fraction of weights that become 0, or n:m that stay, as 0.5 or 2:4.")
_WIDTH = flags.DEFINE_float(
    "width", None, "Part of each feed-forward layer's hidden units that stays, as 0.75; multiples of 8 do."
)
_HEADS = flags.DEFINE_integer("heads", None, "Attention heads that stay, by groups that share a key/value head.")
_DEPTH = flags.DEFINE_integer("depth", None, "Layers that stay.")
_EXPERTS = flags.DEFINE_integer("experts", None, "Experts of a mixture that stay.")
_SURPLUS = flags.DEFINE_enum("surplus_experts", "dropped", ["dropped", "merged"], "What becomes of other experts.")
_AIM = flags.DEFINE_float("aim", None, "sparsegpt: how far, 0 to 1, it aims at the original's outputs; 0 as published.")
_COSTS = flags.DEFINE_enum(
    "costs", None, ["outputs", "loss"], "sparsegpt: of a weight, in its kernel's outputs, as published, or the loss."
)
_REFIT = flags.DEFINE_integer("refit_steps", None, "sparsegpt: of fitting what stays; 0 as published.", lower_bound=0)
_DAMPING = flags.DEFINE_float("damping", None, "sparsegpt: part of the Hessian's mean diagonal added to it.")


def method() -> Method:
    """How single weights are chosen."""
    return _METHOD.value  # type: ignore[return-value]


def sparsity() -> Sparsity | None:
    """How many single weights go; None for none."""
    from gptjax.optim import sparsity as sparsity_lib

    return None if _SPARSITY.value is None else sparsity_lib.parse(_SPARSITY.value)


def config() -> SparseGPT | None:
    """Of sparsegpt; None for the other methods.

    Raises:
      ValueError: for a flag that the method does not read.
    """
    from gptjax.compress.sparsegpt import SparseGPT

    holders = {"aim": _AIM, "costs": _COSTS, "refit_steps": _REFIT, "damping": _DAMPING}
    given: dict[str, Any] = {name: holder.value for name, holder in holders.items() if holder.value is not None}
    if _SPARSITY.value is None and _METHOD.present:
        raise ValueError(f"--method={_METHOD.value} is of single weights: give --sparsity, or leave it out")
    if _SPARSITY.value is not None and _METHOD.value == "sparsegpt":
        return SparseGPT(**given)
    if given:
        why = "there is no --sparsity" if _SPARSITY.value is None else f"--method={_METHOD.value} does not read it"
        raise ValueError(f"--{next(iter(given))} has no effect: {why}; leave it out")
    return None


def way(name: str) -> Cut:
    """What takes out the parts that `cut` calls so."""
    from gptjax.compress import structured

    return structured.METHODS["merged_experts" if name == "experts" and _SURPLUS.value == "merged" else name]


def cut() -> dict[str, float]:
    """What whole parts stay, in the order in which the others go: layers that go need not be cut first."""
    if _EXPERTS.value is None and _SURPLUS.present:
        raise ValueError("--surplus_experts has no effect without --experts; leave it out")
    given = {"depth": _DEPTH.value, "experts": _EXPERTS.value, "heads": _HEADS.value, "width": _WIDTH.value}
    return {name: value for name, value in given.items() if value is not None}
