"""GGUF files: their metadata, and tensors that are read and dequantised when they are asked for.

The header is parsed here and not by the `gguf` package, which is for files that one made oneself. Its reader (0.19)
maps the file, so that all pages read count as memory; a list that claims 2^61 numbers keeps it busy for ever; and
tensors that overlap, or whose offsets wrap around, are tensors to it. Here every count and range is checked against
the file first, and the error names the file. Blocks are dequantised by the package, and headers written by it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.interop.layout import Shape
from gptjax.interop.safetensors import Stored

MAGIC = b"GGUF"
# Many times what models are published with; each thing takes more memory than its bytes in the file.
_MAX_HEADER_BYTES = 1 << 27
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20
_READ_VALUES = 1 << 22  # dequantised at a time: temporaries of some formats are several times their result

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


def gguf_package() -> Any:
    """The `gguf` package.

    Raises:
      ImportError: if it is not installed, naming the extra.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install 'gptjax[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies, and in which of ggml's types.

    Attributes:
      kind: number of the type.
      shape: row-major, as numpy has it; the file names dimensions the other way round.
      dtype: of what `read` returns; of floats their own, of blocks float32.
    """

    file: pathlib.Path
    offset: int
    kind: int
    shape: Shape
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return byte_size(self.kind, self.shape)

    def part(self, index: int) -> GgufTensor:
        """`tensor[index]`, of which no more is read."""
        shape = self.shape[1:]
        offset = self.offset + index * byte_size(self.kind, shape)
        return dataclasses.replace(self, shape=shape, offset=offset)

    def rows(self, start: int, stop: int) -> GgufTensor:
        """`tensor[start:stop]`."""
        offset = self.offset + start * byte_size(self.kind, self.shape[1:])
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), offset=offset)

    def read(self) -> np.ndarray:
        """The values.

        Raises:
          ValueError: if the file has become shorter.
        """
        stored = _stored_dtype(self.kind)
        if stored is not None and stored == self.dtype:
            return self._stored(self.offset, self.num_bytes).read().view(stored).reshape(self.shape)
        values = np.empty(math.prod(self.shape), self.dtype)
        block, block_bytes = gguf_package().GGML_QUANT_SIZES[self.kind]
        step = max(_READ_VALUES // block, 1)
        for start in range(0, values.size // block, step):
            count = min(step, values.size // block - start)
            raw = self._stored(self.offset + start * block_bytes, count * block_bytes).read()
            part = _dequantize(raw, self.kind)
            values[start * block : (start + count) * block] = part.astype(self.dtype, copy=False)
        return values.reshape(self.shape)

    def write(self, raw: np.ndarray) -> None:
        """Puts values, already of the type of the file, in their place."""
        content = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        self._stored(self.offset, self.num_bytes).write(content)

    def _stored(self, offset: int, size: int) -> Stored:
        return Stored(self.file, offset, size, (size,), np.dtype(np.uint8))


def _dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
    gguf = gguf_package()
    # The package dequantises row by row; a block is the shortest row.
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    return gguf.dequantize(raw.reshape(-1, block_bytes), gguf.GGMLQuantizationType(kind)).reshape(-1)


def _stored_dtype(kind: int) -> np.dtype | None:
    """Of the types that are arrays of floats."""
    kinds = gguf_package().GGMLQuantizationType
    return {kinds.F32: np.dtype("<f4"), kinds.F16: np.dtype("<f2"), kinds.BF16: np.dtype(ml_dtypes.bfloat16)}.get(kind)


def is_float(kind: int) -> bool:
    """Whether values of a type are stored as they are, not in quantised blocks."""
    return _stored_dtype(kind) is not None


def byte_size(kind: int, shape: Shape) -> int:
    """Of a tensor whose last dimension is whole blocks."""
    block, block_bytes = gguf_package().GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


@dataclass(frozen=True)
class GgufFile:
    """What a header says.

    Attributes:
      metadata: numbers, booleans and strings as Python's, arrays of numbers as numpy's, of strings as lists.
      tensors: by name, each inside of its file.
      others: the files after the first, of a model in several.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    others: tuple[pathlib.Path, ...] = ()


def is_later_part(path: pathlib.Path) -> bool:
    """Whether a name is that of one of a model's files after the first, which are opened by that."""
    return re.search(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$", path.name) is not None


def read_header(path: pathlib.Path) -> GgufFile:
    """Opens a file, and the others of the model if it is the first of several, as llama.cpp names and numbers them.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"{path}: split.count: got {count!r}, expected a whole number")
    if count < 2:
        return first
    ending = f"-00001-of-{count:05}.gguf"
    if first.metadata.get("split.no") != 0 or not path.name.endswith(ending):
        raise ValueError(
            f"{path}: split.no: got {first.metadata.get('split.no')!r} of {count} files of a model, expected 0, the "
            f"first, in a file whose name ends in {ending}; open that one, and leave them the names they were made with"
        )
    tensors, others = dict(first.tensors), []
    for number in range(1, count):
        other = path.with_name(path.name.removesuffix(ending) + f"-{number + 1:05}-of-{count:05}.gguf")
        if not other.is_file():
            raise ValueError(f"{other}: missing; {path.name} is the first of {count} files of a model")
        part = _read_one(other)
        found = {key: part.metadata.get(key) for key in ("split.no", "split.count")}
        if found != {"split.no": number, "split.count": count}:
            raise ValueError(f"{other}: got {found}, expected number {number} of {count}; it is of another model")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise ValueError(f"{other}: {min(twice)}: in an earlier file of the model too")
        tensors |= part.tensors
        others.append(other)
    total = first.metadata.get("split.tensors.count")
    if total != len(tensors):
        raise ValueError(f"{path}: split.tensors.count: got {total}, expected {len(tensors)}, as the files have")
    return GgufFile(path, first.metadata, tensors, tuple(others))


def _read_one(path: pathlib.Path) -> GgufFile:
    with path.open("rb") as opened:
        cursor = _Cursor(path, opened, path.stat().st_size)
        magic, version = cursor.take(4, "magic"), cursor.scalar(4, "version")
        if magic != MAGIC:
            raise ValueError(f"{path}: begins with {magic!r}, expected {MAGIC!r}; it is no GGUF file")
        if version not in (2, 3):
            reason = "it is written for big-endian machines" if version & 0xFFFF == 0 else "expected 2 or 3"
            raise ValueError(f"{path}: GGUF version {version}: {reason}")
        num_tensors = cursor.count("tensors", least_bytes=24, most=_MAX_TENSORS)
        num_keys = cursor.count("keys", least_bytes=13, most=_MAX_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string("a key")
            if key in metadata:
                raise ValueError(f"{path}: {key}: twice in the metadata")
            metadata[key] = cursor.value(cursor.scalar(4, key), key)
        infos = [_read_info(cursor) for _ in range(num_tensors)]
        position = cursor.position
    return GgufFile(path, metadata, _placed(path, infos, metadata, position))


@dataclass(frozen=True)
class _Info:
    name: str
    shape: Shape
    kind: int
    offset: int


def _read_info(cursor: _Cursor) -> _Info:
    name = cursor.string("a tensor's name")
    num_dims = cursor.scalar(4, name)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"{cursor.path}: {name}: {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
    shape = tuple(cursor.scalar(10, name) for _ in range(num_dims))[::-1]
    return _Info(name, shape, cursor.scalar(4, name), cursor.scalar(10, name))


def _placed(path: pathlib.Path, infos: list[_Info], metadata: Mapping[str, Any], end: int) -> dict[str, GgufTensor]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment: got {alignment!r}, expected a power of two")
    start, num_bytes = end + -end % alignment, path.stat().st_size
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise ValueError(f"{path}: {info.name}: twice in the file")
        tensors[info.name] = _place(path, info, start, num_bytes)
        if info.offset % alignment:
            raise ValueError(f"{path}: {info.name}: offset {info.offset} is no multiple of {alignment}")
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (name, one), (other, two) in zip(ordered, ordered[1:], strict=False):
        if one.offset + one.num_bytes > two.offset:
            raise ValueError(f"{path}: {name} and {other} overlap")
    return tensors


def _place(path: pathlib.Path, info: _Info, start: int, num_bytes: int) -> GgufTensor:
    gguf = gguf_package()
    sizes = gguf.GGML_QUANT_SIZES.get(info.kind)
    if sizes is None or not _is_readable(info.kind):
        known = sizes and gguf.GGMLQuantizationType(info.kind).name
        raise ValueError(
            f"{path}: {info.name}: type {known or info.kind} is not one that can be read as numbers of a model; "
            "requantise it to another"
        )
    if min(info.shape) < 1 or info.shape[-1] % sizes[0]:
        raise ValueError(f"{path}: {info.name}: {list(info.shape)} is not rows of blocks of {sizes[0]}")
    size = byte_size(info.kind, info.shape)
    if start + info.offset + size > num_bytes:
        raise ValueError(
            f"{path}: {info.name}: {size:,} bytes from {start + info.offset:,} are not in a file of {num_bytes:,}; "
            "it is cut or damaged"
        )
    dtype = _stored_dtype(info.kind) or np.dtype(np.float32)
    return GgufTensor(path, start + info.offset, info.kind, info.shape, dtype)


def _is_readable(kind: int) -> bool:
    if _stored_dtype(kind) is not None:
        return True
    block_bytes = gguf_package().GGML_QUANT_SIZES[kind][1]
    try:
        _dequantize(np.zeros(block_bytes, np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Cursor:
    """Reads on through a header, never past the file's end nor without bound."""

    def __init__(self, path: pathlib.Path, file: Any, num_bytes: int) -> None:
        self.path, self.position = path, 0
        self._file, self._limit = file, min(num_bytes, _MAX_HEADER_BYTES)

    def take(self, size: int, what: str) -> bytes:
        if size > self._limit - self.position:
            raise ValueError(
                f"{self.path}: {what}: {size:,} bytes from {self.position:,}, but the header can end at most at "
                f"{self._limit:,}; the file is cut or damaged"
            )
        self.position += size
        return self._file.read(size)

    def scalar(self, kind: int, what: str) -> Any:
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0]
        # The shortest decimal of a float32: 1e-5 and not 9.99999974738e-06.
        return float(str(value)) if kind == _FLOAT32 else value.item()

    def count(self, what: str, *, least_bytes: int, most: int = _MAX_HEADER_BYTES) -> int:
        """A number of things that take at least so many bytes each."""
        count = self.scalar(10, what)
        if count > most or count * least_bytes > self._limit - self.position:
            raise ValueError(f"{self.path}: {count:,} {what}: more than a file's header can hold; it is cut or damaged")
        return count

    def string(self, what: str) -> str:
        content = self.take(self.scalar(10, what), what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what}: {content[:40]!r} is no UTF-8; the file is damaged") from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind, what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: {what}: type {kind} of a value is not known; the file is damaged")
        item = self.scalar(4, what)
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            count = self.count(f"numbers of {what}", least_bytes=dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if item != _STRING:
            raise ValueError(f"{self.path}: {what}: a list of type {item}; expected numbers or strings")
        return [self.string(what) for _ in range(self.count(f"strings of {what}", least_bytes=8))]


def write_header(path: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Shape, int]]) -> GgufFile:
    """Creates a file of known tensors, by name shape and type, whose values are put in their places later.

    Values that are there already stay, so that an interrupted conversion can go on.

    Args:
      metadata: `general.architecture` among it; whole numbers are written as uint32 (int32 in lists), others as
        float32, and bytes as an array of them.
    """
    gguf = gguf_package()
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells the byte order of every file, and more
    writer = gguf.GGUFWriter(None, metadata["general.architecture"])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    for name, (shape, kind) in tensors.items():
        size = byte_size(kind, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=gguf.GGMLQuantizationType(kind))
    beside = path.with_name(path.name + ".header")
    writer.write_header_to_file(beside)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = beside.read_bytes()
    beside.unlink()
    alignment = writer.data_alignment
    header += b"\0" * (-len(header) % alignment)
    sizes = [byte_size(kind, shape) for shape, kind in tensors.values()]
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.write(header)
        file.truncate(len(header) + sum(size + -size % alignment for size in sizes))
    return read_header(path)
