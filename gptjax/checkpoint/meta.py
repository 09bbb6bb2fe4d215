"""What a checkpoint says about itself: enough to rebuild the model and to trace its origin."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax import config
from gptjax.nn.config import ModelConfig

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The `meta` item of a checkpoint, stored as JSON.

    Attributes:
      format_version: of the directory's layout; a newer one than this code knows is refused.
      step: updates that made the parameters.
      model: rebuilds the parameters' structure.
      run: the config of the run that wrote it, as `config.to_dict` gives it.
      tokenizer: fingerprint of the tokenizer whose ids the embeddings are of; empty for none.
      lineage: what was done to get here, oldest first; one entry a stage (`stage` and its facts).
      versions: of the libraries that wrote it.
      created: when it was saved, UTC, ISO 8601.
      score: of the model on held-out text, lower being better; None where it was not measured.
      checksums: by item and path, of every array (`arrays.checksums`) and asset (CRC-32).
    """

    format_version: int
    step: int
    model: ModelConfig
    run: dict[str, Any]
    tokenizer: str
    lineage: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    created: str
    score: float | None
    checksums: dict[str, int]


def make(
    model: ModelConfig,
    *,
    step: int = 0,
    run: Mapping[str, Any] | None = None,
    tokenizer: str = "",
    lineage: Sequence[Mapping[str, Any]] = (),
) -> Meta:
    """The meta of a model made now by this process."""
    return Meta(
        format_version=FORMAT_VERSION,
        step=step,
        model=model,
        run=dict(run or {}),
        tokenizer=tokenizer,
        lineage=tuple(dict(entry) for entry in lineage),
        versions=versions(),
        created=now(),
        score=None,
        checksums={},
    )


def params_hash(model: ModelConfig, checksums: Mapping[str, int]) -> str:
    """Tells a model's parameters apart from all others: SHA-256 of their checksums and the model, as hex.

    Args:
      checksums: as `Meta` has them; those of other items do not count.
    """
    params = {name: value for name, value in checksums.items() if name.startswith("params/")}
    content = json.dumps([params, config.to_dict(model)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def to_json(meta: Meta) -> dict[str, Any]:
    """The meta as nested dicts, lists and scalars."""
    return config.to_dict(meta)


def from_json(values: Any, *, path: str) -> Meta:
    """The inverse of `to_json`.

    Args:
      path: of the file, for messages.

    Raises:
      ValueError: naming the file and the key that is unknown, missing or mistyped.
    """
    version = values.get("format_version") if isinstance(values, Mapping) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest that this gptjax reads; "
            "install the version that wrote it"
        )
    return config.from_dict(Meta, values, path=path)


def model_differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    """One line per size or choice that differs: `groups.0.pattern.0.mlp.d_ff: 1024 -> 2048`."""
    return config.diff(_indexed(config.to_dict(stored)), _indexed(config.to_dict(wanted)))


def _indexed(values: Any) -> Any:
    """Lists as mappings from their index, so that a difference inside one is a leaf."""
    if isinstance(values, Mapping):
        return {key: _indexed(value) for key, value in values.items()}
    if isinstance(values, list):
        return {str(i): _indexed(value) for i, value in enumerate(values)}
    return values


def versions() -> dict[str, str]:
    """Of Python and the libraries that make a model what it is."""
    found = {"python": platform.python_version()}
    for package in ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[package] = "source"
    return found
