"""What a model is: the sizes and choices that `nn.transformer` turns into parameters.

`ModelConfig` is the form that every stage stores, reads and transforms: layers come as
groups of blocks, so dense, mixture-of-experts, first-k-dense, local/global and shared
layers are one form. `nn.spec.ModelSpec` is the flat form that people write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptjax.nn.formats import CacheFormat, QuantConfig, RankRule

Activation = Literal[
    "gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped"
]
GATED_ACTIVATIONS = frozenset({"swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped"})
DType = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "block_outputs"]


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) or LayerNorm.

    Attributes:
      bias: adds a learned offset; LayerNorm as in GPT-2 has one.
      zero_centered: the stored scale is the offset from 1, as Gemma stores it.
    """

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: float = 1e-6
    bias: bool = False
    zero_centered: bool = False


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context.

    `linear`: positions divided by `factor`. `llama3`: frequencies whose wavelength is over
    `original_seq_len / low_freq_factor` divided by `factor`, those under
    `original_seq_len / high_freq_factor` kept, a linear blend between (Llama 3.1 reference
    code). `yarn`: arXiv:2309.00071, sections 3.2-3.4.

    Attributes:
      attention_factor: multiplies cos and sin; None takes YaRN's formula from the mscales.
      mscale, mscale_all_dim: DeepSeek's refinement of that formula; 0 where not used.
      truncate: round YaRN's correction range to whole dimensions (gpt-oss does not).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_seq_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind != "linear" and self.original_seq_len <= 0:
            raise ValueError(f"rope scaling {self.kind!r} needs original_seq_len > 0, got {self.original_seq_len}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), rotating the two halves of a head.

    Attributes:
      theta: base of the geometric series of wavelengths.
      fraction: the leading part of each head that is rotated.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not self.theta > 0.0:
            raise ValueError(f"rope theta={self.theta}: expected above 0")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"rope fraction={self.fraction}: expected above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head, grouped-query (Ainslie et al. 2023) or multi-query attention.

    Attributes:
      window: each query sees itself and the `window - 1` positions before; None sees all.
      bias: offsets on query, key and value; `out_bias` on the output projection.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      sinks: one learned logit a head that takes part in the softmax and carries no value.
      scale: multiplies the scores; None is `head_dim ** -0.5`.
      kv: `previous` has no keys and values of its own and attends to those of the layer before, which sees as far
        (Brandon et al. 2024, arXiv:2405.12981).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: Literal["attention"] = "attention"
    rope: RopeConfig | None = None
    window: int | None = None
    qk_norm: NormConfig | None = None
    bias: bool = False
    out_bias: bool = False
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    kv: Literal["own", "previous"] = "own"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: expected None (all positions) or at least 1")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even to be rotated")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
      kv_latent: rank of the joint key/value compression, the size of a cache entry together
        with `rope_head_dim`.
      q_latent: rank of the query compression; None projects queries directly.
      nope_head_dim, rope_head_dim: parts of a query/key head without and with rotation; the
        rotated part of the key is shared by all heads.
      scale: multiplies the scores; None is `(nope_head_dim + rope_head_dim) ** -0.5`, times
        `nn.rope.score_factor` of a stretched context.
    """

    num_heads: int
    kv_latent: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    kind: Literal["mla"] = "mla"
    q_latent: int | None = None
    norm: NormConfig = NormConfig()
    bias: bool = False
    window: int | None = None
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A feed-forward layer; `swiglu` and its kin have a gate and an up projection."""

    d_ff: int
    activation: Activation
    kind: Literal["mlp"] = "mlp"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts.

    Attributes:
      d_ff: hidden size of one expert.
      shared_d_ff: hidden size of the always-active shared expert; 0 has none.
      router: scores by softmax over experts or by independent sigmoids (DeepSeek-V3).
      normalize: chosen weights are divided by their sum.
      routed_scale: multiplies the routed experts' output.
      num_groups, groups_per_token: experts are in `num_groups` equal groups and only the best
        `groups_per_token` of them are eligible for a token (DeepSeek-V3, section 2.1.2).
      balancing: `aux_loss` adds the load-balancing loss of Switch (arXiv:2101.03961, eq. 4) per
        row; `bias` adds to the selection scores a bias that the optimizer moves against the
        load (arXiv:2408.15664).
      balance_rate: the loss weight, or the bias step.
      z_loss: weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5).
      capacity_factor: None is dropless; otherwise each expert takes at most
        `ceil(capacity_factor * tokens * num_experts_per_token / num_experts)` tokens a row and the
        rest are dropped. Documents packed into one row compete for these places.
      router_bias, bias: learned offsets of the router and of the experts' projections.
    """

    num_experts: int
    num_experts_per_token: int
    d_ff: int
    activation: Activation
    kind: Literal["moe"] = "moe"
    shared_d_ff: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    balancing: Literal["none", "aux_loss", "bias"] = "aux_loss"
    balance_rate: float = 0.01
    z_loss: float = 0.0
    capacity_factor: float | None = None
    router_bias: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token}: expected 1 to num_experts={self.num_experts}"
            )
        if self.num_experts % self.num_groups or not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} must divide num_experts={self.num_experts} and "
                f"groups_per_token={self.groups_per_token} lie in 1..num_groups"
            )
        eligible = self.num_experts // self.num_groups * self.groups_per_token
        if self.num_experts_per_token > eligible:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} exceeds the {eligible} experts "
                f"in {self.groups_per_token} group(s)"
            )


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer: attention and a feed-forward part, each inside a residual branch.

    Attributes:
      norm_placement: `pre` norms the input of a branch; `post` norms after the residual sum
        (the 2017 transformer); `sandwich` norms input and output of a branch (Gemma 2, 3).
    """

    attention: AttentionConfig | MLAConfig
    mlp: MLPConfig | MoEConfig
    norm: NormConfig = NormConfig()
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """`pattern` applied `repeats` times; `shared` uses one set of weights for all repeats."""

    pattern: tuple[BlockConfig, ...]
    repeats: int
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.pattern or self.repeats < 1:
            raise ValueError(f"a layer group needs blocks and repeats >= 1, got repeats={self.repeats}")
        for before, block in zip((None, *self.pattern), self.pattern, strict=False):
            if uses_others_kv(block):
                _check_previous(before, block.attention)

    @property
    def num_layers(self) -> int:
        return len(self.pattern) * self.repeats


def uses_others_kv(block: BlockConfig) -> bool:
    """Whether a layer attends to the keys and values of the one before it."""
    return isinstance(block.attention, AttentionConfig) and block.attention.kv == "previous"


def _check_previous(before: BlockConfig | None, cfg: AttentionConfig | MLAConfig) -> None:
    theirs = None if before is None else before.attention
    if not isinstance(theirs, AttentionConfig):
        raise ValueError(
            "kv='previous': the layer before it in a group's pattern has keys and values of another kind, or there "
            "is none; expected the first layer of a pattern, and what follows latent attention, to have kv='own'"
        )
    for name in ("num_kv_heads", "head_dim", "rope", "qk_norm", "window", "bias"):
        if getattr(theirs, name) != getattr(cfg, name):
            raise ValueError(
                f"kv='previous': {name}={getattr(cfg, name)}, but the layer whose keys and values it uses has "
                f"{getattr(theirs, name)}; expected the same"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model, as stored in a checkpoint's `meta`.

    Attributes:
      seq_len: longest context that it was built for; the size of a learned position table.
      causal: False lets every position see the whole document (masked language models).
      embed_scale: multiplies token embeddings (Gemma: sqrt(d_model)).
      logit_softcap: logits become `cap * tanh(logits / cap)`.
      dtype: of activations; `auto` is bfloat16 on accelerators and float32 on CPU.
      remat: what the backward pass recomputes; see `nn.block.remat_policy`.
      quant: kernels, keys and values in few bits.
      low_rank: kernels in two factors.
    """

    vocab_size: int
    d_model: int
    seq_len: int
    groups: tuple[LayerGroup, ...]
    final_norm: NormConfig = NormConfig()
    learned_positions: bool = False
    tie_embeddings: bool = True
    causal: bool = True
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    dtype: DType = "auto"
    remat: Remat = "none"
    quant: QuantConfig | None = None
    low_rank: tuple[RankRule, ...] = ()

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.groups)

    @property
    def has_stored_kernels(self) -> bool:
        """Whether kernels are stored in few bits."""
        return self.quant is not None and self.quant.stage == "stored" and bool(self.quant.rules)

    @property
    def kv_cache(self) -> CacheFormat | None:
        """What keys and values are rounded to."""
        return None if self.quant is None else self.quant.kv_cache

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """Every layer's block, in order of execution."""
        return tuple(block for group in self.groups for block in group.pattern * group.repeats)
