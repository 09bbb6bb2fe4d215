"""From a model of another framework to a checkpoint, with its certificate."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from gptjax.checkpoint import arrays, reading
from gptjax.interop import certificate as certificate_lib
from gptjax.interop import checkpoint, formats, publish, referees, stream
from gptjax.interop.certificate import Certificate
from gptjax.interop.judging import CHECK, Check, closing, judge
from gptjax.interop.referees import llama_cpp
from gptjax.interop.runner import GptjaxRunner
from gptjax.interop.source import Source
from gptjax.nn import cost


def import_model(
    source_path: pathlib.Path,
    destination: pathlib.Path,
    *,
    dtype: np.dtype | None = None,
    check: Check = CHECK,
    num_threads: int | None = None,
) -> Certificate:
    """Writes the checkpoint `destination` from a model of another framework, and proves it.

    Killed and called again it goes on. Memory is twice that of the largest tensor, and where both models are run
    (`Check.proof`) then that of the model.

    Args:
      dtype: of the parameters; None keeps that of the source.

    Raises:
      ValueError: if the source is not what it says, or the destination is there already.
      RejectedError: if the result is not within its tolerance; it is then kept as `<destination>.rejected`.
    """
    source = formats.open_source(source_path)
    with publish.directory(destination) as partial:
        checkpoint.write(source, partial, dtype=dtype, num_threads=num_threads)
        found = _prove(source, partial, dtype=dtype, check=check, num_threads=num_threads)
        publish.settle(partial, destination, found)
    return found


def _prove(
    source: Source,
    directory: pathlib.Path,
    *,
    dtype: np.dtype | None,
    check: Check,
    num_threads: int | None,
) -> Certificate:
    values, problems = _compare_values(source, directory, dtype=dtype, num_threads=num_threads)
    meta = reading.read_meta(directory)
    stored = {leaf.dtype.name for leaf in arrays.stored_shapes(directory / "params").values()}
    tolerance = certificate_lib.tolerance("float32" if dtype is None else dtype.name, source.model)
    if source.format != "hf":
        tolerance = llama_cpp.tolerance(source.model, tolerance)
    found = Certificate(
        accepted=not problems,
        kind=f"{source.format} to checkpoint",
        source={"path": str(source.path), "family": source.family.name, "sha256": source.hashes()},
        target={"path": directory.name.removesuffix(".partial"), "checksums": meta.checksums},
        num_params=cost.count(source.model).total,
        dtype=", ".join(sorted(stored)),
        referees={},
        tolerance=tolerance,
        values=values,
        problems=tuple(problems),
        versions=certificate_lib.versions(),
        created=certificate_lib.now(),
    )
    return _run(found, source, directory, check=check) if check.proof == "run" else found


def _compare_values(
    source: Source, directory: pathlib.Path, *, dtype: np.dtype | None, num_threads: int | None
) -> tuple[str, list[str]]:
    """Whether each tensor, made from what is on disk, is the source's to the bit (after its cast, if one was asked)."""
    stored = checkpoint.CheckpointTensors(directory, source.family, source.model)
    different: list[str] = []

    def check(task: stream.Tensor) -> bool:
        wanted = source.tensors[task.name].read().astype(stored[task.name].dtype, copy=False)
        got = stored[task.name].read()
        same = np.array_equal(_bits(wanted), _bits(got))
        if not same:
            different.append(task.name)
        return same

    tasks = [stream.Tensor(name, tensor.shape, tensor.dtype) for name, tensor in stored.items()]
    stream.run(tasks, check, None, label="compare", num_threads=num_threads)
    cast = "" if dtype is None else f", cast to {dtype.name}"
    total = len(stored)
    return (
        f"{total - len(different)} of {total} tensors read back equal to the source's bits{cast}",
        [f"{name}: what was written is not what was read" for name in sorted(different)[:5]],
    )


def _bits(x: np.ndarray) -> np.ndarray:
    """The values as bytes: a NaN is not equal to itself, and zeros of either sign are."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _run(found: Certificate, source: Source, directory: pathlib.Path, *, check: Check) -> Certificate:
    ours = GptjaxRunner.load(directory)
    prompts = certificate_lib.prompts(ours, source.model)
    target = certificate_lib.record(ours, prompts, seq_len=source.model.seq_len)
    names = {"target": target.runner}
    try:
        peer = referees.for_source(source)
    except ImportError as error:
        return dataclasses.replace(found, referees=names | {"source": f"missing: {error}"})
    with closing(peer):
        wanted = certificate_lib.record(peer, prompts, seq_len=source.model.seq_len)
        return judge(found, wanted, target, runners=(peer, ours), check=check)
