"""Writing token stores: parallel, resumable, atomic.

Writing goes to `<path>.partial`, shard by shard, and the directory takes its name when all is
there. Started again after a kill, it goes on after the last finished shard; text that changed
in between is noticed by its checksum.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from gptjax import config
from gptjax.data import source, store
from gptjax.data.progress import Progress
from gptjax.data.tokenizer import FILE_NAME, Tokenizer

_PLAN = "plan.json"
_BATCH_BYTES = 1 << 22


def write_store(
    path: str | os.PathLike[str],
    documents: Iterable[source.Document],
    tokenizer: Tokenizer,
    *,
    description: str,
    shard_bytes: int = 1 << 28,
    progress_fn: Callable[[Progress], None] = lambda progress: None,
) -> store.Store:
    """Tokenises `documents`, on all cores, into a store at `path`.

    A finished store made with the same tokenizer from the same source is verified, not written again.

    `description` names the source in the store. A shard is closed once it holds `shard_bytes` of
    text, which is what a kill costs at most. `progress_fn` is called every few megabytes.

    Raises:
      ValueError: if the documents are empty, or `path` or its unfinished part is damaged or holds
        something else.
    """
    final = store.local_path(path)
    partial = store.partial_path(final)
    plan = store.StoreMeta(
        version=store.VERSION,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        source=description,
        start_id=tokenizer.start_id,
        end_id=tokenizer.eos_id,
        shard_bytes=shard_bytes,
    )
    if final.exists():
        if not (final / store.META).is_file():
            raise ValueError(f"{final}: already there and not a token store; delete it or choose another directory")
        found = store.open_store(final)
        _check_same_plan(final, plan, found.meta)
        found.verify()
        return found
    stream = iter(documents)
    first = next(stream, None)
    if first is None:
        raise ValueError(
            f"{description}: no text to tokenise for {final}: no document that has text falls into this part; "
            "give more documents, or another eval_fraction (0 holds nothing out)"
        )
    _begin(partial, plan)
    counter = _Counter(progress_fn)
    shards: list[store.ShardMeta] = []
    while first is not None:
        group = _until_full(itertools.chain([first], stream), shard_bytes)
        shards.append(_finish_shard(partial, len(shards), group, tokenizer, plan, counter))
        first = next(stream, None)
    with _synced(partial / FILE_NAME) as file:
        file.write(tokenizer.to_bytes())
    write_json(partial / store.META, dataclasses.replace(plan, shards=tuple(shards)))
    partial.rename(final)
    for name in [_PLAN, *(_shard_name(index) for index in range(len(shards)))]:
        (final / name).unlink()
    return store.open_store(final)


def store_of(spec: str, tokenizer: Tokenizer, *, scratch: pathlib.Path) -> store.Store:
    """The token store that `spec` is, or one that is made at `scratch` of the text that it names.

    Raises:
      ValueError: if it is neither, or a store of another tokenizer's tokens.
    """
    if store.is_store(spec):
        return store.open_store(spec, fingerprint=tokenizer.fingerprint)
    text = source.open_source(spec)
    return write_store(scratch, text.documents(), tokenizer, description=text.description)


def _begin(partial: pathlib.Path, plan: store.StoreMeta) -> None:
    """Makes the unfinished directory, or finds that it can be gone on with."""
    if (partial / _shard_name(0)).is_file():
        _check_same_plan(partial, plan, store.read_meta(partial / _PLAN))
        return
    # Without a finished shard there is nothing to lose or to go on with.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / _PLAN, plan)


class _Counter:
    def __init__(self, progress_fn: Callable[[Progress], None]):
        self._progress_fn = progress_fn
        self._seconds = 0.0
        self._timed_tokens = 0
        self._documents = self._bytes = self._tokens = 0

    def add(self, num_documents: int, num_bytes: int, num_tokens: int, *, seconds: float | None) -> None:
        """Counts a batch, or a shard found finished (`seconds` None), and reports."""
        self._documents += num_documents
        self._bytes += num_bytes
        self._tokens += num_tokens
        if seconds is not None:
            self._seconds += seconds
            self._timed_tokens += num_tokens
        rate = self._timed_tokens / self._seconds if self._seconds else 0.0
        self._progress_fn(Progress(self._documents, self._bytes, self._tokens, rate))


def _finish_shard(
    directory: pathlib.Path,
    index: int,
    documents: Iterator[source.Document],
    tokenizer: Tokenizer,
    plan: store.StoreMeta,
    counter: _Counter,
) -> store.ShardMeta:
    """Writes shard `index`, unless an earlier run did; its json, written last, says so."""
    done = directory / _shard_name(index)
    if not done.is_file():
        shard = _write_shard(directory, index, documents, tokenizer, plan, counter)
        write_json(done, shard)
        return shard
    shard = store.read_shard_meta(done)
    crc = 0
    for document in documents:
        crc = zlib.crc32(document.text.encode(), crc)
    if crc != shard.text_crc:
        raise ValueError(
            f"{directory}: shard {index} was made from other text than {plan.source} holds now "
            f"(checksum {shard.text_crc:08x}, now {crc:08x}); delete {directory} to start afresh"
        )
    store.check_shard(directory, index, shard, plan.vocab_size)
    store.Tokens(directory, index, store.token_dtype(plan.vocab_size)).verify()
    counter.add(shard.num_documents, shard.num_bytes, shard.num_tokens, seconds=None)
    return shard


def _write_shard(
    directory: pathlib.Path,
    index: int,
    documents: Iterator[source.Document],
    tokenizer: Tokenizer,
    plan: store.StoreMeta,
    counter: _Counter,
) -> store.ShardMeta:
    head = [] if plan.start_id is None else [plan.start_id]
    tail = [] if plan.end_id is None else [plan.end_id]
    dtype = store.token_dtype(plan.vocab_size)
    counts: list[tuple[int, int]] = []
    checksums, text_crc = store.BlockChecksums(), 0
    with _synced(directory / store.tokens_name(index)) as tokens_file:
        while batch := list(_until_full(documents, _BATCH_BYTES)):
            began = time.perf_counter()
            texts = [document.text for document in batch]
            encoded = [text.encode() for text in texts]
            for raw in encoded:
                text_crc = zlib.crc32(raw, text_crc)
            rows = [np.concatenate([head, ids, tail]).astype(dtype) for ids in tokenizer.encode_batch(texts)]
            block = np.concatenate(rows).tobytes()
            tokens_file.write(block)
            checksums.add(block)
            new = [(len(row), len(raw)) for row, raw in zip(rows, encoded, strict=True)]
            counts += new
            tokens, size = map(sum, zip(*new, strict=True))
            counter.add(len(batch), size, tokens, seconds=time.perf_counter() - began)
    table = np.array(counts, "<u4")
    tables = {store.documents_name(index): table.tobytes(), store.checksums_name(index): checksums.to_bytes()}
    for name, content in tables.items():
        with _synced(directory / name) as file:
            file.write(content)
    num_tokens, num_bytes = table.sum(axis=0, dtype=np.int64).tolist()
    return store.ShardMeta(
        num_documents=len(counts),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        text_crc=text_crc,
        checksums_crc=zlib.crc32(tables[store.checksums_name(index)]),
        documents_crc=zlib.crc32(tables[store.documents_name(index)]),
    )


def _until_full(documents: Iterator[source.Document], num_bytes: int) -> Iterator[source.Document]:
    """Documents until their text reaches `num_bytes`; takes none beyond."""
    size = 0
    while size < num_bytes and (document := next(documents, None)) is not None:
        size += len(document.text.encode())
        yield document


@contextmanager
def _synced(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk, not only in its cache, when the block ends."""
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A full disk does not say where.
        error.filename = error.filename or os.fspath(path)
        raise


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a dataclass or a mapping beside and renames, so that the file is there whole or not at all."""
    beside = path.with_suffix(".writing")
    with _synced(beside) as file:
        file.write(json.dumps(config.to_dict(value), indent=1).encode())
    beside.replace(path)


def _check_same_plan(path: pathlib.Path, plan: store.StoreMeta, found: store.StoreMeta) -> None:
    changes = config.diff(dataclasses.replace(found, shards=()), plan)
    if changes:
        raise ValueError(
            f"{path}: already there and made otherwise ({'; '.join(changes)}); delete it or choose another directory"
        )


def _shard_name(index: int) -> str:
    return f"{index:05d}.json"
