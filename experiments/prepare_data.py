"""Turns text into a tokenizer and two token stores, one to train on and one to evaluate on.

    python -m experiments.prepare_data --source=stdlib --vocab_size=4096 --out=build/data
    python -m experiments.prepare_data --source='dir:src/**/*.py' --tokenizer=build/data --out=build/more

Leaves in --out: tokenizer.model, train/, eval/ and summary.json. Killed, it goes on when started again.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

from absl import flags, logging

from experiments import common
from gptjax import lock
from gptjax.data import clean, source, store, tokenizer, writer
from gptjax.data.progress import ProgressLine
from gptjax.json_files import write_json
from gptjax.process import peak_memory_bytes

_SOURCE = flags.DEFINE_string("source", "stdlib", str(source.__doc__).partition("\n\n")[2])
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Its path, `bytes`, or `characters`; without it one is trained.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Pieces of the tokenizer to train.")
_EVAL_FRACTION = flags.DEFINE_float("eval_fraction", 0.05, "Share of the documents to hold out, by a hash of their id.")
_DROP_DUPLICATES = flags.DEFINE_bool("drop_duplicates", True, "Leave out documents with text seen before.")


def main() -> None:
    """Prepares --source in --out."""
    out, text = store.local_path(_OUT.value), source.open_source(_SOURCE.value)
    with lock.exclusive(out):
        _prepare(out, text)


def _prepare(out: pathlib.Path, text: source.Source) -> None:
    began = time.perf_counter()
    if _DROP_DUPLICATES.value:
        documents = text.documents
        text = dataclasses.replace(text, documents=lambda: clean.drop_duplicates(documents()))
    pieces = _tokenizer(out / tokenizer.FILE_NAME, text)
    summary: dict[str, object] = {
        "source": text.description,
        "out": str(out),
        "eval_fraction": _EVAL_FRACTION.value,
        "drop_duplicates": _DROP_DUPLICATES.value,
        "tokenizer": pieces.kind,
        "vocab_size": pieces.vocab_size,
        "fingerprint": pieces.fingerprint,
    }
    common.print_table(summary)
    # The small part first: it reads all of the source, so bad text is found before hours of work on the other.
    for part in ("eval", "train") if _EVAL_FRACTION.value else ("train",):
        summary[part] = counts = _write_part(part, out / part, text, pieces)
        common.print_table({f"{part} {name}": value for name, value in counts.items()})
    summary["seconds"] = round(time.perf_counter() - began, 2)
    summary["peak_memory_bytes"] = peak_memory_bytes()
    write_json(out / "summary.json", summary)


def _write_part(
    part: source.Part, path: pathlib.Path, text: source.Source, pieces: tokenizer.Tokenizer
) -> dict[str, float]:
    share = _EVAL_FRACTION.value if part == "eval" else 1 - _EVAL_FRACTION.value
    line = ProgressLine(part, expected_bytes=text.size_bytes and text.size_bytes * share)
    documents = source.split(text, part, eval_fraction=_EVAL_FRACTION.value)
    description = f"{part} of {text.description}, eval_fraction={_EVAL_FRACTION.value:g}"
    description += ", no duplicates" if _DROP_DUPLICATES.value else ""
    found = writer.write_store(path, documents, pieces, description=description, progress_fn=line)
    line.close()
    counts = {"documents": found.num_documents, "bytes": found.num_bytes, "tokens": found.num_tokens}
    return counts | {"bytes_per_token": round(found.num_bytes / found.num_tokens, 4)}


def _tokenizer(path: pathlib.Path, text: source.Source) -> tokenizer.Tokenizer:
    """The tokenizer at `path`; if none is there yet, the one named by flag or a new one is put there."""
    if path.exists() and not _TOKENIZER.value:
        old = tokenizer.load(path)
        if old.vocab_size != _VOCAB_SIZE.value:
            raise ValueError(f"{path}: has {old.vocab_size} pieces, not {_VOCAB_SIZE.value}; delete it or change --out")
        logging.info("Using the tokenizer that is there, %s.", path)
        return old
    if _TOKENIZER.value == "bytes":
        new = tokenizer.byte_level()
    elif _TOKENIZER.value == "characters":
        new = tokenizer.characters("".join({c for document in text.documents() for c in set(document.text)}))
    elif _TOKENIZER.value:
        new = tokenizer.load(_TOKENIZER.value)
    else:
        logging.info("Training a tokenizer of %d pieces.", _VOCAB_SIZE.value)
        train = source.split(text, "train", eval_fraction=_EVAL_FRACTION.value)
        new = tokenizer.train_bpe((document.text for document in train), _VOCAB_SIZE.value)
    return tokenizer.save(new, path)


if __name__ == "__main__":
    common.start(main)
