"""Pack plans: which spans of which documents make up row `i`, computed from lengths alone.

The unit is the *pair* (input token, target token), two neighbours within one document: a
document of `n` stored tokens has `n - 1` pairs, and a row holds `seq_len` of them. A span of
pairs is read as one slice, one token longer than the span. Since a pair never leaves its
document, no target is ever predicted from another document.

    concat     documents end to end, cut wherever a row ends: no padding but in the last row
    best_fit   a document is cut only if it is longer than a row; the pieces go where they leave
               least room (best-fit decreasing), the room left is padding
               Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 2.2
    windows    for evaluation: overlapping windows over long documents, each pair scored once
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Literal, NamedTuple, Protocol

import numpy as np

from gptjax.data import store as store_lib
from gptjax.types import Batch

Packing = Literal["concat", "best_fit"]


class Span(NamedTuple):
    """A run of pairs of one document.

    Attributes:
      start: the global number of its first token.
      length: pairs in it; the slice read has one token more.
      context: its first pairs that are there to be seen, not scored.
    """

    start: int
    length: int
    context: int = 0


class Plan(Protocol):
    """Rows by number; `spans(row)` is a pure function."""

    @property
    def num_rows(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    def spans(self, row: int) -> list[Span]: ...


def plan(starts: np.ndarray, seq_len: int, packing: Packing) -> Plan:
    """The plan of a store for training, from its `Store.starts`: every pair exactly once.

    Raises:
      ValueError: if there is not a single pair.
    """
    _check_pairs(int(starts[-1]) - (len(starts) - 1), seq_len)
    return ConcatPlan(starts, seq_len) if packing == "concat" else _best_fit(_pieces(starts, seq_len), seq_len)


def windows(starts: np.ndarray, *, seq_len: int, stride: int) -> SpanPlan:
    """The plan of a store for evaluation, from its `Store.starts`: every pair scored exactly once.

    The first window of a document scores all its pairs, each later one the `stride` (the last
    one: the remaining) pairs after those, with `seq_len - stride` or more pairs of context. The
    last window ends where the document does, so its context is as long as can be.
    """
    pairs = np.diff(starts) - 1
    _check_pairs(int(pairs.sum()), seq_len)
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride: expected 1 to seq_len={seq_len}, got {stride}")
    counts = np.where(pairs > 0, 1 + -(-np.maximum(pairs - seq_len, 0) // stride), 0)
    document = np.repeat(np.arange(len(pairs)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    last_start = np.maximum(pairs - seq_len, 0)[document]
    start = np.minimum(index * stride, last_start)
    scored_from = np.where(index > 0, (index - 1) * stride + seq_len, 0)
    length = np.minimum(pairs[document], seq_len)
    spans = _Spans(starts[document] + start, length, scored_from - start)
    return _best_fit(spans, seq_len)


@dataclasses.dataclass(frozen=True, eq=False)
class ConcatPlan:
    """Pairs end to end; nothing is stored, a row is found by bisection over the documents."""

    starts: np.ndarray
    seq_len: int

    @property
    def num_pairs(self) -> int:
        return int(self.starts[-1]) - (len(self.starts) - 1)

    @property
    def num_rows(self) -> int:
        return -(-self.num_pairs // self.seq_len)

    def spans(self, row: int) -> list[Span]:
        pair, end = row * self.seq_len, min((row + 1) * self.seq_len, self.num_pairs)
        # Each document before has one pair fewer than tokens.
        document = bisect.bisect_right(range(len(self.starts)), pair, key=lambda d: int(self.starts[d]) - d) - 1
        spans = []
        while pair < end:
            start = pair + document
            length = min(end, int(self.starts[document + 1]) - document - 1) - pair
            if length > 0:
                spans.append(Span(start, length))
            pair += length
            document += 1
        return spans


class _Spans(NamedTuple):
    """Columns of `Span`, int64 `[num_spans]` each."""

    start: np.ndarray
    length: np.ndarray
    context: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SpanPlan:
    """Rows as slices of columns: row `r` has the spans `row_starts[r]` to `row_starts[r + 1]`."""

    columns: _Spans
    row_starts: np.ndarray
    seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def spans(self, row: int) -> list[Span]:
        part = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        return [Span(*map(int, values)) for values in zip(*(column[part] for column in self.columns), strict=True)]


def empty_batch(num_rows: int, seq_len: int) -> Batch:
    """All padding."""
    ints = [np.zeros((num_rows, seq_len), np.int32) for _ in range(4)]
    mask = np.zeros((num_rows, seq_len), np.float32)
    return Batch(tokens=ints[0], targets=ints[1], loss_mask=mask, segment_ids=ints[2], positions=ints[3])  # type: ignore[arg-type]


def fill_row(batch: Batch, row: int, tokens_store: store_lib.Store, spans: list[Span]) -> None:
    """Writes `spans` side by side into row `row` of a numpy batch.

    Positions restart and the segment number grows with each span, also where a document goes on
    from the row before: that text is out of sight.
    """
    at = 0
    for segment, (start, length, context) in enumerate(spans, start=1):
        tokens = tokens_store.read(start, length + 1)
        here = slice(at, at + length)
        batch.tokens[row, here] = tokens[:-1]  # type: ignore[index]
        batch.targets[row, here] = tokens[1:]  # type: ignore[index]
        batch.loss_mask[row, at + context : at + length] = 1.0  # type: ignore[index]
        batch.segment_ids[row, here] = segment  # type: ignore[index]
        batch.positions[row, here] = np.arange(length)  # type: ignore[index]
        at += length


def _check_pairs(num_pairs: int, seq_len: int) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len: expected at least 1, got {seq_len}")
    if num_pairs < 1:
        raise ValueError("the store holds no document of two tokens or more, so there is nothing to predict")


def _pieces(starts: np.ndarray, seq_len: int) -> _Spans:
    """Every document cut into full rows and a rest."""
    pairs = np.diff(starts) - 1
    counts = -(-pairs // seq_len)
    document = np.repeat(np.arange(len(pairs)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = np.minimum(pairs[document] - index * seq_len, seq_len)
    return _Spans(starts[document] + index * seq_len, length, np.zeros_like(length))


def _best_fit(spans: _Spans, seq_len: int) -> SpanPlan:
    """Puts each span, the longest first, into the row with the least room that holds it.

    Spans of one length are placed together, so the work is one numpy operation per pair of
    length and room that meet, not one per span.
    """
    order = np.argsort(-spans.length, kind="stable")
    row_of = np.empty(len(order), np.int64)
    rows_with_room: dict[int, np.ndarray] = {}
    rooms: list[int] = []  # the keys above, sorted
    num_rows = 0
    lengths, firsts = np.unique(-spans.length[order], return_index=True)
    bounds = [*firsts.tolist(), len(order)]
    for length, begin, end in zip((-lengths).tolist(), bounds[:-1], bounds[1:], strict=True):
        while begin < end:
            at = bisect.bisect_left(rooms, length)
            room = rooms.pop(at) if at < len(rooms) else seq_len
            # Once a span is in, the same row has the least room that holds the next: it is filled first.
            per_row = room // length
            needed = -(-(end - begin) // per_row)
            if room in rows_with_room:
                rows = rows_with_room.pop(room)
            else:
                rows, num_rows = np.arange(num_rows, num_rows + needed), num_rows + needed
            taken = np.repeat(rows[:needed], per_row)[: end - begin]
            row_of[order[begin : begin + len(taken)]] = taken
            begin += len(taken)
            in_last = len(taken) - (min(needed, len(rows)) - 1) * per_row
            _give_back(rows_with_room, rooms, rows[: needed - 1], room - per_row * length)
            _give_back(rows_with_room, rooms, rows[needed - 1 : needed], room - in_last * length)
            _give_back(rows_with_room, rooms, rows[needed:], room)
    by_row = np.argsort(row_of, kind="stable")
    row_starts = np.searchsorted(row_of[by_row], np.arange(num_rows + 1))
    return SpanPlan(_Spans(*(column[by_row] for column in spans)), row_starts, seq_len)


def _give_back(rows_with_room: dict[int, np.ndarray], rooms: list[int], rows: np.ndarray, room: int) -> None:
    if not len(rows) or not room:
        return
    if room in rows_with_room:
        rows_with_room[room] = np.concatenate([rows_with_room[room], rows])
    else:
        rows_with_room[room] = rows
        bisect.insort(rooms, room)
