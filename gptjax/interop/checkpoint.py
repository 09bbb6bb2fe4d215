"""Between a source and a checkpoint, a tensor at a time."""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from gptjax.checkpoint import arrays, meta, reading
from gptjax.checkpoint import stream as array_stream
from gptjax.checkpoint.narration import quiet_orbax
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import stream
from gptjax.interop.source import Readable, Source, digest
from gptjax.interop.stored import Scales, Slice, Steps, StoredParams, floats_of, steps_of
from gptjax.interop.table import Family, Unit, check_names, units
from gptjax.json_files import write_json
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.quantized import QuantizedArray

_FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def write(
    source: Source, directory: pathlib.Path, *, dtype: np.dtype | None = None, num_threads: int | None = None
) -> None:
    """Writes the checkpoint of a source, without its certificate; goes on with what an earlier call left.

    Args:
      dtype: of the parameters; None keeps that of the source.

    Raises:
      ValueError: naming the tensor that is missing, unknown, of another shape or dtype.
    """
    wanted = units(source.family, source.model)
    check_names(source.family, wanted, source.tensors, path=str(source.path))
    shapes = _shapes(source, wanted, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    job = {"source": source.identity(), "dtype": None if dtype is None else dtype.name}
    journal = stream.Journal(directory / stream.JOURNAL_FILE, job=job)
    sliced = {part.path: len(part.index) for unit in wanted for part in unit.ours}
    writer = array_stream.ArraysWriter(directory / "params", shapes, sliced_dims=sliced)

    by_name = {unit.theirs: unit for unit in wanted}

    def convert(task: stream.Tensor) -> list[int]:
        unit = by_name[task.name]
        parts = _to_ours(unit, source.tensors[task.name], shapes)
        sums = []
        for part, value in zip(unit.ours, parts, strict=True):
            writer.write(part.path, part.index, value)
            sums.append(array_stream.bit_sum(value))
        return sums

    found = {name: source.tensors[name] for name in by_name}
    tasks = [stream.Tensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()]
    stream.run(tasks, convert, journal, label="import", num_threads=num_threads)
    sums = dict.fromkeys((f"params/{path}" for path in shapes), 0)
    for unit in wanted:
        for part, total in zip(unit.ours, journal.notes[unit.theirs], strict=True):
            sums[f"params/{part.path}"] = (sums[f"params/{part.path}"] + total) & 0xFFFFFFFF
    _finish(source, directory, sums)
    journal.close()


def _shapes(source: Source, wanted: list[Unit], dtype: np.dtype | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Of our arrays; a stacked one has one dtype, so its tensors must."""
    dtypes: dict[str, tuple[np.dtype, str]] = {}
    for unit in wanted:
        own = source.tensors[unit.theirs].dtype
        for part in unit.ours:
            known, name = dtypes.setdefault(part.path, (own, unit.theirs))
            if dtype is None and known != own:
                raise ValueError(
                    f"{source.path}: {name} is {known} and {unit.theirs} is {own}, which here are layers of one array; "
                    "choose one with --dtype"
                )
            if dtype is None and own not in _FLOATS:
                raise ValueError(
                    f"{source.path}: {unit.theirs}: {own} values; parameters are float32, bfloat16 or float16: choose "
                    "one with --dtype"
                )
    abstract = arrays.flatten(transformer.abstract_params(source.model))
    return {path: jax.ShapeDtypeStruct(leaf.shape, dtype or dtypes[path][0]) for path, leaf in abstract.items()}


def _to_ours(unit: Unit, tensor: Readable, shapes: Mapping[str, Any]) -> list[np.ndarray]:
    parts = unit.layout.to_ours(tensor.read(), [part.shape for part in unit.ours])
    # Contiguous here, once: a checksum and a write of a transposed view would each make a copy.
    return [
        np.ascontiguousarray(value.astype(shapes[part.path].dtype, copy=False))
        for part, value in zip(unit.ours, parts, strict=True)
    ]


def _finish(source: Source, directory: pathlib.Path, sums: dict[str, int]) -> None:
    """Writes what a checkpoint has besides arrays."""
    assets = {}
    if source.tokenizer is not None:
        assets[tokenizer_lib.FILE_NAME] = source.tokenizer.to_bytes()
    sums = sums | {f"assets/{name}": zlib.crc32(content) for name, content in assets.items()}
    entry = {"stage": "import", "format": source.format, "family": source.family.name, "source": str(source.path)}
    fingerprint = "" if source.tokenizer is None else source.tokenizer.fingerprint
    described = meta.make(source.model, tokenizer=fingerprint, lineage=[entry])
    write_json(directory / "meta" / reading.JSON_FILE, meta.to_json(dataclasses.replace(described, checksums=sums)))
    write_json(directory / "data" / reading.JSON_FILE, {})
    (directory / "assets").mkdir(exist_ok=True)
    for name, content in assets.items():
        (directory / "assets" / name).write_bytes(content)


class CheckpointTensors(Mapping[str, "CheckpointTensor"]):
    """The tensors of a checkpoint under the names of a family, read one at a time.

    `verify` compares what was read with the checksums of the checkpoint, once every tensor was.
    """

    def __init__(
        self, directory: epath.PathLike, family: Family, model: ModelConfig, *, dtype: np.dtype | None = None
    ) -> None:
        quiet_orbax()
        self.directory = pathlib.Path(directory)
        self._meta = reading.read_meta(epath.Path(directory))
        self._shapes = arrays.stored_shapes(epath.Path(directory) / "params")
        self._units = {unit.theirs: unit for unit in units(family, model)}
        sliced = {part.path: len(part.index) for unit in self._units.values() for part in unit.ours}
        self._params = StoredParams(self.directory, model, sliced)
        self._dtype = dtype

    def __getitem__(self, name: str) -> CheckpointTensor:
        unit = self._units[name]
        first = unit.ours[0].path
        stored = np.dtype(np.float32 if first in self._params.kernels else self._shapes[first].dtype)
        return CheckpointTensor(self._params, unit, self._dtype or stored)

    def __iter__(self) -> Any:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def verify(self, sums: Mapping[str, list[int]]) -> None:
        """Raises:
        ValueError: naming an array whose slices, by the sums of each tensor's, are not what was saved.
        """
        totals: dict[str, dict[tuple[int, ...], int]] = {}
        for name, parts in sums.items():
            files = [(file, part.index) for part in self._units[name].ours for file in self._params.files(part.path)]
            for (file, index), total in zip(files, parts, strict=True):
                totals.setdefault(file, {})[index] = total
        for path, slices in totals.items():
            expected = self._meta.checksums.get(f"params/{path}")
            if expected is not None and sum(slices.values()) & 0xFFFFFFFF != expected:
                raise ValueError(
                    f"{self.directory}: params/{path}: the values are not those that were saved (checksum); "
                    "restore the files from a copy"
                )


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of theirs, made from ours when it is read."""

    params: StoredParams
    unit: Unit
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.unit.theirs_shape

    @property
    def is_in_few_bits(self) -> bool:
        """Whether any of it is."""
        return any(part.path in self.params.kernels for part in self.unit.ours)

    def read(self) -> np.ndarray:
        return self.read_with_sums()[0]

    def read_with_sums(self) -> tuple[np.ndarray, list[int]]:
        """The values, and the checksums of all that they are made of."""
        parts, sums = self.read_parts()
        return self.values(parts), sums

    def read_parts(self) -> tuple[list[Slice], list[int]]:
        """The slices of ours as they are stored, for `values` or `steps`, and their checksums."""
        found = [self.params.read(part.path, part.index) for part in self.unit.ours]
        return [part for part, _ in found], [total for _, sums in found for total in sums]

    def values(self, parts: Sequence[Slice]) -> np.ndarray:
        """The tensor."""
        return self.unit.layout.to_theirs(list(map(floats_of, parts))).astype(self.dtype, copy=False)

    def steps(self, parts: Sequence[Slice]) -> Steps:
        """The tensor as whole numbers; all of it is in few bits, and none of that fp8."""
        found = [steps_of(part) for part in parts if isinstance(part, QuantizedArray)]
        return Steps(*(self.unit.layout.to_theirs(values) for values in zip(*found, strict=True)))

    def scales(self) -> list[Scales | None]:
        """Of each slice."""
        return [self.params.scales(part.path, part.index) for part in self.unit.ours]


def value_problems(
    source: Source, stored: Mapping[str, CheckpointTensor], *, num_threads: int | None = None
) -> dict[str, str]:
    """What is wrong with tensors, by name.

    Their bits have to be those of the source, cast as in the checkpoint, and their values finite numbers. Of what is in
    few bits on either side a zero may have another sign.
    """
    found: dict[str, str] = {}

    def compare(task: stream.Tensor) -> None:
        tensor = stored[task.name]
        one_zero = tensor.dtype.type(0) if tensor.is_in_few_bits else None
        # One after the other: both in memory would be more than what converting takes.
        wanted = _digest(source.tensors[task.name].read().astype(task.dtype, copy=False), one_zero)
        values = tensor.read()
        if wanted != _digest(values, one_zero):
            found[task.name] = f"{task.name}: what was written is not what was read"
        elif num_bad := int(np.count_nonzero(~np.isfinite(values))):
            found[task.name] = f"{task.name}: {num_bad:,} of its {values.size:,} values are not finite numbers"

    tasks = [stream.Tensor(name, tensor.shape, tensor.dtype) for name, tensor in stored.items()]
    stream.run(tasks, compare, None, label="compare", num_threads=num_threads)
    return dict(sorted(found.items()))


def _digest(values: np.ndarray, one_zero: np.generic | None) -> bytes:
    return digest(values if one_zero is None else values + one_zero)


MAX_PROBLEMS = 5
"""Of as many tensors a certificate tells."""
