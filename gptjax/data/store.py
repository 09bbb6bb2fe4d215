"""The tokenised store: a directory of memory-mapped shards, written once and never changed.

    meta.json            what it holds, with a checksum of every file below
    00000.tokens         token ids, little-endian uint16, or uint32 past 65,536 pieces
    00000.documents      per document its number of tokens and its bytes of text, two uint32
    tokenizer.model      the tokenizer

A document is stored as `start token, its tokens, end token` (those the tokenizer has), so every
token of the text and the end has a token before it to be predicted from. A document never
spans shards.

The tokenizer lies beside them, so a store can be read and scored on its own. See writer.py for
how a store comes to be.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import zlib
from typing import TypeVar

import numpy as np

from gptjax import config
from gptjax.data import tokenizer

T = TypeVar("T")

VERSION = 1
META = "meta.json"
_CHECK_ON_OPEN_BYTES = 1 << 28
_CHECK_BLOCK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """Counts and CRC-32 checksums of one shard; `num_bytes` and `text_crc` are of the text."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    text_crc: int
    tokens_crc: int
    documents_crc: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What `meta.json` holds.

    Attributes:
      fingerprint: of the tokenizer.
      source: what the text came from.
      start_id, end_id: the tokens put around each document, None where there are none.
      shard_bytes: bytes of text after which a shard is closed.
    """

    version: int
    fingerprint: str
    vocab_size: int
    source: str
    start_id: int | None
    end_id: int | None
    shard_bytes: int
    shards: tuple[ShardMeta, ...] = ()


class Store:
    """Read access to a store by global token and document number; make one with `open_store`.

    Attributes:
      path: its directory.
      meta: its description.
      starts: int64 `[num_documents + 1]`, the token each document starts at.
    """

    def __init__(self, path: pathlib.Path, meta: StoreMeta):
        self.path = path
        self.meta = meta
        counts = self._document_sizes(0)
        self.starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, dtype=np.int64, out=self.starts[1:])
        self._shard_starts = np.cumsum([0, *(shard.num_tokens for shard in meta.shards)])
        self._shards = [_map(path / tokens_name(i), token_dtype(meta.vocab_size)) for i in range(len(meta.shards))]

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 text in all."""
        return sum(shard.num_bytes for shard in self.meta.shards)

    @functools.cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer that made the tokens."""
        found = tokenizer.load(self.path)
        if found.fingerprint != self.meta.fingerprint:
            raise ValueError(
                f"{self.path / tokenizer.FILE_NAME}: not the tokenizer that made this store; {_HOW_TO_REPAIR}"
            )
        return found

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `[start, start + length)`, which must lie within one document."""
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        offset = start - int(self._shard_starts[shard])
        return self._shards[shard][offset : offset + length]

    def document(self, index: int) -> np.ndarray:
        start, stop = self.starts[index : index + 2].tolist()
        return self.read(start, stop - start)

    def document_bytes(self) -> np.ndarray:
        """uint32 `[num_documents]`, bytes of UTF-8 text; read anew, as few need it."""
        return self._document_sizes(1)

    def verify(self) -> None:
        """Reads every file and compares its checksum.

        Raises:
          ValueError: naming the first file that does not hold what was written.
        """
        for index, shard in enumerate(self.meta.shards):
            check(self.path / tokens_name(index), shard.tokens_crc)
            check(self.path / documents_name(index), shard.documents_crc)

    def _document_sizes(self, column: int) -> np.ndarray:
        maps = [_map(self.path / documents_name(i), "<u4") for i in range(len(self.meta.shards))]
        return np.concatenate([sizes.reshape(-1, 2)[:, column] for sizes in maps])


def open_store(path: str | os.PathLike[str], *, fingerprint: str | None = None) -> Store:
    """Opens a store and checks the size of every file and the checksum of every table of documents.

    Those of the tokens are checked too unless they are over 256 MiB: then `verify` does it, which
    `experiments.prepare_data`, run again, calls.

    With the `fingerprint` of the tokenizer in use, a store made with another is refused.

    Raises:
      ValueError: if nothing is there, a file is missing, cut or damaged, or the tokenizer is another.
    """
    directory = local_path(path)
    if not (directory / META).is_file():
        partial = partial_path(directory)
        inside = sorted(file.parent.name for file in directory.glob(f"*/{META}"))
        hint = f"there are in it: {', '.join(inside)}" if inside else HOW_TO_MAKE
        if partial.is_dir():
            hint = f"{partial} is unfinished: start again the experiments.prepare_data that was making it"
        raise ValueError(f"{directory}: no token store there; {hint}")
    meta = read_json(directory / META, StoreMeta)
    if meta.version != VERSION:
        raise ValueError(f"{directory}: store version {meta.version}, expected {VERSION}; {HOW_TO_MAKE}")
    if fingerprint is not None and meta.fingerprint != fingerprint:
        raise ValueError(
            f"{directory}: made with tokenizer {meta.fingerprint[:12]}, expected {fingerprint[:12]}; "
            "name the tokenizer that prepared it, or prepare it again"
        )
    total = 0
    for index, shard in enumerate(meta.shards):
        tokens_bytes = shard.num_tokens * np.dtype(token_dtype(meta.vocab_size)).itemsize
        _check_size(directory / tokens_name(index), tokens_bytes)
        _check_size(directory / documents_name(index), shard.num_documents * 8)
        check(directory / documents_name(index), shard.documents_crc)
        total += tokens_bytes
    store = Store(directory, meta)
    if total <= _CHECK_ON_OPEN_BYTES:
        store.verify()
    return store


HOW_TO_MAKE = "make one with experiments.prepare_data"
_HOW_TO_REPAIR = "copy it again, or delete the store and make it again with experiments.prepare_data"


def read_json(path: pathlib.Path, cls: type[T]) -> T:
    """The dataclass that a json file of a store holds."""
    try:
        return config.from_dict(cls, json.loads(path.read_bytes()), path=str(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}; {_HOW_TO_REPAIR}") from error


def _map(path: pathlib.Path, dtype: str) -> np.ndarray:
    # As a plain array: slicing a memmap object costs more than the read. An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)


def _check_size(path: pathlib.Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing; {_HOW_TO_REPAIR}")
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {expected}; {_HOW_TO_REPAIR}")


def check(path: pathlib.Path, expected: int) -> None:
    """Raises ValueError unless the CRC-32 of the file is `expected`."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_CHECK_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    if crc != expected:
        raise ValueError(f"{path}: checksum {crc:08x}, expected {expected:08x}: the file is damaged; {_HOW_TO_REPAIR}")


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a store; raises ValueError for one with a scheme, which `pathlib` would take for a directory."""
    if "://" in str(path):
        raise ValueError(f"{path}: stores are memory-mapped, so they must lie on a local disk; copy them from or to it")
    return pathlib.Path(path)


def partial_path(path: pathlib.Path) -> pathlib.Path:
    """Where a store is before it is finished."""
    return path.with_name(path.name + ".partial")


def token_dtype(vocab_size: int) -> str:
    """The numpy type of stored tokens."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def tokens_name(index: int) -> str:
    """File of the tokens of shard `index`."""
    return f"{index:05d}.tokens"


def documents_name(index: int) -> str:
    """File of the document sizes of shard `index`."""
    return f"{index:05d}.documents"
