"""Where text comes from: every source is a re-iterable stream of documents `(id, text)`.

One string, `kind:where` or a bare path recognised by its content:

    stdlib                the Python standard library of this machine
    dir:src, dir:src/**/*.py   files of a directory, or of a glob; a text
                          file is a document, the .jsonl and .parquet files
                          there are streams of documents
    text:book.txt         one file, one document
    jsonl:data.jsonl.zst  one JSON object per line, plain or .gz or .zst,
                          its key `text`
    parquet:data.parquet  one row per document, its column `text`
    tfds:name/config?split=train   a prepared tensorflow-datasets data set,
                          its feature `text`

Ids are stable: they do not depend on the machine, the time or where the directory lies, so a
held-out split by their hash stays. They are made of the file's name and the document's place in it, so
renaming or compressing a file draws its split anew. Documents without a single character are left out.
A source that is one text is split at a character instead: its end is held out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import zstandard

from gptjax.data import corpus, listing

if TYPE_CHECKING:
    from typing_extensions import Buffer

Part = Literal["train", "eval"]

TEXT_KEY = "text"
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_PARQUET_SUFFIX = ".parquet"


class Document(NamedTuple):
    """A text and its name, unique within its source."""

    id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A named stream of documents that can be read any number of times, in the same order.

    Attributes:
      description: what `open_source` was given; stores record it.
      documents: starts a new pass.
      size_bytes: about how much text there is, for the time left; None if unknown.
      is_one_text: whether it is a single document, which `split` then cuts in two.
    """

    description: str
    documents: Callable[[], Iterator[Document]]
    size_bytes: int | None = None
    is_one_text: bool = False


def open_source(spec: str) -> Source:
    """The source that `spec` names.

    Raises:
      ValueError: if nothing is there, or the kind is unknown; while reading, on text that is not
        UTF-8 and on malformed records, naming the file and the line.
    """
    kind, colon, where = spec.partition(":")
    if spec == "stdlib":
        files = corpus.modules()
        return Source(spec, lambda: _read_files(files), _size(files.values()))
    if not colon or kind not in _OPENERS:
        kind, where = _sniff(spec), spec
    if not where:
        raise ValueError(f"source {spec!r}: expected a path, stdlib, or one of {_KINDS}")
    return dataclasses.replace(_OPENERS[kind](where), description=f"{kind}:{where}")


def split(source: Source, part: Part, *, eval_fraction: float) -> Iterator[Document]:
    """The documents of one part, in order; without `eval_fraction` all are for training.

    Raises:
      ValueError: if `eval_fraction` is not from 0 to 0.5.
    """
    if not 0 <= eval_fraction <= 0.5:
        raise ValueError(f"eval_fraction: expected 0 to 0.5, got {eval_fraction}")
    for document in source.documents():
        if source.is_one_text:
            cut = int(len(document.text) * (1 - eval_fraction))
            text = document.text[:cut] if part == "train" else document.text[cut:]
            yield from _nonempty(iter([Document(document.id, text)]))
        elif is_held_out(document.id, eval_fraction) == (part == "eval"):
            yield document


def is_held_out(id: str, eval_fraction: float) -> bool:
    """Whether a document belongs to evaluation: one in `round(1 / eval_fraction)` does, by SHA-256 of its id."""
    if eval_fraction == 0:
        return False
    return int(hashlib.sha256(id.encode()).hexdigest(), 16) % round(1 / eval_fraction) == 0


def _sniff(path: str) -> str:
    file = pathlib.Path(path)
    if file.is_dir() or glob.has_magic(path):
        return "dir"
    _check_regular(file)
    with file.open("rb") as raw:
        head = raw.read(4)
    if head == b"PAR1" or str(file).endswith(_PARQUET_SUFFIX):
        return "parquet"
    if head[:2] == b"\x1f\x8b" or head == b"\x28\xb5\x2f\xfd" or str(file).endswith(_JSONL_SUFFIXES):
        return "jsonl"
    return "text"


def _open_dir(where: str) -> Source:
    files = listing.files(where)
    return Source(where, lambda: _read_files(files), _size(files.values()))


def _open_text(where: str) -> Source:
    source = _of_file(where, lambda id, path: iter([Document(id, _read_text(path))]))
    return dataclasses.replace(source, is_one_text=True)


def _open_jsonl(where: str) -> Source:
    return _of_file(where, _read_jsonl)


def _open_parquet(where: str) -> Source:
    return _of_file(where, _read_parquet)


def _of_file(where: str, read: Callable[[str, pathlib.Path], Iterator[Document]]) -> Source:
    path = pathlib.Path(where)
    _check_regular(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: the file is empty")
    return Source(where, lambda: _nonempty(read(path.name, path)), _size([path]))


def _check_regular(path: pathlib.Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; expected a path, stdlib, or one of {_KINDS}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file that can be read more than once, got a directory or a pipe")


def _size(paths: Iterable[pathlib.Path]) -> int | None:
    paths = list(paths)
    if any(path.name.endswith((".gz", ".zst", _PARQUET_SUFFIX)) for path in paths):
        return None  # compressed: its size says little about the text
    return sum(path.stat().st_size for path in paths)


def _read_files(files: dict[str, pathlib.Path]) -> Iterator[Document]:
    for id, path in files.items():
        if id.endswith(_JSONL_SUFFIXES):
            yield from _nonempty(_read_jsonl(id, path))
        elif id.endswith(_PARQUET_SUFFIX):
            yield from _nonempty(_read_parquet(id, path))
        elif text := _read_text(path):
            yield Document(id, text)


def _nonempty(documents: Iterator[Document]) -> Iterator[Document]:
    return (document for document in documents if document.text)


def _read_text(path: pathlib.Path) -> str:
    # Bytes, not text mode: that would turn \r\n into \n.
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} ({error.object[error.start]:#04x}); convert the file, "
            "or leave it out with a glob such as dir:src/**/*.py"
        ) from error


def _read_jsonl(id: str, path: pathlib.Path) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        lines = _open_compressed(path, stack)
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Document(f"{id}:{number}", _text_of(json.loads(line.decode()), f"{path}:{number}"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}:{number}: expected one JSON object in UTF-8 per line: {error}") from error
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            raise ValueError(f"{path}: damaged after line {number}: {error}") from error


def _open_compressed(path: pathlib.Path, stack: contextlib.ExitStack) -> IO[bytes]:
    """Decompresses by what the file holds, not by how it is called."""
    raw = stack.enter_context(path.open("rb"))
    head = raw.read(4)
    raw.seek(0)
    if head[:2] == b"\x1f\x8b":
        return stack.enter_context(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type, return-value]
    if head == b"\x28\xb5\x2f\xfd":
        return stack.enter_context(io.BufferedReader(_ZstdReader(raw)))
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses any number of frames, and raises where zstandard's own reader takes a cut for the end."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._compressed = b""
        self._text = memoryview(b"")  # taken from without copying the rest: one read may decompress to gigabytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        while not self._text and self._feed():
            pass
        size = min(len(view), len(self._text))
        view[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _feed(self) -> bool:
        """Decompresses some more; False at the end."""
        compressed = self._compressed or self._raw.read(1 << 16)
        if self._frame.eof:
            if not compressed:
                return False
            self._frame = self._decompressor.decompressobj()
        elif not compressed:
            raise EOFError("the file ends within a zstd frame")
        self._text = memoryview(self._frame.decompress(compressed))
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        return True


def _text_of(record: object, where: str) -> str:
    text = record.get(TEXT_KEY) if isinstance(record, dict) else None
    try:
        if isinstance(text, bytes):
            return text.decode()
        if isinstance(text, str):
            text.encode()  # JSON can spell half a character, which no tokenizer could encode
            return text
    except UnicodeError as error:
        raise ValueError(f"{where}: `{TEXT_KEY}` is not Unicode text: {error}") from error
    got = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
    if text is not None:
        got = f"one that is {type(text).__name__}"
    raise ValueError(f"{where}: expected an object with the string `{TEXT_KEY}`, got {got}")


def _read_parquet(id: str, path: pathlib.Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if TEXT_KEY not in table.schema_arrow.names:
                raise ValueError(f"{path}: expected a column `{TEXT_KEY}`, got {table.schema_arrow.names}")
            for batch in table.iter_batches(batch_size=256, columns=[TEXT_KEY]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise ValueError(f"{path}: row {row}: expected a string, got {type(text).__name__}")
                    yield Document(f"{id}:{row}", text or "")
                    row += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: column `{TEXT_KEY}` is not UTF-8 after row {row}: {error}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error


def _open_tfds(where: str) -> Source:
    import tensorflow_datasets as tfds

    name, _, option = where.partition("?")
    split = option.removeprefix("split=") or "train"
    directory = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    try:
        # From the files alone: the data set's own code may want TensorFlow, its prepared records do not.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
        records = builder.as_data_source(split=split)
    except Exception as error:  # its own errors have no common base
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"tfds:{where}: cannot be read from {directory}: {reason}; prepare it as ArrayRecord files first, "
            f"`tfds build {name} --file_format=array_record`, or set TFDS_DATA_DIR to where they are"
        ) from error

    def documents() -> Iterator[Document]:
        for index in range(len(records)):
            yield Document(f"{name}:{split}:{index}", _text_of(records[index], f"tfds:{where}, record {index}"))

    return Source(where, lambda: _nonempty(documents()))


_OPENERS: dict[str, Callable[[str], Source]] = {
    "dir": _open_dir,
    "text": _open_text,
    "jsonl": _open_jsonl,
    "parquet": _open_parquet,
    "tfds": _open_tfds,
}
_KINDS = ", ".join(f"{kind}:" for kind in _OPENERS)
