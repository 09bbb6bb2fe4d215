"""From a model of another framework to a checkpoint, with its certificate."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from gptjax.checkpoint import arrays, reading
from gptjax.interop import certificate as certificate_lib
from gptjax.interop import checkpoint, formats, publish, referees
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
    certificate_lib.check_dtype(dtype)
    source = formats.open_source(source_path)
    identity = source.identity()
    with publish.directory(destination, job={"from": source.format}) as partial:
        checkpoint.write(source, partial, dtype=dtype, num_threads=num_threads)
        found = _prove(source, partial, dtype=dtype, check=check, num_threads=num_threads)
        if source.identity() != identity:
            raise ValueError(f"{source.path}: was changed while it was read; remove {partial}, and import it again")
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
    stored = checkpoint.CheckpointTensors(directory, source.family, source.model)
    problems = checkpoint.value_problems(source, stored, num_threads=num_threads)
    cast = "" if dtype is None else f", cast to {dtype.name}"
    meta = reading.read_meta(directory)
    dtypes = {leaf.dtype.name for leaf in arrays.stored_shapes(directory / "params").values()}
    tolerance = certificate_lib.tolerance("float32" if dtype is None else dtype.name, source.model)
    if source.format != "hf":
        tolerance = llama_cpp.tolerance(source.model, tolerance)
    found = Certificate(
        accepted=not problems,
        kind=f"{source.format} to checkpoint",
        source={"path": str(source.path), "family": source.family.name, "sha256": source.hashes()},
        target={"path": directory.name.removesuffix(".partial"), "checksums": meta.checksums},
        num_params=cost.count(source.model).total,
        dtype=", ".join(sorted(dtypes)),
        referees={},
        tolerance=tolerance,
        values=f"{len(stored) - len(problems)} of {len(stored)} tensors read back equal to the source's bits{cast}",
        problems=tuple(problems.values())[: checkpoint.MAX_PROBLEMS],
        versions=certificate_lib.versions(),
        created=certificate_lib.now(),
    )
    return _run(found, source, directory, check=check) if check.proof == "run" else found


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
