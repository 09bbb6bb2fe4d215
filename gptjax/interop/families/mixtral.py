"""Mixtral: Mistral with a mixture of experts in every layer.

Source: transformers, `models/mixtral/`. In memory it stacks the experts; on disk each is three tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.layout import Linear
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row
from gptjax.nn.config import AttentionConfig, BlockConfig, ModelConfig, MoEConfig, NormConfig

_MOE_ROWS = (
    Row("model.layers.{layer}.block_sparse_moe.gate.weight", "moe/router/kernel", Linear()),
    Row("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "moe/experts_gate/kernel", Linear()),
    Row("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "moe/experts_down/kernel", Linear()),
    Row("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "moe/experts_up/kernel", Linear()),
)


def _read(reader: ConfigReader) -> ModelConfig:
    seq_len = reader.size("max_position_embeddings", 131_072)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-5))
    reader.require("hidden_act", "silu", default="silu")
    reader.require("attention_bias", False, default=False)
    attention = llama.read_attention(reader, theta=1_000_000.0, seq_len=seq_len)
    moe = MoEConfig(
        num_experts=reader.size(reader.known_as("num_local_experts", "num_experts"), 8, most=MAX_EXPERTS),
        num_experts_per_token=reader.size("num_experts_per_tok", 2),
        d_ff=reader.size("intermediate_size"),
        activation="swiglu",
        balancing="none",
        balance_rate=0.0,
    )
    block = BlockConfig(
        attention=dataclasses.replace(attention, window=reader.optional("sliding_window", int)), mlp=moe, norm=norm
    )
    blocks = [block] * reader.size("num_hidden_layers", most=MAX_LAYERS)
    return llama.read_model(reader, blocks, seq_len=seq_len, tied=False)


def _write(model: ModelConfig) -> dict[str, Any]:
    block = model.blocks[0]
    assert isinstance(block.attention, AttentionConfig) and isinstance(block.mlp, MoEConfig), "experts, with heads"
    keys = {
        **llama.write_outer(model),
        "hidden_act": "silu",
        **llama.write_attention(block.attention),
        "sliding_window": block.attention.window,
        "intermediate_size": block.mlp.d_ff,
        "num_local_experts": block.mlp.num_experts,
        "num_experts_per_tok": block.mlp.num_experts_per_token,
    }
    del keys["attention_bias"]
    return keys


_ROWS = llama.OUTER_ROWS + llama.NORM_ROWS + llama.ATTENTION_ROWS + _MOE_ROWS
MIXTRAL = Family("mixtral", "MixtralForCausalLM", _ROWS, _read, _write, llama.IGNORED)
