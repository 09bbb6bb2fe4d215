"""The tokenised store: a directory of memory-mapped shards, written once and never changed.

    meta.json            what it holds, with a checksum of every table below
    00000.tokens         token ids, little-endian uint16, or uint32 past 65,536 pieces
    00000.checksums      CRC-32 of each 64 KiB of them, uint32
    00000.documents      per document its number of tokens and its bytes of text, two uint32
    tokenizer.model      the tokenizer

A document is stored as `start token, its tokens, end token` (those the tokenizer has), so every
token of the text and the end has a token before it to be predicted from. A document never
spans shards.

Each 64 KiB of tokens are compared with their checksum when they are read for the first time, so
damage is found before it is trained on, however large the store is.

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
from typing import Any

import numpy as np

from gptjax import config
from gptjax.data import tokenizer

VERSION = 2
META = "meta.json"
_CHECK_ON_OPEN_BYTES = 1 << 28
_CHECK_BLOCK_BYTES = 1 << 24
_CHECKSUM_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """Counts and CRC-32 checksums of one shard; `num_bytes` and `text_crc` are of the text."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    text_crc: int
    checksums_crc: int
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
        self._shards = [Tokens(path, i, token_dtype(meta.vocab_size)) for i in range(len(meta.shards))]

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

    @property
    def content(self) -> str:
        """A checksum of all tokens and of where documents begin, as eight hexadecimal digits."""
        sums = [(shard.checksums_crc, shard.documents_crc) for shard in self.meta.shards]
        return f"{zlib.crc32(np.array(sums, '<u4').tobytes()):08x}"

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
        """Tokens `[start, start + length)`, which must lie within one document.

        Raises:
          ValueError: if they are not what was written.
        """
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        return self._shards[shard].read(start - int(self._shard_starts[shard]), length)

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
        for index, (shard, tokens) in enumerate(zip(self.meta.shards, self._shards, strict=True)):
            check_shard(self.path, index, shard, self.meta.vocab_size)
            tokens.verify()

    def _document_sizes(self, column: int) -> np.ndarray:
        maps = [_map(self.path / documents_name(i), "<u4") for i in range(len(self.meta.shards))]
        return np.concatenate([sizes.reshape(-1, 2)[:, column] for sizes in maps])


class Tokens:
    """The tokens of shard `index`; each block is compared with its checksum when it is read for the first time."""

    def __init__(self, directory: pathlib.Path, index: int, dtype: str):
        self._path = directory / tokens_name(index)
        self._tokens = _map(self._path, dtype)
        self._checksums = _map(directory / checksums_name(index), "<u4")
        self._checked = np.zeros(len(self._checksums), np.bool_)

    def read(self, start: int, length: int) -> np.ndarray:
        """Raises:
        ValueError: if they are not what was written.
        """
        size = self._tokens.itemsize
        first, stop = start * size // _CHECKSUM_BYTES, -(-(start + length) * size // _CHECKSUM_BYTES)
        if not self._checked[first:stop].all():
            self._check(first, stop)
        return self._tokens[start : start + length]

    def verify(self) -> None:
        """Compares all, also those that were compared before."""
        self._check(0, len(self._checksums))

    def _check(self, first: int, stop: int) -> None:
        raw = self._tokens.view(np.uint8).data
        for block in range(first, stop):
            crc = zlib.crc32(raw[block * _CHECKSUM_BYTES : (block + 1) * _CHECKSUM_BYTES])
            _compare(self._path, crc, int(self._checksums[block]), f" of bytes from {block * _CHECKSUM_BYTES:,}")
            self._checked[block] = True


class BlockChecksums:
    """Makes the checksums of a shard's tokens while they are written."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._size = 0

    def add(self, data: bytes) -> None:
        """Takes the next bytes of the file."""
        rest = memoryview(data)
        while rest:
            room = _CHECKSUM_BYTES - self._size % _CHECKSUM_BYTES
            if room == _CHECKSUM_BYTES:
                self._sums.append(0)
            self._sums[-1] = zlib.crc32(rest[:room], self._sums[-1])
            self._size += len(rest[:room])
            rest = rest[room:]

    def to_bytes(self) -> bytes:
        """What the file of checksums holds."""
        return np.array(self._sums, "<u4").tobytes()


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a store is there, or the folder of stores that `experiments.prepare_data` makes."""
    directory = pathlib.Path(path)
    return (directory / META).is_file() or (directory / tokenizer.FILE_NAME).is_file()


def open_store(path: str | os.PathLike[str], *, fingerprint: str | None = None) -> Store:
    """Opens a store and checks the size of every file and the checksum of every table.

    Tokens are checked too, unless they are over 256 MiB: then when they are read, or by `verify`, which
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
    meta = read_meta(directory / META)
    if fingerprint is not None and meta.fingerprint != fingerprint:
        raise ValueError(
            f"{directory}: made with tokenizer {meta.fingerprint[:12]}, expected {fingerprint[:12]}; "
            "name the tokenizer that prepared it, or prepare it again"
        )
    for index, shard in enumerate(meta.shards):
        check_shard(directory, index, shard, meta.vocab_size)
    store = Store(directory, meta)
    if store.num_tokens * np.dtype(token_dtype(meta.vocab_size)).itemsize <= _CHECK_ON_OPEN_BYTES:
        store.verify()
    return store


HOW_TO_MAKE = "make one with experiments.prepare_data"
_HOW_TO_REPAIR = "copy it again, or delete the store and make it again with experiments.prepare_data"


def read_meta(path: pathlib.Path) -> StoreMeta:
    """The description of a store, finished or not.

    Raises:
      ValueError: if it is damaged or of another release.
    """
    found = _load_json(path)
    version = found.get("version") if isinstance(found, dict) else None
    if version is not None and version != VERSION:
        raise ValueError(
            f"{path}: store version {version}, expected {VERSION}: another release wrote it; "
            f"delete {path.parent} and make it again with experiments.prepare_data"
        )
    return config.from_dict(StoreMeta, found, path=str(path))


def read_shard_meta(path: pathlib.Path) -> ShardMeta:
    """The counts and checksums of a finished shard of an unfinished store."""
    return config.from_dict(ShardMeta, _load_json(path), path=str(path))


def _load_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
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


def check_shard(directory: pathlib.Path, index: int, shard: ShardMeta, vocab_size: int) -> None:
    """Raises ValueError unless the files of shard `index` have their sizes, and the tables what was written."""
    tokens_bytes = shard.num_tokens * np.dtype(token_dtype(vocab_size)).itemsize
    _check_size(directory / tokens_name(index), tokens_bytes)
    _check_size(directory / checksums_name(index), -(-tokens_bytes // _CHECKSUM_BYTES) * 4)
    _check_size(directory / documents_name(index), shard.num_documents * 8)
    for name, expected in ((checksums_name(index), shard.checksums_crc), (documents_name(index), shard.documents_crc)):
        crc = 0
        with (directory / name).open("rb") as file:
            while block := file.read(_CHECK_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
        _compare(directory / name, crc, expected)


def _compare(path: pathlib.Path, crc: int, expected: int, where: str = "") -> None:
    if crc != expected:
        raise ValueError(
            f"{path}: checksum{where} {crc:08x}, expected {expected:08x}: the file is damaged; {_HOW_TO_REPAIR}"
        )


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


def checksums_name(index: int) -> str:
    """File of the checksums of shard `index`'s tokens."""
    return f"{index:05d}.checksums"


def documents_name(index: int) -> str:
    """File of the document sizes of shard `index`."""
    return f"{index:05d}.documents"
