"""The one transformer, and the pure functions through which everything uses it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.nn import cache as kv_cache
from gptjax.nn import low_rank, rope, storage
from gptjax.nn.attention import SOWN, Context
from gptjax.nn.block import Block, Stream, scan_group, sum_aux
from gptjax.nn.cache import KVCache
from gptjax.nn.config import AttentionConfig, BlockConfig, ModelConfig, RopeConfig
from gptjax.nn.init import EMBEDDING_STD, declare, draw
from gptjax.nn.linear import compute_dtype, einsum, stored
from gptjax.nn.norm import Norm
from gptjax.nn.quantized import Kernel, Layout, look_up, transposed
from gptjax.parallel import rules
from gptjax.parallel.mesh import platform
from gptjax.parallel.rules import constrain
from gptjax.types import Array, ModelOutput, Params


def init(cfg: ModelConfig, rng: Array) -> Params:
    """Initial parameters, a nested dict: float32, and what `cfg.quant` stores in few bits rounded to those."""
    return store(cfg, draw(_abstract_boxed(cfg), rng))


def store(cfg: ModelConfig, params: Params) -> Params:
    """Float parameters with the kernels that `cfg.quant` stores in few bits rounded to the nearest of those.

    Raises:
      ValueError: naming a kernel that cannot be stored so.
    """
    abstract_params(cfg)  # which checks
    return storage.store(cfg.quant, params, layouts(cfg))


@functools.lru_cache(maxsize=64)
def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters; nothing is allocated.

    Raises:
      ValueError: naming what cannot be stored as `cfg.quant` says.
    """
    return storage.abstract(cfg.quant, nn.unbox(_abstract_boxed(cfg)), layouts(cfg))


@functools.lru_cache(maxsize=64)
def param_axes(cfg: ModelConfig) -> Params:
    """The logical axes of each parameter: a tree of tuples of names with the parameters' structure."""
    names = jax.tree.map(lambda box: tuple(box.names), _abstract_boxed(cfg), is_leaf=_is_box)
    return storage.axes(cfg.quant, names, abstract_params(cfg))


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    positions_BT: Array | None = None,
    segment_ids_BT: Array | None = None,
    cache: KVCache | None = None,
) -> ModelOutput:
    """Hidden states of every position, after the final norm.

    Args:
      tokens_BT: int32.
      positions_BT: int32 positions within documents; None counts from 0 along each row. With a
        cache they are required: absolute, and -1 where a row has no token.
      segment_ids_BT: int32 documents of packed rows, which do not see each other; 0 is padding.
      cache: from `nn.cache.init_cache` or a former call; prefill and decode are the same call.
    """
    if cache is not None and positions_BT is None:
        raise ValueError("a cache needs positions_BT: the absolute position of every token")
    if positions_BT is None:
        positions_BT = _from_0(tokens_BT)
    params = storage.as_trained(cfg.quant, params, layouts(cfg))
    module = Transformer(cfg)
    return module.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT, cache)  # type: ignore[return-value]


class LayerValues(NamedTuple):
    """What a layer computes on the way.

    Attributes:
      x_BTD: the residual stream after it, before the final norm.
      queries, keys, values: `[B, T, heads, size]` as they are attended with, rotated and normed.
    """

    x_BTD: Array
    queries: Array
    keys: Array
    values: Array


def forward_with_layers(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    positions_BT: Array | None = None,
    segment_ids_BT: Array | None = None,
) -> tuple[ModelOutput, list[LayerValues]]:
    """`forward`, and what each layer computed; what of it is not read is not kept by the compiled program."""
    positions_BT = _from_0(tokens_BT) if positions_BT is None else positions_BT
    params = storage.as_trained(cfg.quant, params, layouts(cfg))
    output, kept = Transformer(cfg).apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, None, mutable=[SOWN]
    )
    found = []
    for i, group in enumerate(cfg.groups):
        for repeat in range(group.repeats):
            for j in range(len(group.pattern)):
                block = kept[SOWN][f"group_{i}"][f"block_{j}"]
                attended = {name: values[0][repeat] for name, values in block["attention"].items()}
                found.append(LayerValues(x_BTD=block["x_BTD"][0][repeat], **attended))
    return output, found  # type: ignore[return-value]


def _from_0(tokens_BT: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)


def layers(cfg: ModelConfig, params: Params) -> Iterator[tuple[BlockConfig, Params]]:
    """Each layer's block with its own parameters, in order of execution."""
    for i, group in enumerate(cfg.groups):
        for repeat in range(group.repeats):
            weights = params[f"group_{i}"]
            own = weights if group.shared else jax.tree.map(operator.itemgetter(repeat), weights)
            for j, block in enumerate(group.pattern):
                yield block, own[f"block_{j}"]


def residuals(cfg: ModelConfig, params: Params, tokens_BT: Array) -> list[Array]:
    """The residual stream `[B, T, D]` before the first layer and after each, before the final norm."""
    positions_BT = _from_0(tokens_BT)
    ctx = context(cfg, positions_BT, None)
    params = storage.as_trained(cfg.quant, params, layouts(cfg))
    stream = Stream(Embedding(cfg).apply({"params": params["embed"]}, tokens_BT, positions_BT))  # type: ignore[arg-type]
    found = [stream.x_BTD]
    for block, weights in layers(cfg, params):
        stream, _, _ = Block(block, out_scale=1.0).apply({"params": weights}, stream, ctx, None)  # type: ignore[misc]
        found.append(stream.x_BTD)
    return found


def head_params(cfg: ModelConfig, params: Params) -> Kernel:
    """The `[D, V]` kernel that maps hidden states to logits: the embedding where it is tied.

    A tied embedding is transposed here, once, and not in each product of a loop over chunks of positions.
    """
    params = storage.as_trained(cfg.quant, params, layouts(cfg))
    return transposed(params["embed"]["tokens"]) if cfg.tie_embeddings else params["head"]["kernel"]


def head_logits(cfg: ModelConfig, head_DV: Kernel, hidden: Array) -> Array:
    """Float32 logits `[..., V]` of hidden states `[..., D]`."""
    flat = hidden.reshape(-1, *hidden.shape[-2:]) if hidden.ndim > 2 else hidden.reshape(1, -1, hidden.shape[-1])
    logits = einsum("BTD,DV->BTV", flat, head_DV).astype(jnp.float32)
    logits = constrain(logits, "act_batch", "act_length", "act_vocab") if hidden.ndim == 3 else logits
    if cfg.logit_softcap is not None:
        logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def logits(cfg: ModelConfig, params: Params, hidden: Array) -> Array:
    """Float32 logits `[..., V]` of hidden states `[..., D]`."""
    return head_logits(cfg, head_params(cfg, params), hidden)


class Transformer(nn.Module):
    """Embedding, groups of layers, final norm. The output head is `head_logits`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array | None, cache: KVCache | None
    ) -> ModelOutput:
        cfg = self.cfg
        x_BTD = Embedding(cfg, name="embed")(tokens_BT, positions_BT)
        ctx = context(cfg, positions_BT, segment_ids_BT)
        out_scale = (2 * cfg.num_layers) ** -0.5
        caches, auxes = {}, {}
        for i, group in enumerate(cfg.groups):
            name = f"group_{i}"
            layers = scan_group(group, out_scale=out_scale, remat=cfg.remat, name=name)
            x_BTD, (caches[name], auxes[name]) = layers(x_BTD, None if cache is None else cache[name], ctx)
        hidden_BTD = Norm(cfg.final_norm, name="final_norm")(x_BTD)
        if not cfg.tie_embeddings:
            Head(cfg, name="head")()
        hidden_BTD = constrain(hidden_BTD, "act_batch", "act_length", "act_embed")
        return ModelOutput(hidden_BTD=hidden_BTD, cache=None if cache is None else caches, aux=sum_aux(auxes))


class Embedding(nn.Module):
    """`tokens_BT -> x_BTD`, with learned positions where the model has them."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: Array, positions_BT: Array) -> Array:
        cfg, dtype = self.cfg, compute_dtype(self.cfg.dtype, platform())
        layout = Layout((cfg.d_model,), (cfg.vocab_size,), in_first=False)
        table_VD = stored(self, "tokens", _table((cfg.vocab_size, cfg.d_model), "vocab", layout))
        x_BTD = look_up(table_VD, tokens_BT, dtype)
        if cfg.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, dtype)
        if cfg.learned_positions:
            position_SD = self.param("positions", _table((cfg.seq_len, cfg.d_model), None))
            x_BTD = x_BTD + position_SD.astype(dtype)[positions_BT]
        return constrain(x_BTD, "act_batch", "act_residual", "act_embed")


class Head(nn.Module):
    """Declares the kernel of an untied output head."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> Kernel:
        shape = (self.cfg.d_model, self.cfg.vocab_size)
        layout = Layout(shape[:1], shape[1:])
        return stored(self, "kernel", declare(shape, ("embed", "vocab"), std=EMBEDDING_STD, layout=layout))


def _table(shape: tuple[int, int], axis: str | None, layout: Layout | None = None) -> Callable[[Array], Any]:
    return declare(shape, (axis, "embed"), std=EMBEDDING_STD, layout=layout)


def context(cfg: ModelConfig, positions_BT: Array, segment_ids_BT: Array | None) -> Context:
    """What every layer reads besides the residual stream."""
    keys: dict[tuple[RopeConfig, int], None] = {}
    for block in cfg.blocks:
        attention = block.attention
        head_dim = attention.head_dim if isinstance(attention, AttentionConfig) else attention.rope_head_dim
        if attention.rope is not None:
            keys[attention.rope, head_dim] = None
    return Context(
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        rope_tables=tuple(rope.tables(*key, positions_BT) for key in keys),
        rope_keys=tuple(keys),
        causal=cfg.causal,
        cache_format=cfg.kv_cache,
    )


@functools.lru_cache(maxsize=64)
def layouts(cfg: ModelConfig) -> dict[str, Layout]:
    """Of each kernel, or factor of one, that may be stored in few bits, by path."""
    boxes = jax.tree_util.tree_leaves_with_path(_abstract_boxed(cfg), is_leaf=_is_box)
    return {storage.name(path): box.layout for path, box in boxes if box.layout is not None}


@functools.lru_cache(maxsize=64)
def _abstract_boxed(cfg: ModelConfig) -> Any:
    """The tree of `nn.init.Declared` boxes around shapes."""
    kv_cache.check(cfg)

    def declared() -> Any:
        tokens = jnp.zeros((1, 2), jnp.int32)
        return Transformer(cfg).init(jax.random.key(0), tokens, tokens, None, None)["params"]

    with rules.unsplit():
        return low_rank.factored(cfg.low_rank, jax.eval_shape(declared))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)
