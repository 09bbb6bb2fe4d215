"""The two compiled programs of generation: `prefill` and the `decode` loop."""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.infer.sampling import Draw, RowSampling, sample
from gptjax.nn import transformer
from gptjax.nn.cache import KVCache, init_cache
from gptjax.nn.config import ModelConfig
from gptjax.types import Array, Params


@flax.struct.dataclass
class DecodeState:
    """Rows being completed; `N` is the length of the output buffer.

    Attributes:
      last_B: int32 newest token of each row, not yet in the cache.
      position_B: int32 position of `last_B`.
      tokens_BN, logprobs_BN: what was generated; row b has `num_B[b]` of them.
      done_B: rows that met an end token or were ended by the host.
      step: int32 tokens generated in the rows that are not done.
      seen_BV: bool tokens of prompt and completion; None without a repetition penalty.
      keys_B: random keys of the rows.
    """

    cache: KVCache
    last_B: Array
    position_B: Array
    tokens_BN: Array
    logprobs_BN: Array
    num_B: Array
    done_B: Array
    step: Array
    seen_BV: Array | None
    keys_B: Array


@functools.partial(jax.jit, static_argnums=0, static_argnames=("cache_len", "buffer_len"))
def prefill(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    length_B: Array,
    sampling: RowSampling,
    eos_ids: Array,
    seed: Array,
    *,
    cache_len: int,
    buffer_len: int,
) -> DecodeState:
    """Reads the prompts (padded on the right) and draws the first token of each row."""
    batch_size, num_tokens = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), tokens_BT.shape)
    valid_BT = positions_BT < length_B[:, None]
    positions_BT = jnp.where(valid_BT, positions_BT, -1)
    cache = init_cache(cfg, batch_size=batch_size, max_len=cache_len)
    output = transformer.forward(cfg, params, tokens_BT, positions_BT=positions_BT, cache=cache)
    hidden_BD = jnp.take_along_axis(output.hidden_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    row_B = jnp.arange(batch_size)
    seen_BV = None
    if sampling.stages.penalty:
        seen_BV = jnp.zeros((batch_size, cfg.vocab_size), bool)
        seen_BV = seen_BV.at[row_B[:, None], jnp.where(valid_BT, tokens_BT, cfg.vocab_size)].set(True, mode="drop")
    state = DecodeState(
        cache=output.cache,
        last_B=jnp.zeros((batch_size,), jnp.int32),
        position_B=length_B.astype(jnp.int32) - 1,
        tokens_BN=jnp.zeros((batch_size, buffer_len), jnp.int32),
        logprobs_BN=jnp.zeros((batch_size, buffer_len), jnp.float32),
        num_B=jnp.zeros((batch_size,), jnp.int32),
        done_B=jnp.zeros((batch_size,), bool),
        step=jnp.zeros((), jnp.int32),
        seen_BV=seen_BV,
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_B),
    )
    return _append(state, _draw(cfg, params, hidden_BD, state, sampling), eos_ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    cfg: ModelConfig,
    params: Params,
    state: DecodeState,
    sampling: RowSampling,
    eos_ids: Array,
    ended_B: Array,
    limit: Array,
) -> DecodeState:
    """Generates until rows have `limit` tokens or all are done, as one loop on the device.

    Args:
      ended_B: rows that the host wants no more of.
    """

    def go_on(state: DecodeState) -> Array:
        return (state.step < limit) & ~jnp.all(state.done_B)

    def step(state: DecodeState) -> DecodeState:
        positions_B1 = jnp.where(state.done_B, -1, state.position_B)[:, None]
        output = transformer.forward(cfg, params, state.last_B[:, None], positions_BT=positions_B1, cache=state.cache)
        draw = _draw(cfg, params, output.hidden_BTD[:, 0], state, sampling)
        return _append(dataclasses.replace(state, cache=output.cache), draw, eos_ids)

    return jax.lax.while_loop(go_on, step, dataclasses.replace(state, done_B=state.done_B | ended_B))


def _draw(cfg: ModelConfig, params: Params, hidden_BD: Array, state: DecodeState, sampling: RowSampling) -> Draw:
    logits_BV = transformer.logits(cfg, params, hidden_BD[:, None])[:, 0]
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.num_B)
    return sample(logits_BV, sampling, keys_B=keys_B, seen_BV=state.seen_BV)


def _append(state: DecodeState, draw: Draw, eos_ids: Array) -> DecodeState:
    """Adds a drawn token to each row that is not done."""
    row_B = jnp.arange(draw.token_B.shape[0])
    # Past the buffer's end, where `mode="drop"` writes nothing.
    slot_B = jnp.where(state.done_B, state.tokens_BN.shape[1], state.num_B)
    live_B = (~state.done_B).astype(jnp.int32)
    seen_BV = state.seen_BV
    return dataclasses.replace(
        state,
        last_B=draw.token_B,
        position_B=state.position_B + live_B,
        tokens_BN=state.tokens_BN.at[row_B, slot_B].set(draw.token_B, mode="drop"),
        logprobs_BN=state.logprobs_BN.at[row_B, slot_B].set(draw.logprob_B, mode="drop"),
        num_B=state.num_B + live_B,
        done_B=state.done_B | jnp.isin(draw.token_B, eos_ids),
        step=state.step + 1,
        seen_BV=None if seen_BV is None else seen_BV.at[row_B, draw.token_B].set(True),
    )
