"""Figures of parameters on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gptjax.train.step import eval_step
from gptjax.types import Array, Batch, Metrics, Objective, Params

SHOWN = ("loss", "accuracy")


class EvaluateFn(Protocol):
    """`(params, batches) -> {"loss", "accuracy", "bits_per_byte"}` over all batches.

    Args:
      frozen: passed to the objective untouched.
      num_bytes: of text that the targets spell; None leaves `bits_per_byte` out.
    """

    def __call__(
        self, params: Params, batches: Iterable[Batch], *, frozen: Any = (), num_bytes: int | None = None
    ) -> dict[str, float]: ...


def evaluator(objective: Objective, *, seed: int = 0) -> EvaluateFn:
    """A function that evaluates parameters; called again with batches of the same shape, it compiles nothing.

    Sums are kept on the device and read once, at the end. Batch `i` draws from `fold_in(key(seed), i)`, so a
    masked language model is always asked the same.

        bits_per_byte = sum of nats / ln 2 / num_bytes
    """
    step = eval_step(objective)

    @jax.jit
    def figures(params: Params, frozen: Any, batch: Batch, index: Array) -> Metrics:
        metrics = step(params, frozen, batch, jax.random.fold_in(jax.random.key(seed), index))
        return {name: metrics[name] for name in SHOWN if name in metrics}

    # Apart from the model: with the first batch's missing sums as an argument it would be compiled twice.
    add = jax.jit(lambda sums, more: jax.tree.map(jnp.add, sums, more))

    def evaluate(
        params: Params, batches: Iterable[Batch], *, frozen: Any = (), num_bytes: int | None = None
    ) -> dict[str, float]:
        sums = None
        for index, batch in enumerate(batches):
            found = figures(params, frozen, batch, jnp.asarray(index, jnp.int32))
            sums = found if sums is None else add(sums, found)
        if sums is None:
            raise ValueError("evaluation: expected at least one batch, got none")
        totals = jax.device_get(sums)
        values = {name: float(mean.value) for name, mean in totals.items()}
        if num_bytes:
            values["bits_per_byte"] = float(totals["loss"].total) / math.log(2) / num_bytes
        return values

    return evaluate
