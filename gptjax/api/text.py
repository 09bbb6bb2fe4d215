"""Tokenizer, data set and collator with the names that transformers gives them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.api import presets
from gptjax.checkpoint import store
from gptjax.data import examples as example_rows
from gptjax.data import tokenizer
from gptjax.data.examples import token_ids
from gptjax.nn.config import ModelConfig
from gptjax.train import objective
from gptjax.types import Batch, Objective


class GPT4Tokenizer:
    """A `data.tokenizer.Tokenizer` under transformers' names."""

    def __init__(self, inner: tokenizer.Tokenizer) -> None:
        self.inner = inner

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str]) -> GPT4Tokenizer:
        """The tokenizer of a preset (bytes), of a checkpoint or workdir, or of a tokenizer's own file or directory.

        Raises:
          ValueError: if there is none.
        """
        if presets.is_preset(name_or_path):
            return cls(tokenizer.byte_level())
        presets.check_there(name_or_path)
        path = Path(name_or_path)
        if path.is_file() or (path / tokenizer.FILE_NAME).is_file():
            return cls(tokenizer.load(path))
        found = store.read_assets(store.find(name_or_path)).get(tokenizer.FILE_NAME)
        if found is None:
            raise ValueError(f"{path}: its checkpoint has no {tokenizer.FILE_NAME}; it was saved without a tokenizer")
        return cls(tokenizer.from_bytes(found))

    @classmethod
    def train(cls, files: Sequence[str | os.PathLike[str]], *, vocab_size: int) -> GPT4Tokenizer:
        """Learns byte-pair merges, with byte fallback, from UTF-8 text files."""
        return cls(tokenizer.train_bpe((read_text(path) for path in files), vocab_size))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Raises:
        ValueError: if another tokenizer is there.
        """
        tokenizer.save(self.inner, Path(directory) / tokenizer.FILE_NAME)

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        """`{"input_ids": ids}` of a text, or a list of ids for each of several; see `encode`."""
        encode = functools.partial(self.encode, add_special_tokens=add_special_tokens)
        return {"input_ids": encode(text) if isinstance(text, str) else [encode(each) for each in text]}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, behind the token that every sequence starts with in training unless told otherwise."""
        return self.inner.encode_prompt(text) if add_special_tokens else self.inner.encode(text)

    def decode(self, token_ids: Iterable[int]) -> str:
        return self.inner.decode(token_ids)

    def __len__(self) -> int:
        return self.inner.vocab_size

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def pad_token_id(self) -> int | None:
        return self.inner.pad_id

    @property
    def bos_token_id(self) -> int | None:
        return self.inner.bos_id

    @property
    def eos_token_id(self) -> int | None:
        return self.inner.eos_id

    @property
    def mask_token_id(self) -> int | None:
        return self.inner.mask_id


class TextDataset:
    """The tokens of a text file in blocks of `block_size`; the last block is what is left.

    Items are int32 arrays of at most `block_size` tokens. Each begins with the tokenizer's start token, where it
    has one: what a model is to continue later begins so too.

    Raises:
      ValueError: if the file is missing, empty or not UTF-8.
    """

    def __init__(self, tokenizer: GPT4Tokenizer, file_path: str | os.PathLike[str], block_size: int) -> None:
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: expected at least 2, a token and the one after it")
        start_id = tokenizer.inner.start_id
        self._head = np.asarray([] if start_id is None else [start_id], np.int32)
        self._tokens = np.asarray(tokenizer.encode(read_text(file_path), add_special_tokens=False), np.int32)
        self._stride = block_size - len(self._head)

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._stride)

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index % len(self) * self._stride
        return np.concatenate([self._head, self._tokens[start : start + self._stride]])


class DataCollatorForLanguageModeling:
    """Decides what a batch of token blocks is trained for.

    Args:
      mlm: True hides 15 % of the tokens (of these 80 % as mask, 10 % as a random token, 10 % as they
        are) and predicts them from both sides; False predicts every token from those before it.
      mlm_probability: another part to hide than 15 %.
    """

    def __init__(
        self, tokenizer: GPT4Tokenizer, *, mlm: bool = True, mlm_probability: float = objective.MASKED_FRACTION
    ) -> None:
        if mlm and tokenizer.mask_token_id is None:
            raise ValueError("mlm=True hides tokens behind a mask token, and this tokenizer has none; use mlm=False")
        if not 0.0 < mlm_probability <= 1.0:
            raise ValueError(f"mlm_probability={mlm_probability}: expected over 0 and at most 1")
        self.tokenizer = tokenizer
        self.mlm = mlm
        self.mlm_probability = mlm_probability

    def __call__(self, examples: Sequence[Any], *, length: int | None = None) -> Batch:
        """Rows of int32 and float32 numpy arrays, padded on the right.

        Which tokens are hidden is drawn in the training step, anew each time.

        Args:
          examples: token ids, or mappings with `input_ids`; empty ones become padding.
          length: of the rows; None is that of the longest example.
        """
        rows = [token_ids(each) for each in examples]
        # Row by row the next token, whose last one is unknown; a masked model predicts the token itself.
        return example_rows.batch(rows, length=length or max(map(len, rows)), shift=0 if self.mlm else 1)

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """The model as this training uses it: a masked one sees both sides, another only what is before."""
        return dataclasses.replace(config, causal=not self.mlm)

    def objective(self, config: ModelConfig) -> Objective:
        """The loss to train `model_config(config)` with."""
        if not self.mlm:
            return objective.next_token(config)
        inner = self.tokenizer.inner
        assert inner.mask_id is not None, "checked at construction"
        return objective.masked_lm(
            config,
            mask_id=inner.mask_id,
            vocab_size=inner.vocab_size,
            special_ids=sorted(inner.special_ids),
            fraction=self.mlm_probability,
        )


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Raises:
      ValueError: if it is missing, empty, or not UTF-8.
    """
    try:
        # Not read_text, which would turn \\r\\n into \\n.
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} ({error.object[error.start]:#04x})"
        raise ValueError(f"{os.fspath(path)}: {found} is not UTF-8; convert the file first") from error
    if not text:
        raise ValueError(f"{os.fspath(path)}: the file is empty")
    return text
