"""What a teacher says of training rows, computed once, on disk, and found by a row's number.

A cache is a directory with `key.json`, which says of which teacher and of which rows it is, and files of
`ROWS_PER_FILE` rows each, `rows-000012.npy` having the rows from `12 * ROWS_PER_FILE` on. Each is an array of records
`[rows, T]` that is memory-mapped to be read. A file appears whole or not at all, so filling goes on where it was
interrupted, and a longer run adds files. Rows are the training data's own (`data.loader`), which depend on the
seed but not on the batch size: students that see the same rows share a cache.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from gptjax import lock
from gptjax.compress.divergence import TopK
from gptjax.data.loader import TrainData
from gptjax.json_files import read_json, write_json
from gptjax.parallel import hosts, rules
from gptjax.types import Batch

FORMAT_VERSION = 1
ROWS_PER_FILE = 64
KEY_FILE = "key.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """What must agree for a cache to be used.

    Attributes:
      teacher: hash of its parameters and model.
      vocab_size: of the tokens that it chose from.
      order: `TrainData.order`.
    """

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float
    order: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "rows_per_file": ROWS_PER_FILE} | dataclasses.asdict(self)


class TeacherCache:
    """The rows of one local directory.

    Raises:
      ValueError: if the directory is the cache of something else, or unreadable.
    """

    def __init__(self, directory: str | os.PathLike[str], key: Key) -> None:
        self.directory = Path(directory)
        self._key = key
        self._open: dict[int, np.ndarray] = {}
        found = read_json(self.directory / KEY_FILE)
        if not found and self.directory.is_dir() and any(self.directory.glob("rows-*.npy")):
            raise ValueError(f"{self.directory}: has rows but no {KEY_FILE}; restore it, or choose another cache")
        wanted = key.to_json()
        for name in found.keys() | wanted.keys() if found else ():
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.directory}: is the cache of another {name} (there {found.get(name)}, now "
                    f"{wanted.get(name)}); choose another distill.cache"
                )

    def missing(self, num_rows: int) -> list[int]:
        """The files that the first `num_rows` rows still need."""
        return [n for n in range(-(-num_rows // ROWS_PER_FILE)) if not self._path(n).exists()]

    def fill(self, num_rows: int, data: TrainData, top_k_fn: Callable[[Batch], TopK], *, batch_size: int) -> None:
        """Computes what is missing of the first `num_rows` rows.

        Args:
          top_k_fn: `batch [B, T] -> TopK`, under the mesh in use.
          batch_size: rows that it is given at a time.

        Raises:
          ValueError: on several hosts, or while another process fills the same cache.
        """
        if jax.process_count() > 1:
            raise ValueError(f"{self.directory}: rows are missing, and several hosts cannot fill it; fill it from one")
        sharding = rules.batch_sharding(jax.sharding.get_mesh())
        with lock.exclusive(self.directory):
            write_json(self.directory / KEY_FILE, self._key.to_json())
            missing = self.missing(num_rows)
            for done, number in enumerate(missing):
                if done % 8 == 0:
                    logging.info("%s: the teacher reads; %d files of %d to go.", self.directory, len(missing) - done,
                                 -(-num_rows // ROWS_PER_FILE))  # fmt: skip
                first = number * ROWS_PER_FILE
                parts = []
                for start in range(first, first + ROWS_PER_FILE, batch_size):
                    # The last batch is filled up, so that all have the shape that was compiled for.
                    rows = [min(row, first + ROWS_PER_FILE - 1) for row in range(start, start + batch_size)]
                    parts.append(jax.device_get(top_k_fn(hosts.to_global(data.batch(rows), sharding))))
                self._write(number, parts)

    def read(self, row_numbers: Sequence[int]) -> TopK:
        """`TopK` of rows, `[rows, T, ...]` numpy."""
        records = np.stack([self._file(row // ROWS_PER_FILE)[row % ROWS_PER_FILE] for row in row_numbers])
        return TopK(np.ascontiguousarray(records["ids"]), np.ascontiguousarray(records["log_probs"]))  # type: ignore[arg-type]

    def _write(self, number: int, parts: Sequence[TopK]) -> None:
        ids = np.concatenate([part.ids for part in parts])[:ROWS_PER_FILE]
        records = np.empty(ids.shape[:2], self._dtype())
        records["ids"] = ids
        records["log_probs"] = np.concatenate([part.log_probs for part in parts])[:ROWS_PER_FILE]
        path = self._path(number)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, records)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def _file(self, number: int) -> np.ndarray:
        if number not in self._open:
            path, shape = self._path(number), (ROWS_PER_FILE, self._key.order["seq_len"])
            try:
                records = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: cannot be read ({error}); remove it, and it is computed again") from error
            if records.dtype != self._dtype() or records.shape != shape:
                raise ValueError(
                    f"{path}: expected {shape} records of {self._dtype()}, got {records.shape} of {records.dtype}; "
                    "remove it, and it is computed again"
                )
            self._open[number] = records
        return self._open[number]

    def _dtype(self) -> np.dtype:
        k = self._key.top_k
        return np.dtype([("ids", np.int32, (k,)), ("log_probs", np.float32, (k + 1,))])

    def _path(self, number: int) -> Path:
        return self.directory / f"rows-{number:06d}.npy"
