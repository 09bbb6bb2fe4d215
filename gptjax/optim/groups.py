"""Which parameter gets which decay, learning rate and treatment.

A parameter's kind follows from its name and logical axes; the groups of the config, regexes
over its `/`-joined path, then set learning-rate scale, weight decay or freeze. Every
parameter belongs to exactly one group, the first that matches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gptjax.types import Params

Kind = Literal["matrix", "head", "embedding", "vector", "balance_bias"]
BATCH_AXES = ("layers", "experts")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """One parameter group.

    Attributes:
      pattern: regex that must match the whole path, such as `embed/.*` or `.*/(query|key)/kernel`.
      lr_scale: multiplies the learning rate.
      weight_decay: None is the optimizer's weight decay on matrices and the head, and none on
        embeddings, norms, biases and sinks; a number holds for every parameter of the group.
      freeze: parameters stay as they are and have no optimizer state.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    freeze: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is not a regular expression: {error}") from error
        if not self.lr_scale > 0.0:
            raise ValueError(f"lr_scale={self.lr_scale} of {self.pattern!r}: expected above 0 (freeze=True stops it)")
        if self.weight_decay is not None and not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay={self.weight_decay} of group {self.pattern!r}: expected at least 0")


EVERYTHING = (GroupConfig(pattern=".*"),)


@dataclass(frozen=True)
class MatrixLayout:
    """How an array is read as a batch of matrices: `[*batch, *inputs, *outputs]`.

    Attributes:
      num_batch_axes: leading axes over which matrices are independent (layers, experts).
      num_input_axes: axes after those that are merged into the rows; the rest are the columns.
    """

    num_batch_axes: int
    num_input_axes: int


@dataclass(frozen=True)
class Treatment:
    """What the optimizer does with one parameter; `layout` is None for vectors."""

    kind: Kind
    group: str
    lr_scale: float
    weight_decay: float
    freeze: bool
    layout: MatrixLayout | None


def assign(
    groups: Sequence[GroupConfig], abstract_params: Params, param_axes: Params, *, weight_decay: float
) -> dict[str, Treatment]:
    """Each parameter's treatment, by path, in the order of the tree.

    Args:
      groups: first match wins; `EVERYTHING` is the default.
      param_axes: like `abstract_params` with tuples of logical axis names as leaves.

    Raises:
      ValueError: if a parameter has no group, or a group has no parameter.
    """
    treatments: dict[str, Treatment] = {}
    uncovered, used = [], set()
    for path, axes in _axes_by_path(abstract_params, param_axes).items():
        number = next((i for i, group in enumerate(groups) if re.fullmatch(group.pattern, path)), None)
        if number is None:
            uncovered.append(path)
            continue
        used.add(number)
        treatments[path] = _treat(path, axes, groups[number], weight_decay)
    if uncovered:
        raise ValueError(
            f"groups: no pattern matches {_some(uncovered)}; patterns are {_some([g.pattern for g in groups])}. "
            "Add a last group with pattern '.*' for the rest."
        )
    idle = [group.pattern for i, group in enumerate(groups) if i not in used]
    if idle:
        raise ValueError(
            f"groups: {_some(idle)} got no parameter (a pattern must match a whole path, and the first match wins); "
            f"paths are {_some(list(treatments))}"
        )
    return treatments


def path_of(key_path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as the parameter's name."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def kind_of(path: str, axes: tuple[str | None, ...]) -> Kind:
    """What a parameter is, from its path and logical axes."""
    if path.rsplit("/", 1)[-1] == "balance_bias":
        return "balance_bias"
    if len(_merged(axes)) < 2:
        return "vector"
    if path.startswith("embed/"):
        return "embedding"
    return "head" if "vocab" in axes else "matrix"


def matrix_layout(path: str, axes: tuple[str | None, ...]) -> MatrixLayout:
    """Reads the axes as a batch of matrices, with heads and head_dim as one side.

    Only leading `layers` and `experts` are batch axes: a router `[D, E]` is one matrix.

    Raises:
      ValueError: if what is left is not two sides.
    """
    sides = _merged(axes)
    if len(sides) != 2:
        raise ValueError(
            f"{path}: logical axes {axes} leave {len(sides)} sides after the batch axes {BATCH_AXES}; "
            "expected 2 to make a matrix"
        )
    return MatrixLayout(num_batch_axes=_num_batch_axes(axes), num_input_axes=sides[0])


def _treat(path: str, axes: tuple[str | None, ...], group: GroupConfig, weight_decay: float) -> Treatment:
    kind = kind_of(path, axes)
    decay = group.weight_decay
    if decay is None:
        decay = weight_decay if kind in ("matrix", "head") else 0.0
    return Treatment(
        kind=kind,
        group=group.pattern,
        lr_scale=group.lr_scale,
        weight_decay=0.0 if kind == "balance_bias" else decay,
        freeze=group.freeze,
        layout=None if kind in ("vector", "balance_bias") else matrix_layout(path, axes),
    )


def _num_batch_axes(axes: tuple[str | None, ...]) -> int:
    return next((i for i, name in enumerate(axes) if name not in BATCH_AXES), len(axes))


def _merged(axes: tuple[str | None, ...]) -> list[int]:
    """How many axes each side has after the batch axes; (kv_)heads and head_dim are one side."""
    sides: list[int] = []
    previous = None
    for name in axes[_num_batch_axes(axes) :]:
        if sides and name == "head_dim" and previous in ("heads", "kv_heads"):
            sides[-1] += 1
        else:
            sides.append(1)
        previous = name
    return sides


def _axes_by_path(abstract_params: Params, param_axes: Params) -> dict[str, tuple[str | None, ...]]:
    found: dict[str, tuple[str | None, ...]] = {}

    def visit(key_path: tuple[Any, ...], leaf: Any, axes: tuple[str | None, ...]) -> None:
        path = path_of(key_path)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"{path}: logical axes {axes} do not name the dimensions of {list(leaf.shape)}")
        found[path] = axes

    jax.tree_util.tree_map_with_path(visit, abstract_params, param_axes)
    return found


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
