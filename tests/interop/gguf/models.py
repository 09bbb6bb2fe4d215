"""Tiny random models of each architecture that GGUF files are read and written for."""

import dataclasses
import pathlib
import zlib

import numpy as np

from gptjax.interop import checkpoint
from gptjax.interop.families import FAMILIES
from gptjax.interop.source import Source
from gptjax.interop.table import read_config, units

_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_GEMMA3 = _LLAMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "sliding_window": 8,
    "rope_theta": 1_000_000.0,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": None,
}

CONFIGS: dict[str, dict] = {
    "llama": _LLAMA | {"model_type": "llama"},
    "llama tied, one kv head": _LLAMA | {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama with biases": _LLAMA | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama wide heads": _LLAMA | {"model_type": "llama", "head_dim": 32, "num_key_value_heads": 4},
    "llama 3 rotation": _LLAMA | {"model_type": "llama", "rope_scaling": _LLAMA3, "rope_theta": 500_000.0},
    "llama linear rotation": _LLAMA | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama yarn": _LLAMA | {"model_type": "llama", "rope_scaling": _YARN},
    "mixtral": _LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": _LLAMA | _MOE | {"model_type": "qwen3_moe", "num_experts": 8, "norm_topk_prob": True},
    "gemma3": _GEMMA3,
    "gemma3 linear rotation": _GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_oss": _LLAMA
    | {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 8,
        "rope_scaling": {"rope_type": "default"},
    },
    "deepseek_v3": {key: value for key, value in _LLAMA.items() if key != "head_dim"}
    | _MOE
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
}
CONFIGS["gemma3 of local layers"] = _GEMMA3 | {"num_hidden_layers": 5}
# The number of layers by which llama.cpp knows that queries have no latents.
CONFIGS["deepseek_v3 without latents of queries, in groups"] = CONFIGS["deepseek_v3"] | {
    "num_hidden_layers": 26,
    "q_lora_rank": None,
    "n_group": 4,
    "topk_group": 2,
}


@dataclasses.dataclass(frozen=True)
class Array:
    """A tensor in memory."""

    value: np.ndarray

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def read(self):
        return self.value


def source(config: dict, *, dtype=np.float32, tokenizer=None) -> Source:
    """A model of random values; scales are near one (or near zero, where they count from one)."""
    family = FAMILIES[config["model_type"]]
    model = read_config(family, config, path="a test")
    random = np.random.default_rng(zlib.crc32(repr(sorted(config.items())).encode()))
    tensors = {}
    for unit in units(family, model):
        spread = 0.02 if len(unit.theirs_shape) == 1 else unit.theirs_shape[-1] ** -0.5
        value = random.normal(size=unit.theirs_shape) * spread * 2
        is_scale = "norm.weight" in unit.theirs or ".ln_" in unit.theirs and unit.theirs.endswith("weight")
        if is_scale and family.name != "gemma3_text":
            value += 1
        tensors[unit.theirs] = Array(value.astype(dtype))
    return Source(pathlib.Path("test"), "hf", family, model, tensors, tokenizer, ())


def saved(config: dict, directory: pathlib.Path, **options) -> Source:
    """The same as a checkpoint too."""
    made = source(config, **options)
    checkpoint.write(made, directory)
    return made
