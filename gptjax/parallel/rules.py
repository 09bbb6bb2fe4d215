"""The one partitioning table: which mesh axes split each logical axis.

Modules name the axes of their arrays in words (`embed`, `heads`, `act_batch`); this table
alone says where they go. A mesh axis of size 1 splits nothing, so one table serves data,
fully-sharded, tensor, context and expert parallelism: the mesh's shape selects among them.

Reading the standard table for a query kernel `[embed, heads, head_dim]` on a mesh with
fsdp=4 and tensor=2: `embed` is cut in 4 by `fsdp` (gathered just before use, layer by layer),
`heads` in 2 by `tensor` (each device computes its own heads), `head_dim` not at all.

Parameters: `embed` is a kernel's d_model side, `layers` the stacked axis of scanned layers.
Activations: `act_length` splits the sequence; keys and values carry `act_kv_length`, which
stays whole, so context parallelism gathers them; `act_residual` is the sequence axis of the
residual stream between blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Names = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

STANDARD: Rules = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "latent": (),
    "layers": (),
    "act_batch": ("data", "fsdp", "expert"),
    "act_length": ("context",),
    "act_kv_length": (),
    "act_residual": ("context",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "act_experts": ("expert",),
}

PRESETS: Mapping[str, Rules] = {
    "standard": STANDARD,
    # Megatron's sequence parallelism (arXiv:2205.05198): norms and residuals are split over
    # `tensor` too, which trades each all-reduce for a reduce-scatter and an all-gather.
    "sequence": {**STANDARD, "act_residual": ("context", "tensor")},
    # Whole experts on more devices in place of slices of experts: fewer, larger products.
    "expert_wide": {**STANDARD, "experts": ("expert", "tensor")},
}

# Contexts that are part of `jax.jit`'s cache key: a function that was traced under one table is not
# taken for its trace under another.
_active = jax.make_user_context("standard")
_unsplit = jax.make_user_context(False)


def use(preset: str) -> AbstractContextManager[None]:
    """Traces what is inside under the table `PRESETS[preset]`."""
    if preset not in PRESETS:
        raise ValueError(f"mesh.rules={preset!r}: expected one of {', '.join(PRESETS)}")
    return _active(preset)


def unsplit() -> AbstractContextManager[None]:
    """Traces what is inside as if no mesh were set: to find shapes with a batch too small to split."""
    return _unsplit(True)


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that split the logical axis `name`, whatever their size."""
    rules = PRESETS[_active.value]
    if name not in rules:
        raise ValueError(f"unknown logical axis {name!r}: expected one of {', '.join(rules)}")
    return rules[name]


def spec(*names: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names; None is never split.

    A mesh axis splits at most one dimension: the first that asks for it has it.
    """
    used: set[str] = set()
    entries = []
    for name in names:
        axes = tuple(axis for axis in (mesh_axes(name) if name else ()) if axis not in used)
        used.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def fitted_spec(mesh: Mesh, names: Names, shape: tuple[int, ...]) -> PartitionSpec:
    """`spec(*names)` without the mesh axes that do not divide their dimension of `shape` evenly."""
    return _fit(mesh, spec(*names), shape)


def current_mesh() -> Mesh | None:
    """The mesh set by `jax.set_mesh`, or None where none is set or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or _unsplit.value else mesh  # type: ignore[return-value]


def axis_size(mesh: Mesh, name: str) -> int:
    """The number of parts that `mesh` cuts the logical axis `name` into."""
    size = 1
    for axis in mesh_axes(name):
        size *= mesh.shape[axis]
    return size


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the layout of an activation; without a mesh it returns `x` unchanged."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} logical axes {names} for an array of shape {x.shape}")
    wanted = spec(*names)
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _fit(mesh, wanted, x.shape)))


def sharding(mesh: Mesh, names: Names, shape: tuple[int, ...]) -> NamedSharding:
    """The layout of one parameter. Mesh axes that do not divide a dimension are left out of it."""
    return NamedSharding(mesh, _fit(mesh, spec(*names), shape, warn=str(names)))


def tree_shardings(mesh: Mesh, axes_tree: Any, shapes_tree: Any) -> Any:
    """`sharding` over a tree of logical axes and a matching tree of arrays or shapes."""
    return jax.tree.map(
        lambda names, leaf: sharding(mesh, names, leaf.shape), axes_tree, shapes_tree, is_leaf=_is_names
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of every `[B, T]` field of a batch."""
    return NamedSharding(mesh, spec("act_batch", "act_length"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of scalars and small state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_each_device(tree: Any) -> Any:
    """Arrays whole on every device of the mesh in use: for loops whose every turn would else send parts around."""
    return tree if current_mesh() is None else jax.device_put(tree, replicated(jax.sharding.get_mesh()))


def state_shardings(mesh: Mesh, abstract_state: Any, axes_tree: Any, shapes_tree: Any) -> Any:
    """Layouts of a training state, found by matching paths and shapes with the parameters'.

    A leaf whose path ends in a parameter's path has that parameter's layout where the shapes
    agree (moments, averages), the layout less the dropped dimensions where it is a
    factored statistic (Adafactor), and is replicated otherwise.
    """
    names = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(axes_tree, is_leaf=_is_names)}
    shapes = {_keys(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_tree)}

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for start in range(len(keys)):
            if (tail := keys[start:]) in names:
                kept = _kept_axes(names[tail], shapes[tail], leaf.shape)
                return sharding(mesh, kept, leaf.shape) if kept is not None else replicated(mesh)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, abstract_state)


def _kept_axes(names: Names, shape: tuple[int, ...], state_shape: tuple[int, ...]) -> Names | None:
    """The names of the dimensions of `shape` that remain in `state_shape`, a subsequence of it."""
    if shape == state_shape:
        return names
    kept, dim = [], 0
    for size in state_shape:
        while dim < len(shape) and shape[dim] != size:
            dim += 1
        if dim == len(shape):
            return None
        kept.append(names[dim])
        dim += 1
    return tuple(kept)


def _fit(mesh: Mesh, wanted: PartitionSpec, shape: tuple[int, ...], warn: str = "") -> PartitionSpec:
    """`wanted` without the mesh axes that do not divide their dimension evenly."""
    entries: list[Any] = []
    for entry, size in zip(wanted, shape, strict=True):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        kept: list[str] = []
        for axis in axes:
            parts = mesh.shape[axis]
            if size % parts == 0:
                kept.append(axis)
                size //= parts
            elif warn:
                _log_once(f"{warn} {shape}: {size} is not divisible by mesh axis {axis}={parts}; replicated over it")
        entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return PartitionSpec(*entries)


@functools.cache
def _log_once(message: str) -> None:
    logging.info("%s", message)


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
