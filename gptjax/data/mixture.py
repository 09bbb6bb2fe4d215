"""Which row of which source comes at global row `i`, by arithmetic.

Two pure functions make every order of training data a closed form, so that resuming needs no
state and no host needs to know another:

    Mixture      global row -> (source, how many rows of it came before)
    permute      that count -> a row of the source, in a fresh shuffle each epoch
"""

from __future__ import annotations

import fractions
import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_MAX_PERIOD = 1 << 16
_FEISTEL_ROUNDS = 6


class Pick(NamedTuple):
    """Row `number` (from 0, epochs included) of source number `source`."""

    source: int
    number: int


class Mixture:
    """Interleaves sources by weight: after any `n` rows each source has had within 1 of `weight * n`.

    The schedule repeats with the common denominator of the weights (10 for 0.7, 0.2, 0.1), where the
    counts are exact. Weights without one up to 65,536 are rounded to multiples of 1/65,536.

    Source: Tijdeman 1980, "The chairman assignment problem" (the bound and the rule).
    """

    def __init__(self, weights: Mapping[str, float]):
        """Any positive weights; only their ratios count."""
        self.names = tuple(weights)
        self.quotas = _quotas(weights)
        self.period = sum(self.quotas)
        self._source = _schedule(self.quotas)
        rank = np.empty(self.period, np.int64)
        for source in range(len(self.quotas)):
            mine = self._source == source
            rank[mine] = np.arange(np.count_nonzero(mine))
        self._rank = rank

    def pick(self, row: int) -> Pick:
        cycle, within = divmod(row, self.period)
        source = int(self._source[within])
        return Pick(source, cycle * self.quotas[source] + int(self._rank[within]))


def _quotas(weights: Mapping[str, float]) -> tuple[int, ...]:
    """Integers in the ratio of the weights; where that takes more than `_MAX_PERIOD` in all, the nearest from 1 on."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{name}: expected a positive weight, got {weight}; leave out what is not wanted")
    # str gives 0.1 as it was written; as a binary fraction its denominator is 2**55.
    exact = [fractions.Fraction(str(weight)) for weight in weights.values()]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [value // divisor for value in whole]
    if sum(whole) <= _MAX_PERIOD:
        return tuple(whole)
    shares = [weight / sum(exact) * _MAX_PERIOD for weight in exact]
    quotas = [max(1, int(share)) for share in shares]
    largest_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
    for i in largest_remainder[: max(0, _MAX_PERIOD - sum(quotas))]:
        quotas[i] += 1
    return tuple(quotas)


def _schedule(quotas: tuple[int, ...]) -> np.ndarray:
    """Source of each row of one period, int32 `[sum(quotas)]`.

    A source may take row n if that puts it less than 1 ahead of its share; of those that may, the
    one whose next row would be overdue first does.
    """
    num_sources, period = len(quotas), sum(quotas)
    counts = [0] * num_sources
    schedule = np.zeros(period, np.int32)
    if num_sources == 1:
        return schedule
    # In integers: slack = (1 - 1 / (2k - 2)) times the denominator 2k - 2.
    denominator = 2 * num_sources - 2
    slack = (denominator - 1) * period
    for row in range(period):
        best, earliest = -1, math.inf
        for source, quota in enumerate(quotas):
            if (counts[source] + 1) * denominator * period - quota * (row + 1) * denominator > slack:
                continue
            deadline = ((counts[source] + 1) * denominator * period - period) / quota
            if deadline < earliest:
                best, earliest = source, deadline
        counts[best] += 1
        schedule[row] = best
    return schedule


def permute(index: int, size: int, *, key: int) -> int:
    """A bijection of `range(size)`, different for every key; constant time and memory.

    A balanced Feistel network over the smallest even number of bits that covers `size`; results
    outside are sent through again until they fall inside (cycle walking), under 4 times on average.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right, key + round_number) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def stream_key(*parts: int | str) -> int:
    """64 bits that depend on every part and on nothing else (Python's `hash` differs by process)."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _mix(value: int, key: int) -> int:
    """The finaliser of SplitMix64. Source: Steele, Lea, Flood 2014, figure 14."""
    value = (value * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
