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
    one = evaluator(toy.objective, [whole], num_bytes=100)(params)
    four = evaluator(toy.objective, parts, num_bytes=100)(params)
    assert one.keys() == four.keys() == {"loss", "bits_per_byte"}
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=1e-6)


def test_bits_per_byte_is_the_formula(params):
    batch = toy.batch()
    found = evaluator(toy.objective, [batch], num_bytes=50)(params)
    nats = found["loss"] * batch.loss_mask.sum()
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 50, rel=1e-6)
    assert set(evaluator(toy.objective, [batch])(params)) == {"loss"}


def test_a_batch_of_padding_counts_for_nothing(params):
    batch = toy.batch()
    empty = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    assert evaluator(toy.objective, [batch, empty])(params) == evaluator(toy.objective, [batch])(params)


def test_no_batches_are_refused(params):
    with pytest.raises(ValueError, match="at least one batch"):
        evaluator(toy.objective, [])(params)
