"""What compressing did to a model: quality, size and speed, beside the model that it was made from."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.eval import perplexity
from gptjax.infer.generate import GenerateConfig, generate
from gptjax.infer.layout import for_decoding
from gptjax.nn import cost, transformer
from gptjax.nn.config import ModelConfig
from gptjax.types import Array, Batch, Params

_DECODE_TOKENS = 64
_PROMPT_TOKENS = 16
_TRIALS = 3
# In which a small model has many trials: of three that take milliseconds the best is a matter of luck.
_LEAST_SECONDS = 0.4


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures on held-out rows of text; a standard error is that of a mean, from the spread over rows.

    Attributes:
      loss: mean nats a token.
      bits_per_byte: of the text that the tokens spell.
      accuracy: share of tokens that had the highest logit.
      kl: mean over positions of `KL(original || this)`, in nats, and agreement: share of positions where both have the
        same most likely token; 0 and 1 for the original itself.
      loss_ratio_error: standard error of `log(perplexity / original's)`: rows are the same, so it is far smaller than
        what the errors of both would make.
    """

    loss: float
    loss_error: float
    bits_per_byte: float
    accuracy: float
    kl: float
    kl_error: float
    agreement: float
    loss_ratio: float
    loss_ratio_error: float

    @property
    def perplexity(self) -> float:
        return perplexity.perplexity(self.loss, 1.0)

    @property
    def perplexity_ratio(self) -> float:
        """To the original's."""
        return perplexity.perplexity(self.loss_ratio, 1.0)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a model takes.

    Attributes:
      num_params: as the architecture counts them, zeros included.
      memory_bytes: of the parameters as they are loaded.
      flops_per_token: forward operations in rows of the model's context; zeros are multiplied like others.
      cache_bytes_per_token: keys and values that a token leaves behind.
    """

    num_params: int
    memory_bytes: int
    flops_per_token: float
    cache_bytes_per_token: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second: reading a prompt, and writing one token after the other for one reader."""

    prefill: float
    decode: float


class Reference(NamedTuple):
    """An original, and the text that all are measured on.

    Attributes:
      num_bytes: of UTF-8 that the targets of `batches` spell.
      nats_R: that the original needs for each row with a target.
    """

    model: ModelConfig
    params: Params
    batches: Sequence[Batch]
    num_bytes: int
    nats_R: np.ndarray


def reference(cfg: ModelConfig, params: Params, batches: Sequence[Batch], *, num_bytes: int) -> Reference:
    """The original's part of what `quality` compares, which is the same for every variant."""
    return Reference(cfg, params, batches, num_bytes, _row_sums(cfg, params, batches)[1][:, 0])


def quality(reference: Reference, cfg: ModelConfig, params: Params) -> Quality:
    """The figures of a variant, by the evaluator of `eval.perplexity`.

    Raises:
      ValueError: if it has another vocabulary.
    """
    if cfg.vocab_size != reference.model.vocab_size:
        raise ValueError(
            f"vocab_size={cfg.vocab_size}: expected the original's {reference.model.vocab_size}; compare models of one "
            "tokenizer"
        )
    weight_R, own_R = _row_sums(cfg, params, reference.batches)
    return _quality(weight_R, own_R, _compared_sums(reference, cfg, params), reference.nats_R, reference.num_bytes)


def size(cfg: ModelConfig, params: Params) -> Size:
    """Counted from what is there."""
    return Size(
        num_params=cost.count(cfg).total,
        memory_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        flops_per_token=cost.flops_per_token(cfg, cfg.seq_len).forward,
        cache_bytes_per_token=cost.cache_bytes_per_token(cfg),
    )


def speed(cfg: ModelConfig, params: Params, *, prompt_len: int) -> Speed:
    """The best of a few trials, after everything is compiled.

    Args:
      prompt_len: tokens of the prompt that is read; at most the context.
    """
    laid_out = for_decoding(cfg, params)
    prompt = (np.arange(prompt_len, dtype=np.int32) % cfg.vocab_size)[None]
    prefill = _seconds(lambda: jax.block_until_ready(_last_logits(*laid_out, prompt)))
    prompts = [list(range(1, min(_PROMPT_TOKENS, cfg.seq_len // 2) + 1))]
    num_tokens = min(_DECODE_TOKENS, cfg.seq_len - len(prompts[0]) - 1)

    def decode(length: int) -> float:
        config = GenerateConfig(max_new_tokens=length)
        return _seconds(lambda: generate(*laid_out, prompts=prompts, config=config))

    return Speed(prefill=prompt_len / prefill, decode=_decode_rate(num_tokens, decode(num_tokens + 1), decode(1)))


def _decode_rate(num_tokens: int, all_seconds: float, first_seconds: float) -> float:
    """Tokens a second after the first, which comes with reading the prompt.

    Where the two times are no further apart than a busy machine's noise, the first is counted too: a
    rate that is too low is better than one from the difference of two noises.
    """
    seconds = all_seconds - first_seconds
    return num_tokens / seconds if seconds > all_seconds / 4 else (num_tokens + 1) / all_seconds


def _seconds(run: Any) -> float:
    run()
    times: list[float] = []
    while len(times) < _TRIALS or sum(times) < _LEAST_SECONDS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    hidden_BTD = transformer.forward(cfg, params, tokens_BT).hidden_BTD
    return transformer.logits(cfg, params, hidden_BTD[:, -1:])


def _row_sums(cfg: ModelConfig, params: Params, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Of every row with a target its weight, `[R]`, and its nats and correct tokens, `[R, 2]`."""
    weights, own = [], []
    for batch in batches:
        mask_BT = jnp.asarray(batch.loss_mask)
        nll_BT, correct_BT = perplexity.token_nll(cfg, params, batch)
        nats_B = jnp.where(mask_BT > 0, mask_BT * nll_BT, 0.0).sum(-1)
        weights.append(mask_BT.sum(-1))
        own.append(jnp.stack([nats_B, (mask_BT * correct_BT).sum(-1)], axis=-1))
    weight_R, own_R = (np.concatenate(jax.device_get(values)).astype(np.float64) for values in (weights, own))
    return weight_R[weight_R > 0], own_R[weight_R > 0]


def _compared_sums(reference: Reference, cfg: ModelConfig, params: Params) -> np.ndarray:
    """Of every row with a target its KL and agreements, `[R, 2]`."""
    found = []
    for batch in reference.batches:
        for row in np.flatnonzero((np.asarray(batch.loss_mask) > 0).any(-1)):
            # One at a time: two models' logits of a large vocabulary are what takes memory.
            one = jax.tree.map(operator.itemgetter(slice(row, row + 1)), batch)
            theirs_TV = _logits(reference.model, reference.params, one)
            found.append(_compared(_logits(cfg, params, one), theirs_TV, one.loss_mask[0]))
    return np.asarray(jax.device_get(found), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    hidden_BTD = transformer.forward(
        cfg, params, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids
    ).hidden_BTD
    return transformer.logits(cfg, params, hidden_BTD)[0]


@jax.jit
def _compared(logits_TV: Array, reference_TV: Array, mask_T: Array) -> Array:
    log_q, log_p = jax.nn.log_softmax(logits_TV), jax.nn.log_softmax(reference_TV)
    kl_T = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    same_T = logits_TV.argmax(-1) == reference_TV.argmax(-1)
    return jnp.stack([jnp.where(mask_T > 0, mask_T * kl_T, 0.0).sum(), (mask_T * same_T).sum()])


def _quality(
    weight_R: np.ndarray, own_R: np.ndarray, compared_R: np.ndarray, reference_R: np.ndarray, num_bytes: int
) -> Quality:
    total = weight_R.sum()
    loss, loss_error = _mean(own_R[:, 0], weight_R)
    kl, kl_error = _mean(compared_R[:, 0], weight_R)
    ratio, ratio_error = _mean(own_R[:, 0] - reference_R, weight_R)
    return Quality(
        loss=loss,
        loss_error=loss_error,
        bits_per_byte=float(perplexity.bits_per_byte(own_R[:, 0].sum(), num_bytes)),
        accuracy=float(own_R[:, 1].sum() / total),
        kl=kl,
        kl_error=kl_error,
        agreement=float(compared_R[:, 1].sum() / total),
        loss_ratio=ratio,
        loss_ratio_error=ratio_error,
    )


def _mean(sum_R: np.ndarray, weight_R: np.ndarray) -> tuple[float, float]:
    """The mean of a quantity from its sums over rows, and its standard error, rows being independent.

    The error is that of a ratio of sums: `sqrt(R / (R - 1) * sum (s_r - m w_r)^2) / sum w`.
    """
    mean, num_rows = sum_R.sum() / weight_R.sum(), len(sum_R)
    if num_rows < 2:
        return float(mean), math.nan
    spread = np.square(sum_R - mean * weight_R).sum() * num_rows / (num_rows - 1)
    return float(mean), float(math.sqrt(spread) / weight_R.sum())


def to_json(figures: Quality | Size | Speed) -> dict[str, Any]:
    """Plain numbers; of a quality also its perplexities."""
    found = dataclasses.asdict(figures)
    if isinstance(figures, Quality):
        found |= {"perplexity": figures.perplexity, "perplexity_ratio": figures.perplexity_ratio}
    return found
