"""safetensors files, read and written a tensor at a time.

Source: https://github.com/huggingface/safetensors, "Format": eight bytes of header length, a JSON
header, then the values, row-major and little-endian. Files are taken for hostile: the header is
bounded, every range is checked against the file, and nothing in it names another file.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.interop.layout import Shape

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes from `offset` of `file`."""

    file: pathlib.Path
    offset: int
    size: int
    shape: Shape
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """The values.

        Raises:
          ValueError: if the file has become shorter.
        """
        # Not mapped: pages of a mapped file count as this process's memory.
        data = np.empty(self.size, np.uint8)
        view, position = data.data, self.offset
        with self.file.open("rb", buffering=0) as file:
            while view:
                count = os.preadv(file.fileno(), [view], position)
                if count == 0:
                    raise ValueError(f"{self.file}: ends at byte {position}, expected {self.offset + self.size}")
                view, position = view[count:], position + count
        return data.view(self.dtype).reshape(self.shape)

    def write(self, value: np.ndarray) -> None:
        """Puts the values in their place."""
        assert value.shape == self.shape and value.dtype == self.dtype, f"{self}: {value.dtype} {value.shape}"
        view, position = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, self.offset
        with self.file.open("r+b", buffering=0) as file:
            while view:
                count = os.pwrite(file.fileno(), view, position)
                view, position = view[count:], position + count


class SafetensorsFolder(Mapping[str, Stored]):
    """The tensors of a folder: one file, or those that its index names.

    Raises:
      ValueError: naming the file that is missing, cut, damaged, or outside of the folder.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Stored] = {}
        if (folder / SINGLE_FILE).exists() or not (folder / INDEX_FILE).exists():  # of both, transformers takes this
            self._tensors = read_header(folder / SINGLE_FILE)
        else:
            self._read_index(folder / INDEX_FILE)

    def _read_index(self, index: pathlib.Path) -> None:
        weight_map = _json(index, index.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: weight_map: expected file names by tensor, got {type(weight_map).__name__}")
        headers = {}
        for name in sorted(set(weight_map.values())):
            # An index from elsewhere must not make us read any other file of this machine.
            if name != os.path.basename(name) or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight_map names {name!r}; expected .safetensors files beside the index")
            headers[name] = read_header(self.folder / name)
        for tensor, name in weight_map.items():
            if tensor not in headers[name]:
                raise ValueError(f"{index}: says that {tensor} is in {name}, which does not have it")
            self._tensors[tensor] = headers[name][tensor]
        for name, header in headers.items():
            for tensor in header:
                if weight_map.get(tensor) != name:
                    raise ValueError(
                        f"{self.folder / name}: has {tensor}, which {index.name} says is elsewhere or nowhere"
                    )

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file, checked against its size.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(f"{path}: not a safetensors file, or cut: {num_bytes:,} bytes, header of {length:,}")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    found, start = {}, 8 + length
    for name, entry in header.items():
        found[name] = _stored(path, name, entry, start, num_bytes)
    position = start
    for stored in sorted(found.values(), key=lambda stored: (stored.offset, stored.size)):
        if stored.offset != position:
            raise ValueError(f"{path}: tensors overlap or leave a gap at byte {position}")
        position += stored.size
    if position != num_bytes:
        raise ValueError(f"{path}: {num_bytes:,} bytes, expected {position:,} from its header: cut or added to")
    return found


def _stored(path: pathlib.Path, name: str, entry: Any, start: int, num_bytes: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {name}: expected dtype, shape and data_offsets, got {entry!r:.80}") from error
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise ValueError(f"{path}: {name}: expected sizes of 0 or more, got {shape} at {begin}..{end}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: {name}: dtype {dtype!r} is not supported; expected one of {', '.join(_DTYPES)}")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != size or start + end > num_bytes:
        raise ValueError(
            f"{path}: {name}: bytes {begin}..{end} do not hold {dtype} {shape} ({size:,} bytes) in a file of "
            f"{num_bytes:,}; it is cut or damaged"
        )
    return Stored(path, start + begin, size, tuple(shape), _DTYPES[dtype])


def _json(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not JSON where JSON belongs ({error}); it is damaged or another format"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def plan_shards(
    tensors: Mapping[str, tuple[Shape, np.dtype]], *, max_shard_bytes: int
) -> list[dict[str, tuple[Shape, np.dtype]]]:
    """The tensors of each file, in order; a tensor larger than the limit has a file of its own."""
    shards: list[dict[str, tuple[Shape, np.dtype]]] = []
    room = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = shape, dtype
        room -= size
    return shards


class SafetensorsWriter:
    """Files of known tensors, whose values may come in any order and from any thread.

    Opening it again after a kill changes no value that was written.

    Args:
      shards: as `plan_shards` gives them.
    """

    def __init__(self, folder: pathlib.Path, shards: list[dict[str, tuple[Shape, np.dtype]]]) -> None:
        self.folder = folder
        self._places: dict[str, Stored] = {}
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        names = [SINGLE_FILE] if len(shards) == 1 else names
        for name, tensors in zip(names, shards, strict=True):
            self._places |= _create(folder / name, tensors)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(place.size for place in self._places.values())},
                "weight_map": {name: place.file.name for name, place in self._places.items()},
            }
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, value: np.ndarray) -> None:
        self._places[name].write(value)


def _create(path: pathlib.Path, tensors: Mapping[str, tuple[Shape, np.dtype]]) -> dict[str, Stored]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return read_header(path)
