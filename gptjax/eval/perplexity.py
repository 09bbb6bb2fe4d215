"""Exact likelihoods: what a model makes of every target token, summed without rounding drift.

    loss = nats / tokens        perplexity = exp(loss)        bits per byte = nats / ln 2 / bytes

Perplexity depends on the tokenizer; bits per byte of the same text do not, and compare with
any compressor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.kernels import cross_entropy
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.parallel import hosts, rules
from gptjax.train import objective
from gptjax.types import Array, Batch, Params


class Evaluation(NamedTuple):
    """Sums over all targets with a loss mask, which add up over data sets.

    Attributes:
      nats: negative log-likelihood.
      tokens: targets, weighted by the mask.
      correct: targets that alone had the highest logit.
    """

    nats: float
    tokens: float
    correct: float

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


def evaluate(cfg: ModelConfig, params: Params, batches: Iterable[Batch]) -> Evaluation:
    """Scores every target of `batches`, this host's rows of each.

    Batches are spread over the mesh in use, if any. The device sums one batch in float32 and the
    host all batches in float64, so the figure does not depend on how many there are.

    Raises:
      ValueError: if there is nothing to score, or for a bidirectional model, which sees what it is to predict.
    """
    if not cfg.causal:
        raise ValueError("this model is bidirectional (causal=False): it sees what it is to predict; use a causal one")
    sums, waiting = Evaluation(0.0, 0.0, 0.0), None
    for batch in batches:
        # The sums of a batch are read when the next one is under way.
        started = _batch_sums(cfg, params, _on_mesh(batch))
        sums, waiting = _add(sums, waiting), started
    sums = _add(sums, waiting)
    if not sums.tokens:
        raise ValueError("evaluation: expected at least one target with a loss mask, got none")
    return sums


def evaluate_logits(logits_of: Callable[[list[int]], np.ndarray], batches: Iterable[Batch]) -> Evaluation:
    """The sums that `evaluate` gives, in float64, from the logits of any implementation.

    Args:
      logits_of: float `[T, V]` of a text of `T` tokens; each document of a row is one.

    Raises:
      ValueError: if there is nothing to score.
    """
    nats = tokens = correct = 0.0
    for batch in batches:
        rows = (np.asarray(x) for x in (batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids))
        for tokens_T, targets_T, mask_T, segments_T in zip(*rows, strict=True):
            for segment in np.unique(segments_T[segments_T > 0]):
                own = segments_T == segment
                logits_TV = np.asarray(logits_of(tokens_T[own].tolist()), np.float64)
                wanted_T, mask = targets_T[own], mask_T[own]
                shifted_TV = logits_TV - logits_TV.max(-1, keepdims=True)
                nll_T = np.log(np.exp(shifted_TV).sum(-1)) - shifted_TV[np.arange(len(wanted_T)), wanted_T]
                best_T = shifted_TV.argmax(-1) == wanted_T
                nats, tokens = nats + float((mask * nll_T).sum()), tokens + float(mask.sum())
                correct += float((mask * best_T).sum())
    if not tokens:
        raise ValueError("evaluation: expected at least one target with a loss mask, got none")
    return Evaluation(nats, tokens, correct)


@functools.partial(jax.jit, static_argnums=0)
def token_nll(cfg: ModelConfig, params: Params, batch: Batch) -> tuple[Array, Array]:
    """`(nll_BT, correct_BT)`, float32, of every target whatever its mask.

    Logits exist for one chunk of positions at a time, never for the whole batch.
    """
    hidden_BTD = transformer.forward(
        cfg, params, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids
    ).hidden_BTD
    head = transformer.head_params(cfg, params)
    batch_size, length = batch.targets.shape
    num_chunks = objective.num_chunks(cfg, (batch_size, length))

    def chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = inputs
        scored = cross_entropy.softmax_nll(transformer.head_logits(cfg, head, hidden), targets)
        return scored.nll, scored.correct

    # Chunk j has the positions j modulo the number of chunks: a sharded length stays evenly sharded.
    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch_size, length // num_chunks, num_chunks, *x.shape[2:]), 2, 0)

    nll, correct = jax.lax.map(chunk, (split(hidden_BTD), split(batch.targets)))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(batch_size, length) for x in (nll, correct))  # type: ignore[return-value]


def perplexity(nats: float, tokens: float) -> float:
    """`exp(nats / tokens)`; infinite where that is too large for a float."""
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """`nats / ln 2 / num_bytes`, `num_bytes` being of the UTF-8 text that the targets spell."""
    return nats / math.log(2) / num_bytes


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(cfg: ModelConfig, params: Params, batch: Batch) -> Evaluation:
    nll_BT, correct_BT = token_nll(cfg, params, batch)
    mask_BT = batch.loss_mask
    # A masked position may have an infinite loss, and 0 * inf is NaN.
    nats = jnp.sum(jnp.where(mask_BT > 0, mask_BT * nll_BT, 0.0))
    return Evaluation(nats, jnp.sum(mask_BT), jnp.sum(mask_BT * correct_BT))  # type: ignore[arg-type]


def _add(sums: Evaluation, batch: Evaluation | None) -> Evaluation:
    if batch is None:
        return sums
    return Evaluation(*(total + float(value) for total, value in zip(sums, batch, strict=True)))


def _on_mesh(batch: Batch) -> Batch:
    if rules.current_mesh() is None:
        return batch
    return hosts.to_global(batch, rules.batch_sharding(jax.sharding.get_mesh()))
