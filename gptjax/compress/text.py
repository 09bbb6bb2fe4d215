"""Calibration text: rows of tokens of one length, on which a method sees what a model's kernels are multiplied with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from gptjax.data import source as source_lib
from gptjax.data import store as store_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.types import Array

# Rows are taken evenly from this many times the tokens that they need: a text's beginning is seldom all there is to it.
_SPREAD = 16
_DOCUMENTS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Rows of text as tokens.

    Attributes:
      source: what was opened.
      tokens_RT: int32 `[rows, length]`.
    """

    source: str
    tokens_RT: np.ndarray

    def batches(self, *, rows_at_once: int) -> list[Array]:
        """int32 `[B, length]` each, all of one shape: B is the largest divisor of the rows up to `rows_at_once`."""
        rows = len(self.tokens_RT)
        size = next(size for size in range(min(rows, rows_at_once), 0, -1) if rows % size == 0)
        return [jnp.asarray(self.tokens_RT[start : start + size]) for start in range(0, rows, size)]

    def facts(self) -> dict[str, str | int]:
        """What a checkpoint's lineage keeps of it."""
        rows, length = self.tokens_RT.shape
        digest = hashlib.sha256(self.tokens_RT.astype("<i4").tobytes()).hexdigest()
        return {"source": self.source, "rows": rows, "length": length, "tokens_sha256": digest}


def calibration(spec: str, tokenizer: Tokenizer, *, rows: int, length: int) -> Calibration:
    """Reads calibration rows: documents one after another, cut into equal rows.

    Of a long text the rows are spread evenly over its first `16 * rows * length` tokens.

    Args:
      spec: a token store, or a file or another source that `data.source.open_source` takes.

    Raises:
      ValueError: if the text is shorter than the rows.
    """
    description, documents = _documents(spec, tokenizer)
    return cut(description, documents, rows=rows, length=length)


def cut(description: str, documents: Iterable[np.ndarray], *, rows: int, length: int) -> Calibration:
    """As `calibration`, of documents that are tokens already; `description` is what errors and lineages call them."""
    if rows < 1 or length < 2:
        raise ValueError(f"calibration: {rows} rows of {length} tokens; expected at least 1 row of at least 2")
    wanted, limit, parts, found = rows * length, _SPREAD * rows * length, [], 0
    for tokens in documents:
        parts.append(tokens)
        found += len(tokens)
        if found >= limit:
            break
    if found < wanted:
        fewer = f", or ask for at most {found // length} rows" if found >= length else ""
        raise ValueError(
            f"{description}: has {found:,} tokens, too few for {rows} calibration rows of {length}; give more "
            f"text{fewer}"
        )
    stream = np.concatenate(parts)[:limit]
    # The last start is where the last whole row fits, and neighbours do not overlap.
    starts = np.arange(rows) * (len(stream) - length) // max(rows - 1, 1)
    return Calibration(description, np.stack([stream[start : start + length] for start in starts]))


def _documents(spec: str, tokenizer: Tokenizer) -> tuple[str, Iterator[np.ndarray]]:
    """What `spec` is, and the tokens of its documents with those around them, as models are trained on them."""
    if store_lib.is_store(spec):
        store = store_lib.open_store(spec, fingerprint=tokenizer.fingerprint)
        return spec, (store.document(index).astype(np.int32) for index in range(store.num_documents))
    source = source_lib.open_source(spec)
    return source.description, _tokenized(source, tokenizer)


def _tokenized(source: source_lib.Source, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    start, end = ([] if id is None else [id] for id in (tokenizer.start_id, tokenizer.eos_id))
    waiting: list[str] = []

    def encoded() -> Iterator[np.ndarray]:
        for tokens in tokenizer.encode_batch(waiting):
            yield np.concatenate([start, tokens, end]).astype(np.int32)

    for document in source.documents():
        waiting.append(document.text)
        if len(waiting) == _DOCUMENTS_AT_ONCE:
            yield from encoded()
            waiting.clear()
    yield from encoded()
