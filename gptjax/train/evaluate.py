"""Figures of parameters on a fixed set of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.train.step import eval_step
from gptjax.types import Array, Batch, Metrics, Objective, Params

SHOWN = ("loss", "accuracy")


def evaluator(
    objective: Objective, batches: Iterable[Batch], *, num_bytes: int | None = None, seed: int = 0
) -> Callable[..., dict[str, float]]:
    """The function `(params, frozen=()) -> {"loss", "accuracy", "bits_per_byte"}` over all batches.

    Sums are kept on the device and read once, at the end. Batch `i` draws from `fold_in(key(seed), i)`, so a
    masked language model is always asked the same.

        bits_per_byte = sum of nats / ln 2 / num_bytes

    Args:
      batches: gone through anew at every call.
      num_bytes: of text that the targets spell; None leaves `bits_per_byte` out.
    """
    step = eval_step(objective)

    @jax.jit
    def add(sums: Metrics | None, params: Params, frozen: Any, batch: Batch, index: Array) -> Metrics:
        metrics = step(params, frozen, batch, jax.random.fold_in(jax.random.key(seed), index))
        shown = {name: metrics[name] for name in SHOWN if name in metrics}
        return shown if sums is None else jax.tree.map(jnp.add, sums, shown)

    def evaluate(params: Params, frozen: Any = ()) -> dict[str, float]:
        sums = None
        for index, batch in enumerate(batches):
            sums = add(sums, params, frozen, batch, jnp.asarray(index, jnp.int32))
        if sums is None:
            raise ValueError("evaluation: expected at least one batch, got none")
        totals = jax.device_get(sums)
        values = {name: float(mean.value) for name, mean in totals.items()}
        if num_bytes:
            values["bits_per_byte"] = float(totals["loss"].total) / math.log(2) / num_bytes
        return values

    return evaluate
