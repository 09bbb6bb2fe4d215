"""From a checkpoint to another framework's format, with its certificate."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import get_args

import numpy as np
from etils import epath

from gptjax.checkpoint import reading
from gptjax.interop import certificate as certificate_lib
from gptjax.interop import checkpoint as checkpoint_lib
from gptjax.interop import (
    formats,
    hf,
    lineage,
    onnx,
    params,
    perplexities,
    publish,
    referees,
    saved_model,
    stablehlo,
    value_proof,
)
from gptjax.interop.certificate import Certificate, Tolerance
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.gguf.held import FewBits
from gptjax.interop.gguf.write import QUANTIZATIONS, Quantization
from gptjax.interop.judging import CHECK, Check, Rounded, closing, judge
from gptjax.interop.referees import llama_cpp
from gptjax.interop.runner import GptjaxRunner
from gptjax.interop.source import sha256
from gptjax.nn import cost
from gptjax.nn.config import ModelConfig

GGUF_FILE = "model.gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What formats leave open; what a format has no use for must be left off.

    Attributes:
      family: the architecture to write it as; None takes the first that expresses the model.
      dtype: of the values; None keeps the stored one.
      quantization: of the weights in GGUF that are floats here; None is f16, or the dtype.
      few_bits: what GGUF has for kernels that are in few bits here; None is blocks with the very values.
      max_shard_bytes: size of a file of weights at most.
      num_threads: tensors in work at a time; None takes as many as there are cores.
    """

    family: str | None = None
    dtype: np.dtype | None = None
    quantization: str | None = None
    few_bits: str | None = None
    max_shard_bytes: int | None = None
    num_threads: int | None = None


_DEFAULT = Options()


def _write_hf(checkpoint: epath.Path, folder: pathlib.Path, options: Options) -> None:
    hf.write(
        checkpoint,
        folder,
        family_name=options.family,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes or hf.DEFAULT_SHARD_BYTES,
        num_threads=options.num_threads,
    )
    (folder / lineage.CARD_FILE).write_text(lineage.model_card(reading.read_meta(checkpoint)))


def _write_gguf(checkpoint: epath.Path, folder: pathlib.Path, options: Options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    gguf_write.write(
        checkpoint,
        folder / GGUF_FILE,
        quantization=_quantization(options),
        few_bits=_few_bits(options),
        family_name=options.family,
        facts=lineage.gguf_facts(reading.read_meta(checkpoint)),
        num_threads=options.num_threads,
    )


def _write_stablehlo(checkpoint: epath.Path, folder: pathlib.Path, options: Options) -> None:
    stablehlo.write(
        checkpoint,
        folder,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes or hf.DEFAULT_SHARD_BYTES,
        num_threads=options.num_threads,
    )


def _write_saved_model(checkpoint: epath.Path, folder: pathlib.Path, options: Options) -> None:
    saved_model.write(checkpoint, folder, dtype=options.dtype)


def _write_onnx(checkpoint: epath.Path, folder: pathlib.Path, options: Options) -> None:
    onnx.write(checkpoint, folder, num_threads=options.num_threads)


_FORMATS: Mapping[str, tuple[Callable[[epath.Path, pathlib.Path, Options], None], frozenset[str]]] = {
    "hf": (_write_hf, frozenset({"family", "dtype", "max_shard_bytes"})),
    "gguf": (_write_gguf, frozenset({"family", "dtype", "quantization", "few_bits"})),
    "onnx": (_write_onnx, frozenset()),
    "saved_model": (_write_saved_model, frozenset({"dtype"})),
    "stablehlo": (_write_stablehlo, frozenset({"dtype", "max_shard_bytes"})),
}
FORMATS = tuple(_FORMATS)
# What can be opened again here, if the peer is missing.
_REOPENED = ("hf", "gguf")
# In these no value of a checkpoint changes.
_EXACT = ("as stored", "float32", "f32")


def export(
    checkpoint: epath.PathLike,
    destination: pathlib.Path,
    *,
    format: str,
    options: Options = _DEFAULT,
    check: Check = CHECK,
) -> Certificate:
    """Writes the folder `destination` in another framework's format, re-loads it, and proves it.

    Killed and called again it goes on. Memory is twice that of the largest tensor (that of the model for
    `saved_model`), and with `Check.proof="run"` then that of the model, twice
    where values are rounded.

    Args:
      checkpoint: a checkpoint directory, or a workdir (its newest).
      format: one of `FORMATS`.

    Raises:
      ValueError: if the format cannot hold the model, or the destination is there already.
      RejectedError: if the result is not within its tolerance; it is then kept as `<destination>.rejected`.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    write, used = _FORMATS[format]
    given = {field.name for field in dataclasses.fields(Options) if getattr(options, field.name) is not None}
    idle = sorted(given - used - {"num_threads"})
    if idle:
        raise ValueError(f"{idle[0]}={getattr(options, idle[0])}: has no effect on {format}; leave it off")
    certificate_lib.check_dtype(options.dtype)
    path = reading.find(checkpoint)
    _check_quant(path, format=format, options=options)
    settings = {name: str(getattr(options, name)) for name in sorted(given - {"num_threads"})}
    with publish.directory(destination, job={"checkpoint": str(path), "to": format, **settings}) as partial:
        write(path, partial, options)
        found = _described(path, partial, format=format, options=options)
        if check.proof == "run":
            found = _run(found, path, partial, format=format, options=options, check=check)
        publish.settle(partial, destination, found)
    return found


def _check_quant(path: epath.Path, *, format: str, options: Options) -> None:
    quant = reading.read_meta(path).model.quant
    if quant is not None and quant.kv_cache is not None:
        raise ValueError(
            f"{path}: its keys and values are in few bits, which no format says; take that back first, by "
            "experiments.quantize --weights=none --kv_cache=none"
        )
    if quant is None and options.few_bits is not None:
        raise ValueError(f"few_bits={options.few_bits}: {path} has no kernels in few bits; leave it off")
    if quant is not None and quant.stage == "train":
        raise ValueError(
            f"{path}: was trained for few bits, to which each product rounds its kernels; store them in few bits first"
        )
    if quant is not None and format not in _REOPENED:
        raise ValueError(
            f"{path}: its kernels are in few bits, which {format} is not written from; export it as hf or gguf, or the "
            "checkpoint that it was made from, whose path is in its lineage"
        )


def _few_bits(options: Options) -> FewBits:
    name = options.few_bits or "blocks"
    for known in get_args(FewBits):
        if name == known:
            return known
    raise ValueError(f"few_bits={name!r}: expected one of {', '.join(get_args(FewBits))}")


def _quantization(options: Options) -> Quantization:
    if options.quantization is not None and options.dtype is not None:
        raise ValueError("dtype and quantization: both say how GGUF stores weights; give one")
    name = options.quantization or {"float32": "f32", "bfloat16": "bf16"}.get(str(options.dtype), "f16")
    for known in QUANTIZATIONS:
        if name == known:
            return known
    raise ValueError(f"quantization={name!r}: expected one of {', '.join(QUANTIZATIONS)}")


def _dtype(format: str, options: Options) -> str:
    """What became of values that are floats."""
    if format == "gguf":
        return _quantization(options)
    return "as stored" if options.dtype is None else options.dtype.name


def _tolerance(format: str, options: Options, model: ModelConfig, *, blocks: Collection[str]) -> Tolerance:
    """What the values that are written may change.

    Args:
      blocks: kinds of those in a GGUF file, beside which llama.cpp rounds activations to 8 bits.
    """
    if format == "gguf":
        kind = _quantization(options)
        if blocks:
            kind = "q8_0" if set(blocks) == {"q8_0"} else "q4_0"
        dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(kind, kind)
        return llama_cpp.tolerance(model, certificate_lib.tolerance(dtype, model))
    return certificate_lib.tolerance("float32" if options.dtype is None else options.dtype.name, model)


def _described(path: epath.Path, partial: pathlib.Path, *, format: str, options: Options) -> Certificate:
    meta = reading.read_meta(path)
    files = sorted(
        file
        for file in partial.rglob("*")
        if file.is_file() and str(file.relative_to(partial)) not in publish.WORK_FILES
    )
    dtype = _dtype(format, options)
    proof = value_proof.read_back(path, partial, format=format, dtype=options.dtype, num_threads=options.num_threads)
    if proof.blocks:
        dtype = f"{dtype}, kernels in few bits as {' '.join(proof.blocks)}"
    return Certificate(
        accepted=not proof.problems,
        kind=f"checkpoint to {format}",
        source={
            "path": str(path),
            "step": meta.step,
            "checksums": meta.checksums,
            "lineage": [dict(entry) for entry in meta.lineage],
        },
        target={
            "path": partial.name.removesuffix(".partial"),
            "sha256": {str(file.relative_to(partial)): sha256(file) for file in files},
        },
        num_params=cost.count(meta.model).total,
        dtype=dtype,
        referees={},
        tolerance=_tolerance(format, options, meta.model, blocks=proof.blocks),
        values=proof.told,
        problems=tuple(proof.problems.values())[: checkpoint_lib.MAX_PROBLEMS],
        versions=certificate_lib.versions(),
        created=certificate_lib.now(),
    )


def _run(
    found: Certificate, path: epath.Path, partial: pathlib.Path, *, format: str, options: Options, check: Check
) -> Certificate:
    ours = GptjaxRunner.load(path)
    prompts = certificate_lib.prompts(ours, ours.model)
    source = certificate_lib.record(ours, prompts, seq_len=ours.model.seq_len)
    missing = ""
    try:
        peer = referees.for_artefact(format, partial)
    except ImportError as error:
        if format not in _REOPENED:
            return dataclasses.replace(found, referees={"source": source.runner, "target": f"missing: {error}"})
        missing, peer = str(error), reloaded(partial)
    with closing(peer):
        target = certificate_lib.record(peer, prompts, seq_len=ours.model.seq_len)
        rounded = _rounded(partial, ours.model, format=format, options=options)
        if rounded is not None and format == "hf":  # which is run in float32
            found = dataclasses.replace(found, tolerance=certificate_lib.tolerance("float32", ours.model))
        judged = judge(found, source, target, runners=(ours, peer), check=check, rounded=rounded)
        if check.text is not None:
            written = ours if rounded is None else rounded.runner
            judged = perplexities.judge(judged, check.text, ours, peer, written=written)
    if missing:
        peers = {**judged.referees, "missing": f"{missing}; gptjax read its own artefact instead"}
        return dataclasses.replace(judged, referees=peers)
    return judged


def _rounded(partial: pathlib.Path, model: ModelConfig, *, format: str, options: Options) -> Rounded | None:
    """Ours with what is read back, where that is not to the bit what ours computes with."""
    dtype, reasons = _dtype(format, options), {}
    if format not in _REOPENED:
        return None
    if dtype not in _EXACT:
        reasons[f"values are rounded to {dtype}"] = certificate_lib.ROUNDING_KL[dtype]
    if model.quant is not None:
        reasons["what is in few bits here is multiplied as floats"] = certificate_lib.ROUNDING_KL["f16"]
        if _few_bits(options) == "blocks_or_f16":
            reasons["kernels that no block holds are rounded to f16"] = certificate_lib.ROUNDING_KL["f16"]
        if any(rule.activations != "none" for rule in model.quant.rules):
            reasons["inputs are rounded as the checkpoint says here alone"] = certificate_lib.ROUNDING_KL["q8_0"]
    if not reasons:
        return None
    return Rounded(runner=reloaded(partial), reason="; ".join(reasons), max_kl=max(reasons.values()))


def reloaded(path: pathlib.Path) -> GptjaxRunner:
    """Ours, with what it reads back from an artefact."""
    source = formats.open_source(path)
    return GptjaxRunner(source.model, params.read(source), source.tokenizer)
