"""Parameters written and read a slice at a time: checkpoints of models that no memory here holds.

The files are those of Orbax's tree format (OCDBT, zarr), which `reading` restores like any other.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from gptjax.checkpoint import sparse

_DICT_KEY = 2  # Orbax's KeyType.DICT


def bit_sum(values: np.ndarray) -> int:
    """`arrays.checksums` of a part of an array; those of the parts add up modulo 2^32 to that of the whole."""
    if values.dtype.kind == "i":  # with their sign
        return int(values.sum(dtype=np.int64)) & 0xFFFFFFFF
    unsigned = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    return int(unsigned.sum(dtype=np.uint64)) & 0xFFFFFFFF


class ArraysWriter:
    """The arrays of one item, such as `params`, whose slices may come in any order and from any thread.

    Opened again after a kill it goes on with what is there.

    Args:
      directory: of the item.
      shapes: of the whole arrays, by path; `dtype` and `shape`.
      sliced_dims: how many leading dimensions of an array slices have an index for; its chunks are such slices.
    """

    def __init__(self, directory: pathlib.Path, shapes: Mapping[str, Any], *, sliced_dims: Mapping[str, int]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "_METADATA").write_text(json.dumps(_tree_metadata(shapes)))
        context = ts.Context()
        self._arrays = {
            path: ts.open(
                {
                    "driver": "zarr",
                    "kvstore": _kvstore(directory, path),
                    "metadata": {
                        "shape": list(leaf.shape),
                        "chunks": [1 if dim < sliced_dims[path] else size for dim, size in enumerate(leaf.shape)],
                        "compressor": None,
                        "dtype": _zarr_dtype(leaf.dtype),
                    },
                    "store_data_equal_to_fill_value": True,
                },
                open=True,
                create=True,
                context=context,
            ).result()
            for path, leaf in shapes.items()
        }

    def write(self, path: str, index: tuple[int, ...], value: np.ndarray) -> None:
        """Returns when the slice `array[index]` is on disk."""
        self._arrays[path][index].write(value).result()


class ArraysReader:
    """The arrays of one item, read a slice at a time.

    An array may lie in pieces of many slices. Then the last piece is kept, so slices of one array should be asked for
    one after the other.

    Args:
      sliced_dims: of each array, by path, how many leading dimensions slices have an index for.
    """

    def __init__(self, directory: pathlib.Path, sliced_dims: Mapping[str, int]) -> None:
        bitmaps = {p: bitmap for p, bitmap in sparse.bitmaps(_stored_paths(directory)).items() if p in sliced_dims}
        files = {path: dims for path, dims in sliced_dims.items() if path not in bitmaps}
        for path, bitmap in bitmaps.items():
            files |= {bitmap: sliced_dims[path], path + sparse.VALUES: 0}
        # What is read once need not be kept: memory would grow to the limit.
        self._arrays = _open_all(directory, files, cache_bytes=0)
        pieces = [_piece_bytes(array, files[path]) for path, array in self._arrays.items()]
        if any(pieces):
            self._arrays = _open_all(directory, files, cache_bytes=max(pieces))
        self._packed = {
            path: sparse.Slices(
                self._arrays[bitmap],
                self._arrays[path + sparse.VALUES],
                size=sparse.size_of(bitmap),
                sliced_dims=sliced_dims[path],
            )
            for path, bitmap in bitmaps.items()
        }

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        """`array[index]`."""
        if path in self._packed:
            return self._packed[path].read(index)
        return self._arrays[path][index].read().result()


def _stored_paths(directory: pathlib.Path) -> list[str]:
    metadata = json.loads((directory / "_METADATA").read_text())["tree_metadata"]
    return ["/".join(key["key"] for key in leaf["key_metadata"]) for leaf in metadata.values()]


def _open_all(directory: pathlib.Path, paths: Iterable[str], *, cache_bytes: int) -> dict[str, Any]:
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    opened = {
        path: ts.open({"driver": "zarr", "kvstore": _kvstore(directory, path)}, open=True, context=context)
        for path in paths
    }
    return {path: future.result() for path, future in opened.items()}


def _piece_bytes(array: Any, sliced_dims: int) -> int:
    """The size of a stored piece; 0 where it is a single slice."""
    shape = array.chunk_layout.read_chunk.shape
    return math.prod(shape) * array.dtype.numpy_dtype.itemsize if math.prod(shape[:sliced_dims]) > 1 else 0


def _kvstore(directory: pathlib.Path, path: str) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": path.replace("/", ".") + "/"}


def _zarr_dtype(dtype: Any) -> str:
    return "bfloat16" if dtype == ml_dtypes.bfloat16 else np.dtype(dtype).newbyteorder("<").str


def _tree_metadata(shapes: Mapping[str, Any]) -> dict[str, Any]:
    tree = {}
    for path, leaf in shapes.items():
        keys = path.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(leaf.shape),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
