"""Kernels in two factors: `x @ kernel` is `(x @ reduce) @ expand`, of `rank * (inputs + outputs)` parameters.

In the tree of parameters a dict `{"reduce", "expand"}` stands where the kernel would; each factor is a kernel like any,
which is trained, sharded and stored in few bits by its own path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax

from gptjax.nn.formats import RankRule
from gptjax.nn.init import Declared
from gptjax.nn.quantized import Layout

# The first two are themselves factors, through which latent attention also goes the other way.
_WHOLE = re.compile(r"/(key_up|value_up|router)/")


@flax.struct.dataclass
class Factors:
    """A kernel in two factors, as products take it.

    Attributes:
      reduce: `[*lead, *in, rank]`.
      expand: `[*lead, rank, *out]`.
      num_lead: dimensions that count separate kernels.
    """

    reduce: Any
    expand: Any
    num_lead: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that they stand for."""
        return (*self.reduce.shape[:-1], *self.expand.shape[self.num_lead + 1 :])

    @property
    def ndim(self) -> int:
        return len(self.shape)


def specs(spec: str) -> tuple[str, str]:
    """The einsums with the two factors in place of the one with the kernel, inputs first."""
    x, kernel, y = spec.replace("->", ",").split(",")
    ins = "".join(dim for dim in kernel if dim in x and dim not in y)
    lead = "".join(dim for dim in kernel if dim in x and dim in y)
    outs = kernel.removeprefix(lead + ins)
    assert lead + ins + outs == kernel and not set(outs) & set(x), f"{spec}: not a product of rows and a kernel"
    kept = "".join(dim for dim in x if dim not in ins)
    return f"{x},{lead}{ins}r->{kept}r", f"{kept}r,{lead}r{outs}->{y}"


def rule_for(rules: Sequence[RankRule], path: str) -> RankRule | None:
    """The rule of the kernel at `path`; None if it is whole."""
    if not can_be_factored(path):
        return None
    return next((rule for rule in rules if re.search(rule.pattern, path)), None)


def can_be_factored(path: str) -> bool:
    """Whether a parameter is a kernel of a layer that is only multiplied with, inputs first."""
    return path.startswith("group_") and path.endswith("/kernel") and not _WHOLE.search(path)


def largest_rank(layout: Layout) -> int:
    """The largest with fewer parameters in the factors than in the kernel; 0 if there is none."""
    inputs, outputs = layout.num_inputs, math.prod(layout.out_shape)
    return (inputs * outputs - 1) // (inputs + outputs)


def check(rank: int, layout: Layout, *, path: str) -> None:
    """Raises:
    ValueError: if factors of this rank have no fewer parameters than the kernel, or there are none.
    """
    if not 1 <= rank <= largest_rank(layout):
        inputs, outputs = layout.num_inputs, math.prod(layout.out_shape)
        raise ValueError(
            f"{path}: rank={rank} of a kernel of {inputs} inputs and {outputs} outputs; expected 1 to "
            f"{largest_rank(layout)}, above which factors are larger than the kernel"
        )


def factored(rules: Sequence[RankRule], boxes: Any) -> Any:
    """A tree of `Declared` kernels with those that have a rule in two.

    Raises:
      ValueError: naming a kernel that cannot have such factors.
    """
    if not rules:
        return boxes

    def leaf(path: tuple, box: Declared) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = rule_for(rules, name)
        if rule is None or box.layout is None:
            return box
        check(rule.rank, box.layout, path=name)
        return _split(box, box.layout, rule.rank)

    return jax.tree_util.tree_map_with_path(leaf, boxes, is_leaf=lambda node: isinstance(node, Declared))


def _split(box: Declared, layout: Layout, rank: int) -> dict[str, Declared]:
    """Of equal size at the start: both keep the variance of what they are given, up to the gain of the kernel."""
    num_lead = len(box.names) - len(layout.in_shape) - len(layout.out_shape)
    lead, lead_names = box.value.shape[:num_lead], box.names[:num_lead]
    ins, outs = box.names[num_lead : num_lead + len(layout.in_shape)], box.names[num_lead + len(layout.in_shape) :]

    def factor(names: tuple, std: float, own: Layout) -> Declared:
        value = jax.ShapeDtypeStruct((*lead, *own.in_shape, *own.out_shape), box.value.dtype)
        return Declared(value, names=(*lead_names, *names), std=std, constant=box.constant, layout=own)  # type: ignore[call-arg]

    return {
        "reduce": factor((*ins, "latent"), layout.num_inputs**-0.5, Layout(layout.in_shape, (rank,))),
        "expand": factor(
            ("latent", *outs), box.std * (layout.num_inputs / rank) ** 0.5, Layout((rank,), layout.out_shape)
        ),
    }
