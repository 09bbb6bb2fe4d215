"""A model with its parameters, under transformers' names."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config as config_lib
from gptjax.api import presets
from gptjax.api.text import GPT4Tokenizer
from gptjax.kernels import cross_entropy
from gptjax.model import Model, check_length, load
from gptjax.nn import cost, transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.spec import ModelSpec
from gptjax.types import Array, Params

IGNORED_LABEL = -100


class LMOutput(NamedTuple):
    """`loss` is the mean over labels, None where none were given; `logits` are float32 `[B, T, V]`."""

    loss: Array | None
    logits: Array


class GPT4LMHeadModel:
    """A language model: `config` and `params` as in all of gptjax, `tokenizer` where it is known.

    Attributes:
      lineage: what was done to make it, oldest first, which checkpoints keep.
      original: the model that it was made from by compressing it, which `evaluate` scores too.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        tokenizer: GPT4Tokenizer | None = None,
        lineage: Sequence[Mapping[str, Any]] = (),
        original: GPT4LMHeadModel | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.lineage = tuple(lineage)
        self.original = original
        self._made: Model | None = None

    def __repr__(self) -> str:
        return f"<GPT4LMHeadModel: {self.num_parameters():,} parameters>"

    @classmethod
    def from_config(cls, config: str | ModelSpec | ModelConfig, *, seed: int = 0, **changes: Any) -> GPT4LMHeadModel:
        """A model with random parameters.

        Args:
          config: a preset's name, or a config.
          seed: of the parameters.
          changes: of the preset's or spec's fields, such as `vocab_size=len(tokenizer)`.

        Raises:
          ValueError: for an unknown preset, or sizes that do not fit each other.
        """
        if isinstance(config, str):
            if config not in presets.PRESETS:
                raise ValueError(f"{config!r}: no such preset; there are {', '.join(presets.PRESETS)}")
            config = presets.PRESETS[config]
        if changes:
            config = config_lib.from_dict(type(config), config_lib.to_dict(config) | changes, path="from_config")
        model = config.build() if isinstance(config, ModelSpec) else config
        return cls(model, jax.jit(functools.partial(transformer.init, model))(jax.random.key(seed)))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> GPT4LMHeadModel:
        """Reads a checkpoint: its directory, or a workdir, whose newest one is taken.

        Raises:
          ValueError: if there is none or it cannot be read, and for a preset, which has no weights.
        """
        if presets.is_preset(path):
            presets.refuse_weights(os.fspath(path))
        presets.check_there(path)
        found = load(path)
        tokenizer = GPT4Tokenizer(found.tokenizer) if found.tokenizer else None
        lineage = () if found.meta is None else found.meta.lineage
        return cls(found.config, found.params, tokenizer=tokenizer, lineage=lineage)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint, with the tokenizer where there is one, as step 0 of a new workdir.

        Raises:
          ValueError: if the directory holds a checkpoint already, or writing fails.
        """
        made = (*self.lineage, {"stage": "save_pretrained"})
        dataclasses.replace(self.inner(), made=made).save(directory)

    def __call__(self, input_ids: Any, *, attention_mask: Any = None, labels: Any = None) -> LMOutput:
        """Logits of every position and, given labels, the loss.

        Args:
          input_ids: `[B, T]` or `[T]`.
          attention_mask: the same shape; 0 marks padding, which is to be on the right.
          labels: the same shape; -100 is left out. A causal model predicts each from the positions
            before it, as transformers does, so `labels=input_ids` is its language-modelling loss.

        Raises:
          ValueError: for other shapes or types, and for ids that the model does not have.
        """
        size = self.config.vocab_size
        tokens_BT = _rows("input_ids", input_ids, high=size)
        shape = tokens_BT.shape
        check_length(self.config, shape[1])
        ones = np.ones(shape, np.int32)
        mask_BT = ones if attention_mask is None else _rows("attention_mask", attention_mask, shape=shape, high=2)
        labels_BT = None if labels is None else _rows("labels", labels, shape=shape, high=size, besides=IGNORED_LABEL)
        logits_BTV = _logits(self.config, self.params, tokens_BT, mask_BT)
        if labels_BT is None:
            return LMOutput(None, logits_BTV)
        shift = 1 if self.config.causal else 0
        return LMOutput(_mean_loss(logits_BTV[:, : shape[1] - shift], labels_BT[:, shift:]), logits_BTV)

    def generate(self, input_ids: Any, *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Prompts and what the model writes after them, as token ids; greedy unless a temperature is given.

        Args:
          input_ids: one prompt or several, which may differ in length.
          max_new_tokens: a completion ends after so many, or with the tokenizer's end token.
          options: the others of `gptjax.Model.options`: temperature, top_k, top_p, seed and so on.
        """
        prompts = _prompts(input_ids)
        completions = self.inner().complete(prompts, max_new_tokens=max_new_tokens, **options)
        return [[*prompt, *completion.tokens] for prompt, completion in zip(prompts, completions, strict=True)]

    def evaluate(self, dataset: Sequence[Any], *, batch_size: int = 8) -> dict[str, float]:
        """`loss`, `perplexity` and `accuracy`, beside those of the original; as `gptjax.Model.evaluate`."""
        original = None if self.original is None else self.original.inner()
        return dataclasses.replace(self.inner(), original=original).evaluate(dataset, batch_size=batch_size)

    def inner(self) -> Model:
        """The same as gptjax's own value: one for as long as the parameters are these, laid out for decoding once."""
        inner = self.tokenizer.inner if self.tokenizer else None
        made = self._made
        if made is None or made.params is not self.params or (made.config, made.tokenizer) != (self.config, inner):
            made = self._made = Model(self.config, self.params, inner)
        return made

    def num_parameters(self) -> int:
        return cost.count(self.config).total


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens_BT: Array, mask_BT: Array) -> Array:
    output = transformer.forward(config, params, tokens_BT, segment_ids_BT=mask_BT)
    return transformer.logits(config, params, output.hidden_BTD)


@jax.jit
def _mean_loss(logits_BTV: Array, labels_BT: Array) -> Array:
    counted = labels_BT != IGNORED_LABEL
    nll = cross_entropy.softmax_nll(logits_BTV, jnp.where(counted, labels_BT, 0)).nll
    return jnp.sum(nll * counted) / jnp.maximum(jnp.sum(counted), 1)


def _rows(name: str, ids: Any, *, high: int, shape: tuple[int, ...] | None = None, besides: int | None = None) -> Array:
    """Ids from 0 to below `high`, or `besides`, as int32 `[B, T]`; JAX would take others for some that it has."""
    rows = jnp.atleast_2d(jnp.asarray(ids))
    rows = rows.astype(jnp.int32) if rows.dtype == bool else rows
    if rows.ndim != 2 or not rows.size or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers of shape [B, T] or [T], got {rows.dtype} {list(rows.shape)}")
    if shape is not None and rows.shape != shape:
        raise ValueError(f"{name}: expected the shape of input_ids, {list(shape)}, got {list(rows.shape)}")
    if not isinstance(rows, jax.core.Tracer):
        judged = rows if besides is None else jnp.where(rows == besides, 0, rows)
        if not 0 <= judged.min() <= judged.max() < high:
            allowed = f"0 to {high - 1}" + ("" if besides is None else f" or {besides}")
            raise ValueError(f"{name}: expected {allowed}, got {judged.min()} to {judged.max()}")
    return rows.astype(jnp.int32)


def _prompts(input_ids: Any) -> list[list[int]]:
    if isinstance(input_ids, Sequence) and input_ids and not np.isscalar(input_ids[0]):
        return [np.asarray(prompt, np.int32).tolist() for prompt in input_ids]
    return np.atleast_2d(np.asarray(input_ids, np.int32)).tolist()
