"""The flat form of a model that people write in `configs/`; `ModelSpec.build` expands it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from gptjax.nn import quant_spec
from gptjax.nn import sharing as layer_sharing
from gptjax.nn.config import (
    Activation,
    AttentionConfig,
    BlockConfig,
    DType,
    LayerGroup,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    Remat,
    RopeConfig,
    RopeScaling,
)
from gptjax.nn.formats import RankRule
from gptjax.nn.sharing import SharingConfig


@dataclass(frozen=True, kw_only=True)
class MLASpec:
    """The sizes of latent attention; see `MLAConfig`."""

    kv_latent: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    q_latent: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The flat keys of `config.model`. Keys with a default are choices that most models leave off.

    Attributes:
      quant: what products round kernels, keys and values to while training, such as `int4:g64:asym`; `nn.quant_spec`
        says what there is. Parameters stay floats until `experiments.quantize` stores them so.
      window: sliding window of the local layers; None makes every layer see all positions.
      global_every: with a window, each n-th layer sees all positions; 0: no layer does.
      local_rope_theta: rotary base of the local layers, which are then not stretched by `rope_scaling`
        (Gemma 3); None is `rope_theta`, with the scaling.
      sharing: of weights between layers.
      kv_every: of so many layers in a row the first has keys and values, which the others use too.
      low_rank: kernels in two factors.
      moe: makes the feed-forward of every `moe_every`-th layer after `first_k_dense` a mixture.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    activation: Activation
    position: Literal["rope", "learned", "none"]
    rope_theta: float
    tie_embeddings: bool
    dtype: DType
    remat: Remat
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: bool = False
    bias: bool = False
    window: int | None = None
    global_every: int = 0
    local_rope_theta: float | None = None
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    attn_softcap: float | None = None
    attn_sinks: bool = False
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    mla: MLASpec | None = None
    moe: MoEConfig | None = None
    moe_every: int = 1
    first_k_dense: int = 0
    quant: str | None = None
    sharing: SharingConfig | None = None
    kv_every: int = 1
    low_rank: tuple[RankRule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "quant", self.quant or None)
        sizes = "vocab_size seq_len d_model num_layers num_heads num_kv_heads head_dim d_ff moe_every kv_every".split()
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0 <= self.first_k_dense <= self.num_layers:
            raise ValueError(f"first_k_dense={self.first_k_dense}: expected 0 to num_layers={self.num_layers}")
        if self.global_every < 0:
            raise ValueError(f"global_every={self.global_every}: expected at least 0")
        if self.quant is not None:
            quant_spec.parse(self.quant)  # which checks
        if (self.num_layers - (self.first_k_dense if self.moe else 0)) % self.kv_every:
            raise ValueError(f"kv_every={self.kv_every}: does not divide num_layers={self.num_layers} evenly")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        rotary = {"rope_scaling", "rope_fraction", "local_rope_theta"}
        without = {
            "window=None": (self.window is None, {"global_every", "local_rope_theta"}),
            "moe=None": (self.moe is None, {"moe_every", "first_k_dense"}),
            f"position={self.position!r}": (self.position != "rope", rotary),
            "mla, which has none of its own": (
                self.mla is not None,
                {"qk_norm", "attn_softcap", "attn_sinks", "kv_every"},
            ),
        }
        for reason, (applies, names) in without.items():
            idle = [f for f in dataclasses.fields(self) if f.name in names and getattr(self, f.name) != f.default]
            if applies and idle:
                name = idle[0].name
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with {reason}; leave it off")

    def build(self) -> ModelConfig:
        """Expands to the grouped form; the longest repeating pattern is scanned."""
        blocks = tuple(self._block(i) for i in range(self.num_layers))
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            seq_len=self.seq_len,
            groups=self._groups(blocks) if self.sharing is None else layer_sharing.groups(blocks, self.sharing),
            final_norm=self._norm(),
            learned_positions=self.position == "learned",
            tie_embeddings=self.tie_embeddings,
            embed_scale=self.embed_scale,
            logit_softcap=self.logit_softcap,
            dtype=self.dtype,
            remat=self.remat,
            quant=None if self.quant is None else quant_spec.parse(self.quant),
            low_rank=self.low_rank,
        )

    def _groups(self, blocks: tuple[BlockConfig, ...]) -> tuple[LayerGroup, ...]:
        period = math.lcm(self.global_every or 1, self.moe_every if self.moe else 1, self.kv_every)
        dense = self.first_k_dense if self.moe else 0
        groups = [LayerGroup(pattern=(block,), repeats=1) for block in blocks[:dense]]
        if dense and len(set(blocks[:dense])) == 1:
            groups = [LayerGroup(pattern=blocks[:1], repeats=dense)]
        rest = blocks[dense:]
        repeats = len(rest) // period
        if repeats:
            groups.append(LayerGroup(pattern=rest[:period], repeats=repeats))
        # What is left over begins with a layer that has keys and values.
        groups += [
            LayerGroup(pattern=rest[i : i + self.kv_every], repeats=1)
            for i in range(repeats * period, len(rest), self.kv_every)
        ]
        return tuple(groups)

    def _norm(self) -> NormConfig:
        return NormConfig(kind=self.norm, eps=self.norm_eps, bias=self.norm == "layernorm")

    def _block(self, layer: int) -> BlockConfig:
        # The pattern counts from the first layer after the dense ones, so that it repeats.
        index = layer - (self.first_k_dense if self.moe else 0)
        is_global = self.window is None or (
            self.global_every > 0 and index % self.global_every == self.global_every - 1
        )
        is_moe = self.moe is not None and index >= 0 and index % self.moe_every == self.moe_every - 1
        mlp: MLPConfig | MoEConfig = MLPConfig(d_ff=self.d_ff, activation=self.activation, bias=self.bias)
        return BlockConfig(
            attention=self._attention(is_global, kv="previous" if index > 0 and index % self.kv_every else "own"),
            mlp=self.moe if is_moe and self.moe else mlp,
            norm=self._norm(),
            norm_placement=self.norm_placement,
        )

    def _attention(self, is_global: bool, *, kv: Literal["own", "previous"]) -> AttentionConfig | MLAConfig:
        rope = None
        if self.position == "rope":
            own = None if is_global else self.local_rope_theta
            rope = RopeConfig(
                theta=own or self.rope_theta, fraction=self.rope_fraction, scaling=None if own else self.rope_scaling
            )
        window = None if is_global else self.window
        if self.mla is not None:
            if rope is None:
                raise ValueError("mla needs position='rope'")
            sizes = {field.name: getattr(self.mla, field.name) for field in dataclasses.fields(self.mla)}
            return MLAConfig(
                num_heads=self.num_heads, rope=rope, norm=self._norm(), bias=self.bias, window=window, **sizes
            )
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=rope,
            window=window,
            qk_norm=self._norm() if self.qk_norm else None,
            bias=self.bias,
            out_bias=self.bias,
            softcap=self.attn_softcap,
            sinks=self.attn_sinks,
            kv=kv,
        )
