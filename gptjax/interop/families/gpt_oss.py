"""gpt-oss: biases everywhere, attention sinks, every other layer with a window, and clamped experts.

Source: transformers, `models/gpt_oss/`; experts are stacked on disk too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.qwen3 import GLOBAL, LOCAL, read_layer_types, write_layer_types
from gptjax.interop.layout import Alternating, Linear
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row
from gptjax.nn.config import AttentionConfig, BlockConfig, ModelConfig, MoEConfig, NormConfig

_EXPERTS = "model.layers.{layer}.mlp.experts"
_MOE_ROWS = (
    Row("model.layers.{layer}.mlp.router.weight", "moe/router/kernel", Linear()),
    Row("model.layers.{layer}.mlp.router.bias", "moe/router/bias"),
    Row(f"{_EXPERTS}.gate_up_proj", ("moe/experts_gate/kernel", "moe/experts_up/kernel"), Alternating()),
    Row(f"{_EXPERTS}.gate_up_proj_bias", ("moe/experts_gate/bias", "moe/experts_up/bias"), Alternating()),
    Row(f"{_EXPERTS}.down_proj", "moe/experts_down/kernel"),
    Row(f"{_EXPERTS}.down_proj_bias", "moe/experts_down/bias"),
)
_SINK_ROWS = (Row("model.layers.{layer}.self_attn.sinks", "attention/sinks"),)
_WINDOW = 128


def _read(reader: ConfigReader) -> ModelConfig:
    seq_len = reader.size("max_position_embeddings", 131_072)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-5))
    reader.require("hidden_act", "silu", default="silu")
    reader.require("swiglu_alpha", 1.702, default=1.702)
    reader.require("swiglu_limit", 7.0, default=7.0)
    if "rope_parameters" not in reader and "rope_scaling" not in reader:
        raise ValueError(f"{reader.path}: rope_scaling: missing; expected it, since it is not the same in all versions")
    attention = llama.read_attention(reader, theta=150_000.0, seq_len=seq_len)
    bias = reader.take("attention_bias", bool, True)
    attention = dataclasses.replace(attention, bias=bias, out_bias=bias, sinks=True)
    moe = MoEConfig(
        num_experts=reader.size(reader.known_as("num_local_experts", "num_experts"), 128, most=MAX_EXPERTS),
        num_experts_per_token=reader.size(reader.known_as("num_experts_per_tok", "experts_per_token"), 4),
        d_ff=reader.size("intermediate_size"),
        activation="swiglu_clamped",
        balancing="none",
        balance_rate=0.0,
        router_bias=True,
        bias=True,
    )
    windows = _read_windows(reader, reader.size("num_hidden_layers", most=MAX_LAYERS))
    blocks = [
        BlockConfig(attention=dataclasses.replace(attention, window=window), mlp=moe, norm=norm) for window in windows
    ]
    return llama.read_model(reader, blocks, seq_len=seq_len, tied=False)


def _read_windows(reader: ConfigReader, num_layers: int) -> list[int | None]:
    """Of each layer; where the config names no types, every other layer has one, from the first on."""
    window = reader.size("sliding_window", _WINDOW)
    types = read_layer_types(reader, [GLOBAL if layer % 2 else LOCAL for layer in range(num_layers)])
    return [window if kind == LOCAL else None for kind in types]


def _write(model: ModelConfig) -> dict[str, Any]:
    attention, moe = model.blocks[0].attention, model.blocks[0].mlp
    assert isinstance(attention, AttentionConfig) and isinstance(moe, MoEConfig), "experts, with heads"
    layer_types = write_layer_types(model)
    return {
        **llama.write_outer(model),
        "hidden_act": "silu",
        # Where it is missing, transformers stretches by its own default.
        "rope_scaling": {"rope_type": "default"},
        **llama.write_attention(attention),
        **layer_types,
        "sliding_window": layer_types["sliding_window"] or _WINDOW,  # needed even where no layer has one
        "intermediate_size": moe.d_ff,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "swiglu_limit": 7.0,
    }


_ROWS = (*llama.OUTER_ROWS, *llama.NORM_ROWS, *llama.ATTENTION_ROWS, *_SINK_ROWS, *_MOE_ROWS)
GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _ROWS, _read, _write, llama.IGNORED)
