"""Qwen3-MoE: normed queries and keys, and a mixture of experts in some of the layers.

Source: transformers, `models/qwen3_moe/`. In memory it stacks the experts; on disk each is three tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.qwen3 import QK_NORM_ROWS
from gptjax.interop.layout import Linear
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row
from gptjax.nn.config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig

EXPERT_ROWS = (
    Row("model.layers.{layer}.mlp.gate.weight", "moe/router/kernel", Linear()),
    Row("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "moe/experts_gate/kernel", Linear()),
    Row("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "moe/experts_up/kernel", Linear()),
    Row("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "moe/experts_down/kernel", Linear()),
)


def _read(reader: ConfigReader) -> ModelConfig:
    seq_len = reader.size("max_position_embeddings", 32_768)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-6))
    reader.require("hidden_act", "silu", default="silu")
    attention = llama.read_attention(reader, theta=10_000.0, seq_len=seq_len)
    attention = dataclasses.replace(attention, qk_norm=norm, window=_read_window(reader))
    moe = MoEConfig(
        num_experts=reader.size(reader.known_as("num_experts", "num_local_experts"), 128, most=MAX_EXPERTS),
        num_experts_per_token=reader.size("num_experts_per_tok", 8),
        d_ff=reader.size("moe_intermediate_size", 768),
        activation="swiglu",
        normalize=reader.take("norm_topk_prob", bool, False),
        balancing="none",
        balance_rate=0.0,
    )
    mlp = MLPConfig(d_ff=reader.size("intermediate_size", 6144), activation="swiglu")
    num_layers = reader.size("num_hidden_layers", most=MAX_LAYERS)
    dense = _read_dense_layers(reader, num_layers)
    blocks = [
        BlockConfig(attention=attention, mlp=mlp if layer in dense else moe, norm=norm) for layer in range(num_layers)
    ]
    return llama.read_model(reader, blocks, seq_len=seq_len, tied=False)


def _read_window(reader: ConfigReader) -> int | None:
    windowed = reader.take("use_sliding_window", bool, False)
    if windowed:
        # transformers 5 windows every layer; its earlier versions did so from this layer on.
        reader.require("max_window_layers", 0, default=0)
        return reader.size("sliding_window", 4096)
    reader.ignore(["sliding_window", "max_window_layers"])
    return None


def _read_dense_layers(reader: ConfigReader, num_layers: int) -> set[int]:
    """The layers that are not mixtures: all but each `decoder_sparse_step`-th, and those that are named."""
    step = reader.take("decoder_sparse_step", int, 1)
    named = reader.take("mlp_only_layers", list, [])
    if step < 1:
        raise ValueError(f"{reader.path}: decoder_sparse_step: got {step}, expected at least 1")
    if not all(isinstance(layer, int) and 0 <= layer < num_layers for layer in named):
        raise ValueError(f"{reader.path}: mlp_only_layers: got {named!r}, expected layers from 0 to {num_layers - 1}")
    return {layer for layer in range(num_layers) if layer in named or (layer + 1) % step}


def _write(model: ModelConfig) -> dict[str, Any]:
    attention = model.blocks[0].attention
    mixtures = [block.mlp for block in model.blocks if isinstance(block.mlp, MoEConfig)]
    assert isinstance(attention, AttentionConfig) and mixtures, "experts, with heads"
    moe = mixtures[0]
    dense = [layer for layer, block in enumerate(model.blocks) if isinstance(block.mlp, MLPConfig)]
    return {
        **llama.write_outer(model),
        "hidden_act": "silu",
        **llama.write_attention(attention),
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        # Required, and without meaning where every layer is a mixture.
        "intermediate_size": model.blocks[dense[0]].mlp.d_ff if dense else moe.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


_ROWS = (
    *llama.OUTER_ROWS, *llama.NORM_ROWS, *llama.ATTENTION_ROWS, *QK_NORM_ROWS, *llama.MLP_ROWS, *EXPERT_ROWS
)  # fmt: skip
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _ROWS, _read, _write, llama.IGNORED)
