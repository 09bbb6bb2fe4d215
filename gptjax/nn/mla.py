"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from gptjax.kernels.attention import attention
from gptjax.nn import cache as kv_cache
from gptjax.nn import rope
from gptjax.nn.attention import SOWN, Context
from gptjax.nn.config import MLAConfig
from gptjax.nn.linear import Kernel, Linear, einsum
from gptjax.nn.norm import Norm
from gptjax.parallel.rules import constrain
from gptjax.types import Array


class LatentAttention(nn.Module):
    """`(x_BTD, cache, kv) -> (y_BTD, cache, None)`, with keys and values projected up from one latent a position.

    Only the latent and one rotated key, shared by all heads, are cached. A single new token
    takes the absorbed form: the key projection is folded into the query and the value
    projection into the output, so attention runs on latents as one key/value head and the
    cache is read once.

    Attributes:
      out_scale: gain of the output projection's initial values.
    """

    cfg: MLAConfig
    out_scale: float

    @nn.compact
    def __call__(
        self, x_BTD: Array, ctx: Context, cache: Mapping[str, Any] | None, kv: Mapping[str, Array] | None
    ) -> tuple[Array, Mapping[str, Any] | None, None]:
        del kv  # each layer has its own latents
        cfg = self.cfg
        table = ctx.rope_table(cfg.rope, cfg.rope_head_dim)
        q_BTNH = self._query(x_BTD)
        q_nope, q_rope = q_BTNH[..., : cfg.nope_head_dim], rope.rotate(q_BTNH[..., cfg.nope_head_dim :], table)
        latents_BTR, key_BTH = self._latents(x_BTD, table)
        q_rope, key_BTH = (kv_cache.turned(x, ctx.cache_format) for x in (q_rope, key_BTH))
        new = {"latents": latents_BTR, "rotated_keys": key_BTH}
        cache, view = kv_cache.attended(
            cache, new, ctx.positions_BT, ring=cfg.window is not None, format=ctx.cache_format
        )
        up_RNH, value_RNH = self._up_kernels()
        latents, keys = view["latents"].astype(x_BTD.dtype), view["rotated_keys"].astype(x_BTD.dtype)
        absorbed = cache is not None and x_BTD.shape[1] == 1
        if absorbed:
            q_BTNR = einsum("BTNH,RNH->BTNR", q_nope, up_RNH)
            q = jnp.concatenate([q_BTNR, q_rope], axis=-1)
            k = jnp.concatenate([latents, keys], axis=-1)[:, :, None]
            v = latents[:, :, None]
        else:
            k_nope = einsum("BSR,RNH->BSNH", latents, up_RNH)
            shared = jnp.broadcast_to(keys[:, :, None], (*k_nope.shape[:3], keys.shape[-1]))
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            k = jnp.concatenate([k_nope, shared], axis=-1)
            v = einsum("BSR,RNH->BSNH", latents, value_RNH)
            for name, value in (("queries", q), ("keys", k), ("values", v)):
                self.sow(SOWN, name, value)
        head = None if absorbed else "act_heads"
        o = attention(
            constrain(q, "act_batch", "act_length", "act_heads", None),
            constrain(k, "act_batch", "act_kv_length", head, None),
            constrain(v, "act_batch", "act_kv_length", head, None),
            q_positions_BT=ctx.positions_BT,
            kv_positions_BS=view["positions"],
            q_segments_BT=ctx.segment_ids_BT if cache is None else None,
            kv_segments_BS=ctx.segment_ids_BT if cache is None else None,
            causal=ctx.causal,
            window=cfg.window,
            scale=self._scale(),
        )
        o_BTNH = einsum("BTNR,RNH->BTNH", o, value_RNH) if absorbed else o
        out = Linear(
            spec="BTNH,NHD->BTD",
            shape=(cfg.num_heads, cfg.v_head_dim, x_BTD.shape[-1]),
            axes=("heads", "head_dim", "embed"),
            in_dims=(0, 1),
            bias=cfg.bias,
            scale=self.out_scale,
            name="out",
        )
        return out(o_BTNH), cache, None

    def _query(self, x_BTD: Array) -> Array:
        cfg, d_model = self.cfg, x_BTD.shape[-1]
        head_dim = cfg.nope_head_dim + cfg.rope_head_dim
        if cfg.q_latent is None:
            shape, axes = (d_model, cfg.num_heads, head_dim), ("embed", "heads", "head_dim")
            return Linear(spec="BTD,DNH->BTNH", shape=shape, axes=axes, name="query")(x_BTD)
        down = Linear(
            spec="BTD,DR->BTR",
            shape=(d_model, cfg.q_latent),
            axes=("embed", "latent"),
            bias=cfg.bias,
            name="query_down",
        )
        latent = Norm(cfg.norm, axis="latent", name="query_norm")(down(x_BTD))
        shape, axes = (cfg.q_latent, cfg.num_heads, head_dim), ("latent", "heads", "head_dim")
        return Linear(spec="BTR,RNH->BTNH", shape=shape, axes=axes, name="query_up")(latent)

    def _latents(self, x_BTD: Array, table: tuple[Array, Array]) -> tuple[Array, Array]:
        """The normalised latent `[B, T, R]` and the rotated key `[B, T, H]` of each position."""
        cfg, d_model = self.cfg, x_BTD.shape[-1]
        down = Linear(
            spec="BTD,DR->BTR",
            shape=(d_model, cfg.kv_latent + cfg.rope_head_dim),
            axes=("embed", "latent"),
            bias=cfg.bias,
            name="kv_down",
        )(x_BTD)
        latents = Norm(cfg.norm, axis="latent", name="kv_norm")(down[..., : cfg.kv_latent])
        key = rope.rotate(down[..., None, cfg.kv_latent :], table)[:, :, 0]
        return latents, key

    def _scale(self) -> float:
        cfg = self.cfg
        if cfg.scale is not None:
            return cfg.scale
        return (cfg.nope_head_dim + cfg.rope_head_dim) ** -0.5 * rope.score_factor(cfg.rope.scaling)

    def _up_kernels(self) -> tuple[Array, Array]:
        """Kernels from latents to keys and to values, `[R, N, H]` each; they are used in two ways."""
        cfg = self.cfg
        axes = ("latent", "heads", "head_dim")
        key_up, _ = Kernel((cfg.kv_latent, cfg.num_heads, cfg.nope_head_dim), axes, name="key_up")()
        value_up, _ = Kernel((cfg.kv_latent, cfg.num_heads, cfg.v_head_dim), axes, name="value_up")()
        return key_up, value_up
