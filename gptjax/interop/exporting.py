"""From a checkpoint to another framework's format, with its certificate."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from etils import epath

from gptjax.checkpoint import reading
from gptjax.interop import certificate as certificate_lib
from gptjax.interop import formats, hf, params, publish, referees
from gptjax.interop.certificate import TOLERANCES, Certificate
from gptjax.interop.importing import Proof, judge
from gptjax.interop.runner import GptjaxRunner, Runner
from gptjax.interop.source import sha256
from gptjax.nn import cost

FORMATS = ("hf",)


def export(
    checkpoint: epath.PathLike,
    destination: pathlib.Path,
    *,
    format: str,
    family: str | None = None,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = hf.DEFAULT_SHARD_BYTES,
    proof: Proof = "run",
    trace: Callable[[str], None] | None = None,
    num_threads: int | None = None,
) -> Certificate:
    """Writes the folder `destination` in another framework's format, re-loads it, and proves it.

    Killed and called again it goes on. Memory is twice that of the largest tensor, and with `proof="run"` then that
    of the model.

    Args:
      checkpoint: a checkpoint directory, or a workdir (its newest).
      family: the architecture to write it as; None takes the first that expresses the model.
      dtype: of the tensors; None keeps the stored one.
      trace: told how the layers' outputs compare, where the peer shows them.

    Raises:
      ValueError: if the format cannot hold the model, or the destination is there already.
      RejectedError: if the result is not within its tolerance; it is then kept as `<destination>.rejected`.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    path = reading.find(checkpoint)
    with publish.directory(destination) as partial:
        hf.write(
            path, partial, family_name=family, dtype=dtype, max_shard_bytes=max_shard_bytes, num_threads=num_threads
        )
        found = _described(path, partial, format=format, dtype=dtype)
        if proof == "run":
            found = _run(found, path, partial, format=format, trace=trace)
        publish.settle(partial, destination, found)
    return found


def _described(path: epath.Path, partial: pathlib.Path, *, format: str, dtype: np.dtype | None) -> Certificate:
    meta = reading.read_meta(path)
    files = sorted(file for file in partial.iterdir() if file.is_file() and file.name != publish.CERTIFICATE_FILE)
    hashes = {file.name: sha256(file) for file in files if file.stat().st_size and file.name != "lock"}
    return Certificate(
        accepted=True,
        kind=f"checkpoint to {format}",
        source={"path": str(path), "step": meta.step, "checksums": meta.checksums},
        target={"path": partial.name.removesuffix(".partial"), "sha256": hashes},
        num_params=cost.count(meta.model).total,
        dtype="as stored" if dtype is None else dtype.name,
        referees={},
        tolerance=TOLERANCES["float32" if dtype is None else dtype.name],
        values="the checkpoint's values were those that were saved (checksums)",
        versions=certificate_lib.versions(),
        created=certificate_lib.now(),
    )


def _run(
    found: Certificate,
    path: epath.Path,
    partial: pathlib.Path,
    *,
    format: str,
    trace: Callable[[str], None] | None,
) -> Certificate:
    ours = GptjaxRunner.load(path)
    prompts = certificate_lib.prompts(ours, ours.model)
    source = certificate_lib.record(ours, prompts, seq_len=ours.model.seq_len)
    missing = ""
    try:
        peer = referees.for_artefact(format, partial)
    except ImportError as error:
        missing, peer = str(error), reloaded(partial)
    target = certificate_lib.record(peer, prompts, seq_len=ours.model.seq_len)
    judged = judge(found, source, target, runners=(ours, peer), trace=trace)
    if missing:
        peers = {**judged.referees, "missing": f"{missing}; gptjax read its own artefact instead"}
        return dataclasses.replace(judged, referees=peers)
    return judged


def reloaded(path: pathlib.Path) -> Runner:
    """Ours, with what it reads back from an artefact: the referee of last resort."""
    source = formats.open_source(path)
    return GptjaxRunner(source.model, params.read(source), source.tokenizer)
