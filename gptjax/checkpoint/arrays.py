"""Trees of arrays on disk: their names, checksums, and reading them onto any mesh and dtype.

A tree is stored as nested dicts of its path names, whatever its Python types (optax's
NamedTuples included), so a checkpoint can be read without the code that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gptjax.checkpoint import sparse, stream
from gptjax.types import Array

_CAST_BATCH_FRACTION = 8
"""Arrays that change dtype are read in batches of an eighth of the whole, in their stored dtype."""

_STACK_BYTES = 64 << 20
"""Stacks of layers over this size are stored a layer apart."""


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves by `/`-joined path, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from `/`-joined paths."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def checksums(flat: Mapping[str, Array]) -> dict[str, int]:
    """The sum modulo 2^32 of each array's elements, read as unsigned integers of their bits.

    It does not depend on the sharding, costs one pass over memory where the array lives, and
    any single damaged value changes it; the file format itself has none for values.
    """
    sums = jax.device_get([_bit_sum(leaf) for leaf in flat.values()])
    return {path: int(total) for path, total in zip(flat, sums, strict=True)}


@jax.jit
def _bit_sum(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    else:
        x = x.astype(jnp.int32)
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)


def as_array(path: str, value: Any) -> Array:
    """The value as a JAX array of the same dtype.

    Raises:
      ValueError: if JAX would change it (64-bit numpy arrays).
    """
    array = jnp.asarray(value)
    if isinstance(value, np.ndarray) and array.dtype != value.dtype:
        raise ValueError(f"{path}: {value.dtype} would be saved as {array.dtype}; convert it first")
    return array


def handler() -> ocp.PyTreeCheckpointHandler:
    """Reads and writes one item. Weights do not compress, and trying costs CPU during training."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def save_args(flat: Mapping[str, Array]) -> dict[str, ocp.SaveArgs]:
    """How each array is cut into pieces that are read whole: a large stack of layers by layer."""
    # A stack in one piece would have to fit in the memory of whoever wants one layer of it.
    by_layer, in_pieces = (
        ocp.SaveArgs(chunk_byte_size=_STACK_BYTES, shard_axes=(0,)),
        ocp.SaveArgs(chunk_byte_size=_STACK_BYTES),
    )

    def args(path: str, leaf: Any) -> ocp.SaveArgs:
        if path.endswith(sparse.VALUES) and leaf.nbytes > _STACK_BYTES:
            return in_pieces
        return by_layer if _is_large_stack(path, leaf) else ocp.SaveArgs()

    return {path: args(path, leaf) for path, leaf in flat.items()}


def _is_large_stack(path: str, leaf: Array) -> bool:
    return path.startswith("group_") and leaf.ndim > 2 and leaf.shape[0] < leaf.shape[1] and leaf.nbytes > _STACK_BYTES


def stored_shapes(directory: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays in an item's directory, by path."""
    return sparse.shapes(_files(directory))


def _files(directory: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """As `stored_shapes`, of what is really there: arrays with many zeros are in two parts."""
    tree = handler().metadata(directory).tree
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(tree).items()}


def mismatches(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """One line per array that is missing, unexpected, or of another shape or kind of dtype."""
    for path, leaf in wanted.items():
        if path not in stored:
            yield f"{path}: expected {list(leaf.shape)} from the config, not there"
        elif tuple(leaf.shape) != tuple(stored[path].shape):
            yield f"{path}: expected {list(leaf.shape)} from the config, got {list(stored[path].shape)}"
        elif leaf.dtype != stored[path].dtype and not (_is_float(leaf) and _is_float(stored[path])):
            yield f"{path}: expected {leaf.dtype} from the config, got {stored[path].dtype}"
    for path in stored.keys() - wanted.keys():
        yield f"{path}: not in the config, got {list(stored[path].shape)}"


def read(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], *, expected_checksums: Mapping[str, int]
) -> dict[str, Array]:
    """The arrays of an item, each with the wanted sharding and dtype, verified.

    Args:
      wanted: by path; must fit `stored_shapes`. A leaf without a sharding goes to the first device.
      expected_checksums: of the stored values; paths that it lacks are not verified.

    Raises:
      ValueError: naming the arrays that are not what was saved.
    """
    files = _files(directory)
    stored, packed = sparse.shapes(files), sparse.bitmaps(files)
    # In the stored dtype first: a checksum cannot be verified after a cast.
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored[path].dtype, sharding=_sharding(leaf))
        for path, leaf in wanted.items()
    }
    found: dict[str, Array] = {}
    for batch in _batches(placed, wanted):
        dense = {path: leaf for path, leaf in batch.items() if path not in packed}
        values = _read_batch(directory, dense) if dense else {}
        for path in batch.keys() - dense.keys():
            values[path] = _read_packed(directory, path, packed[path], batch[path].sharding, expected_checksums)
        damaged = [p for p, total in checksums(values).items() if total != expected_checksums.get(p, total)]
        if damaged:
            raise ValueError(f"{', '.join(damaged[:5])}: the values are not those that were saved (checksum)")
        for path in batch:
            value = values.pop(path)
            found[path] = value if value.dtype == wanted[path].dtype else value.astype(wanted[path].dtype)
    return {path: found[path] for path in wanted}


def _read_batch(directory: epath.Path, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    tree = nest(batch)
    restored = handler().restore(
        directory,
        args=ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        ),
    )
    return flatten(restored)


def _read_packed(
    directory: epath.Path, path: str, bitmap: str, sharding: Any, expected_checksums: Mapping[str, int]
) -> Array:
    """An array stored in two parts. The bitmap's checksum is verified here, that of the values by the caller."""
    tree = nest({bitmap: 0, path + sparse.VALUES: 0})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True)
    parts = flatten(handler().restore(directory, args=args))
    total = stream.bit_sum(parts[bitmap])
    if total != expected_checksums.get(bitmap, total):
        raise ValueError(f"{path}: the places of its values are not those that were saved (checksum)")
    array = sparse.unpack(sparse.Packed(parts[bitmap], parts[path + sparse.VALUES], sparse.size_of(bitmap)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _batches(
    placed: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, Any]
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """All arrays that keep their dtype together; the others in turn, to bound the memory of both copies."""
    kept = {path: leaf for path, leaf in placed.items() if leaf.dtype == wanted[path].dtype}
    if kept:
        yield kept
    cast = {path: leaf for path, leaf in placed.items() if path not in kept}
    limit = sum(_num_bytes(leaf) for leaf in cast.values()) / _CAST_BATCH_FRACTION
    batch: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in cast.items():
        batch[path] = leaf
        if sum(_num_bytes(x) for x in batch.values()) >= limit:
            yield batch
            batch = {}
    if batch:
        yield batch


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))
