import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import packing

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)
SEQ_LENS = st.integers(1, 24)


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def all_pairs(lengths):
    """Numbers of the tokens that are followed by another one of the same document."""
    starts = starts_of(lengths)
    return [t for d in range(len(lengths)) for t in range(starts[d], starts[d + 1] - 1)]


def scored_pairs(plan):
    return [
        pair
        for row in range(plan.num_rows)
        for span in plan.spans(row)
        for pair in range(span.start + span.context, span.start + span.length)
    ]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, SEQ_LENS, st.sampled_from(["concat", "best_fit"]))
def test_every_pair_of_every_document_is_in_exactly_one_row(lengths, seq_len, kind):
    plan = packing.plan(starts_of(lengths), seq_len, kind)
    assert sorted(scored_pairs(plan)) == all_pairs(lengths)
    for row in range(plan.num_rows):
        assert 1 <= sum(span.length for span in plan.spans(row)) <= seq_len


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SEQ_LENS)
def test_concat_pads_nothing_but_the_end(lengths, seq_len):
    plan = packing.plan(starts_of(lengths), seq_len, "concat")
    assert plan.num_rows == -(-len(all_pairs(lengths)) // seq_len)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SEQ_LENS)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, seq_len):
    starts = starts_of(lengths)
    plan = packing.plan(starts, seq_len, "best_fit")
    pieces = collections.Counter(
        int(np.searchsorted(starts, span.start, side="right")) - 1
        for row in range(plan.num_rows)
        for span in plan.spans(row)
    )
    for document, length in enumerate(lengths):
        assert pieces[document] == -(-(length - 1) // seq_len)


def rooms_of_reference(pieces, seq_len):
    rooms = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        rooms.remove(min(fitting)) if fitting else None
        rooms.append((min(fitting) if fitting else seq_len) - piece)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=60))
def test_best_fit_is_best_fit_decreasing_one_piece_at_a_time(pieces):
    seq_len = 24
    plan = packing.plan(starts_of([piece + 1 for piece in pieces]), seq_len, "best_fit")
    rooms = sorted(seq_len - sum(span.length for span in plan.spans(row)) for row in range(plan.num_rows))
    assert rooms == rooms_of_reference(pieces, seq_len)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, SEQ_LENS, st.data())
def test_windows_score_every_pair_once_with_the_context_promised(lengths, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    starts = starts_of(lengths)
    plan = packing.windows(starts, seq_len=seq_len, stride=stride)
    assert sorted(scored_pairs(plan)) == all_pairs(lengths)
    for row in range(plan.num_rows):
        for span in plan.spans(row):
            document_start = starts[np.searchsorted(starts, span.start, side="right") - 1]
            for pair in range(span.start + span.context, span.start + span.length):
                assert pair - span.start >= min(pair - document_start, seq_len - stride)


def test_windows_of_a_document_written_out():
    # 11 tokens are 10 pairs: a full window, one that adds 3, and the last, which ends with the document.
    plan = packing.windows(np.array([0, 11]), seq_len=6, stride=3)
    assert [plan.spans(row) for row in range(plan.num_rows)] == [[(0, 6, 0)], [(3, 6, 3)], [(4, 6, 5)]]


def test_concat_row_of_several_documents_written_out():
    plan = packing.plan(np.array([0, 3, 4, 9]), 4, "concat")  # 2, 0 and 4 pairs
    assert [plan.spans(row) for row in range(plan.num_rows)] == [[(0, 2, 0), (4, 2, 0)], [(6, 2, 0)]]


def test_best_fit_of_many_documents_is_quick_and_tight():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 200_000).astype(np.int64) + 2
    plan = packing.plan(starts_of(lengths), 1024, "best_fit")
    assert (lengths - 1).sum() / (plan.num_rows * 1024) > 0.99


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="nothing to predict"):
        packing.plan(np.array([0, 1, 2]), 8, "concat")
    with pytest.raises(ValueError, match="seq_len"):
        packing.plan(np.array([0, 5]), 0, "best_fit")
    with pytest.raises(ValueError, match="stride: expected 1 to seq_len=4, got 5"):
        packing.windows(np.array([0, 9]), seq_len=4, stride=5)
