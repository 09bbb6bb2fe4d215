"""Batched generation: one compiled prefill, then one compiled loop over tokens.

Prompts of different length are padded on the right; padding has position -1, which is neither
written to the cache nor attended, so every row computes what it would compute alone. The loop
runs on the device until its token budget is spent or every row has ended; the host looks at
tokens only between runs of the loop: at the end, or every few tokens when it streams or
looks for stop strings. Lengths are rounded up to buckets, so that few programs are compiled.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gptjax.infer import decode
from gptjax.infer.layout import for_decoding
from gptjax.infer.sampling import SamplingConfig, per_row
from gptjax.infer.text import DecodeFn, TextStream
from gptjax.nn.config import ModelConfig
from gptjax.types import Params

FinishReason = Literal["eos", "stop", "length"]

# Tokens between looks of the host: streamed text comes in pieces of this many.
BLOCK_TOKENS = 8
_MIN_BUCKET = 16
_MIN_BUFFER_STEP = 64


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to generate after each prompt.

    Attributes:
      max_new_tokens: a completion ends after this many tokens at the latest.
      sampling: how each token is chosen.
      eos_ids: tokens that end a completion; the one that did is its last token, and not in the text.
      stop: strings that end a completion; the text ends before the first of them.
      vocab_size: of the tokenizer; only tokens below it are chosen. None takes the model's.
      seed: of the draws; row `i` of a batch has its own, so equal prompts give different samples.
    """

    max_new_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    vocab_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "vocab_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, numbers.Integral) or int(value) < 1):
                raise ValueError(f"{name}={value}: expected a whole number, at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: expected 0 to {2**31 - 1}")


class Completion(NamedTuple):
    """What was generated after one prompt.

    Attributes:
      tokens: up to and including the one that ended it.
      logprobs: of each token under the model's own distribution, before any sampling stage.
      text: None where no `decode` function was given.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str | None
    finish_reason: FinishReason


def generate(
    cfg: ModelConfig,
    params: Params,
    *,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    decode_fn: DecodeFn | None = None,
) -> list[Completion]:
    """Completes a batch of token prompts.

    Args:
      decode_fn: `Tokenizer.decode`; needed for stop strings and for `Completion.text`.

    Raises:
      ValueError: for an empty or out-of-vocabulary prompt, a model that cannot generate, or a
        length beyond its context.
    """
    if config.stop and decode_fn is None:
        raise ValueError(f"stop={list(config.stop)}: stop strings need the tokenizer's decode function")
    _check(cfg, prompts, config)
    rows = [_Row(prompt, config, decode_fn) for prompt in prompts]
    run = _Run(cfg, params, prompts, config)
    while not all(row.done for row in rows):
        run.advance(BLOCK_TOKENS if config.stop else config.max_new_tokens, rows)
        tokens_BN, logprobs_BN = run.read()
        for row, tokens, logprobs in zip(rows, tokens_BN, logprobs_BN, strict=True):
            row.take(tokens, logprobs)
    return [row.completion() for row in rows]


def stream(
    cfg: ModelConfig,
    params: Params,
    *,
    prompt: Sequence[int],
    config: GenerateConfig,
    decode_fn: DecodeFn,
) -> Iterator[str]:
    """The text of one completion piece by piece; the pieces join to `generate`'s text.

    The first piece comes after one token; later ones while the device computes the next block.

    Raises:
      ValueError: as `generate`, at once and not when the first piece is asked for.
    """
    _check(cfg, [prompt], config)
    return _pieces(cfg, params, prompt, config, _Row(prompt, config, decode_fn))


def _pieces(
    cfg: ModelConfig, params: Params, prompt: Sequence[int], config: GenerateConfig, row: _Row
) -> Iterator[str]:
    run = _Run(cfg, params, [prompt], config)
    while not row.done:
        (tokens,), (logprobs,) = run.read()
        run.advance(BLOCK_TOKENS, [row])
        if piece := row.take(tokens, logprobs):
            yield piece


class _Run:
    """One batch on the device."""

    def __init__(self, cfg: ModelConfig, params: Params, prompts: Sequence[Sequence[int]], config: GenerateConfig):
        self._cfg, self._params = for_decoding(cfg, params)
        self._max_new_tokens = config.max_new_tokens
        self._num_tokens = 1
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BT = np.zeros((len(prompts), _bucket(max(lengths))), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        self._sampling = per_row([config.sampling] * len(prompts), vocab_size=config.vocab_size or cfg.vocab_size)
        self._eos_ids = np.array(config.eos_ids, np.int32)
        self._state = decode.prefill(
            self._cfg,
            self._params,
            tokens_BT,
            lengths,
            self._sampling,
            self._eos_ids,
            np.int32(config.seed),
            cache_len=_buffer_len(int(max(lengths)) + config.max_new_tokens),
            buffer_len=_buffer_len(config.max_new_tokens),
        )

    def advance(self, num_tokens: int, rows: Sequence[_Row]) -> None:
        """Starts the loop for `num_tokens` more; returns before it is done."""
        if self._num_tokens == self._max_new_tokens:
            return
        self._num_tokens = min(self._num_tokens + num_tokens, self._max_new_tokens)
        ended_B = np.array([row.done for row in rows])
        self._state = decode.decode(
            self._cfg,
            self._params,
            self._state,
            self._sampling,
            self._eos_ids,
            ended_B,
            np.int32(self._num_tokens),
        )

    def read(self) -> tuple[list[list[int]], list[list[float]]]:
        """All tokens generated so far and their log-probabilities, by row; waits for the device."""
        state = self._state
        tokens_BN, logprobs_BN, num_B = map(np.asarray, (state.tokens_BN, state.logprobs_BN, state.num_B))
        return (
            [row[:num].tolist() for row, num in zip(tokens_BN, num_B, strict=True)],
            [row[:num].tolist() for row, num in zip(logprobs_BN, num_B, strict=True)],
        )


class _Row:
    """What the host knows of one completion."""

    def __init__(self, prompt: Sequence[int], config: GenerateConfig, decode_fn: DecodeFn | None):
        self._config = config
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text = TextStream(decode_fn, stop=config.stop, prompt=prompt) if decode_fn is not None else None
        self._finish_reason: FinishReason | None = None

    @property
    def done(self) -> bool:
        return self._finish_reason is not None

    def take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Takes over the tokens that are new; returns the text that they made certain."""
        pieces = []
        while not self.done and len(self._tokens) < len(tokens):
            new = len(self._tokens)
            pieces.append(self._append(tokens[new], logprobs[new]))
        return "".join(pieces)

    def _append(self, token: int, logprob: float) -> str:
        self._tokens.append(token)
        self._logprobs.append(logprob)
        piece = ""
        if token in self._config.eos_ids:
            self._finish_reason = "eos"
        elif self._text is not None:
            piece = self._text.push([token])
            if self._text.stopped:
                self._finish_reason = "stop"
        if self._finish_reason is None and len(self._tokens) == self._config.max_new_tokens:
            self._finish_reason = "length"
        if self.done and self._text is not None:
            piece += self._text.finish()
            # A stop string can be complete only in what was held back to the end.
            if self._text.stopped:
                self._finish_reason = "stop"
        return piece

    def completion(self) -> Completion:
        assert self._finish_reason is not None, "the completion is not finished"
        text = None if self._text is None else self._text.text
        return Completion(tuple(self._tokens), tuple(self._logprobs), text, self._finish_reason)


def _check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], config: GenerateConfig) -> None:
    if not cfg.causal:
        raise ValueError("this model is bidirectional (causal=False) and cannot generate; use a causal one")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} has no tokens; begin it with the tokenizer's bos_id")
        if not (0 <= min(prompt) and max(prompt) < cfg.vocab_size):
            raise ValueError(
                f"prompt {row}: tokens {min(prompt)} to {max(prompt)} do not fit the model's "
                f"vocab_size={cfg.vocab_size}; is this its tokenizer?"
            )
    longest = max(len(prompt) for prompt in prompts)
    room = room_for(cfg, longest)
    if config.max_new_tokens <= room:
        return
    advice = f"ask for at most {room} tokens"
    if room < 1:
        advice = f"shorten the prompt to at most {room_for(cfg, config.max_new_tokens)} tokens"
    if room < 1 and config.max_new_tokens > cfg.seq_len:
        advice = f"shorten the prompt and ask for fewer tokens, at most {cfg.seq_len + 1} together"
    raise ValueError(
        f"a prompt of {longest} tokens + max_new_tokens={config.max_new_tokens} exceed the model's context, "
        f"seq_len={cfg.seq_len}; {advice}{longer_context(cfg)}"
    )


def room_for(cfg: ModelConfig, prompt_tokens: int) -> int:
    """New tokens that fit in the context behind a prompt; the last one needs no position, as nothing follows it."""
    return cfg.seq_len + 1 - prompt_tokens


def longer_context(cfg: ModelConfig) -> str:
    """What else an error may advise where a sequence is too long."""
    if cfg.learned_positions:
        return ""
    return "; from Python, a ModelConfig with a larger seq_len goes on, at lower quality past the trained length"


def _bucket(length: int) -> int:
    """The next power of two: at most one prefill program for each doubling of the prompt."""
    return max(_MIN_BUCKET, 1 << (int(length) - 1).bit_length())


def _buffer_len(length: int) -> int:
    """`length` rounded up by at most a quarter, or 63 slots: few programs, and little to read past the end."""
    step = max(_MIN_BUFFER_STEP, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
