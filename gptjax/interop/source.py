"""A model of another framework, opened: its config, its tensors by Hugging Face's names, its tokenizer."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.interop.layout import Shape
from gptjax.interop.table import Family
from gptjax.nn.config import ModelConfig

_HASH_BYTES = 1 << 24


class Readable(Protocol):
    """A tensor that is read when it is asked for."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """What an importer of a format returns.

    Attributes:
      path: as the user gave it.
      format: `hf`, `gguf` or `llama2c`.
      tensors: by the names of the family's rows.
      files: everything that was read, for hashes.
      raw_config: theirs, as it was found.
    """

    path: pathlib.Path
    format: str
    family: Family
    model: ModelConfig
    tensors: Mapping[str, Readable]
    tokenizer: Tokenizer | None
    files: tuple[pathlib.Path, ...]
    raw_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = 0 if self.tokenizer is None else self.tokenizer.vocab_size
        if size > self.model.vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer has {size} ids and the model {self.model.vocab_size}: those from "
                f"{self.model.vocab_size} on would have no embedding; put the tokenizer of this model there"
            )

    def identity(self) -> dict[str, Any]:
        """Tells this source from another without reading it: names, sizes and times of its files."""
        stats = {file.name: file.stat() for file in self.files}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each file, by name."""
        return {file.name: sha256(file) for file in self.files}


def digest(x: np.ndarray) -> bytes:
    """Of the values' bits: two tensors can be told apart without both in memory."""
    return hashlib.blake2b(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, digest_size=32).digest()


def sha256(path: pathlib.Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
