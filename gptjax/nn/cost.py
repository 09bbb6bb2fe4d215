"""What a model costs: parameters, floating-point operations and bytes, counted from its config.

A multiply-add is two operations. Only matrix products are counted, as in the MFU of PaLM
(arXiv:2204.02311, appendix B), with two refinements that peers have been blamed for lacking:
causal and windowed attention count the pairs that exist, not all `T ** 2`, and experts
count the active ones. Recomputation is not counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax

from gptjax.nn import low_rank, storage
from gptjax.nn.cache import init_cache
from gptjax.nn.config import GATED_ACTIVATIONS, AttentionConfig, BlockConfig, MLAConfig, ModelConfig, MoEConfig
from gptjax.nn.transformer import abstract_params, layouts

_POSITIONS = jax.tree_util.DictKey("positions")


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
      total: all of them.
      active: those that one token uses: all but the experts it is not sent to.
      embedding: token and position tables and an untied head.
    """

    total: int
    active: int
    embedding: int


@dataclass(frozen=True)
class Flops:
    """Forward operations a token, averaged over a row.

    Attributes:
      kernels: products with stored kernels in the layers.
      attention: scores and weighted values.
      head: the product with the vocabulary.
    """

    kernels: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        return self.kernels + self.attention + self.head

    @property
    def train(self) -> float:
        """Forward and backward: the backward pass has two products for each of the forward's."""
        return 3.0 * self.forward


def count(cfg: ModelConfig) -> Counts:
    """Counts parameters from shapes, so that what exists is what is counted."""
    total = inactive = embedding = 0
    floats = abstract_params(storage.with_float_kernels(cfg))
    for path, leaf in jax.tree_util.tree_leaves_with_path(floats):
        names = [str(key.key) for key in path]
        size = math.prod(leaf.shape)
        total += size
        if names[0] in ("embed", "head"):
            embedding += size
        elif any(name.startswith("experts_") for name in names):
            group, block = (int(name.rsplit("_", 1)[1]) for name in names[:2])
            moe = cfg.groups[group].pattern[block].mlp
            assert isinstance(moe, MoEConfig), f"{'/'.join(names)} in a block without experts"
            inactive += size - size * moe.num_experts_per_token // moe.num_experts
    return Counts(total=total, active=total - inactive, embedding=embedding)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> Flops:
    """Forward operations a token in rows of `seq_len` tokens that are one document each."""
    kernels = attention = 0.0
    for block in cfg.blocks:
        kernels += 2.0 * _active_kernel_size(block, cfg.d_model)
        pairs = attended_pairs(seq_len, window=block.attention.window, causal=cfg.causal) / seq_len
        attention += 2.0 * pairs * block.attention.num_heads * _pair_width(block)
    kernels -= 2.0 * _saved_by_factors(cfg)
    return Flops(kernels=kernels, attention=attention, head=2.0 * cfg.d_model * cfg.vocab_size)


def _saved_by_factors(cfg: ModelConfig) -> int:
    """Multiply-adds a token that kernels in two factors need less than whole ones, in all the layers that use them."""
    saved = 0
    for path, layout in layouts(dataclasses.replace(cfg, low_rank=())).items():
        rule = low_rank.rule_for(cfg.low_rank, path)
        if rule is None:
            continue
        group, block = (int(name.rsplit("_", 1)[1]) for name in path.split("/")[:2])
        inputs, outputs = layout.num_inputs, math.prod(layout.out_shape)
        own = inputs * outputs - rule.rank * (inputs + outputs)
        moe = cfg.groups[group].pattern[block].mlp
        uses = moe.num_experts_per_token if isinstance(moe, MoEConfig) and "/experts_" in path else 1
        saved += cfg.groups[group].repeats * uses * own
    return saved


def attended_pairs(seq_len: int, *, window: int | None, causal: bool) -> int:
    """How many (query, key) pairs a row of one document has."""
    reach = seq_len if window is None else min(window, seq_len)
    # The first `reach` queries see 1 .. reach keys, the others `reach` each.
    backward = reach * (reach + 1) // 2 + (seq_len - reach) * reach
    return backward if causal else 2 * backward - seq_len


def cache_bytes_per_token(cfg: ModelConfig, *, dtype: Any = None) -> int:
    """Bytes of keys and values that one position adds to the cache while no window is full.

    Args:
      dtype: as for `init_cache`.
    """
    cache = jax.eval_shape(functools.partial(init_cache, cfg, batch_size=1, max_len=1, dtype=dtype))
    entries = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cache) if path[-1] != _POSITIONS]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in entries)


def _pair_width(block: BlockConfig) -> int:
    """Multiply-adds of one (query, key) pair in one head."""
    cfg = block.attention
    if isinstance(cfg, AttentionConfig):
        return 2 * cfg.head_dim
    return cfg.nope_head_dim + cfg.rope_head_dim + cfg.v_head_dim


def _active_kernel_size(block: BlockConfig, d_model: int) -> int:
    """Kernel elements of one layer that one token is multiplied with."""
    attention, mlp = block.attention, block.mlp
    if isinstance(attention, MLAConfig):
        size = _latent_kernel_size(attention, d_model)
    else:
        kv_heads = attention.num_kv_heads if attention.kv == "own" else 0
        size = 2 * d_model * attention.head_dim * (attention.num_heads + kv_heads)
    projections = 3 if mlp.activation in GATED_ACTIVATIONS else 2
    if isinstance(mlp, MoEConfig):
        width = mlp.num_experts_per_token * mlp.d_ff + mlp.shared_d_ff
        return size + projections * d_model * width + d_model * mlp.num_experts
    return size + projections * d_model * mlp.d_ff


def _latent_kernel_size(cfg: MLAConfig, d_model: int) -> int:
    query_width = cfg.num_heads * (cfg.nope_head_dim + cfg.rope_head_dim)
    query = d_model * query_width if cfg.q_latent is None else cfg.q_latent * (d_model + query_width)
    down = d_model * (cfg.kv_latent + cfg.rope_head_dim)
    up = cfg.kv_latent * cfg.num_heads * (cfg.nope_head_dim + cfg.v_head_dim)
    return query + down + up + cfg.num_heads * cfg.v_head_dim * d_model
