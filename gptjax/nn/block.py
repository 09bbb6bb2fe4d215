"""One transformer layer, the repeating pattern of layers, and what its backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from gptjax.nn.attention import SOWN, Attention, Context
from gptjax.nn.config import AttentionConfig, BlockConfig, LayerGroup, MoEConfig
from gptjax.nn.mla import LatentAttention
from gptjax.nn.mlp import MLP
from gptjax.nn.moe import MoE
from gptjax.nn.norm import Norm
from gptjax.parallel.mesh import platform
from gptjax.parallel.rules import constrain
from gptjax.types import Array

# Up to this many repeats are unrolled on CPU, where a loop hinders fusion across layers.
_MAX_UNROLL_ON_CPU = 16


def remat_policy(name: str) -> Callable[..., Any] | None:
    """Which values the forward pass keeps for the backward pass; the rest is computed again.

    `full` keeps the input of each pattern alone; `dots` keeps the results of matrix products
    without batch dimensions (not attention scores); `block_outputs` keeps what attention and
    feed-forward add to the residual stream. `none` keeps everything and needs no policy.
    """
    policies = jax.checkpoint_policies
    match name:
        case "full":
            return policies.nothing_saveable
        case "dots":
            return policies.dots_with_no_batch_dims_saveable
        case "block_outputs":
            return policies.save_only_these_names("attention_out", "mlp_out")
    raise ValueError(f"remat={name!r}: expected none, full, dots or block_outputs")


class Stream(NamedTuple):
    """What goes from layer to layer.

    Attributes:
      x_BTD: the residual stream.
      kv: what the last layer attended to, for a layer without keys and values of its own.
    """

    x_BTD: Array
    kv: Mapping[str, Array] | None = None


class Block(nn.Module):
    """`(stream, cache) -> (stream, cache, aux)`; `aux` is empty without experts."""

    cfg: BlockConfig
    out_scale: float

    @nn.compact
    def __call__(self, stream: Stream, ctx: Context, cache: Mapping[str, Array] | None) -> tuple[Stream, Any, dict]:
        cfg, kv = self.cfg, stream.kv
        x_BTD = constrain(stream.x_BTD, "act_batch", "act_residual", "act_embed")
        attention_cls = Attention if isinstance(cfg.attention, AttentionConfig) else LatentAttention
        attention = attention_cls(cfg.attention, self.out_scale, name="attention")  # type: ignore[arg-type]
        aux: dict[str, Array] = {}

        def attend(x: Array) -> Array:
            nonlocal cache, kv
            y, cache, kv = attention(x, ctx, cache, kv)
            return checkpoint_name(y, "attention_out")

        def feed_forward(x: Array) -> Array:
            nonlocal aux
            if isinstance(cfg.mlp, MoEConfig):
                valid = ctx.positions_BT >= 0 if ctx.segment_ids_BT is None else ctx.segment_ids_BT > 0
                y, aux = MoE(cfg.mlp, self.out_scale, name="moe")(x, valid)
            else:
                y = MLP(cfg.mlp, self.out_scale, name="mlp")(x)
            return checkpoint_name(y, "mlp_out")

        x_BTD = self._branch("attention", attend, x_BTD)
        x_BTD = self._branch("mlp", feed_forward, x_BTD)
        self.sow(SOWN, "x_BTD", x_BTD)
        return Stream(x_BTD, kv), cache, aux

    def _branch(self, name: str, fn: Callable[[Array], Array], x_BTD: Array) -> Array:
        cfg = self.cfg
        norm = Norm(cfg.norm, name=f"{name}_norm")
        if cfg.norm_placement == "post":
            return norm(x_BTD + fn(x_BTD))
        y_BTD = fn(constrain(norm(x_BTD), "act_batch", "act_length", "act_embed"))
        if cfg.norm_placement == "sandwich":
            y_BTD = Norm(cfg.norm, name=f"{name}_out_norm")(y_BTD)
        return constrain(x_BTD + y_BTD, "act_batch", "act_residual", "act_embed")


class Pattern(nn.Module):
    """The blocks of a layer group in turn: the body that the group's scan repeats."""

    blocks: tuple[BlockConfig, ...]
    out_scale: float

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Mapping[str, Any] | None, ctx: Context) -> tuple[Array, tuple]:
        caches, auxes, stream = {}, {}, Stream(x_BTD)
        for j, block in enumerate(self.blocks):
            name = f"block_{j}"
            layer = Block(block, self.out_scale, name=name)
            stream, caches[name], aux = layer(stream, ctx, None if cache is None else cache[name])
            if aux:
                auxes[name] = aux
        return stream.x_BTD, (None if cache is None else caches, auxes)


def scan_group(group: LayerGroup, *, out_scale: float, remat: str, name: str | None) -> nn.Module:
    """A module `(x_BTD, cache, ctx) -> (x_BTD, (cache, aux))` over the whole group.

    Parameters, caches and statistics are stacked on a leading `layers` axis; a shared group has
    one unstacked set of parameters.
    """
    body: Any = Pattern
    if remat != "none":
        # Inside a scan the loop already keeps XLA from merging the recomputation with the original.
        body = nn.remat(body, policy=remat_policy(remat), prevent_cse=_unroll(group) > 1)
    scanned = nn.scan(
        body,
        variable_axes={SOWN: 0} if group.shared else {"params": 0, SOWN: 0},
        variable_broadcast="params" if group.shared else False,
        split_rngs={"params": not group.shared},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=group.repeats,
        unroll=_unroll(group),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(group.pattern, out_scale, name=name)


def _unroll(group: LayerGroup) -> int:
    if platform() == "cpu" and group.num_layers <= _MAX_UNROLL_ON_CPU:
        return group.repeats
    return 1


def sum_aux(auxes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up the statistics of all layers; `load` stays apart, `[layers, E]` for each block."""
    total: dict[str, Any] = {}
    loads: dict[str, Array] = {}
    for group, blocks in auxes.items():
        for block, aux in blocks.items():
            loads[f"{group}/{block}"] = aux["load"]
            for key in aux.keys() - {"load"}:
                total[key] = total.get(key, jnp.zeros((), jnp.float32)) + aux[key].sum()
    return {**total, "load": loads} if loads else {}
