"""Llama 2 and 3, and Mistral, which adds a sliding window.

Source: transformers, `models/llama/configuration_llama.py` and `models/mistral/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gptjax.interop.families import rotary
from gptjax.interop.layout import Flat, Linear
from gptjax.interop.reader import MAX_LAYERS, ConfigReader
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
    """Heads and one rotation for all layers, as the families that descend from Llama name them."""
    return dataclasses.replace(read_heads(reader), rope=rotary.read(reader, theta=theta, seq_len=seq_len))


def read_heads(reader: ConfigReader, *, head_dim: int | None = None) -> AttentionConfig:
    """Attention without rotation; `head_dim` is that of a config that names none, None the width's share."""
    num_heads, d_model = reader.size("num_attention_heads"), reader.size("hidden_size")
    bias = reader.take("attention_bias", bool, False)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=reader.size("num_key_value_heads", num_heads),
        head_dim=reader.size("head_dim", head_dim or d_model // num_heads),
        bias=bias,
        out_bias=bias,
    )


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    """The inverse of `read_attention`."""
    assert attention.rope is not None, "this family rotates"
    return write_heads(attention) | rotary.write(attention.rope)


def write_heads(attention: AttentionConfig) -> dict[str, Any]:
    """The inverse of `read_heads`."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
    }


def read_mlp(reader: ConfigReader, *, activation: str = "hidden_act") -> MLPConfig:
    """A gated feed-forward layer without biases; `activation` is the key that names its function."""
    reader.require(activation, "silu", default="silu")
    return MLPConfig(d_ff=reader.size("intermediate_size"), activation="swiglu")


def read_model(reader: ConfigReader, blocks: Sequence[BlockConfig], *, seq_len: int, tied: bool) -> ModelConfig:
    """The model of its layers; `tied` is for a config that does not say whether the head is the embedding."""
    return ModelConfig(
        vocab_size=reader.size("vocab_size"),
        d_model=reader.size("hidden_size"),
        seq_len=seq_len,
        groups=group_layers(blocks),
        final_norm=blocks[0].norm,
        tie_embeddings=reader.take("tie_word_embeddings", bool, tied),
    )


def write_model(model: ModelConfig) -> dict[str, Any]:
    """The keys of a dense model but for those of its attention and its activation."""
    mlp = model.blocks[0].mlp
    assert isinstance(mlp, MLPConfig), "this family is dense"
    return write_outer(model) | {"intermediate_size": mlp.d_ff}


def write_outer(model: ModelConfig) -> dict[str, Any]:
    """The keys of any model but for those of its attention and its feed-forward layers."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": model.blocks[0].norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _read(reader: ConfigReader) -> ModelConfig:
    reader.require("sliding_window", None)  # transformers' Llama would not apply it
    reader.require("rope_interleaved", False, default=False)  # said by SmolLM's configs
    block = _read_block(reader, seq_len := reader.size("max_position_embeddings", 2048))
    mlp = dataclasses.replace(block.mlp, bias=reader.take("mlp_bias", bool, False))
    blocks = [dataclasses.replace(block, mlp=mlp)] * reader.size("num_hidden_layers", most=MAX_LAYERS)
    return read_model(reader, blocks, seq_len=seq_len, tied=False)


def _read_mistral(reader: ConfigReader) -> ModelConfig:
    reader.require("attention_bias", False, default=False)
    block = _read_block(reader, seq_len := reader.size("max_position_embeddings", 131_072))
    window = reader.optional("sliding_window", int, absent=4096)
    attention = dataclasses.replace(block.attention, window=window)
    blocks = [dataclasses.replace(block, attention=attention)] * reader.size("num_hidden_layers", most=MAX_LAYERS)
    return read_model(reader, blocks, seq_len=seq_len, tied=False)


def _read_block(reader: ConfigReader, seq_len: int) -> BlockConfig:
    attention = read_attention(reader, theta=10_000.0, seq_len=seq_len)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-6))
    return BlockConfig(attention=attention, mlp=read_mlp(reader), norm=norm)


def _write(model: ModelConfig) -> dict[str, Any]:
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    assert isinstance(attention, AttentionConfig), "latent attention is another family's"
    return write_model(model) | write_attention(attention) | {"hidden_act": "silu", "mlp_bias": mlp.bias}


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    keys = _write(model) | {"sliding_window": model.blocks[0].attention.window}
    del keys["mlp_bias"], keys["attention_bias"]
    return keys


_ROWS = OUTER_ROWS + NORM_ROWS + ATTENTION_ROWS + MLP_ROWS
LLAMA = Family("llama", "LlamaForCausalLM", _ROWS, _read, _write, IGNORED)
MISTRAL = Family("mistral", "MistralForCausalLM", _ROWS, _read_mistral, _write_mistral, IGNORED)
