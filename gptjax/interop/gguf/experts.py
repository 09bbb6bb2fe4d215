"""gpt-oss and DeepSeek-V3 among llama.cpp's architectures: see `gptjax.interop.gguf.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptjax.interop.gguf.config import COMMON, FULL, HEADS, SLIDING, Architecture, Found, Key, expert_keys
from gptjax.interop.gguf.names import SAME, TRANSPOSED, Move, absorbed_heads, taken_apart
from gptjax.interop.reader import ConfigReader
from gptjax.nn.config import MLAConfig, ModelConfig

_GPT_OSS_RENAMED = {
    "self_attn.sinks": ("attn_sinks.weight",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
}
_DEEPSEEK_RENAMED = {
    "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",),
    "self_attn.kv_b_proj.weight": ("attn_k_b.weight", "attn_v_b.weight"),
}
_LITE_LAYERS = (26, 27)  # by which llama.cpp knows the models whose queries have no latent
_SIGMOID = 2  # `expert_gating_func`
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def _read_gpt_oss(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling", {"rope_type": "default"})
    return {
        # The reference does not round YaRN's range; llama.cpp does, and differs by that.
        "rope_scaling": scaling | ({"truncate": False} if scaling["rope_type"] == "yarn" else {}),
        "layer_types": [FULL if layer % 2 else SLIDING for layer in range(config["num_hidden_layers"])],
    }


def _read_deepseek(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    reader.require("expert_gating_func", _SIGMOID)
    reader.require("nextn_predict_layers", 0, default=0)
    num_heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    rotated, is_lite = config["qk_rope_head_dim"], config["num_hidden_layers"] in _LITE_LAYERS
    if "attention.key_length_mla" in reader:
        # The form in which the keys' projection is absorbed into the queries': one head of latents for all.
        reader.require("attention.head_count_kv", 1)
        reader.require("attention.key_length", rank + rotated)
        reader.require("attention.value_length", rank)
        key_dim, value_dim = reader.size("attention.key_length_mla"), reader.size("attention.value_length_mla")
    else:
        reader.require("attention.head_count_kv", num_heads, default=num_heads)
        key_dim, value_dim = reader.size("attention.key_length"), reader.size("attention.value_length")
    scaling, multiplier = config.get("rope_scaling", {}), reader.optional(_LOG_MULTIPLIER, float)
    if scaling.get("rope_type") == "yarn":
        if not multiplier:
            raise ValueError(f"{reader.path}: {_LOG_MULTIPLIER}: got {multiplier}, expected over 0 beside YaRN")
        mscale = float(f"{10 * multiplier:.6g}")
        scaling = scaling | {"mscale": mscale, "mscale_all_dim": mscale}
    reader.ignore(["attention.q_lora_rank"] if is_lite else [])
    return {
        "num_key_value_heads": num_heads,
        "q_lora_rank": None if is_lite else reader.size("attention.q_lora_rank"),
        "qk_nope_head_dim": key_dim - rotated,
        "v_head_dim": value_dim,
        "rope_scaling": scaling or None,
    }


def _write_deepseek(config: Mapping[str, Any]) -> dict[str, Any]:
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_gating_func": _SIGMOID,
    }
    if config["q_lora_rank"] is not None:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if (config.get("rope_scaling") or {}).get("rope_type") == "yarn":
        keys[_LOG_MULTIPLIER] = 0.1 * config["rope_scaling"].get("mscale_all_dim", 0.0)
    return keys


def _absorbed(model: ModelConfig) -> Move:
    attention = model.blocks[0].attention
    assert isinstance(attention, MLAConfig), "latent attention"
    return absorbed_heads(attention)


GPT_OSS = Architecture(
    name="gpt-oss",
    families=("gpt_oss",),
    keys=(
        *COMMON,
        *HEADS,
        Key("intermediate_size", "expert_feed_forward_length"),
        Key("intermediate_size", "feed_forward_length"),
        *expert_keys("num_local_experts"),
        Key("sliding_window", "attention.sliding_window"),
    ),
    fixed={"model_type": "gpt_oss", "attention_bias": True},
    read_rest=_read_gpt_oss,
    moves={
        "gate_up_proj": taken_apart(TRANSPOSED),
        "gate_up_proj_bias": taken_apart(SAME),
        "down_proj": TRANSPOSED,
    },
    renamed=_GPT_OSS_RENAMED,
)
DEEPSEEK2 = Architecture(
    name="deepseek2",
    families=("deepseek_v3",),
    keys=(
        *COMMON,
        Key("kv_lora_rank", "attention.kv_lora_rank"),
        Key("qk_rope_head_dim", "rope.dimension_count"),
        Key("intermediate_size", "feed_forward_length"),
        Key("first_k_dense_replace", "leading_dense_block_count", default=0),
        Key("moe_intermediate_size", "expert_feed_forward_length"),
        *expert_keys("n_routed_experts"),
        Key("n_shared_experts", "expert_shared_count"),
        Key("routed_scaling_factor", "expert_weights_scale", float, 1.0),
        Key("norm_topk_prob", "expert_weights_norm", bool, False),
        Key("n_group", "expert_group_count", default=1),
        Key("topk_group", "expert_group_used_count", default=1),
    ),
    fixed={"model_type": "deepseek_v3"},
    read_rest=_read_deepseek,
    write_rest=_write_deepseek,
    rotated="qk_rope_head_dim",
    moves={"kv_b_proj.weight": _absorbed},
    renamed=_DEEPSEEK_RENAMED,
)
