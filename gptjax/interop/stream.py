"""Goes through the tensors of a model with a bound on memory, in threads, and on after a kill."""

from __future__ import annotations

import concurrent.futures
import json
import math
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.data.tokenizer import available_cores
from gptjax.progress import BytesLine

JOURNAL_FILE = "journal.jsonl"
# Tensors smaller than the largest may be held together up to this, so that threads have work.
_MEMORY_BYTES = 512 << 20
_MAX_THREADS = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor to be converted: its name, and what it takes on their side."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Journal:
    """Which tensors are done, and what is noted of them; a line of JSON for each in a file.

    Raises:
      ValueError: if the file belongs to another conversion.
    """

    def __init__(self, path: pathlib.Path, *, job: Mapping[str, Any]) -> None:
        self._path, self._lock = path, threading.Lock()
        self.notes: dict[str, Any] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[0] != json.dumps(job):
            raise ValueError(
                f"{path.parent}: holds a conversion that was interrupted, of another source or with other settings; "
                "delete that directory to begin this one"
            )
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:  # cut by a kill: the tensor is written again
                break
            self.notes[entry["name"]] = entry["note"]
        # Without the cut line, and in one move: a kill in here must not cost what was noted.
        text = "".join(json.dumps({"name": name, "note": note}) + "\n" for name, note in self.notes.items())
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(job) + "\n" + text)
        new.replace(path)
        self._file = path.open("a")

    def add(self, name: str, note: Any) -> None:
        with self._lock:
            self.notes[name] = note
            self._file.write(json.dumps({"name": name, "note": note}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """When all is done, and the file is for others to remove."""
        self._file.close()

    def remove(self) -> None:
        """When all is done."""
        self.close()
        self._path.unlink()


def run(
    tasks: Sequence[Tensor],
    work: Callable[[Tensor], Any],
    journal: Journal | None,
    *,
    label: str,
    num_threads: int | None = None,
) -> None:
    """Calls `work(task)` for each task that the journal lacks, and notes its result there.

    Args:
      journal: None where nothing is kept, and all is done.

    At a time so many run as hold twice their tensors' bytes within a budget, which the largest has alone.
    """
    line = BytesLine(label, sum(task.num_bytes for task in tasks))
    done = set() if journal is None else journal.notes.keys()
    left = [task for task in tasks if task.name not in done]
    line.skip(sum(task.num_bytes for task in tasks if task.name in done))
    budget = _Budget(max([_MEMORY_BYTES, *(2 * task.num_bytes for task in left)]))
    failed = threading.Event()

    def one(task: Tensor) -> None:
        with budget.held(2 * task.num_bytes):
            if failed.is_set():
                return
            try:
                note = work(task)
                if journal is not None:
                    journal.add(task.name, note)
            except BaseException:
                failed.set()
                raise
        line.add(task.num_bytes)

    threads = num_threads or min(_MAX_THREADS, available_cores())
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(one, task) for task in left]:
                future.result()
        except BaseException:  # an interrupt too: the pool would go through all that is left before it lets go
            failed.set()
            raise
    line.close()


class _Budget:
    """Bytes that threads may hold together; one that asks for all waits until it is alone."""

    def __init__(self, num_bytes: int) -> None:
        self._free, self._changed = num_bytes, threading.Condition()

    @contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= num_bytes)
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += num_bytes
                self._changed.notify_all()
