"""What a state is made of: the parameter table and the bytes on each device, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from gptjax.nn.cost import Counts
from gptjax.optim.groups import path_of
from gptjax.train.state import TrainState


class Row(NamedTuple):
    """One array: `device_bytes` is what the fullest device holds of it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    partition: str
    num_values: int
    device_bytes: int


def rows(shapes: Any, shardings: Any) -> Iterator[Row]:
    """A row for each leaf of a tree of shapes and a matching tree of shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shard = sharding.shard_shape(leaf.shape)
        partition = ", ".join(_entry_text(entry) for entry in getattr(sharding, "spec", ()))
        device_bytes = math.prod(shard) * leaf.dtype.itemsize
        yield Row(path_of(path), leaf.shape, leaf.dtype.name, partition, math.prod(leaf.shape), device_bytes)


def table(shapes: TrainState, shardings: TrainState, counts: Counts) -> str:
    """The parameters with their layouts, and the bytes that the state takes on each device."""
    params = list(rows(shapes.params, shardings.params))
    cells = [("parameter", "shape", "partition", "numbers")]
    cells += [(row.path, str(list(row.shape)), f"({row.partition})", f"{row.num_values:,}") for row in params]
    cells.append(("all", "", "", f"{counts.total:,}"))
    if counts.active < counts.total:
        cells.append(("of which a token uses", "", "", f"{counts.active:,}"))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths)) + f"  {line[3]:>16}" for line in cells]  # noqa: B905
    state_bytes = sum(row.device_bytes for row in rows(shapes.opt_state, shardings.opt_state))
    param_bytes = sum(row.device_bytes for row in params)
    lines.append(
        f"on each device: parameters {bytes_text(param_bytes)}, optimizer state {bytes_text(state_bytes)}, "
        f"gradients {bytes_text(param_bytes)}, besides activations"
    )
    return "\n".join(lines)


def bytes_text(count: float) -> str:
    """`1.5 GiB` and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _entry_text(entry: Any) -> str:
    return "-" if entry is None else entry if isinstance(entry, str) else "+".join(entry)
