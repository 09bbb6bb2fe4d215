"""Batches for training and evaluation, as numpy rows of this host.

Training row `b` of step `k` is global row `i = k * batch_size + b`. The mixture says which source it
comes from and how many of that source's rows came before; these, modulo the source's size, go
through that epoch's shuffle to a row of its pack plan. All of it is arithmetic on the config and
the seed, so resuming is the step number and a host takes its part of each batch without asking
anyone, whatever the number of hosts.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging

from gptjax.data import mixture, packing, tokenizer
from gptjax.data import store as store_lib
from gptjax.types import Batch

# Grain asks for a length; no run comes near this many steps.
_MANY_STEPS = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and evaluate on.

    Attributes:
      train: token store directory -> weight; only the ratios of the weights count.
      eval: token store directory for evaluation; None, or on a command line nothing, for none.
      tokenizer: its file, or a directory with a `tokenizer.model`.
      batch_size: rows per step, over all hosts.
      packing: how documents become rows; see packing.py.
      prefetch: batches made ahead of the training step, in threads; 0 makes each when asked.
    """

    train: dict[str, float]
    eval: str | None = None
    tokenizer: str
    batch_size: int
    packing: packing.Packing = "concat"
    prefetch: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval", self.eval or None)
        if not self.train:
            raise ValueError('train: expected at least one token store, such as {"build/data/train": 1.0}')
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.prefetch < 0:
            raise ValueError(f"prefetch: expected 0 or more batches, got {self.prefetch}")


class TrainData:
    """Random access to the training batches of one host: `data[step]`."""

    def __init__(self, cfg: DataConfig, *, seq_len: int, seed: int, num_hosts: int = 1, host: int = 0):
        """Opens the stores and plans the rows.

        Raises:
          ValueError: if a store is missing or damaged or made with another tokenizer, or the batch
            does not divide among the hosts.
        """
        self._rows = host_rows(cfg.batch_size, num_hosts=num_hosts, host=host)
        self.prefetch = cfg.prefetch
        self._batch_size = cfg.batch_size
        self._seq_len = seq_len
        self._seed = seed
        self._packing = cfg.packing
        self._notes_fn: Callable[[Sequence[int]], Any] | None = None
        fingerprint = tokenizer.load(cfg.tokenizer).fingerprint
        # A config that was stored and read back may have its keys in another order.
        self._mixture = mixture.Mixture(dict(sorted(cfg.train.items())))
        self._stores = [store_lib.open_store(path, fingerprint=fingerprint) for path in self._mixture.names]
        self._plans = [packing.plan(store.starts, seq_len, cfg.packing) for store in self._stores]

    def __len__(self) -> int:
        return _MANY_STEPS

    def __getitem__(self, step: int) -> Batch:
        return self.batch(self.row_numbers(step))

    def row_numbers(self, step: int) -> list[int]:
        """The global numbers of this host's rows of a step."""
        return [step * self._batch_size + row for row in self._rows]

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """The training rows of these global numbers; they depend on `order` alone."""
        batch = packing.empty_batch(len(row_numbers), self._seq_len)
        for at, row in enumerate(row_numbers):
            source, number = self._mixture.pick(row)
            plan = self._plans[source]
            epoch, index = divmod(number, plan.num_rows)
            key = mixture.stream_key(self._seed, source, epoch)
            spans = plan.spans(mixture.permute(index, plan.num_rows, key=key))
            packing.fill_row(batch, at, self._stores[source], spans)
        return batch if self._notes_fn is None else dataclasses.replace(batch, notes=self._notes_fn(row_numbers))

    def annotated(self, notes_fn: Callable[[Sequence[int]], Any]) -> TrainData:
        """The same data, whose batches have for `notes` what the function gives for their row numbers."""
        data = copy.copy(self)
        data._notes_fn = notes_fn
        return data

    @property
    def contents(self) -> dict[str, str]:
        """The checksum of each source's tokens."""
        return {name: store.content for name, store in zip(self._mixture.names, self._stores, strict=True)}

    @property
    def order(self) -> dict[str, Any]:
        """All that decides which tokens the row of a number has, wherever the stores are."""
        quotas = [int(quota) for quota in self._mixture.quotas]
        return {
            "sources": [list(pair) for pair in zip(self.contents.values(), quotas, strict=True)],
            "seed": self._seed,
            "seq_len": self._seq_len,
            "packing": self._packing,
        }

    def summary(self) -> str:
        """A line for each source: its share of the rows, and what an epoch of it is."""
        lines = []
        parts = zip(self._mixture.names, self._mixture.quotas, self._stores, self._plans, strict=True)
        for name, quota, store, plan in parts:
            padding = 1 - (store.num_tokens - store.num_documents) / (plan.num_rows * self._seq_len)
            lines.append(
                f"{name}: {quota / self._mixture.period:.2%} of the rows, {store.num_documents:,} documents, "
                f"{store.num_tokens:,} tokens, {plan.num_rows:,} rows an epoch, {padding:.2%} of them padding"
            )
        return "\n".join(lines)


def train_batches(data: TrainData, *, start_step: int = 0) -> Iterator[Batch]:
    """Endless batches `[batch_size / num_hosts, seq_len]` from `start_step` on, made ahead in threads."""
    logging.info("data\n%s", data.summary())
    options = grain.ReadOptions(num_threads=min(data.prefetch, 4), prefetch_buffer_size=data.prefetch)
    steps: Any = grain.MapDataset.source(data)[start_step:]
    return iter(steps.to_iter_dataset(options))


class EvalBatches:
    """Re-iterable batches in which every token of every document is a target with weight 1 exactly once.

    Bits per byte = (nats summed over the targets) / ln 2 / `num_bytes`. Counted are all tokens of the
    text and the end token, without which the code could not be read back. A tokenizer without
    special ids leaves out the first token of each document, which has nothing to be predicted from.

    Attributes:
      num_batches: the same on every host; the last one is filled up with padding.
      num_targets: scored targets, over all hosts.
      num_bytes: of UTF-8 text that they spell.
    """

    def __init__(self, store: store_lib.Store, plan: packing.SpanPlan, row_numbers: np.ndarray, hosts: _HostRows):
        self._store, self._plan, self._row_numbers, self._hosts = store, plan, row_numbers, hosts
        self.num_batches = -(-len(row_numbers) // hosts.batch_size)
        self.num_targets, self.num_bytes = _targets_and_bytes(store, plan, row_numbers)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.num_batches):
            batch = packing.empty_batch(len(self._hosts.rows), self._plan.seq_len)
            for at, row in enumerate(self._hosts.rows):
                number = index * self._hosts.batch_size + row
                if number < len(self._row_numbers):
                    packing.fill_row(batch, at, self._store, self._plan.spans(int(self._row_numbers[number])))
            yield batch


def eval_batches(
    store: store_lib.Store | str | os.PathLike[str],
    *,
    batch_size: int,
    seq_len: int,
    stride: int | None = None,
    max_batches: int | None = None,
    num_hosts: int = 1,
    host: int = 0,
) -> EvalBatches:
    """Batches `[batch_size / num_hosts, seq_len]` that score a store; short documents share rows.

    Each window over a long document adds `stride` targets, half of `seq_len` unless told, see
    `packing.windows`: a smaller one is dearer and gives more context. With `max_batches` only so
    many are made, of rows from all over the store, always the same ones; `num_targets` and
    `num_bytes` are then theirs.
    """
    if not isinstance(store, store_lib.Store):
        store = store_lib.open_store(store)
    hosts = _HostRows(batch_size, host_rows(batch_size, num_hosts=num_hosts, host=host))
    plan = packing.windows(store.starts, seq_len=seq_len, stride=max(1, seq_len // 2) if stride is None else stride)
    num_rows = plan.num_rows if max_batches is None else min(plan.num_rows, max_batches * batch_size)
    return EvalBatches(store, plan, np.arange(num_rows) * plan.num_rows // num_rows, hosts)


class _HostRows(NamedTuple):
    batch_size: int
    rows: range


def _targets_and_bytes(store: store_lib.Store, plan: packing.SpanPlan, row_numbers: np.ndarray) -> tuple[int, int]:
    whole = len(row_numbers) == plan.num_rows
    if whole and store.meta.start_id is not None:
        return store.num_tokens - store.num_documents, store.num_bytes
    sizes = np.array([len(piece) for piece in store.tokenizer.pieces])
    num_targets = num_bytes = 0
    for row in row_numbers.tolist():
        for start, length, context in plan.spans(row):
            scored = store.read(start + 1 + context, length - context)
            num_targets += len(scored)
            num_bytes += int(sizes[scored].sum())
    return num_targets, num_bytes


def host_rows(batch_size: int, *, num_hosts: int, host: int) -> range:
    """The rows of a global batch that belong to `host`.

    Raises:
      ValueError: if there are none or they cannot be shared out equally.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if not 0 <= host < num_hosts:
        raise ValueError(f"host: expected 0 to {num_hosts - 1}, got {host}")
    if batch_size % num_hosts:
        raise ValueError(f"batch_size={batch_size}: expected a multiple of the {num_hosts} hosts")
    per_host = batch_size // num_hosts
    return range(host * per_host, (host + 1) * per_host)
