"""Which format a path holds, told by its content, and the model in it."""

from __future__ import annotations

import pathlib

from gptjax.interop import gguf, hf, llama2c
from gptjax.interop.source import Source


def recognise(path: pathlib.Path) -> str | None:
    """`hf`, `gguf`, `llama2c`, or None where it is none of them."""
    if path.is_dir():
        if hf.is_folder(path):
            return "hf"
        return "gguf" if any(path.glob("*.gguf")) else None
    if not path.is_file():
        return None
    if gguf.is_gguf(path):
        return "gguf"
    return "llama2c" if path.suffix == ".bin" or llama2c.is_llama2c(path) else None


def open_source(path: pathlib.Path) -> Source:
    """Opens a model of another framework.

    Raises:
      ValueError: if there is none, or naming what is wrong with it.
    """
    match recognise(path):
        case "hf":
            return hf.open_source(path)
        case "gguf":
            return gguf.open_source(path)
        case "llama2c":
            return llama2c.open_source(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    raise ValueError(
        f"{path}: no model of a known format; expected a Hugging Face folder (config.json and .safetensors), "
        "a GGUF file or a llama2.c .bin"
    )
