"""A bigram model: the smallest thing that trains on a `Batch`, with nothing of the transformer in it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.optim import guard
from gptjax.train.state import TrainState
from gptjax.types import Batch, Loss, Mean

VOCAB = 16
WIDTH = 8


class ToyOptimizer(NamedTuple):
    tx: optax.GradientTransformation
    schedule: optax.Schedule


def optimizer(learning_rate: float = 0.05) -> ToyOptimizer:
    return guarded(optax.adam(learning_rate), learning_rate)


def guarded(tx: optax.GradientTransformation, learning_rate: float) -> ToyOptimizer:
    return ToyOptimizer(guard.guard(guard.keeping(tx), sigma=None), optax.constant_schedule(learning_rate))


def init(rng):
    first, second = jax.random.split(rng)
    return {
        "embed": jax.random.normal(first, (VOCAB, WIDTH)),
        "head": {"kernel": jax.random.normal(second, (VOCAB, WIDTH))},
    }


def objective(params, frozen, batch, rng, step) -> Loss:
    logits = jnp.einsum("BTD,VD->BTV", params["embed"][batch.tokens], params["head"]["kernel"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    total, weight = jnp.sum(nll * batch.loss_mask), jnp.sum(batch.loss_mask)
    return Loss(total, weight, {"loss": Mean(total, weight)})


def batch(index: int = 0, *, rows: int = 8, length: int = 12, mask: float = 0.7) -> Batch:
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=(rng.random((rows, length)) < mask).astype(np.float32),
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    )


def batches(start: int = 0):
    index = start
    while True:
        yield batch(index)
        index += 1


def new_state(tx) -> TrainState:
    from gptjax.train import state

    return state.create(init, tx, seed=0)
