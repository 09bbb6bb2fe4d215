"""Held-out text as the rows that models are compared on."""

from __future__ import annotations

import pathlib
import tempfile
from typing import NamedTuple

from gptjax.data import loader, writer
from gptjax.data.tokenizer import Tokenizer
from gptjax.types import Batch


class HeldOut(NamedTuple):
    """Rows from all over a text, none of which sees another.

    Attributes:
      name: what the text is.
      batches: of one row each, `[1, T]`.
      num_targets: that are scored.
      num_bytes: of UTF-8 that they spell.
    """

    name: str
    batches: tuple[Batch, ...]
    num_targets: int
    num_bytes: int


def read(spec: str, tokenizer: Tokenizer, *, seq_len: int, num_tokens: int) -> HeldOut:
    """The rows of a text, always the same ones.

    Args:
      spec: a token store, a file, or another source that `data.source.open_source` takes.
      num_tokens: at most, but a row at least.

    Raises:
      ValueError: if there is no such text, or nothing in it to be scored.
    """
    with tempfile.TemporaryDirectory() as scratch:
        store = writer.store_of(spec, tokenizer, scratch=pathlib.Path(scratch) / "store")
        found = loader.eval_batches(
            store, batch_size=1, seq_len=seq_len, stride=seq_len, max_batches=max(1, num_tokens // seq_len)
        )
        return HeldOut(spec, tuple(found), found.num_targets, found.num_bytes)
