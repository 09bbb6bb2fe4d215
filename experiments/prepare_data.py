"""Turns text into a tokenizer and two token stores, one to train on and one to evaluate on.

    python -m experiments.prepare_data --source=stdlib --vocab_size=4096 --out=build/data
    python -m experiments.prepare_data --source='dir:src/**/*.py' --tokenizer=build/data --out=build/more

Leaves in --out: tokenizer.model, train/, eval/ and summary.json. Killed, it goes on when started again.
"""

from __future__ import annotations

import json
import pathlib
import resource
import sys
import time
from collections.abc import Iterator

from absl import app, flags, logging

from gptjax.data import clean, source, tokenizer, writer

_SOURCE = flags.DEFINE_string("source", "stdlib", source.__doc__.split("\n\n", 1)[1])  # type: ignore[union-attr]
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer to use; without it one is trained on the training text.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Pieces of the tokenizer to train.")
_EVAL_FRACTION = flags.DEFINE_float("eval_fraction", 0.05, "Share of the documents to hold out, by a hash of their id.")
_DROP_DUPLICATES = flags.DEFINE_bool("drop_duplicates", True, "Leave out documents with text seen before.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    began = time.perf_counter()
    out = pathlib.Path(_OUT.value)
    text = source.open_source(_SOURCE.value)
    out.mkdir(parents=True, exist_ok=True)
    pieces = _tokenizer(out / tokenizer.FILE_NAME, text)
    resolved = {
        "source": text.description,
        "eval_fraction": _EVAL_FRACTION.value,
        "drop_duplicates": _DROP_DUPLICATES.value,
        "out": str(out),
        "tokenizer": f"{pieces.kind}, {pieces.vocab_size} pieces, {pieces.fingerprint[:12]}",
    }
    _print_table(resolved)
    summary = {**resolved, "fingerprint": pieces.fingerprint, "vocab_size": pieces.vocab_size}
    for split in ("train", "eval"):
        store = writer.write_store(
            out / split,
            _documents(text, split),
            pieces,
            description=f"{split} of {text.description}, eval_fraction={_EVAL_FRACTION.value:g}",
            progress_fn=_ProgressLine(split, text.size_bytes),
        )
        summary[split] = {
            "documents": store.num_documents,
            "bytes": store.num_bytes,
            "tokens": store.num_tokens,
            "bytes_per_token": store.num_bytes / store.num_tokens,
        }
        _print_table({f"{split} {name}": value for name, value in summary[split].items()})
    summary["seconds"] = time.perf_counter() - began
    summary["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (out / "summary.json").write_text(json.dumps(summary, indent=1))


def _documents(text: source.Source, split: str) -> Iterator[source.Document]:
    stream = clean.drop_duplicates(text.documents()) if _DROP_DUPLICATES.value else text.documents()
    return (each for each in stream if source.is_held_out(each.id, _EVAL_FRACTION.value) == (split == "eval"))


def _tokenizer(path: pathlib.Path, text: source.Source) -> tokenizer.Tokenizer:
    """The tokenizer at `path`, put there first: the one named by flag, or a newly trained one."""
    given = tokenizer.load(_TOKENIZER.value) if _TOKENIZER.value else None
    if path.exists():
        found = tokenizer.load(path)
        if given.fingerprint != found.fingerprint if given else found.vocab_size != _VOCAB_SIZE.value:
            raise ValueError(f"{path}: already there, another one ({found.vocab_size} pieces); choose another --out")
        return found
    if given is None:
        logging.info("Training a tokenizer of %d pieces.", _VOCAB_SIZE.value)
        given = tokenizer.train_bpe((each.text for each in _documents(text, "train")), _VOCAB_SIZE.value)
    beside = path.with_suffix(".writing")
    beside.write_bytes(given.to_bytes())
    beside.replace(path)
    return given


class _ProgressLine:
    """One line that is written over on a terminal, and a new one every ten seconds elsewhere."""

    def __init__(self, split: str, size_bytes: int | None):
        share = _EVAL_FRACTION.value if split == "eval" else 1 - _EVAL_FRACTION.value
        self._split, self._size_bytes = split, size_bytes and size_bytes * share
        self._next = 0.0

    def __call__(self, progress: writer.Progress) -> None:
        on_terminal = sys.stderr.isatty()
        if not on_terminal and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 10
        line = f"{self._split}: {progress.num_documents:,} documents, {progress.num_bytes / 1e6:,.1f} MB, "
        line += f"{progress.num_tokens:,} tokens, {progress.tokens_per_second:,.0f} tokens/s"
        if self._size_bytes and progress.num_bytes:
            rate = progress.tokens_per_second * progress.num_bytes / progress.num_tokens
            line += f", {max(0.0, self._size_bytes - progress.num_bytes) / max(rate, 1):,.0f} s left"
        print(f"\r{line}\033[K" if on_terminal else line, end="" if on_terminal else "\n", file=sys.stderr, flush=True)


def _print_table(rows: dict[str, object]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value:,}" if isinstance(value, int) else f"{name:{width}}  {value}")


if __name__ == "__main__":
    app.run(main)
