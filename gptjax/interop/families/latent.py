"""Multi-head latent attention as DeepSeek's models store it.

Theirs rotates neighbouring pairs, and keeps the projections to keys and values in one tensor, head by head.

Source: transformers, `models/deepseek_v3/`; DeepSeek-V2 (arXiv:2405.04434), section 2.1.
"""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import rotary
from gptjax.interop.layout import JoinedHeads, Layout, Linear, PairedRotation, Same
from gptjax.interop.reader import ConfigReader
from gptjax.interop.table import Row
from gptjax.nn.config import BlockConfig, MLAConfig, NormConfig


def _query(block: BlockConfig) -> Layout:
    assert isinstance(block.attention, MLAConfig), "latent attention"
    return PairedRotation(Linear(), rotated=block.attention.rope_head_dim, offset=block.attention.nope_head_dim)


def _kv_down(block: BlockConfig) -> PairedRotation:
    assert isinstance(block.attention, MLAConfig), "latent attention"
    return PairedRotation(Linear(), rotated=block.attention.rope_head_dim, offset=block.attention.kv_latent)


def _kv_down_bias(block: BlockConfig) -> Layout:
    kernel = _kv_down(block)
    return PairedRotation(Same(), rotated=kernel.rotated, offset=kernel.offset)


_ATTENTION = "model.layers.{layer}.self_attn"
ROWS = (
    Row(f"{_ATTENTION}.q_proj.weight", "attention/query/kernel", _query),
    Row(f"{_ATTENTION}.q_a_proj.weight", "attention/query_down/kernel", Linear()),
    Row(f"{_ATTENTION}.q_a_proj.bias", "attention/query_down/bias"),
    Row(f"{_ATTENTION}.q_a_layernorm.weight", "attention/query_norm/scale"),
    Row(f"{_ATTENTION}.q_b_proj.weight", "attention/query_up/kernel", _query),
    Row(f"{_ATTENTION}.kv_a_proj_with_mqa.weight", "attention/kv_down/kernel", _kv_down),
    Row(f"{_ATTENTION}.kv_a_proj_with_mqa.bias", "attention/kv_down/bias", _kv_down_bias),
    Row(f"{_ATTENTION}.kv_a_layernorm.weight", "attention/kv_norm/scale"),
    Row(f"{_ATTENTION}.kv_b_proj.weight", ("attention/key_up/kernel", "attention/value_up/kernel"), JoinedHeads()),
    Row(f"{_ATTENTION}.o_proj.weight", "attention/out/kernel", Linear(in_dims=2)),
    Row(f"{_ATTENTION}.o_proj.bias", "attention/out/bias"),
)


def read(reader: ConfigReader, *, seq_len: int) -> MLAConfig:
    """The attention of a model's layers."""
    num_heads = reader.size("num_attention_heads")
    reader.require("num_key_value_heads", num_heads, default=num_heads)
    reader.require("rope_interleave", True, default=True)
    reader.ignore(["head_dim", "qk_head_dim"])  # follow from others
    return MLAConfig(
        num_heads=num_heads,
        kv_latent=reader.size("kv_lora_rank", 512),
        nope_head_dim=reader.size("qk_nope_head_dim", 128),
        rope_head_dim=reader.size("qk_rope_head_dim", 64),
        v_head_dim=reader.size("v_head_dim", 128),
        rope=rotary.read(reader, theta=10_000.0, seq_len=seq_len),
        q_latent=reader.optional("q_lora_rank", int),
        norm=NormConfig(eps=1e-6),  # of the latents, whatever rms_norm_eps is
        bias=reader.take("attention_bias", bool, False),
    )


def write(attention: MLAConfig) -> dict[str, Any]:
    """The inverse of `read`."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "attention_bias": attention.bias,
        "q_lora_rank": attention.q_latent,
        "kv_lora_rank": attention.kv_latent,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_interleave": True,
        **rotary.write(attention.rope),
    }
