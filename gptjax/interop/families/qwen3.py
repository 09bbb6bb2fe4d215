"""Qwen3, dense: Llama with norms on queries and keys, and some layers with a sliding window.

Source: transformers, `models/qwen3/configuration_qwen3.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gptjax.interop.families import llama, rotary
from gptjax.interop.families.llama import ATTENTION_ROWS, IGNORED, MLP_ROWS, NORM_ROWS, OUTER_ROWS
from gptjax.interop.reader import MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row
from gptjax.nn.config import AttentionConfig, BlockConfig, ModelConfig, NormConfig

QK_NORM_ROWS = (
    Row("model.layers.{layer}.self_attn.q_norm.weight", "attention/query_norm/scale"),
    Row("model.layers.{layer}.self_attn.k_norm.weight", "attention/key_norm/scale"),
)
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read_layer_types(reader: ConfigReader, default: Sequence[str]) -> list[str]:
    """`LOCAL` or `GLOBAL` of each layer; `default` is that of a config without `layer_types`.

    Raises:
      ValueError: for another kind of layer, or a list of another length.
    """
    found = reader.optional("layer_types", list)
    if found is None:
        return list(default)
    unknown = [kind for kind in found if kind not in (LOCAL, GLOBAL)]
    if unknown or len(found) != len(default):
        raise ValueError(
            f"{reader.path}: layer_types: got {unknown[0] if unknown else len(found)!r}, expected {len(default)} of "
            f"{LOCAL} or {GLOBAL}"
        )
    return found


def write_layer_types(model: ModelConfig) -> dict[str, Any]:
    """The inverse, with the window of the local layers."""
    windows = [block.attention.window for block in model.blocks]
    return {
        "layer_types": [GLOBAL if window is None else LOCAL for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


def read_windows(reader: ConfigReader, *, num_layers: int) -> list[int | None]:
    """Of each layer; from the `max_window_layers`-th on they have one, where `use_sliding_window` says so."""
    window: int | None = reader.size("sliding_window", 4096)
    if not reader.take("use_sliding_window", bool, False):
        window = None
    num_global = num_layers if window is None else reader.take("max_window_layers", int, 28)
    reader.ignore(["max_window_layers"])
    default = [GLOBAL if layer < num_global else LOCAL for layer in range(num_layers)]
    types = read_layer_types(reader, default)
    if window is None and LOCAL in types:
        raise ValueError(f"{reader.path}: layer_types: has {LOCAL}, expected none without use_sliding_window")
    return [window if kind == LOCAL else None for kind in types]


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    keys = write_layer_types(model)
    num_global = next((i for i, kind in enumerate(keys["layer_types"]) if kind == LOCAL), model.num_layers)
    return keys | {"use_sliding_window": keys["sliding_window"] is not None, "max_window_layers": num_global}


def read_attentions(reader: ConfigReader, *, seq_len: int, norm: NormConfig) -> list[AttentionConfig]:
    """Of each layer."""
    attention = dataclasses.replace(
        llama.read_heads(reader, head_dim=128),
        rope=rotary.read(reader, theta=10_000.0, seq_len=seq_len),
        qk_norm=norm,
    )
    windows = read_windows(reader, num_layers=reader.size("num_hidden_layers", most=MAX_LAYERS))
    return [dataclasses.replace(attention, window=window) for window in windows]


def _read(reader: ConfigReader) -> ModelConfig:
    seq_len = reader.size("max_position_embeddings", 32_768)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-6))
    mlp = llama.read_mlp(reader)
    attentions = read_attentions(reader, seq_len=seq_len, norm=norm)
    blocks = [BlockConfig(attention=attention, mlp=mlp, norm=norm) for attention in attentions]
    return llama.read_model(reader, blocks, seq_len=seq_len, tied=False)


def _write(model: ModelConfig) -> dict[str, Any]:
    attention = model.blocks[0].attention
    assert isinstance(attention, AttentionConfig), "latent attention is another family's"
    return llama.write_model(model) | llama.write_attention(attention) | write_windows(model) | {"hidden_act": "silu"}


_ROWS = OUTER_ROWS + NORM_ROWS + ATTENTION_ROWS + QK_NORM_ROWS + MLP_ROWS
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _ROWS, _read, _write, IGNORED)
