"""Whoever can run a model: ours, or the peer's own implementation as the referee."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gptjax.checkpoint import reading
from gptjax.checkpoint.meta import versions
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.infer import generate as generation
from gptjax.infer.generate import GenerateConfig
from gptjax.infer.layout import dropless, for_decoding
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.types import Params

_BUCKET_TOKENS = 128


class Runner(Protocol):
    """One implementation with one model in it.

    Attributes:
      name: what ran, with versions, such as `transformers 5.24.0, torch 2.13.0`.
    """

    name: str

    def logits(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Float32 `[T, V]`, without a cache; None where the implementation does not give them away."""

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely continuation, with its cache; it does not stop at an end token."""

    def encode(self, text: str) -> list[int] | None:
        """Its own tokenizer's ids of a text, without special tokens around; None where it has none."""

    def hidden(self, tokens: Sequence[int]) -> list[np.ndarray] | None:
        """The residual stream `[T, D]` before the first layer and after each, before the final norm; or None."""


class GptjaxRunner:
    """Ours, from a checkpoint directory or any tree of parameters."""

    def __init__(self, model: ModelConfig, params: Params, tokenizer: Tokenizer | None) -> None:
        self.name = f"gptjax {versions()['gptjax']}, jax {jax.__version__}"
        self.model, self.params, self.tokenizer = dropless(model), params, tokenizer
        self._decoding = for_decoding(model, params)

    @classmethod
    def load(cls, directory: epath.PathLike) -> GptjaxRunner:
        """Reads a checkpoint, checksums and all."""
        meta, params = reading.restore_params(directory)
        content = reading.read_assets(reading.find(directory)).get(tokenizer_lib.FILE_NAME)
        return cls(meta.model, params, None if content is None else tokenizer_lib.from_bytes(content))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        # Causal models do not see what follows, so few programs are compiled for all lengths.
        size = min(self.model.seq_len, -(-len(tokens) // _BUCKET_TOKENS) * _BUCKET_TOKENS)
        row = np.zeros((1, max(size, len(tokens)) if self.model.causal else len(tokens)), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(_logits(self.model, self.params, row)[0, : len(tokens)])

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        config = GenerateConfig(max_new_tokens=num_tokens)
        return list(generation.generate(*self._decoding, prompts=[list(tokens)], config=config)[0].tokens)

    def encode(self, text: str) -> list[int] | None:
        if self.tokenizer is None:
            return None
        if self.tokenizer.kind == "characters":
            # What it would refuse is left out, as by the tokenizer.json that it is exported as.
            text = "".join(character for character in text if character.encode() in self.tokenizer.pieces)
        return self.tokenizer.encode(text)

    def hidden(self, tokens: Sequence[int]) -> list[np.ndarray]:
        row = jnp.asarray([tokens], jnp.int32)
        return [np.asarray(x[0]) for x in transformer.residuals(self.model, self.params, row)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return transformer.logits(model, params, transformer.forward(model, params, tokens_BT).hidden_BTD)
