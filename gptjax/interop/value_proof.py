"""What an exported artefact holds, read back and compared with the checkpoint, without running anything."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from etils import epath

from gptjax.checkpoint import reading
from gptjax.interop import checkpoint as checkpoint_lib
from gptjax.interop import gguf, hf
from gptjax.interop.checkpoint import CheckpointTensors
from gptjax.interop.gguf.file import gguf_package, is_float
from gptjax.interop.gguf.names import MovedTensor


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found.

    Attributes:
      told: in words.
      problems: by tensor.
      blocks: the kinds of ggml's blocks that hold kernels in few bits.
    """

    told: str
    problems: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()


def read_back(
    path: epath.Path, partial: pathlib.Path, *, format: str, dtype: np.dtype | None, num_threads: int | None
) -> Proof:
    """Compares what has to be equal: all of `hf`, and in `gguf` what is in few bits here and not rounded there."""
    told = "the checkpoint's values were those that were saved (checksums)"
    if format == "hf":
        return _read_back_hf(path, partial, told, dtype=dtype, num_threads=num_threads)
    if format == "gguf" and reading.read_meta(path).model.quant is not None:
        return _read_back_gguf(path, partial, told, num_threads=num_threads)
    return Proof(told=told)


def _read_back_hf(
    path: epath.Path, partial: pathlib.Path, told: str, *, dtype: np.dtype | None, num_threads: int | None
) -> Proof:
    written = hf.open_source(partial)
    stored = CheckpointTensors(path, written.family, reading.read_meta(path).model, dtype=dtype)
    problems = checkpoint_lib.value_problems(written, stored, num_threads=num_threads)
    told += f"; {len(stored) - len(problems)} of {len(stored)} tensors read back equal to its bits"
    num_dequantised = sum(tensor.is_in_few_bits for tensor in stored.values())
    if num_dequantised:
        told += f", {num_dequantised} of them as the floats that few bits stand for"
    return Proof(told=told, problems=problems)


def _read_back_gguf(path: epath.Path, partial: pathlib.Path, told: str, *, num_threads: int | None) -> Proof:
    written = gguf.open_source(partial)
    stored = CheckpointTensors(path, written.family, reading.read_meta(path).model)
    few = {name: tensor for name, tensor in stored.items() if tensor.is_in_few_bits}
    kept = {name: tensor for name, tensor in few.items() if _is_kept(written.tensors[name])}
    problems = checkpoint_lib.value_problems(written, kept, num_threads=num_threads)
    kinds = sorted({kind for name in kept for kind in _block_kinds(written.tensors[name])})
    told += f"; of {len(few)} tensors in few bits {len(kept) - len(problems)} read back equal to the bit"
    if len(kept) < len(few):
        told += f", {len(few) - len(kept)} are rounded floats"
    return Proof(told=told, problems=problems, blocks=tuple(kinds))


def _is_kept(tensor: object) -> bool:
    assert isinstance(tensor, MovedTensor), "of a GGUF file"
    return all(part.dtype == np.float32 for part in tensor.parts)


def _block_kinds(tensor: object) -> list[str]:
    assert isinstance(tensor, MovedTensor), "of a GGUF file"
    names = gguf_package().GGMLQuantizationType
    return [names(part.kind).name.lower() for part in tensor.parts if not is_float(part.kind)]
