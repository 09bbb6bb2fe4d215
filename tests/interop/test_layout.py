"""Layouts move values without losing any, and say beforehand what shape they expect."""

import numpy as np
import pytest

from gptjax.interop.layout import Alternating, Flat, Joined, JoinedHeads, Linear, PairedRotation, Same

CASES = {
    "same": (Same(), [(3, 4)], (3, 4)),
    "vector": (Flat(), [(2, 3)], (6,)),
    "conv1d": (Flat(1), [(5, 2, 3)], (5, 6)),
    "linear": (Linear(), [(5, 2, 3)], (6, 5)),
    "linear of two inputs": (Linear(2), [(2, 3, 5)], (5, 6)),
    "joined": (Joined((Flat(1), Flat(1)), axis=1), [(5, 2, 3), (5, 1, 3)], (5, 9)),
    "joined rows": (Joined((Linear(), Linear()), axis=0), [(5, 2, 3), (5, 1, 3)], (9, 5)),
    "alternating": (Alternating(), [(2, 5, 3), (2, 5, 3)], (2, 5, 6)),
    "joined heads": (JoinedHeads(), [(5, 2, 3), (5, 2, 4)], (14, 5)),
    "pairs": (PairedRotation(Linear(), rotated=4), [(5, 2, 4)], (8, 5)),
    "pairs at the end": (PairedRotation(Linear(), rotated=4, offset=3), [(5, 7)], (7, 5)),
    "pairs at the end of a vector": (PairedRotation(Same(), rotated=4, offset=3), [(7,)], (7,)),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_in_the_stated_shape(name):
    layout, shapes, theirs_shape = CASES[name]
    sizes = [int(np.prod(shape)) for shape in shapes]
    ours = [
        np.arange(size).reshape(shape) + 1000 * i for i, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
    ]
    theirs = layout.to_theirs(ours)
    assert theirs.shape == layout.theirs_shape(shapes) == theirs_shape
    back = layout.to_ours(theirs, shapes)
    assert all(np.array_equal(a, b) for a, b in zip(ours, back, strict=True))
    assert np.array_equal(layout.to_theirs(back), theirs)


def test_neighbouring_pairs_become_halves():
    theirs = np.array([[0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]]).T  # two heads of three pairs
    (ours,) = PairedRotation(Linear(), rotated=6).to_ours(theirs, [(1, 2, 6)])
    assert ours.tolist() == [[[0, 2, 4, 1, 3, 5], [10, 12, 14, 11, 13, 15]]]
    (ours,) = PairedRotation(Same(), rotated=6, offset=1).to_ours(np.arange(8), [(8,)])
    assert ours.tolist() == [0, 1, 3, 5, 2, 4, 6, 7]


def test_gate_and_up_take_turns():
    gate, up = Alternating().to_ours(np.array([[1, -1, 2, -2]]), [(1, 2), (1, 2)])
    assert gate.tolist() == [[1, 2]] and up.tolist() == [[-1, -2]]


def test_heads_are_joined_head_by_head():
    theirs = np.array([[0], [1], [2], [10], [11], [12]])  # two heads of a key of two and a value of one
    key, value = JoinedHeads().to_ours(theirs, [(1, 2, 2), (1, 2, 1)])
    assert key.tolist() == [[[0, 1], [10, 11]]] and value.tolist() == [[[2], [12]]]
