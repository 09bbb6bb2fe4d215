"""Which format a path holds, told by its content, and the model in it."""

from __future__ import annotations

import pathlib

from gptjax.interop import hf
from gptjax.interop.source import Source

_GGUF_MAGIC = b"GGUF"


def recognise(path: pathlib.Path) -> str | None:
    """`hf`, `gguf`, `llama2c`, or None where it is none of them."""
    if path.is_dir():
        return "hf" if (path / hf.CONFIG_FILE).is_file() else None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(len(_GGUF_MAGIC))
    if start == _GGUF_MAGIC:
        return "gguf"
    return None


def open_source(path: pathlib.Path) -> Source:
    """Opens a model of another framework.

    Raises:
      ValueError: if there is none, or naming what is wrong with it.
    """
    match recognise(path):
        case "hf":
            return hf.open_source(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    raise ValueError(
        f"{path}: no model of a known format; expected a Hugging Face folder (config.json and .safetensors), "
        "a GGUF file or a llama2.c .bin"
    )
