"""The values that flow between modules, and the letters that name their dimensions.

Letters, used as suffixes of array names and in einsum strings alike:

    B batch           T query length     S key/value length   L layers
    D d_model         F d_ff             V vocab_size         H head_dim
    N query heads     K key/value heads  G = N / K            R latent rank
    E experts         A active experts   C expert capacity

So `q_BTNH` is a query array and `"BTD,DF->BTF"` an MLP projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax

Array = jax.Array
Params = Mapping[str, Any]
"""Nested dict of arrays; the leaf path joined by `/` is the parameter's name everywhere."""


@flax.struct.dataclass
class Batch:
    """Rows of packed tokens; every field but the last is `[B, T]`.

    Attributes:
      tokens: int32 inputs.
      targets: int32 token to predict at each position.
      loss_mask: float32 weight of each target; 0 at padding and wherever no loss is wanted.
      segment_ids: int32 document number within the row, from 1; 0 marks padding.
      positions: int32 position within the document, from 0.
      notes: what a task has to say of each position, a tree of `[B, T, ...]`; mostly nothing.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array
    notes: Any = ()


class Mean(NamedTuple):
    """A mean kept as its numerator and denominator.

    So it adds up exactly over microbatches, shards and evaluation batches.
    """

    total: Array | float
    count: Array | float  # type: ignore[assignment]  # not the tuple's method

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array | float:
        return self.total / self.count


Metrics = dict[str, Mean]


class Loss(NamedTuple):
    """What an objective returns; the gradient step divides the sum by the weight.

    Attributes:
      total: scalar, summed over targets, auxiliary terms included.
      weight: scalar, the number of target tokens (the sum of `loss_mask`).
      metrics: named means.
    """

    total: Array
    weight: Array
    metrics: Metrics


Objective = Callable[[Params, Any, Batch, Array, Array], Loss]
"""`(params, frozen, batch, rng, step) -> Loss`; `frozen` is a teacher's pytree or `()`."""


@flax.struct.dataclass
class ModelOutput:
    """What the transformer returns.

    Attributes:
      hidden_BTD: output of the final norm; `nn.transformer.logits` maps it to the vocabulary.
      cache: the updated key/value cache, or None when none was given.
      aux: sums over layers of auxiliary losses and router statistics; empty without experts.
    """

    hidden_BTD: Array
    cache: Any
    aux: Mapping[str, Array]
