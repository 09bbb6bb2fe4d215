"""JSON files that are never seen half-written, local or gs://."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a value, whole or not at all; directories are made."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        if error.strerror:  # else the whole text is its argument
            error.filename = error.filename or os.fspath(path)  # A full disk does not say where.
        raise
    partial.replace(path)


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The content of a file; empty where there is none.

    Raises:
      ValueError: with the path, if it is not JSON.
    """
    path = epath.Path(path)
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); restore it, or remove it") from error
