"""Llama 2 and 3, and Mistral, which adds a sliding window.

Source: transformers, `models/llama/configuration_llama.py` and `models/mistral/`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import rotary
from gptjax.interop.layout import Flat, Linear
from gptjax.interop.reader import ConfigReader
from gptjax.interop.table import Family, Row, group_layers
from gptjax.nn.config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig

ATTENTION_ROWS = (
    Row("model.layers.{layer}.self_attn.q_proj.weight", "attention/query/kernel", Linear()),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "attention/key/kernel", Linear()),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "attention/value/kernel", Linear()),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "attention/out/kernel", Linear(in_dims=2)),
    Row("model.layers.{layer}.self_attn.q_proj.bias", "attention/query/bias", Flat()),
    Row("model.layers.{layer}.self_attn.k_proj.bias", "attention/key/bias", Flat()),
    Row("model.layers.{layer}.self_attn.v_proj.bias", "attention/value/bias", Flat()),
    Row("model.layers.{layer}.self_attn.o_proj.bias", "attention/out/bias"),
)
MLP_ROWS = (
    Row("model.layers.{layer}.mlp.gate_proj.weight", "mlp/gate/kernel", Linear()),
    Row("model.layers.{layer}.mlp.up_proj.weight", "mlp/up/kernel", Linear()),
    Row("model.layers.{layer}.mlp.down_proj.weight", "mlp/down/kernel", Linear()),
    Row("model.layers.{layer}.mlp.gate_proj.bias", "mlp/gate/bias"),
    Row("model.layers.{layer}.mlp.up_proj.bias", "mlp/up/bias"),
    Row("model.layers.{layer}.mlp.down_proj.bias", "mlp/down/bias"),
)
OUTER_ROWS = (
    Row("model.embed_tokens.weight", "embed/tokens"),
    Row("model.norm.weight", "final_norm/scale"),
    Row("lm_head.weight", "head/kernel", Linear()),
)
NORM_ROWS = (
    Row("model.layers.{layer}.input_layernorm.weight", "attention_norm/scale"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "mlp_norm/scale"),
)
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def read_attention(reader: ConfigReader, *, theta: float, seq_len: int) -> AttentionConfig:
    """Heads and rotation, as all families that descend from Llama name them."""
    num_heads = reader.take("num_attention_heads", int)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=reader.take("num_key_value_heads", int, num_heads),
        head_dim=reader.take("head_dim", int, reader.take("hidden_size", int) // num_heads),
        rope=rotary.read(reader, theta=theta, seq_len=seq_len),
        bias=reader.take("attention_bias", bool, False),
    )


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    """The inverse of `read_attention`."""
    assert attention.rope is not None, "this family rotates"
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        **rotary.write(attention.rope),
    }


def _read(reader: ConfigReader) -> ModelConfig:
    seq_len = reader.take("max_position_embeddings", int, 2048)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-6))
    reader.require("hidden_act", "silu", default="silu")
    attention = read_attention(reader, theta=10_000.0, seq_len=seq_len)
    attention = dataclasses.replace(attention, out_bias=attention.bias, window=reader.optional("sliding_window", int))
    mlp = MLPConfig(
        d_ff=reader.take("intermediate_size", int), activation="swiglu", bias=reader.take("mlp_bias", bool, False)
    )
    block = BlockConfig(attention=attention, mlp=mlp, norm=norm)
    return ModelConfig(
        vocab_size=reader.take("vocab_size", int),
        d_model=reader.take("hidden_size", int),
        seq_len=seq_len,
        groups=group_layers([block] * reader.take("num_hidden_layers", int)),
        final_norm=norm,
        tie_embeddings=reader.take("tie_word_embeddings", bool, False),
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    block = model.blocks[0]
    assert isinstance(block.attention, AttentionConfig) and isinstance(block.mlp, MLPConfig), "dense, with heads"
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": block.mlp.d_ff,
        "num_hidden_layers": model.num_layers,
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": block.norm.eps,
        "hidden_act": "silu",
        "mlp_bias": block.mlp.bias,
        "tie_word_embeddings": model.tie_embeddings,
        **write_attention(block.attention),
    }


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    keys = _write(model) | {"sliding_window": model.blocks[0].attention.window}
    del keys["mlp_bias"], keys["attention_bias"]
    return keys


_ROWS = OUTER_ROWS + NORM_ROWS + ATTENTION_ROWS + MLP_ROWS
LLAMA = Family("llama", "LlamaForCausalLM", _ROWS, _read, _write, IGNORED)
MISTRAL = Family("mistral", "MistralForCausalLM", _ROWS, _read, _write_mistral, IGNORED)
