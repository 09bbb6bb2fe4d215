"""What is trained for: functions from parameters and a batch to a sum of losses.

Every objective returns a sum and its weight, never a mean, so that microbatches, shards and
evaluation batches of any size add up to the loss of their union. With `m` the loss mask, the
language models here minimise

    sum_t m_t (nll_t + z_loss log(Z_t)^2) + auxiliary,      weight = sum_t m_t,

where `Z_t` normalises the softmax over the vocabulary at position `t` (the z-loss keeps it
near 1; PaLM, arXiv:2204.02311, section 5) and the auxiliary terms are the routers', which are
sums over all tokens: where only a fraction of the tokens is a target, they are multiplied by it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.kernels import cross_entropy
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.parallel import rules
from gptjax.types import Array, Batch, Loss, Mean, Metrics, ModelOutput, Objective, Params

MASKED_FRACTION = 0.15
REPLACED_BY_MASK = 0.8
REPLACED_AT_RANDOM = 0.1


def next_token(config: ModelConfig, *, z_loss: float = 0.0) -> Objective:
    """Predicts each target from the tokens up to it.

    Raises:
      ValueError: for a bidirectional model, which would see what it is to predict.
    """
    if not config.causal:
        raise ValueError("next_token needs a causal model: got causal=False, set causal=True in the ModelConfig")

    def objective(params: Params, frozen: object, batch: Batch, rng: Array, step: Array) -> Loss:
        del frozen, rng, step
        output = _forward(config, params, batch, batch.tokens)
        return language_loss(config, params, output, batch.targets, batch.loss_mask, z_loss=z_loss)

    return objective


def masked_lm(
    config: ModelConfig,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    fraction: float = MASKED_FRACTION,
    z_loss: float = 0.0,
) -> Objective:
    """Predicts a part of the tokens from the whole document with those tokens hidden.

    Every position sees every other of its document. See `mask_tokens` for what is hidden.

    Args:
      config: its `causal` must be False.
      mask_id: the token that hides others.
      vocab_size: random replacements are drawn below it: the tokenizer's size, not the model's.
      special_ids: tokens that are never hidden.
      fraction: of the other tokens that is.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction={fraction} of the tokens to hide: expected over 0 and at most 1")
    if config.causal:
        raise ValueError("masked_lm needs a bidirectional model: got causal=True, set causal=False in the ModelConfig")
    if not 0 <= mask_id < config.vocab_size or vocab_size > config.vocab_size:
        raise ValueError(
            f"mask_id={mask_id} and the tokenizer's vocab_size={vocab_size} must fit "
            f"the model's vocab_size={config.vocab_size}"
        )

    def objective(params: Params, frozen: object, batch: Batch, rng: Array, step: Array) -> Loss:
        del frozen, step
        allowed = batch.segment_ids > 0
        for token in special_ids:
            allowed &= batch.tokens != token
        tokens, hidden = mask_tokens(
            rng, batch.tokens, allowed, mask_id=mask_id, vocab_size=vocab_size, fraction=fraction
        )
        output = _forward(config, params, batch, tokens)
        return language_loss(config, params, output, batch.tokens, hidden, z_loss=z_loss, target_fraction=fraction)

    return objective


def mask_tokens(
    rng: Array, tokens_BT: Array, allowed_BT: Array, *, mask_id: int, vocab_size: int, fraction: float = MASKED_FRACTION
) -> tuple[Array, Array]:
    """Hides tokens as BERT does (arXiv:1810.04805, section 3.1).

    Each allowed position is chosen with probability `fraction`. A chosen token becomes `mask_id`
    (80 %), a random token below `vocab_size` (10 %) or stays (10 %).

    Returns:
      The tokens to read, and the float32 mask of the chosen positions.
    """
    choose_rng, replace_rng, random_rng = jax.random.split(rng, 3)
    chosen = allowed_BT & (jax.random.uniform(choose_rng, tokens_BT.shape) < fraction)
    how = jax.random.uniform(replace_rng, tokens_BT.shape)
    random_tokens = jax.random.randint(random_rng, tokens_BT.shape, 0, vocab_size, tokens_BT.dtype)
    replacement = jnp.where(how < REPLACED_BY_MASK, jnp.asarray(mask_id, tokens_BT.dtype), random_tokens)
    replaced = chosen & (how < REPLACED_BY_MASK + REPLACED_AT_RANDOM)
    return jnp.where(replaced, replacement, tokens_BT), chosen.astype(jnp.float32)


class Term(NamedTuple):
    """A loss of each target besides the cross-entropy, from the same logits.

    Attributes:
      name: of its metric.
      weight: of it; the data's own loss gets the rest of 1.
      loss_fn: `(logits [B, t, V], extras of these positions) -> [B, t]`.
      extras: a tree of `[B, T, ...]`; no gradient flows to them.
      alone_BT: 1 at targets whose only loss this is, with the weight 1; None where there are none.
    """

    name: str
    weight: float
    loss_fn: Callable[[Array, Any], Array]
    extras: Any
    alone_BT: Array | None = None


def language_loss(
    config: ModelConfig,
    params: Params,
    output: ModelOutput,
    targets_BT: Array,
    mask_BT: Array,
    *,
    z_loss: float,
    target_fraction: float = 1.0,
    term: Term | None = None,
) -> Loss:
    """Cross-entropy of a model's output with its auxiliary losses; logits are made chunk by chunk.

    Args:
      target_fraction: of the tokens that are targets, by design; the routers' losses are weighed by it, so
        that they are as strong beside the loss of one target as where every token is one.
      term: a further loss of each target, mixed with the data's.

    Metrics: `loss` (nats per target, cross-entropy alone), `accuracy`, `z_loss` where it is on,
    the term's, with `_alone` behind its name that of targets where it stands alone, and those of `router_metrics`.
    """
    alone_BT = None if term is None else term.alone_BT
    alone_mask_BT = None if alone_BT is None else mask_BT * alone_BT
    data_mask_BT = mask_BT if alone_mask_BT is None else mask_BT - alone_mask_BT

    def chunk_loss(logits: Array, extras: tuple[Array, Any, Any]) -> tuple[Array, dict[str, Array]]:
        targets, (mask, alone_mask), given = extras
        token = cross_entropy.softmax_nll(logits, targets)
        nll = jnp.sum(mask * token.nll)
        sums = {"loss": nll, "accuracy": jnp.sum(mask * token.correct)}
        if z_loss:
            sums["z_loss"] = z_loss * jnp.sum(mask * token.log_z**2)
        data = nll + sums.get("z_loss", 0.0)
        if term is None:
            return data, sums
        values = term.loss_fn(logits, given)
        sums[term.name] = jnp.sum(mask * values)
        total = (1.0 - term.weight) * data + term.weight * sums[term.name]
        if alone_mask is not None:
            sums[f"{term.name}_alone"] = jnp.sum(alone_mask * values)
            total += sums[f"{term.name}_alone"]
        return total, sums

    total, sums = cross_entropy.chunked_loss(
        functools.partial(transformer.head_logits, config),
        chunk_loss,
        output.hidden_BTD,
        transformer.head_params(config, params),
        (targets_BT, (data_mask_BT, alone_mask_BT), () if term is None else term.extras),
        num_chunks=num_chunks(config, targets_BT.shape),
    )
    weight, data_weight = jnp.sum(mask_BT), jnp.sum(data_mask_BT)
    metrics = {
        name: Mean(value, weight - data_weight if name.endswith("_alone") else data_weight)
        for name, value in sums.items()
    }
    if not output.aux:
        return Loss(total, weight, metrics)
    aux = {**output.aux, "loss": target_fraction * output.aux["loss"]}
    return Loss(total + aux["loss"], weight, metrics | router_metrics(aux, weight))


def router_metrics(aux: Mapping[str, Any], weight: Array) -> Metrics:
    """Figures of the routers from `ModelOutput.aux` of a model with experts.

    `router_loss`: all auxiliary losses, per target. `router_entropy`: nats, of a router's distribution
    over experts, mean over tokens and layers. `router_dropped`: part of the assignments that
    found their expert full. `router_load/<block>`: `[layers, E]`, an expert's share of the
    assignments times E, so that 1 is an even load.
    """
    loads: Mapping[str, Array] = aux["load"]
    num_assignments = sum(jnp.sum(load) for load in loads.values())
    metrics = {
        "router_loss": Mean(aux["loss"], weight),
        "router_entropy": Mean(aux["router_entropy"], aux["tokens"]),
        "router_dropped": Mean(aux["dropped"], num_assignments),
    }
    for block, load_LE in loads.items():
        num_experts = load_LE.shape[-1]
        metrics[f"router_load/{block}"] = Mean(load_LE * num_experts, jnp.sum(load_LE, axis=-1, keepdims=True))
    return metrics


def num_chunks(config: ModelConfig, shape: tuple[int, ...]) -> int:
    """Into how many chunks to cut a batch `[B, T]`, by what one device holds of a chunk's logits."""
    mesh = rules.current_mesh()
    num_rows, num_parts = shape[0], 1
    if mesh is not None:
        num_rows = -(-num_rows // rules.axis_size(mesh, "act_batch"))
        num_parts = rules.axis_size(mesh, "act_vocab")
    return cross_entropy.pick_num_chunks(
        num_rows=num_rows, seq_len=shape[1], vocab_size=-(-config.vocab_size // num_parts)
    )


def bidirectional(config: ModelConfig) -> ModelConfig:
    """The same model with every position seeing its whole document, as `masked_lm` needs."""
    return dataclasses.replace(config, causal=False)


def _forward(config: ModelConfig, params: Params, batch: Batch, tokens_BT: Array) -> ModelOutput:
    length = tokens_BT.shape[1]
    if length > config.seq_len:
        raise ValueError(f"rows of {length} tokens do not fit the model's seq_len={config.seq_len}; make them shorter")
    return transformer.forward(
        config, params, tokens_BT, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids
    )
