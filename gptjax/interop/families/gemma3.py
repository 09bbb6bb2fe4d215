"""Gemma 3, text: norms around each branch, stored as offsets from one; local layers with a rotation of their own.

Source: transformers, `models/gemma3/configuration_gemma3.py` and `modeling_gemma3.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama, rotary
from gptjax.interop.families.llama import ATTENTION_ROWS, IGNORED, MLP_ROWS, OUTER_ROWS
from gptjax.interop.families.qwen3 import GLOBAL, LOCAL, QK_NORM_ROWS, read_layer_types, write_layer_types
from gptjax.interop.multimodal import Multimodal
from gptjax.interop.reader import MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row
from gptjax.nn.config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig

NORM_ROWS = (
    Row("model.layers.{layer}.input_layernorm.weight", "attention_norm/scale"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "attention_out_norm/scale"),
    Row("model.layers.{layer}.pre_feedforward_layernorm.weight", "mlp_norm/scale"),
    Row("model.layers.{layer}.post_feedforward_layernorm.weight", "mlp_out_norm/scale"),
)
_THETAS = {LOCAL: ("rope_local_base_freq", 10_000.0), GLOBAL: ("rope_theta", 1_000_000.0)}
_ACTIVATION = "gelu_pytorch_tanh"
# Published configs leave out what is of these sizes.
_SIZES = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def _read(reader: ConfigReader) -> ModelConfig:
    reader.assume(_SIZES)
    reader.require("hidden_activation", _ACTIVATION, default=_ACTIVATION)
    reader.require("use_bidirectional_attention", False, default=False)
    reader.require("attn_logit_softcapping", None)  # transformers' Gemma 3 has the key but not the function
    seq_len = reader.size("max_position_embeddings", 131_072)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-6), zero_centered=True)
    ropes = {kind: _read_rope(reader, kind, seq_len=seq_len) for kind in (LOCAL, GLOBAL)}
    attention = dataclasses.replace(llama.read_heads(reader, head_dim=256), qk_norm=norm)
    denominator = reader.size("query_pre_attn_scalar", 256)
    if denominator != attention.head_dim:
        attention = dataclasses.replace(attention, scale=denominator**-0.5)
    window = reader.size("sliding_window", 4096)
    mlp = MLPConfig(d_ff=reader.size("intermediate_size"), activation="geglu_tanh")
    blocks = []
    for kind in _read_layer_types(reader):
        own = dataclasses.replace(attention, rope=ropes[kind], window=window if kind == LOCAL else None)
        blocks.append(BlockConfig(attention=own, mlp=mlp, norm=norm, norm_placement="sandwich"))
    return dataclasses.replace(
        llama.read_model(reader, blocks, seq_len=seq_len, tied=True),
        embed_scale=reader.size("hidden_size") ** 0.5,
        logit_softcap=reader.optional("final_logit_softcapping", float),
    )


def _read_layer_types(reader: ConfigReader) -> list[str]:
    # Before transformers 4.52 a config said that each n-th layer is global.
    period = reader.size("sliding_window_pattern", reader.size("_sliding_window_pattern", 6))
    num_layers = reader.size("num_hidden_layers", most=MAX_LAYERS)
    return read_layer_types(reader, [LOCAL if layer % period else GLOBAL for layer in range(1, num_layers + 1)])


def _read_rope(reader: ConfigReader, kind: str, *, seq_len: int) -> RopeConfig:
    """Of one type of layer; `rope_scaling`, the older form, is for the global ones."""
    key, default = _THETAS[kind]
    section = None
    by_type = reader.section("rope_parameters")
    if by_type is not None:
        section = by_type.section(kind)
        by_type.ignore(_THETAS)
        by_type.finish()
    older = reader.section("rope_scaling")
    if older is not None and kind == GLOBAL:
        section = older
    return rotary.read_section(reader, section, theta=reader.take(key, float, default), seq_len=seq_len)


def _write(model: ModelConfig) -> dict[str, Any]:
    attention = model.blocks[0].attention
    assert isinstance(attention, AttentionConfig), "latent attention is another family's"
    return (
        llama.write_model(model)
        | llama.write_heads(attention)
        | {"sliding_window": 4096} | {k: v for k, v in write_layer_types(model).items() if v is not None}
        | _write_ropes(model)
        | {
            "hidden_activation": _ACTIVATION,
            "query_pre_attn_scalar": attention.head_dim if attention.scale is None else round(attention.scale**-2),
            "final_logit_softcapping": model.logit_softcap,
            "attn_logit_softcapping": None,
        }
    )  # fmt: skip


def _write_ropes(model: ModelConfig) -> dict[str, Any]:
    """The older form, which says nothing of a scaling of local layers, or the newer one where there is one."""
    ropes: dict[str, RopeConfig] = {}
    for block in model.blocks:
        assert block.attention.rope is not None, "this family rotates"
        ropes.setdefault(GLOBAL if block.attention.window is None else LOCAL, block.attention.rope)
    if (local := ropes.get(LOCAL)) is not None and local.scaling is not None:
        return {"rope_parameters": {kind: rotary.write_section(rope) for kind, rope in ropes.items()}}
    keys: dict[str, Any] = {_THETAS[kind][0]: rope.theta for kind, rope in ropes.items()}
    scaling = ropes[GLOBAL].scaling if GLOBAL in ropes else None
    if scaling is not None:
        keys["rope_scaling"] = rotary.write_scaling(scaling)
    return keys


_ROWS = OUTER_ROWS + NORM_ROWS + ATTENTION_ROWS + QK_NORM_ROWS + MLP_ROWS
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _ROWS, _read, _write, IGNORED)

# Of the names, `model.language_model` is that of transformers 4.52 to 4.57; the other is on disk before and since.
GEMMA3_MULTIMODAL = Multimodal(
    "gemma3",
    GEMMA3,
    ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
    {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."},
    ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
