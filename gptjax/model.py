"""A trained model in one value: what a notebook starts from."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint import store
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import Weights
from gptjax.data import examples
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.eval import perplexity
from gptjax.infer import generate as generation
from gptjax.infer.generate import GenerateConfig
from gptjax.infer.layout import for_decoding
from gptjax.infer.sampling import SamplingConfig
from gptjax.interop import formats
from gptjax.interop import params as foreign_params
from gptjax.nn import cost, transformer
from gptjax.nn.config import ModelConfig
from gptjax.parallel import rules
from gptjax.types import Array, Batch, Params

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Model:
    """A config, its parameters and their tokenizer.

    Attributes:
      tokenizer: None where the checkpoint has none; tokens then take the place of text.
      meta: what the checkpoint says of its origin; None for a model made in memory.
      original: the model that it was made from by compressing it, which `evaluate` scores too.
      made: what was done since `meta`, oldest first.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    meta: Meta | None = None
    original: Model | None = None
    made: tuple[Mapping[str, Any], ...] = ()

    @property
    def lineage(self) -> tuple[Mapping[str, Any], ...]:
        """What was done to make it, oldest first, which checkpoints keep."""
        return (*(() if self.meta is None else self.meta.lineage), *self.made)

    def __repr__(self) -> str:
        size = cost.count(self.config).total
        step = "" if self.meta is None else f", step {self.meta.step}"
        pieces = "no tokenizer" if self.tokenizer is None else f"{self.tokenizer.kind} tokenizer"
        return f"<gptjax.Model: {size:,} parameters, {pieces}{step}>"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint, with the tokenizer where there is one, into a new workdir.

        Raises:
          ValueError: if the directory holds a checkpoint already, or writing fails.
        """
        writer = store.CheckpointStore(directory)
        try:
            if writer.steps():
                raise ValueError(f"{directory}: holds a checkpoint already, which is not overwritten; choose another")
            names = "" if self.tokenizer is None else self.tokenizer.fingerprint
            step, run = (0, {}) if self.meta is None else (self.meta.step, self.meta.run)
            meta = meta_lib.make(self.config, step=step, run=run, tokenizer=names, lineage=self.lineage)
            assets = {} if self.tokenizer is None else {tokenizer_lib.FILE_NAME: self.tokenizer.to_bytes()}
            writer.save(step, meta=meta, params=self.params, assets=assets)
        finally:
            writer.close()

    def logits(self, tokens: Any) -> Array:
        """Float32 logits `[B, T, V]` of the token that follows each prefix of `tokens` `[B, T]`.

        In training sequences began with `tokenizer.start_id`, which `tokenizer.encode_prompt` puts there.

        Raises:
          ValueError: for tokens that are none of this model's; see `checked_tokens`.
        """
        return _logits(self.config, self.params, checked_tokens(self.config, tokens))

    def evaluate(self, dataset: Sequence[Any], *, batch_size: int = 8) -> dict[str, float]:
        """`loss` (nats a token), `perplexity` and `accuracy` over all targets of a data set.

        Of a compressed model also `original_loss` and so on: those of the model that it was made from.

        Args:
          dataset: examples, each of them token ids, a mapping with `input_ids`, or text.
          batch_size: rows that are scored at once.

        Raises:
          ValueError: for examples that do not fit the model, or with nothing to predict, and for a bidirectional model.
        """
        found = [*examples.rows(dataset, self.tokenizer, seq_len=self.config.seq_len)]
        found = [checked_tokens(self.config, ids[None])[0] for ids in found if len(ids) > 1]
        if not found:
            raise ValueError("dataset: nothing to predict in it; expected examples of at least 2 tokens")
        length = max(map(len, found))
        starts = range(0, len(found), batch_size)
        batches = [examples.batch(found[i : i + batch_size], length=length, shift=1) for i in starts]
        figures = _figures(self, batches)
        if self.original is not None:
            figures |= {f"original_{name}": value for name, value in _figures(self.original, batches).items()}
        return figures

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[str]: ...
    def generate(self, prompt: str | list[str], **options: Any) -> str | list[str]:
        """The text that follows a prompt, or each prompt of a list.

        Args:
          options: those of `options`; fewer than 128 new tokens if the context has no room for more.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        completions = self.complete(prompts, **options)
        texts = [completion.text or "" for completion in completions]
        return texts[0] if isinstance(prompt, str) else texts

    def complete(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[generation.Completion]:
        """As `generate`, with tokens, log-probabilities and the reason for each end. Prompts may be tokens."""
        cfg, params = self._decoding
        tokens = [self._tokens(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        return generation.generate(
            cfg,
            params,
            prompts=tokens,
            config=self._options(tokens, options),
            decode_fn=None if self.tokenizer is None else self.tokenizer.decode,
        )

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """Yields the text that `complete([prompt], ...)` gives while it is made."""
        cfg, params = self._decoding
        tokens = self._tokens(prompt)
        return generation.stream(
            cfg,
            params,
            prompt=tokens,
            config=self._options([tokens], options),
            decode_fn=self._needed_tokenizer().decode,
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The assistant's answer to a conversation, as `generate` gives it; see `chat_tokens`."""
        return self.complete([self.chat_tokens(messages)], **options)[0].text or ""

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation by the model's chat template, up to where the assistant answers: a prompt for `complete`.

        Args:
          messages: oldest first, such as `{"role": "user", "content": "Hello"}`.

        Raises:
          ValueError: if the model has no chat template, or the template refuses the messages.
        """
        tokenizer = self._needed_tokenizer()
        return tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def options(
        self,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> GenerateConfig:
        """What `generate`, `complete` and `stream` accept; see `SamplingConfig` and `GenerateConfig`."""
        return GenerateConfig(
            max_new_tokens=max_new_tokens,
            sampling=SamplingConfig(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
            ),
            eos_ids=() if self.tokenizer is None else self.tokenizer.eos_ids,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            vocab_size=None if self.tokenizer is None else self.tokenizer.vocab_size,
            seed=seed,
        )

    def _options(self, prompts: list[list[int]], options: dict[str, Any]) -> GenerateConfig:
        """As `options`, but by default for no more tokens than the context has room for."""
        room = generation.room_for(self.config, max(map(len, prompts), default=0))
        return self.options(**{"max_new_tokens": max(1, min(DEFAULT_NEW_TOKENS, room))} | options)

    @functools.cached_property
    def _decoding(self) -> tuple[ModelConfig, Params]:
        return for_decoding(self.config, self.params)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt behind the token that documents began with in training."""
        if not isinstance(prompt, str):
            return list(prompt)
        return self._needed_tokenizer().encode_prompt(prompt)

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer; import or train it with one, or give complete() and logits() tokens"
            )
        return self.tokenizer


def _figures(model: Model, batches: Sequence[Batch]) -> dict[str, float]:
    found = perplexity.evaluate(model.config, model.params, batches)
    return {
        "loss": found.loss,
        "perplexity": perplexity.perplexity(found.nats, found.tokens),
        "accuracy": found.accuracy,
    }


def checked_tokens(config: ModelConfig, tokens: Any) -> np.ndarray:
    """`tokens` as int32 `[B, T]`.

    Raises:
      ValueError: for another shape, tokens out of the vocabulary, or more of them than the model's context.
    """
    tokens_BT = np.asarray(tokens)
    if tokens_BT.ndim != 2 or not tokens_BT.size or not np.issubdtype(tokens_BT.dtype, np.integer):
        raise ValueError(
            f"tokens: expected integers of shape [B, T], got {tokens_BT.dtype} {list(tokens_BT.shape)}; "
            "one sequence is [tokens]"
        )
    low, high = tokens_BT.min(), tokens_BT.max()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"tokens: {low} to {high} do not fit the model's vocab_size={config.vocab_size}")
    check_length(config, tokens_BT.shape[1])
    return tokens_BT.astype(np.int32)


def check_length(config: ModelConfig, length: int) -> None:
    """Raises:
    ValueError: if the sequence is longer than the model's context.
    """
    if length > config.seq_len:
        raise ValueError(
            f"tokens: {length} positions exceed the model's context, seq_len={config.seq_len}; "
            f"shorten the sequence{generation.longer_context(config)}"
        )


def load(path: epath.PathLike, *, shardings: Any = None, dtype: Any = None, weights: Weights = "last") -> Model:
    """Reads a model from a workdir (its newest checkpoint) or a checkpoint directory, local or gs://.

    A model of another framework is opened as it is, if local: a Hugging Face folder, a GGUF file, a llama2.c `.bin`.

    Args:
      shardings: where parameters go; None is the first device or, on a mesh in use, where the partitioning
        rules put them. See `checkpoint.store.restore_params`.
      dtype: of floating-point parameters; None keeps the stored one.
      weights: `average` takes the average of the parameters that training kept (`optim.ema_decay`).

    Raises:
      ValueError: with the path, if there is no checkpoint, it cannot be read, has no average, or its tokenizer is not
        the one that it was trained with.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}: expected {' or '.join(map(repr, get_args(Weights)))}")
    path = os.path.expanduser(os.fspath(path))
    if "://" not in path and formats.recognise(pathlib.Path(path)) is not None:
        return _foreign(pathlib.Path(path), shardings=shardings, dtype=dtype, weights=weights)
    directory = store.find(path)
    if shardings is None and rules.current_mesh() is not None:
        shardings = _mesh_shardings(store.read_meta(directory).model)
    meta, params = store.restore_params(directory, shardings=shardings, dtype=dtype, weights=weights)
    tokenizer = _tokenizer(store.read_assets(directory), meta, str(directory))
    return Model(meta.model, params, tokenizer, meta)


def _foreign(path: pathlib.Path, *, shardings: Any, dtype: Any, weights: Weights) -> Model:
    """A model of another framework."""
    if weights != "last":
        raise ValueError(
            f"{path}: weights={weights!r}: only gptjax's own checkpoints keep an average; read the last ones"
        )
    source = formats.open_source(path)
    params = foreign_params.read(source, dtype=None if dtype is None else jnp.dtype(dtype))
    if shardings is None and rules.current_mesh() is not None:
        shardings = _mesh_shardings(source.model)
    return Model(source.model, params if shardings is None else jax.device_put(params, shardings), source.tokenizer)


def _mesh_shardings(model: ModelConfig) -> Any:
    shapes, axes = transformer.abstract_params(model), transformer.param_axes(model)
    return rules.tree_shardings(jax.sharding.get_mesh(), axes, shapes)


def _tokenizer(assets: Mapping[str, bytes], meta: Meta, path: str) -> Tokenizer | None:
    if tokenizer_lib.FILE_NAME not in assets:
        if meta.tokenizer:
            raise ValueError(
                f"{path}/assets: {tokenizer_lib.FILE_NAME} is missing; copy there the tokenizer with fingerprint "
                f"{meta.tokenizer[:12]} that the model was trained with"
            )
        return None
    tokenizer = tokenizer_lib.from_bytes(assets[tokenizer_lib.FILE_NAME])
    if meta.tokenizer and tokenizer.fingerprint != meta.tokenizer:
        raise ValueError(
            f"{path}/assets/{tokenizer_lib.FILE_NAME}: fingerprint {tokenizer.fingerprint[:12]}, but the model was "
            f"trained with {meta.tokenizer[:12]}; restore the original file"
        )
    return tokenizer


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    return transformer.logits(cfg, params, transformer.forward(cfg, params, tokens_BT).hidden_BTD)
