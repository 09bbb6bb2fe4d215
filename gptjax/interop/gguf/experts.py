"""gpt-oss and DeepSeek-V3 among llama.cpp's architectures: see `gptjax.interop.gguf.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import logging

from gptjax.interop.gguf import rope
from gptjax.interop.gguf.config import (
    FULL,
    SLIDING,
    Architecture,
    Found,
    Written,
    read_llama_like,
    read_sizes,
    write_llama_like,
    write_sizes,
)
from gptjax.interop.gguf.names import AbsorbedHeads, Move, Same, TakenApart, Transposed
from gptjax.interop.reader import MAX_EXPERTS, ConfigReader
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
_DEEPSEEK_EPS = 1e-6  # of the latents' norms in the reference, where llama.cpp has that of the layers
_SIGMOID = 2  # `expert_gating_func`
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def _read_gpt_oss(reader: ConfigReader, found: Found) -> dict[str, Any]:
    config = read_llama_like(reader, found)
    scaling = config.get("rope_scaling", {"rope_type": "default"})
    d_ff = reader.size("expert_feed_forward_length")
    reader.require("feed_forward_length", d_ff, default=d_ff)
    return config | {
        "model_type": "gpt_oss",
        # The reference does not round YaRN's range; llama.cpp does, and differs by that.
        "rope_scaling": scaling | ({"truncate": False} if scaling["rope_type"] == "yarn" else {}),
        "attention_bias": True,
        "intermediate_size": d_ff,
        "num_local_experts": reader.size("expert_count", most=MAX_EXPERTS),
        "num_experts_per_tok": reader.size("expert_used_count"),
        "sliding_window": reader.size("attention.sliding_window"),
        "layer_types": [FULL if layer % 2 else SLIDING for layer in range(config["num_hidden_layers"])],
    }


def _write_gpt_oss(config: Mapping[str, Any]) -> Written:
    if config["rope_scaling"].get("truncate") is False:
        logging.warning("gguf: llama.cpp rounds the range of YaRN, which this model does not")
    written = write_llama_like(config)
    keys = {
        "feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "attention.sliding_window": config["sliding_window"],
    }
    return Written(dict(written.keys) | keys, written.rope_factors)


def _gpt_oss_move(name: str, model: ModelConfig) -> Move:
    moves: dict[str, Move] = {
        "gate_up_proj": TakenApart(Transposed()),
        "gate_up_proj_bias": TakenApart(),
        "down_proj": Transposed(),
    }
    return moves.get(name.rsplit(".", 1)[-1], Same())


def _read_deepseek(reader: ConfigReader, found: Found) -> dict[str, Any]:
    config = read_sizes(reader, found)
    reader.require("attention.layer_norm_rms_epsilon", _DEEPSEEK_EPS)
    num_heads, rank = config["num_attention_heads"], reader.size("attention.kv_lora_rank")
    rotated = reader.size("rope.dimension_count")
    if "attention.key_length_mla" in reader:
        # The form in which the keys' projection is absorbed into the queries': one head of latents for all.
        reader.require("attention.head_count_kv", 1)
        reader.require("attention.key_length", rank + rotated)
        reader.require("attention.value_length", rank)
        key_dim, value_dim = reader.size("attention.key_length_mla"), reader.size("attention.value_length_mla")
    else:
        reader.require("attention.head_count_kv", num_heads, default=num_heads)
        key_dim, value_dim = reader.size("attention.key_length"), reader.size("attention.value_length")
    multiplier = reader.optional(_LOG_MULTIPLIER, float)
    scaling = rope.read(reader, theta=config["rope_theta"], dims=rotated, factors=found.rope_factors)
    if scaling is not None and scaling["rope_type"] == "yarn":
        if not multiplier:
            raise ValueError(f"{reader.path}: {_LOG_MULTIPLIER}: got {multiplier}, expected over 0 beside YaRN")
        mscale = float(f"{10 * multiplier:.6g}")
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    config |= {
        "model_type": "deepseek_v3",
        "num_key_value_heads": num_heads,
        # Without it llama.cpp takes the model for one of DeepSeek-V2's, by its number of layers.
        "q_lora_rank": reader.size("attention.q_lora_rank"),
        "kv_lora_rank": rank,
        "qk_nope_head_dim": key_dim - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value_dim,
    }
    return config | _read_deepseek_experts(reader) | ({} if scaling is None else {"rope_scaling": scaling})


def _read_deepseek_experts(reader: ConfigReader) -> dict[str, Any]:
    reader.require("expert_gating_func", _SIGMOID)
    reader.require("nextn_predict_layers", 0, default=0)
    return {
        "intermediate_size": reader.size("feed_forward_length"),
        "first_k_dense_replace": reader.take("leading_dense_block_count", int, 0),
        "moe_intermediate_size": reader.size("expert_feed_forward_length"),
        "n_routed_experts": reader.size("expert_count", most=MAX_EXPERTS),
        "n_shared_experts": reader.size("expert_shared_count"),
        "num_experts_per_tok": reader.size("expert_used_count"),
        "routed_scaling_factor": reader.take("expert_weights_scale", float, 1.0),
        "norm_topk_prob": reader.take("expert_weights_norm", bool, False),
        "n_group": reader.take("expert_group_count", int, 1),
        "topk_group": reader.take("expert_group_used_count", int, 1),
    }


def _write_deepseek(config: Mapping[str, Any]) -> Written:
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    scaling, factors = rope.write(config.get("rope_scaling"), theta=config["rope_theta"], dims=rotated)
    if "rope.scaling.type" in scaling:
        scaling[_LOG_MULTIPLIER] = 0.1 * config["rope_scaling"].get("mscale_all_dim", 0.0)
    keys = write_sizes(config) | scaling
    keys |= {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotated,
        "feed_forward_length": config["intermediate_size"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": _SIGMOID,
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }
    if config["q_lora_rank"] is not None:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    return Written(keys, factors)


def _deepseek_move(name: str, model: ModelConfig) -> Move:
    attention = model.blocks[0].attention
    assert isinstance(attention, MLAConfig), "latent attention"
    if name.endswith("kv_b_proj.weight"):
        return AbsorbedHeads(attention.num_heads, attention.nope_head_dim, attention.v_head_dim)
    return Same()


GPT_OSS = Architecture("gpt-oss", ("gpt_oss",), _read_gpt_oss, _write_gpt_oss, _gpt_oss_move, _GPT_OSS_RENAMED)
DEEPSEEK2 = Architecture(
    "deepseek2", ("deepseek_v3",), _read_deepseek, _write_deepseek, _deepseek_move, _DEEPSEEK_RENAMED
)
