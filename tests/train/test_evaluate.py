import dataclasses
import math

import jax
import numpy as np
import pytest

from gptjax.train.evaluate import evaluator
from tests.train import toy


@pytest.fixture(scope="module")
def params():
    return jax.jit(toy.init)(jax.random.key(0))


def test_batches_of_any_cut_give_the_same_figures(params):
    whole = toy.batch(rows=8, mask=0.3)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], whole) for i in range(0, 8, 2)]
    one = evaluator(toy.objective)(params, [whole], num_bytes=100)
    four = evaluator(toy.objective)(params, parts, num_bytes=100)
    assert one.keys() == four.keys() == {"loss", "bits_per_byte"}
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=1e-6)


def test_bits_per_byte_is_the_formula(params):
    batch = toy.batch()
    found = evaluator(toy.objective)(params, [batch], num_bytes=50)
    nats = found["loss"] * batch.loss_mask.sum()
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 50, rel=1e-6)
    assert set(evaluator(toy.objective)(params, [batch])) == {"loss"}


def test_a_batch_of_padding_counts_for_nothing(params):
    batch = toy.batch()
    empty = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    assert evaluator(toy.objective)(params, [batch, empty]) == evaluator(toy.objective)(params, [batch])


def test_no_batches_are_refused(params):
    with pytest.raises(ValueError, match="at least one batch"):
        evaluator(toy.objective)(params, [])


def test_the_model_is_compiled_once_whatever_the_number_of_batches_and_evaluations(params):
    evaluate, traces = evaluator(lambda *args: traces.append(1) or toy.objective(*args)), []
    for _ in range(2):
        evaluate(params, [toy.batch(i) for i in range(3)])
    assert len(traces) == 1
