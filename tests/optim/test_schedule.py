from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from gptjax.optim import schedule

RUN = dict(num_steps=100, warmup_steps=10, final_scale=0.1, decay_fraction=0.2)


def rates(shape, steps, **changes):
    fn = schedule.make(shape, 2.0, **(RUN | changes))
    return jax.jit(jax.vmap(fn))(np.asarray(steps))


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear", "wsd", "wsd_sqrt", "rsqrt"])
def test_warms_up_linearly_to_the_peak(shape):
    np.testing.assert_allclose(rates(shape, [0, 4, 9]), [0.2, 1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # steps 10 (start of decay), 55 (half way), 90 (half of the cool-down), 100 (the end), 200
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0]),
        ("cosine", [2.0, 2.0 * 0.55, 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 9)) / 2), 0.2, 0.2]),
        ("linear", [2.0, 2.0 * 0.55, 2.0 * (0.1 + 0.9 / 9), 0.2, 0.2]),
        ("wsd", [2.0, 2.0, 2.0 * 0.55, 0.2, 0.2]),
        ("wsd_sqrt", [2.0, 2.0, 2.0 * (0.1 + 0.9 * (1 - math.sqrt(0.5))), 0.2, 0.2]),
        (
            "rsqrt",
            [
                2.0 * math.sqrt(10 / 11),
                2.0 * math.sqrt(10 / 56),
                2.0 * math.sqrt(10 / 91) * 0.55,
                0.2 * math.sqrt(10 / 101),
                0.2 * math.sqrt(10 / 201),
            ],
        ),
    ],
)
def test_values_by_hand(shape, expected):
    np.testing.assert_allclose(rates(shape, [10, 55, 90, 100, 200]), expected, rtol=1e-5)


def test_the_last_update_is_not_wasted_on_a_rate_of_zero():
    last, after = rates("linear", [99, 100], final_scale=0.0)
    assert last > 0.0
    assert after == 0.0


def test_without_warmup_starts_at_the_peak():
    assert float(rates("cosine", [0], warmup_steps=0)[0]) == 2.0


def test_rsqrt_without_cooldown_never_comes_down_to_zero():
    final = rates("rsqrt", [99], decay_fraction=0.0, final_scale=0.0)
    np.testing.assert_allclose(final, [2.0 * math.sqrt(0.1)], rtol=1e-6)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    np.testing.assert_allclose(rates("cosine", [0, 4], num_steps=5), [0.2, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(warmup_steps=-1), "warmup_steps=-1"),
        (dict(final_scale=1.5), "final_lr_scale=1.5"),
        (dict(decay_fraction=2.0), "decay_fraction=2.0"),
        (dict(decay_fraction=0.0), "decay_fraction=0.0: wsd needs"),
    ],
)
def test_refuses_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        rates("wsd", [0], **changes)


def test_refuses_an_unknown_shape():
    with pytest.raises(ValueError, match="expected one of constant"):
        rates("cosin", [0])
