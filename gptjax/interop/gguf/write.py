"""Writes GGUF files for llama.cpp, a tensor at a time."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath

from gptjax.checkpoint import reading
from gptjax.checkpoint.meta import model_differences
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import stream
from gptjax.interop.checkpoint import CheckpointTensors
from gptjax.interop.families import FAMILIES
from gptjax.interop.gguf import ARCHITECTURES, blocks, held, names, read_model, rope
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf.config import Architecture, Found
from gptjax.interop.gguf.file import GgufFile, GgufTensor, gguf_package, write_header
from gptjax.interop.gguf.held import FewBits
from gptjax.interop.gguf.names import Place
from gptjax.interop.layout import Shape
from gptjax.interop.source import Source
from gptjax.interop.stored import Steps
from gptjax.interop.table import Family, family_of, inference_form, units
from gptjax.nn.config import BlockConfig, MLAConfig, ModelConfig

Quantization = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
QUANTIZATIONS: tuple[Quantization, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0")

# llama.cpp keeps these in float32: they are small, and it looks for nothing else.
_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")
_WRITE_VALUES = 1 << 22
# Where few bits cost most, for what they save.
_OUTER = ("token_embd.weight", "output.weight")
_NO_FACTS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
      tensors: shape and ggml's type of each, by name.
      places: where each tensor of Hugging Face's goes.
      held: names of those that are blocks of the checkpoint's own codes.
    """

    architecture: Architecture
    family: Family
    metadata: dict[str, Any]
    tensors: Mapping[str, tuple[Shape, int]]
    places: Mapping[str, Place]
    rope_factors: np.ndarray | None
    held: frozenset[str] = frozenset()


def write(
    checkpoint: epath.PathLike,
    file: pathlib.Path,
    *,
    quantization: Quantization = "f16",
    few_bits: FewBits = "blocks",
    family_name: str | None = None,
    name: str = "gptjax",
    facts: Mapping[str, str] = _NO_FACTS,
    num_threads: int | None = None,
) -> Family:
    """Writes the GGUF file of a checkpoint; goes on with what an earlier call left.

    Vectors, norms and routers are float32. Rows that are no whole blocks are float16, which is logged. With `q4_0`
    the embedding and the head are `q8_0`.

    Args:
      quantization: of kernels that are floats.
      few_bits: what becomes of those in few bits: `blocks` of the same codes, where the file's values are the
        checkpoint's to the bit, or what follows for those that no block holds, or floats for all of them.
      family_name: as `model_type` names it; None takes the first that expresses the model.
      name: of the model, in the metadata.
      facts: more metadata.

    Raises:
      ValueError: if llama.cpp cannot run the model or its tokenizer, no block holds a kernel's values, or the
        checkpoint is damaged.
    """
    meta = reading.read_meta(epath.Path(checkpoint))
    content = reading.read_assets(epath.Path(checkpoint)).get(tokenizer_lib.FILE_NAME)
    tokenizer = None if content is None else tokenizer_lib.from_bytes(content)
    plan = make_plan(meta.model, quantization=quantization, family_name=family_name)
    tensors = CheckpointTensors(checkpoint, plan.family, meta.model, dtype=None)
    plan = _in_blocks(plan, held.kinds(plan.places, tensors, few_bits=few_bits))
    job = {"checkpoint": meta.checksums, "quantization": quantization, "family": plan.family.name}
    journal = stream.Journal(file.with_name(file.name + ".journal"), job=job | {"few_bits": few_bits})
    header = _create(file, plan, tokenizer, name=name, vocab_size=meta.model.vocab_size, facts=facts)

    def convert(task: stream.Tensor) -> list[int]:
        place, tensor = plan.places[task.name], tensors[task.name]
        parts, sums = tensor.read_parts()
        in_blocks = plan.held.intersection(place.names)
        if in_blocks:
            _put_blocks(header, place, tensor.steps(parts), in_blocks)
        if in_blocks != set(place.names):
            _put(header, place, tensor.values(parts), but=in_blocks)
        return sums

    names = sorted(tensors, key=lambda key: (tensors[key].unit.ours[0].path, tensors[key].unit.ours[0].index))
    stream.run(_tasks(tensors, names), convert, journal, label="export", num_threads=num_threads)
    tensors.verify(journal.notes)
    journal.remove()
    return plan.family


def write_source(source: Source, file: pathlib.Path, *, quantization: Quantization = "f32") -> None:
    """Writes what a source of any format holds, such as the values of a quantised file in float32.

    Raises:
      ValueError: if llama.cpp cannot run the model or its tokenizer.
    """
    plan = make_plan(source.model, quantization=quantization, family_name=source.family.name)
    header = _create(file, plan, source.tokenizer, name=source.path.stem, vocab_size=source.model.vocab_size)

    def convert(task: stream.Tensor) -> None:
        _put(header, plan.places[task.name], source.tensors[task.name].read())

    stream.run(_tasks(source.tensors, list(plan.places)), convert, None, label="for llama.cpp")


def _in_blocks(plan: Plan, kinds: Mapping[str, str]) -> Plan:
    """With tensors of other types than those for floats."""
    sizes: collections.Counter[str] = collections.Counter()
    for name, kind in kinds.items():
        sizes[kind] += math.prod(plan.tensors[name][0]) if kind in blocks.KINDS else 0
    metadata = dict(plan.metadata)
    if sizes.total():
        metadata["general.file_type"] = int(gguf_package().LlamaFileType[f"MOSTLY_{sizes.most_common(1)[0][0]}"])
    return dataclasses.replace(
        plan,
        metadata=metadata,
        tensors={
            name: (shape, _type(kinds[name]) if name in kinds else kind) for name, (shape, kind) in plan.tensors.items()
        },
        held=frozenset(name for name, kind in kinds.items() if kind in blocks.KINDS),
    )


def _create(
    file: pathlib.Path,
    plan: Plan,
    tokenizer: Tokenizer | None,
    *,
    name: str,
    vocab_size: int,
    facts: Mapping[str, str] = _NO_FACTS,
) -> GgufFile:
    metadata = plan.metadata | {"general.name": name, **facts} | gguf_tokenizer.write(tokenizer, vocab_size=vocab_size)
    header = write_header(file, metadata, plan.tensors)
    if plan.rope_factors is not None:
        header.tensors[rope.FACTORS_TENSOR].write(plan.rope_factors)
    return header


def _tasks(tensors: Mapping[str, Any], names: Sequence[str]) -> list[stream.Tensor]:
    """What is written passes through float32."""
    return [stream.Tensor(name, tuple(tensors[name].shape), np.dtype(np.float32)) for name in names]


def make_plan(model: ModelConfig, *, quantization: Quantization, family_name: str | None = None) -> Plan:
    """Decides what a file of the model holds.

    Raises:
      ValueError: if llama.cpp cannot run the model.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization {quantization!r}: expected one of {', '.join(QUANTIZATIONS)}")
    family = family_of(model, FAMILIES, name=family_name)
    architecture = next((each for each in ARCHITECTURES.values() if family.name in each.families), None)
    if architecture is None:
        raise ValueError(f"family {family.name}: llama.cpp's architecture for it is not supported; export it as hf")
    written = architecture.write(family.write_config(model))
    places = names.places(
        architecture.name,
        units(family, model),
        model,
        moves=architecture.moves,
        renamed=architecture.renamed,
    )
    shapes = {
        theirs: shape
        for place in places.values()
        for theirs, shape in zip(place.names, place.whole_shapes(), strict=True)
    }
    metadata = {f"{architecture.name}.{key}": value for key, value in written.keys.items()}
    factors = written.rope_factors if architecture.has_rope_factors else None
    _check(architecture, metadata, Found(shapes, factors), model)
    _, otherwise = as_run(model)
    if otherwise:
        logging.warning("gguf: %s", otherwise)
    kinds = {name: _kind(name, shape, quantization) for name, shape in shapes.items()}
    tensors = {name: (shapes[name], kind) for name, kind in kinds.items()}
    if written.rope_factors is not None:
        tensors[rope.FACTORS_TENSOR] = written.rope_factors.shape, _type("f32")
    file_type = "ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"
    general = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.file_type": int(gguf_package().LlamaFileType[file_type]),
        "general.quantization_version": gguf_package().GGML_QUANT_VERSION,
    }
    return Plan(architecture, family, general | metadata, tensors, places, written.rope_factors)


def _check(architecture: Architecture, metadata: Mapping[str, Any], found: Found, model: ModelConfig) -> None:
    """What llama.cpp would make of the metadata has to be the model."""
    # Numbers as a file keeps them.
    kept = {
        key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in metadata.items()
    }
    _, _, read = read_model(architecture, kept, found, path="gguf")
    lost = model_differences(inference_form(read), inference_form(model))
    if lost:
        raise ValueError(
            f"llama.cpp's architecture {architecture.name} cannot be told all of this model, which differs in: "
            + "; ".join(lost[:6])
            + _without_window(read, model)
        )


def as_run(model: ModelConfig) -> tuple[ModelConfig, str]:
    """The model that llama.cpp runs where a file holds this one, and what it cannot be told; empty if nothing."""
    changes = {
        # For every architecture: `ggml_rope_yarn_corr_dims`.
        "llama.cpp rounds the range of YaRN, which this model does not": _rounded,
        "llama.cpp takes the layers' epsilon for the norms of latents, where this model has another": _of_one_epsilon,
    }
    reasons = []
    for reason, change in changes.items():
        groups = tuple(dataclasses.replace(each, pattern=tuple(map(change, each.pattern))) for each in model.groups)
        if groups != model.groups:
            model = dataclasses.replace(model, groups=groups)
            reasons.append(reason)
    return model, "; ".join(reasons)


def _rounded(block: BlockConfig) -> BlockConfig:
    rope = block.attention.rope
    if rope is None or rope.scaling is None or rope.scaling.kind != "yarn":
        return block
    rope = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, truncate=True))
    return dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope=rope))


def _of_one_epsilon(block: BlockConfig) -> BlockConfig:
    if not isinstance(block.attention, MLAConfig):
        return block
    norm = dataclasses.replace(block.attention.norm, eps=block.norm.eps)
    return dataclasses.replace(block, attention=dataclasses.replace(block.attention, norm=norm))


def _without_window(read: ModelConfig, model: ModelConfig) -> str:
    """What to do where llama.cpp has no windows and the model does."""
    windows = _windows(model)
    if not windows or _windows(read):
        return ""
    return (
        f"; it has no sliding window there, which makes a difference from position {min(windows)} on. A model of no "
        "more tokens is the same without: with sliding_window null and max_position_embeddings "
        f"{min(windows)} in its config.json, import it again and export that"
    )


def _windows(model: ModelConfig) -> set[int]:
    found = (getattr(block.attention, "window", None) for block in model.blocks)
    return {window for window in found if window is not None}


def _type(quantization: str) -> int:
    return int(gguf_package().GGMLQuantizationType[quantization.upper()])


def _kind(name: str, shape: Shape, quantization: Quantization) -> int:
    if len(shape) == 1 or name.endswith((*_FLOAT32, ".bias")) or quantization == "f32":
        return _type("f32")
    kind = _type("q8_0" if quantization == "q4_0" and name in _OUTER else quantization)
    block = gguf_package().GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        logging.info("gguf: %s is written in f16: its rows of %d are no blocks of %d", name, shape[-1], block)
        return _type("f16")
    return kind


def _put(header: GgufFile, place: Place, value: np.ndarray, *, but: Collection[str] = ()) -> None:
    for name, part in zip(place.names, place.move.to_gguf(value), strict=True):
        tensor = _in_place(header, place, name)
        for rows, at in _pieces(tensor) if name not in but else ():
            rows.write(quantize(part[at], tensor.kind, name=name))


def _put_blocks(header: GgufFile, place: Place, value: Steps, names: Collection[str]) -> None:
    moved = (place.move.to_gguf(each) for each in value)
    for name, steps, scale in zip(place.names, *moved, strict=True):
        if name not in names:
            continue
        tensor = _in_place(header, place, name)
        kind = gguf_package().GGMLQuantizationType(tensor.kind).name
        for rows, at in _pieces(tensor):
            size = tensor.shape[-1]
            rows.write(blocks.pack(Steps(steps[at].reshape(-1, size), scale[at].reshape(-1, size)), kind))


def _in_place(header: GgufFile, place: Place, name: str) -> GgufTensor:
    tensor = header.tensors[name]
    return tensor if place.expert is None else tensor.part(place.expert)


def _pieces(tensor: GgufTensor) -> Iterator[tuple[GgufTensor, slice]]:
    """A tensor by rows: what quantising needs besides is then a small part of it."""
    if len(tensor.shape) == 1:
        yield tensor, slice(None)
        return
    step = max(_WRITE_VALUES // math.prod(tensor.shape[1:]), 1)
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        yield tensor.rows(start, stop), slice(start, stop)


def quantize(value: np.ndarray, kind: int, *, name: str) -> np.ndarray:
    """Values in one of ggml's types, as the `gguf` package rounds them.

    Raises:
      ValueError: if float16 cannot hold them.
    """
    gguf = gguf_package()
    if kind == _type("bf16") and value.dtype == ml_dtypes.bfloat16:
        return value  # through float32 it would be the same but for some NaNs
    values = np.ascontiguousarray(value, np.float32)
    with np.errstate(over="ignore"):
        raw = gguf.quantize(values.reshape(-1, values.shape[-1]), gguf.GGMLQuantizationType(kind))
    if kind == _type("f16") and not np.isfinite(raw).all() and np.isfinite(values).all():
        largest = float(np.abs(values).max())
        raise ValueError(f"{name}: values up to {largest:.4g} are too large for float16; export as bf16 or f32")
    assert raw.nbytes == math.prod(value.shape) * gguf.GGML_QUANT_SIZES[kind][1] // gguf.GGML_QUANT_SIZES[kind][0]
    return raw
