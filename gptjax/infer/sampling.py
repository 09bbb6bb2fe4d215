"""From logits to the next token: penalties, temperature, truncation, and the draw.

Every stage is a pure function of `logits_BV` and of per-row parameters `[B]`, so rows with
different settings share one compiled program and a new temperature compiles nothing. The
stages run in the order of transformers' logits processors:

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Source: Holtzman et al. 2020 (top-p, arXiv:1904.09751); Nguyen et al. 2024 (min-p,
arXiv:2407.01082); Keskar et al. 2019 (repetition penalty, arXiv:1909.05858, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.types import Array


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one completion is drawn; the defaults are greedy decoding.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the `top_k` most likely tokens stay; 0 keeps all.
      top_p: only the smallest set of most likely tokens with at least this much probability
        stays; 1 keeps all.
      min_p: only tokens at least `min_p` times as likely as the most likely one stay.
      repetition_penalty: logits of tokens already in the prompt or the completion are divided
        by it where positive and multiplied where negative; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "at least 0 (0 is greedy)")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "over 0 and at most 1 (1 keeps all tokens)")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 (keeps all tokens) to 1")
        _require(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "over 0 (1 is off)")


class Stages(NamedTuple):
    """Which stages some row needs; static, so that unused ones are not in the program."""

    penalty: bool
    draw: bool
    sort: bool
    min_p: bool


@flax.struct.dataclass
class RowSampling:
    """The `SamplingConfig`s of B rows as arrays `[B]`, and the stages that they need.

    Attributes:
      vocab_size: scalar; tokens from here on are never chosen. A model's vocabulary is often
        rounded up past its tokenizer's.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    vocab_size: Array
    stages: Stages = flax.struct.field(pytree_node=False)


class Draw(NamedTuple):
    """Chosen tokens and their log-probability under the logits before any stage, both `[B]`."""

    token_B: Array
    logprob_B: Array


def per_row(configs: Sequence[SamplingConfig], *, vocab_size: int) -> RowSampling:
    """Stacks one config a row, for a vocabulary of `vocab_size` tokens."""
    drawing = [config for config in configs if config.temperature > 0]
    stages = Stages(
        penalty=any(config.repetition_penalty != 1 for config in configs),
        draw=bool(drawing),
        sort=any(config.top_k > 0 or config.top_p < 1 for config in drawing),
        min_p=any(config.min_p > 0 for config in drawing),
    )
    return RowSampling(
        temperature=jnp.array([config.temperature for config in configs], jnp.float32),
        top_k=jnp.array([config.top_k for config in configs], jnp.int32),
        top_p=jnp.array([config.top_p for config in configs], jnp.float32),
        min_p=jnp.array([config.min_p for config in configs], jnp.float32),
        repetition_penalty=jnp.array([config.repetition_penalty for config in configs], jnp.float32),
        vocab_size=jnp.asarray(vocab_size, jnp.int32),
        stages=stages,
    )


def sample(logits_BV: Array, rows: RowSampling, *, keys_B: Array, seen_BV: Array | None) -> Draw:
    """Draws one token a row.

    Args:
      keys_B: one random key a row, so that a row's draw does not depend on its neighbours.
      seen_BV: bool, tokens that the repetition penalty applies to; read only in that stage.
    """
    is_token_V = jnp.arange(logits_BV.shape[-1]) < rows.vocab_size
    logits_BV = scores_BV = jnp.where(is_token_V, logits_BV.astype(jnp.float32), -jnp.inf)
    if rows.stages.penalty:
        assert seen_BV is not None, "the repetition penalty needs the tokens seen so far"
        scores_BV = penalize_repetition(scores_BV, rows.repetition_penalty, seen_BV=seen_BV)
    token_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    if rows.stages.draw:
        scores_BV = truncate(scale_temperature(scores_BV, rows.temperature), rows)
        drawn_B = _categorical(keys_B, scores_BV)
        token_B = jnp.where(rows.temperature > 0, drawn_B, token_B)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return Draw(token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1))


def truncate(scores_BV: Array, rows: RowSampling) -> Array:
    """Applies the truncating stages that `rows` needs; what is cut becomes -inf."""
    if rows.stages.sort:
        scores_BV = keep_top_k_top_p(scores_BV, rows.top_k, top_p_B=rows.top_p)
    if rows.stages.min_p:
        scores_BV = keep_min_p(scores_BV, rows.min_p)
    return scores_BV


def penalize_repetition(logits_BV: Array, penalty_B: Array, *, seen_BV: Array) -> Array:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones."""
    penalty_B1 = penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def scale_temperature(logits_BV: Array, temperature_B: Array) -> Array:
    """Divides by the temperature; greedy rows (0) pass unchanged."""
    return logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]


def keep_top_k_top_p(logits_BV: Array, top_k_B: Array, *, top_p_B: Array) -> Array:
    """Top-k, then top-p of what is left, from one sort; what is cut becomes -inf.

    A token stays under top-p if the tokens more likely than it have together less than
    `top_p` of the probability. Tokens as likely as the last one kept stay too, in both stages:
    the result does not depend on the order of the vocabulary.
    """
    vocab_size = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    last_B1 = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, vocab_size), vocab_size)[:, None] - 1
    k_threshold_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
    sorted_BV = jnp.where(sorted_BV < k_threshold_B1, -jnp.inf, sorted_BV)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # Rounding of the running sum must not cut anything where the stage is off.
    kept_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    kept_BV = kept_BV.at[:, 0].set(True)
    p_threshold_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < jnp.maximum(k_threshold_B1, p_threshold_B1), -jnp.inf, logits_BV)


def keep_min_p(logits_BV: Array, min_p_B: Array) -> Array:
    """Cuts tokens with `p < min_p * max p`: in logits, `l < max l + log(min_p)`."""
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)


def _categorical(keys_B: Array, logits_BV: Array) -> Array:
    gumbel_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return jnp.argmax(logits_BV + gumbel_BV, axis=-1).astype(jnp.int32)


def _require(condition: bool, name: str, value: float, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value}: expected {expected}")
