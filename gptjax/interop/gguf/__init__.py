"""GGUF files of llama.cpp's, opened as models: config, tensors under Hugging Face's names, tokenizer."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.interop.families import FAMILIES
from gptjax.interop.gguf import experts, names, rope
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf.config import GEMMA3, GPT2, LLAMA, QWEN3, QWEN3_MOE, Architecture, Found
from gptjax.interop.gguf.file import MAGIC, GgufFile, is_later_part, read_header
from gptjax.interop.reader import MAX_LAYERS, ConfigReader
from gptjax.interop.source import Source
from gptjax.interop.table import Family, Unit, read_config, units
from gptjax.nn.config import ModelConfig

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        LLAMA,
        QWEN3,
        QWEN3_MOE,
        GEMMA3,
        GPT2,
        experts.GPT_OSS,
        experts.DEEPSEEK2,
    )
}
"""By `general.architecture`."""

# The tables of rotations in very old files.
_IGNORED = r"blk\.\d+\.attn_rot_embd\.weight"


def is_gguf(file: pathlib.Path) -> bool:
    """Whether the content begins as such a file does."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def find(path: pathlib.Path) -> pathlib.Path:
    """The file itself, or the one GGUF file in a folder, or the first of the one model there in several.

    Raises:
      ValueError: if the folder has none, or several.
    """
    if not path.is_dir():
        return path
    found = [file for file in sorted(path.glob("*.gguf")) if not is_later_part(file)]
    if len(found) != 1:
        raise ValueError(f"{path}: {len(found)} GGUF files, expected one; name the file")
    return found[0]


def open_source(path: pathlib.Path) -> Source:
    """A GGUF file, the first of a model's, or the one in a folder; values of quantised types are float32.

    Raises:
      ValueError: naming the file, and the key or tensor, that is missing, damaged or not supported.
    """
    file = find(path)
    header = read_header(file)
    architecture = architecture_of(header)
    factors = header.tensors.get(rope.FACTORS_TENSOR) if architecture.has_rope_factors else None
    if factors is not None and (len(factors.shape) != 1 or factors.shape[0] > rope.MAX_FACTORS):
        raise ValueError(
            f"{file}: {rope.FACTORS_TENSOR}: got {list(factors.shape)}, expected one dimension of at most "
            f"{rope.MAX_FACTORS}"
        )
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    found = Found(shapes, None if factors is None else factors.read())
    config, family, model = read_model(architecture, header.metadata, found, path=str(file))
    wanted = units(family, model)
    places = names.places(
        architecture.name,
        wanted,
        model,
        moves=architecture.moves,
        renamed=architecture.renamed,
        present=header.tensors.keys(),
    )
    elsewhere = () if factors is None else (rope.FACTORS_TENSOR,)
    tensors = names.find(header, places, ignored=(_IGNORED, *elsewhere))
    return Source(
        path=file,
        format="gguf",
        family=family,
        model=model,
        tensors=_of_one_dtype(tensors, wanted),
        tokenizer=gguf_tokenizer.read(header),
        files=(file, *header.others),
        raw_config=config,
    )


def architecture_of(header: GgufFile) -> Architecture:
    """The architecture of a file.

    Raises:
      ValueError: if it is not one of `ARCHITECTURES`.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{header.path}: general.architecture: got {name!r:.80}, expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def read_model(
    architecture: Architecture, metadata: Mapping[str, Any], found: Found, *, path: str
) -> tuple[dict[str, Any], Family, ModelConfig]:
    """The config as Hugging Face would write it, its family, and ours.

    Raises:
      ValueError: naming the key that is missing, unknown or not supported.
    """
    prefix = architecture.name + "."
    own = {
        key[len(prefix) :]: _plain(value, path=f"{path}: {key}")
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    reader = ConfigReader(own, path=f"{path}: {architecture.name}")
    config = architecture.read(reader, found)
    reader.finish()
    if config["model_type"] not in FAMILIES:
        raise ValueError(f"{path}: model_type: got {config['model_type']!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[config["model_type"]]
    return config, family, read_config(family, config, path=path)


def _plain(value: Any, *, path: str) -> Any:
    """One number for a list of equal ones: some write what all layers have for each layer."""
    if isinstance(value, np.ndarray | list) and len(value) > MAX_LAYERS:
        raise ValueError(f"{path}: got a list of {len(value):,}, expected at most {MAX_LAYERS}, one for each layer")
    if isinstance(value, np.ndarray):
        return value[0].item() if value.size and (value == value[0]).all() else value.tolist()
    return value


def _of_one_dtype(tensors: Mapping[str, names.MovedTensor], wanted: list[Unit]) -> dict[str, names.MovedTensor]:
    """Layers that are of one array here get one dtype; of different ones that is float32, which holds them all."""
    dtypes: dict[str, set[np.dtype]] = {}
    for unit in wanted:
        for part in unit.ours:
            dtypes.setdefault(part.path, set()).add(tensors[unit.theirs].dtype)
    mixed = {path for path, found in dtypes.items() if len(found) > 1}
    return {
        unit.theirs: dataclasses.replace(tensors[unit.theirs], dtype=np.dtype(np.float32))
        if any(part.path in mixed for part in unit.ours)
        else tensors[unit.theirs]
        for unit in wanted
    }
