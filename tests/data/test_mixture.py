import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import mixture

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def named(weights):
    return {f"source{i}": weight for i, weight in enumerate(weights)}


@settings(max_examples=100, deadline=None)
@given(WEIGHTS)
def test_counts_stay_within_one_row_of_the_weights_at_every_row(weights):
    mixed = mixture.Mixture(named(weights))
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights), np.int64)
    for row in range(2 * mixed.period):
        pick = mixed.pick(row)
        assert pick.number == counts[pick.source]
        counts[pick.source] += 1
        assert np.all(np.abs(counts - shares * (row + 1)) < 1)
    np.testing.assert_array_equal(counts, 2 * np.array(mixed.quotas))


def test_decimal_weights_are_taken_as_written():
    assert mixture.Mixture({"a": 0.7, "b": 0.2, "c": 0.1}).quotas == (7, 2, 1)
    assert mixture.Mixture({"a": 1.0}).quotas == (1,)
    assert mixture.Mixture({"a": 1e-3, "b": 1.0}).quotas == (1, 1000)


def test_weights_without_a_small_denominator_are_rounded_but_never_to_nothing():
    mixed = mixture.Mixture({"a": 0.1234567, "b": 0.7654321, "c": 1e-9})
    assert mixed.period == 1 << 16
    assert mixed.quotas[2] == 1
    assert mixed.quotas[0] / mixed.period == pytest.approx(0.1234567 / 0.8888888, abs=2e-5)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="books: expected a positive weight"):
        mixture.Mixture({"web": 1.0, "books": weight})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(mixture.permute(i, size, key=key) for i in range(size)) == list(range(size))


def test_permute_shuffles_globally_and_anew_for_every_key():
    size = 5000
    orders = [
        np.array([mixture.permute(i, size, key=mixture.stream_key(0, 0, e)) for i in range(size)]) for e in range(4)
    ]
    orders.append(np.arange(size))
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06  # 4 standard deviations of a random order
    # Neighbours end up apart: blocks that stay together made waves in the loss of others.
    steps = np.abs(np.diff(orders[0]))
    assert np.median(steps) == pytest.approx(size * (1 - 0.5**0.5), rel=0.1)


def test_permute_reaches_sizes_that_no_list_could_hold():
    size = 10**15 + 7
    values = {mixture.permute(i, size, key=1) for i in range(1000)}
    assert len(values) == 1000
    assert max(values) < size


def test_orders_are_the_same_in_every_process_and_version():
    # Golden: another order would make runs that are resumed see other data than uninterrupted ones.
    assert mixture.stream_key(3, 1, 2) == 14566884940524363187
    assert [mixture.permute(i, 10, key=7) for i in range(10)] == [5, 6, 1, 4, 8, 2, 3, 0, 7, 9]
    assert mixture.stream_key(1, 23) != mixture.stream_key(12, 3)
