"""The peers' own implementations, which judge conversions; each file needs its peer's package."""

from __future__ import annotations

import pathlib

from gptjax.interop.runner import Runner
from gptjax.interop.source import Source


def for_source(source: Source) -> Runner:
    """Who can run what a source holds.

    Raises:
      ImportError: if it is not installed; the message says what to install.
    """
    if source.format in ("gguf", "llama2c"):
        from gptjax.interop.referees import llama_cpp

        return llama_cpp.of_source(source)
    return for_artefact(source.format, source.path)


def for_artefact(format: str, path: pathlib.Path) -> Runner:
    """Who can run an artefact of a format.

    Raises:
      ImportError: if it is not installed; the message says what to install.
    """
    match format:
        case "hf":
            from gptjax.interop.referees.hf import TransformersRunner

            return TransformersRunner(path)
        case "gguf":
            from gptjax.interop.referees import llama_cpp

            return llama_cpp.of_file(path)
        case "stablehlo" | "saved_model" | "onnx":
            from gptjax.interop.referees.programs import ProgramsRunner

            return ProgramsRunner(path, format)
    raise ImportError(f"no other implementation of {format} is known here")
