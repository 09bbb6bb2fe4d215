"""Rows that the student writes itself, so that it is taught where it goes and not only where the data went.

Of each batch a fraction of the rows keep their first tokens, as a prompt; the rest is drawn from the student, at
temperature 1. There the teacher's divergence is the only loss: nobody says that what was written is right. Gradients do
not go through the drawing.

The rows of some steps are written at once, by the two programs of `infer.decode`, from the parameters that these steps
begin with; so the cost of reading all weights for a token is shared by many rows. Between, they are part of the state
that is saved: a run that goes on reads the rows that it would have read.

Source: Agarwal et al. 2023 (GKD, arXiv:2306.13649), algorithm 1, where whole batches take turns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gptjax.compress import matching
from gptjax.data.loader import TrainData
from gptjax.infer import decode
from gptjax.infer.layout import for_decoding
from gptjax.infer.sampling import SamplingConfig, per_row
from gptjax.nn.config import ModelConfig
from gptjax.parallel import hosts, rules
from gptjax.train.state import TrainState
from gptjax.train.task import Carried
from gptjax.types import Array, Batch, Params

NAME = "own_rows"


@flax.struct.dataclass
class Own:
    """`Batch.notes` of a batch with rows of the student's: float32 `[B, T]`, 1 where it wrote the target."""

    written_BT: Array


@flax.struct.dataclass
class Rows:
    """What was written for some steps.

    Attributes:
      tokens: int32 `[rows a step, steps, T + 1]`, prompts first.
      prompt, length: int32 `[rows a step, steps]`, tokens of the prompt, and of all.
    """

    tokens: Array
    prompt: Array
    length: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """Who writes which rows.

    Attributes:
      batch_size, seq_len: of the batches.
      num_parts: that the mesh cuts a batch into; each has as many rows that are written.
      fraction: of the rows of a batch.
      num_steps: steps whose rows are written at once.
      prompt_tokens: tokens that a row keeps; fewer where its first document is shorter.
      vocab_size: of the tokenizer; only tokens below it are drawn.
      eos_ids: tokens that end a row.
      seed: of the draws; those of step `k` are of `draw_seed(seed, k)`.
    """

    student: ModelConfig
    batch_size: int
    num_parts: int
    seq_len: int
    fraction: float
    num_steps: int
    prompt_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        rows = self.fraction * self.batch_size
        if abs(rows - self.num_rows) > 1e-6 or self.num_rows % self.num_parts:
            nearest = math.ceil(rows / self.num_parts) * self.num_parts / self.batch_size
            raise ValueError(
                f"on_policy={self.fraction:g} of data.batch_size={self.batch_size} is {rows:g} rows; expected a "
                f"multiple of {self.num_parts}, the parts of the mesh that share a batch, such as on_policy={nearest:g}"
            )
        if not self.prompt_tokens < self.seq_len:
            raise ValueError(
                f"on_policy_prompt={self.prompt_tokens}: leaves nothing to write of rows of model.seq_len="
                f"{self.seq_len}; expected less"
            )

    @property
    def num_rows(self) -> int:
        """Rows of a batch that the student writes."""
        return round(self.fraction * self.batch_size)

    def is_own(self, row_numbers: Any) -> Any:
        """Of rows of a batch, by number: spread over it, so that every device has its part."""
        every = self.batch_size // math.gcd(self.num_rows, self.batch_size)
        return row_numbers % every < self.num_rows * every // self.batch_size


def carried(writing: Writing) -> Carried:
    """What a run carries from step to step, and how a step uses it."""
    shape = (writing.num_rows, writing.num_steps)
    whole, one = (jax.ShapeDtypeStruct(dims, jnp.int32) for dims in ((*shape, writing.seq_len + 1), shape))
    shapes = Rows(tokens=whole, prompt=one, length=one)  # type: ignore[arg-type]
    return Carried(shapes={NAME: shapes}, mix_fn=functools.partial(_mix, writing))


def renew(writing: Writing, data: TrainData, step: int, state: TrainState) -> TrainState:
    """The state with rows for the steps after `step`, written where those that it has are used up."""
    if step % writing.num_steps:
        return state
    prompts = _prompts(writing, data, step)
    seed = np.int32(draw_seed(writing.seed, step))
    write = _jitted(rules.replicated(jax.sharding.get_mesh()))
    rows = write(writing, matching.apart(state.params)[0], prompts.tokens, prompts.lengths, seed)
    return dataclasses.replace(state, extra={**state.extra, NAME: rows})


def draw_seed(seed: int, step: int) -> int:
    """The seed of the draws for the steps after `step`."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0] >> 1)


class _Prompts(NamedTuple):
    """`[rows a step * steps, tokens]` and `[rows a step * steps]`, padded on the right."""

    tokens: Any
    lengths: Any


def _prompts(writing: Writing, data: TrainData, step: int) -> _Prompts:
    """The beginnings of the rows that are replaced, which depend on the data's order alone."""
    tokens, lengths = [], []
    for number in range(step, step + writing.num_steps):
        own = [row for row in data.row_numbers(number) if writing.is_own(row % writing.batch_size)]
        batch = data.batch(own)
        first = np.asarray(batch.segment_ids)[:, : writing.prompt_tokens] == 1
        tokens.append(np.where(first, np.asarray(batch.tokens)[:, : writing.prompt_tokens], 0))
        lengths.append(np.maximum(first.sum(axis=1), 1))
    found = np.stack(tokens, axis=1), np.stack(lengths, axis=1)
    flat = [part.reshape(-1, *part.shape[2:]).astype(np.int32) for part in found]
    sharding = NamedSharding(jax.sharding.get_mesh(), rules.spec("act_batch", None))
    return _Prompts(hosts.to_global(flat[0], sharding), hosts.to_global(flat[1][:, None], sharding)[:, 0])


@functools.cache
def _jitted(sharding: NamedSharding) -> Callable[..., Rows]:
    return jax.jit(_write, static_argnums=0, out_shardings=sharding)


def _write(writing: Writing, params: Params, prompts_RP: Array, length_R: Array, seed: Array) -> Rows:
    cfg, laid_out = for_decoding(writing.student, params)
    (num_rows, prompt_len), seq_len = prompts_RP.shape, writing.seq_len
    room = seq_len + 1 - prompt_len
    sampling = per_row([SamplingConfig(temperature=1.0)] * num_rows, vocab_size=writing.vocab_size)
    eos_ids = jnp.array(writing.eos_ids, jnp.int32)
    sizes = {"cache_len": seq_len, "buffer_len": room}
    state = decode.prefill(cfg, laid_out, prompts_RP, length_R, sampling, eos_ids, seed, **sizes)
    nobody = jnp.zeros((num_rows,), bool)
    state = decode.decode(cfg, laid_out, state, sampling, eos_ids, nobody, jnp.int32(room))
    place = jnp.arange(seq_len + 1)[None]
    written = jnp.take_along_axis(state.tokens_BN, jnp.clip(place - length_R[:, None], 0, room - 1), axis=1)
    given = jnp.pad(prompts_RP, ((0, 0), (0, room)))
    length = length_R + state.num_B
    tokens = jnp.where(place < length_R[:, None], given, jnp.where(place < length[:, None], written, 0))
    shape = (writing.num_rows, writing.num_steps)
    return Rows(
        tokens=tokens.reshape(*shape, -1), prompt=length_R.reshape(shape), length=length.reshape(shape)
    )  # fmt: skip


def _mix(writing: Writing, batch: Batch, extra: Any, step: Array) -> Batch:
    """The batch with the student's rows in their places."""
    rows = jax.tree.map(lambda leaf: leaf[:, step % writing.num_steps], extra[NAME])
    number_B = np.arange(writing.batch_size)
    own_B = writing.is_own(number_B)
    source_B = np.where(own_B, np.cumsum(own_B) - 1, 0)
    taken = jax.tree.map(lambda leaf: leaf[source_B], rows)
    position = jnp.arange(writing.seq_len)[None]
    pair_BT = (position < taken.length[:, None] - 1).astype(jnp.int32)
    written_BT = pair_BT * (position >= taken.prompt[:, None] - 1)

    def place(own: Array, other: Array) -> Array:
        mixed = jnp.where(own_B[:, None], own.astype(other.dtype), other)
        return rules.constrain(mixed, "act_batch", "act_length")

    return Batch(
        tokens=place(taken.tokens[:, :-1], batch.tokens),
        targets=place(taken.tokens[:, 1:], batch.targets),
        loss_mask=place(pair_BT, batch.loss_mask),
        segment_ids=place(pair_BT, batch.segment_ids),
        positions=place(jnp.broadcast_to(position, pair_BT.shape), batch.positions),
        notes=Own(place(written_BT, jnp.zeros(pair_BT.shape, jnp.float32))),
    )
