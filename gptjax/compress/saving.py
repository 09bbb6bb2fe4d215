"""What compression makes becomes a checkpoint: whole under its name, with its lineage, or not at all."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from gptjax.checkpoint import arrays
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import publish
from gptjax.nn.config import ModelConfig
from gptjax.types import Params


def fingerprint(cfg: ModelConfig, params: Params) -> str:
    """`meta.params_hash` of the checkpoint that these would be."""
    return meta_lib.params_hash(cfg, arrays.checksums(arrays.flatten({"params": params})))


def check_free(destination: pathlib.Path, *, source: str) -> None:
    """Raises:
    ValueError: if something has that name already, it would be inside of what is only read, or cannot be made.
    """
    if "://" not in source and destination.resolve().is_relative_to(pathlib.Path(source).expanduser().resolve()):
        raise ValueError(f"{destination}: is inside of {source}, which is only read; name a directory beside it")
    if destination.exists():
        raise ValueError(f"{destination}: is there already, and is not overwritten; name another, or remove it")
    publish.check_place(destination)


def write(
    destination: pathlib.Path,
    cfg: ModelConfig,
    params: Params,
    *,
    entry: Mapping[str, Any],
    source: Meta | None,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes the checkpoint `destination`.

    Args:
      entry: what the lineage gains: `stage` and its facts, in JSON's types.
      source: of the checkpoint that it was made from, whose step and lineage go on; None for a model of others.

    Raises:
      ValueError: if the destination is there already, or cannot be written.
    """
    assets = {} if tokenizer is None else {tokenizer_lib.FILE_NAME: tokenizer.to_bytes()}
    names = "" if tokenizer is None else tokenizer.fingerprint
    if source is None:
        meta = meta_lib.make(cfg, tokenizer=names, lineage=(entry,))
    else:
        meta = meta_lib.make(
            cfg, step=source.step, run=source.run, tokenizer=names, lineage=(*source.lineage, dict(entry))
        )
    meta = dataclasses.replace(meta, score=None)
    with publish.directory(destination, job=entry) as partial:
        with CheckpointStore(partial) as store:
            store.save(meta.step, meta=meta, params=params, assets=assets)
        (store.directory / str(meta.step)).rename(destination)
        shutil.rmtree(partial)
