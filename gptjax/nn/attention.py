"""Multi-head attention, with grouped or single key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
from flax import linen as nn

from gptjax.kernels.attention import attention
from gptjax.nn import cache as kv_cache
from gptjax.nn import rope
from gptjax.nn.config import AttentionConfig, CacheFormat, RopeConfig
from gptjax.nn.init import declare
from gptjax.nn.linear import Kernel, Linear, project
from gptjax.nn.norm import Norm
from gptjax.parallel.rules import constrain
from gptjax.types import Array


@flax.struct.dataclass
class Context:
    """What every layer reads besides the residual stream.

    Attributes:
      positions_BT: int32 positions within the document; -1 marks padding when decoding.
      segment_ids_BT: int32 documents, or None where each row is one document.
      rope_tables: `(cos, sin)` of each entry of `rope_keys`, computed once for all layers.
      rope_keys: distinct rotary configurations of the model with their head sizes.
      causal: whether later positions are hidden.
      cache_format: what keys and values are rounded to.
    """

    positions_BT: Array
    segment_ids_BT: Array | None
    rope_tables: tuple[tuple[Array, Array], ...]
    rope_keys: tuple[tuple[RopeConfig, int], ...] = flax.struct.field(pytree_node=False)
    causal: bool = flax.struct.field(pytree_node=False)
    cache_format: CacheFormat | None = flax.struct.field(pytree_node=False, default=None)

    def rope_table(self, cfg: RopeConfig, head_dim: int) -> tuple[Array, Array]:
        return self.rope_tables[self.rope_keys.index((cfg, head_dim))]


class Attention(nn.Module):
    """`(x_BTD, cache) -> (y_BTD, cache)`: projections, rotation, attention, output projection.

    Attributes:
      out_scale: gain of the output projection's initial values.
    """

    cfg: AttentionConfig
    out_scale: float

    @nn.compact
    def __call__(
        self, x_BTD: Array, ctx: Context, cache: Mapping[str, Any] | None
    ) -> tuple[Array, Mapping[str, Any] | None]:
        cfg, d_model = self.cfg, x_BTD.shape[-1]
        weights = (
            self._kernel("query", cfg.num_heads, "heads", d_model)(),
            self._kernel("key", cfg.num_kv_heads, "kv_heads", d_model)(),
            self._kernel("value", cfg.num_kv_heads, "kv_heads", d_model)(),
        )
        q_BTNH, k_BTKH, v_BTKH = project(x_BTD, weights)
        if cfg.qk_norm is not None:
            q_BTNH = Norm(cfg.qk_norm, axis="head_dim", name="query_norm")(q_BTNH)
            k_BTKH = Norm(cfg.qk_norm, axis="head_dim", name="key_norm")(k_BTKH)
        if cfg.rope is not None:
            table = ctx.rope_table(cfg.rope, cfg.head_dim)
            q_BTNH, k_BTKH = rope.rotate(q_BTNH, table), rope.rotate(k_BTKH, table)
        q_BTNH, k_BTKH = (kv_cache.turned(x, ctx.cache_format) for x in (q_BTNH, k_BTKH))
        q_BTNH = constrain(q_BTNH, "act_batch", "act_length", "act_heads", None)
        kv = {"keys": k_BTKH, "values": v_BTKH}
        cache, view = kv_cache.attended(
            cache, kv, ctx.positions_BT, ring=cfg.window is not None, format=ctx.cache_format
        )
        o_BTNH = attention(
            q_BTNH,
            constrain(view["keys"], "act_batch", "act_kv_length", "act_kv_heads", None),
            constrain(view["values"], "act_batch", "act_kv_length", "act_kv_heads", None),
            q_positions_BT=ctx.positions_BT,
            kv_positions_BS=view["positions"],
            q_segments_BT=ctx.segment_ids_BT if cache is None else None,
            kv_segments_BS=ctx.segment_ids_BT if cache is None else None,
            causal=ctx.causal,
            window=cfg.window,
            scale=cfg.head_dim**-0.5 if cfg.scale is None else cfg.scale,
            softcap=cfg.softcap,
            sinks_N=self._sinks(),
        )
        out = Linear(
            spec="BTNH,NHD->BTD",
            shape=(cfg.num_heads, cfg.head_dim, d_model),
            axes=("heads", "head_dim", "embed"),
            in_dims=(0, 1),
            bias=cfg.out_bias,
            scale=self.out_scale,
            name="out",
        )
        return out(o_BTNH), cache

    def _kernel(self, name: str, num_heads: int, axis: str, d_model: int) -> Kernel:
        return Kernel(
            shape=(d_model, num_heads, self.cfg.head_dim),
            axes=("embed", axis, "head_dim"),
            bias=self.cfg.bias,
            name=name,
        )

    def _sinks(self) -> Array | None:
        if not self.cfg.sinks:
            return None
        return self.param("sinks", declare((self.cfg.num_heads,), ("heads",)))
