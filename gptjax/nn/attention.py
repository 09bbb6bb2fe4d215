"""Multi-head attention, with grouped or single key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
from flax import linen as nn

from gptjax.kernels.attention import attention
from gptjax.nn import cache as kv_cache
from gptjax.nn import rope
from gptjax.nn.config import AttentionConfig, RopeConfig
from gptjax.nn.formats import CacheFormat
from gptjax.nn.init import declare
from gptjax.nn.linear import Kernel, Linear, project
from gptjax.nn.norm import Norm
from gptjax.parallel.rules import constrain
from gptjax.types import Array

# Where modules leave values for who applies the model and asks for them: Flax's one collection that `init` never fills.
SOWN = "intermediates"


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
    """`(x_BTD, cache, kv) -> (y_BTD, cache, kv)`: projections, rotation, attention, output projection.

    `kv` is what a layer attends to, which the next layer may use too.

    Attributes:
      out_scale: gain of the output projection's initial values.
    """

    cfg: AttentionConfig
    out_scale: float

    @nn.compact
    def __call__(
        self, x_BTD: Array, ctx: Context, cache: Mapping[str, Any] | None, kv: Mapping[str, Array] | None
    ) -> tuple[Array, Mapping[str, Any] | None, Mapping[str, Array]]:
        cfg, d_model = self.cfg, x_BTD.shape[-1]
        weights = [self._kernel("query", cfg.num_heads, "heads", d_model)()]
        if cfg.kv == "own":
            weights.append(self._kernel("key", cfg.num_kv_heads, "kv_heads", d_model)())
            weights.append(self._kernel("value", cfg.num_kv_heads, "kv_heads", d_model)())
        q_BTNH, *own = project(x_BTD, weights)
        q_BTNH = constrain(self._placed(q_BTNH, "query", ctx), "act_batch", "act_length", "act_heads", None)
        if own:
            entries = {"keys": self._placed(own[0], "key", ctx), "values": own[1]}
            cache, view = kv_cache.attended(
                cache, entries, ctx.positions_BT, ring=cfg.window is not None, format=ctx.cache_format
            )
        else:
            assert kv is not None, "a pattern begins with a layer that has keys and values"
            view = dict(kv)
        for name, value in (("queries", q_BTNH), ("keys", view["keys"]), ("values", view["values"])):
            self.sow(SOWN, name, value)
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
        return out(o_BTNH), cache, view

    def _placed(self, x_BTNH: Array, name: str, ctx: Context) -> Array:
        """Queries or keys, normed, rotated by position, and turned as the cache's format has them."""
        cfg = self.cfg
        if cfg.qk_norm is not None:
            x_BTNH = Norm(cfg.qk_norm, axis="head_dim", name=f"{name}_norm")(x_BTNH)
        if cfg.rope is not None:
            x_BTNH = rope.rotate(x_BTNH, ctx.rope_table(cfg.rope, cfg.head_dim))
        return kv_cache.turned(x_BTNH, ctx.cache_format)

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
