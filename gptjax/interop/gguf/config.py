"""llama.cpp's architectures: how GGUF's metadata and Hugging Face's configs say the same of a model.

What llama.cpp takes for granted of an architecture is what `read` says of it, so that a model which differs is found
by writing its metadata and reading them back.

Source: llama.cpp, `convert_hf_to_gguf.py` and `src/llama-model.cpp`; key names in the `gguf` package's `constants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptjax.interop.gguf import rope
from gptjax.interop.gguf.names import FromOne, Move, MoveOf, Pairs, Same, Transposed
from gptjax.interop.layout import Shape
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.nn.config import AttentionConfig, ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"

# Of all that descend from Llama: Hugging Face's key, GGUF's, and its type.
_SIZES = (
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
)
_FLOATS = (("rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("rope_theta", "rope.freq_base"))


@dataclass(frozen=True)
class Found:
    """What else of a file its config depends on.

    Attributes:
      shapes: of the tensors, by GGUF's names.
      rope_factors: the values of `rope_freqs.weight`.
    """

    shapes: Mapping[str, Shape]
    rope_factors: np.ndarray | None = None


@dataclass(frozen=True)
class Written:
    """Metadata, without the architecture before each key, and the factors of a rotation."""

    keys: Mapping[str, Any]
    rope_factors: np.ndarray | None = None


def _same(name: str, model: ModelConfig) -> Move:
    return Same()


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
      families: that are exported as it.
      read: Hugging Face's config, `model_type` included.
      write: the inverse; may lose what llama.cpp cannot be told.
      renamed: see `names.places`.
    """

    name: str
    families: tuple[str, ...]
    read: Callable[[ConfigReader, Found], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], Written]
    move_of: MoveOf = _same
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_outer(reader: ConfigReader, found: Found) -> dict[str, Any]:
    """The vocabulary, whose size is that of the embedding, and whether that is the head too."""
    shape = found.shapes.get("token_embd.weight")
    if shape is None:
        raise ValueError(f"{reader.path}: token_embd.weight: missing")
    reader.require("vocab_size", shape[0], default=shape[0])
    return {"vocab_size": shape[0], "tie_word_embeddings": "output.weight" not in found.shapes}


def read_sizes(reader: ConfigReader, found: Found) -> dict[str, Any]:
    """What Llama and its descendants have in common but for the size of heads and the stretching of rotations."""
    num_heads = reader.size("attention.head_count")
    config = read_outer(reader, found) | {
        "max_position_embeddings": reader.size("context_length"),
        "hidden_size": reader.size("embedding_length"),
        "num_hidden_layers": reader.size("block_count", most=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": reader.size("attention.head_count_kv", num_heads),
        "rms_norm_eps": reader.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": reader.take("rope.freq_base", float, 10_000.0),
    }
    reader.ignore(["tensor_data_layout"])
    return config


def read_llama_like(reader: ConfigReader, found: Found) -> dict[str, Any]:
    """`read_sizes` and attention with heads that are rotated as a whole."""
    config = read_sizes(reader, found)
    head_dim = reader.size("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        reader.require(key, head_dim, default=head_dim)
    scaling = rope.read(reader, theta=config["rope_theta"], dims=head_dim, factors=found.rope_factors)
    return config | {"head_dim": head_dim} | ({} if scaling is None else {"rope_scaling": scaling})


def write_llama_like(config: Mapping[str, Any]) -> Written:
    """The inverse of `read_llama_like`."""
    head_dim = config["head_dim"]
    scaling, factors = rope.write(config.get("rope_scaling"), theta=config["rope_theta"], dims=head_dim)
    keys = write_sizes(config) | scaling
    keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    return Written(keys, factors)


def write_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    keys: dict[str, Any] = {theirs: config[name] for name, theirs in _SIZES}
    return keys | {theirs: float(config[name]) for name, theirs in _FLOATS} | {"vocab_size": config["vocab_size"]}


def _has_biases(found: Found, name: str) -> bool:
    return f"blk.0.{name}.bias" in found.shapes


def _read_llama(reader: ConfigReader, found: Found) -> dict[str, Any]:
    config = read_llama_like(reader, found) | {"intermediate_size": reader.size("feed_forward_length")}
    if reader.take("expert_count", int, 0):
        reader.require("expert_feed_forward_length", config["intermediate_size"], default=config["intermediate_size"])
        return config | {
            "model_type": "mixtral",
            "num_local_experts": reader.size("expert_count", most=MAX_EXPERTS),
            "num_experts_per_tok": reader.size("expert_used_count"),
        }
    reader.require("expert_used_count", 0, default=0)
    return config | {
        "model_type": "llama",
        "attention_bias": _has_biases(found, "attn_q"),
        "mlp_bias": _has_biases(found, "ffn_gate"),
    }


def _write_llama(config: Mapping[str, Any]) -> Written:
    written = write_llama_like(config)
    keys = dict(written.keys) | {"feed_forward_length": config["intermediate_size"]}
    if "num_local_experts" in config:
        keys |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    return Written(keys, written.rope_factors)


def _llama_move(name: str, model: ModelConfig) -> Move:
    attention = model.blocks[0].attention
    assert isinstance(attention, AttentionConfig), "heads"
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}
    projection = name.split(".")[-2]
    return Pairs(heads[projection]) if projection in heads else Same()


def _read_qwen3(reader: ConfigReader, found: Found) -> dict[str, Any]:
    return read_llama_like(reader, found) | {
        "model_type": "qwen3",
        "intermediate_size": reader.size("feed_forward_length"),
        "attention_bias": _has_biases(found, "attn_q"),
        "use_sliding_window": False,
    }


def _write_qwen3(config: Mapping[str, Any]) -> Written:
    written = write_llama_like(config)
    return Written(dict(written.keys) | {"feed_forward_length": config["intermediate_size"]}, written.rope_factors)


def _read_qwen3_moe(reader: ConfigReader, found: Found) -> dict[str, Any]:
    return _read_qwen3(reader, found) | {
        "model_type": "qwen3_moe",
        "num_experts": reader.size("expert_count", most=MAX_EXPERTS),
        "num_experts_per_tok": reader.size("expert_used_count"),
        "moe_intermediate_size": reader.size("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _write_qwen3_moe(config: Mapping[str, Any]) -> Written:
    # A model of local layers alone names no rotation for the others.
    written = _write_qwen3({"rope_theta": _GEMMA3_THETA} | dict(config))
    keys = {
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    return Written(dict(written.keys) | keys, written.rope_factors)


_GEMMA3_PERIOD = 6  # each sixth layer sees everything
_GEMMA3_LOCAL_THETA, _GEMMA3_THETA = 10_000.0, 1_000_000.0


def _read_gemma3(reader: ConfigReader, found: Found) -> dict[str, Any]:
    config = read_llama_like(reader, found)
    reader.require("attention.sliding_window_pattern", _GEMMA3_PERIOD, default=_GEMMA3_PERIOD)
    num_layers = config["num_hidden_layers"]
    scalar = config["head_dim"]
    if num_layers == 62:  # llama.cpp knows the model of 27B by this
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "model_type": "gemma3_text",
        "intermediate_size": reader.size("feed_forward_length"),
        "sliding_window": reader.size("attention.sliding_window"),
        "layer_types": [SLIDING if layer % _GEMMA3_PERIOD else FULL for layer in range(1, num_layers + 1)],
        "rope_local_base_freq": reader.take("rope.freq_base_swa", float, _GEMMA3_LOCAL_THETA),
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": reader.optional("final_logit_softcapping", float),
    }


def _write_gemma3(config: Mapping[str, Any]) -> Written:
    written = _write_qwen3(config)
    keys: dict[str, Any] = {"attention.sliding_window": config["sliding_window"]}
    if config.get("rope_local_base_freq", _GEMMA3_LOCAL_THETA) != _GEMMA3_LOCAL_THETA:
        keys["rope.freq_base_swa"] = float(config["rope_local_base_freq"])
    if config.get("final_logit_softcapping") is not None:
        keys["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return Written(dict(written.keys) | keys, written.rope_factors)


def _gemma3_move(name: str, model: ModelConfig) -> Move:
    return FromOne() if name.endswith("norm.weight") else Same()


def _read_gpt2(reader: ConfigReader, found: Found) -> dict[str, Any]:
    return read_outer(reader, found) | {
        "model_type": "gpt2",
        "n_positions": reader.size("context_length"),
        "n_embd": reader.size("embedding_length"),
        "n_layer": reader.size("block_count", most=MAX_LAYERS),
        "n_head": reader.size("attention.head_count"),
        "n_inner": reader.size("feed_forward_length"),
        "layer_norm_epsilon": reader.take("attention.layer_norm_epsilon", float),
        "activation_function": "gelu_new",
    }


def _write_gpt2(config: Mapping[str, Any]) -> Written:
    return Written(
        {
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "block_count": config["n_layer"],
            "attention.head_count": config["n_head"],
            "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
            "vocab_size": config["vocab_size"],
        }
    )


def _gpt2_move(name: str, model: ModelConfig) -> Move:
    return Transposed() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else Same()


LLAMA = Architecture("llama", ("llama", "mistral", "mixtral"), _read_llama, _write_llama, _llama_move)
QWEN3 = Architecture("qwen3", ("qwen3",), _read_qwen3, _write_qwen3)
QWEN3_MOE = Architecture("qwen3moe", ("qwen3_moe",), _read_qwen3_moe, _write_qwen3_moe)
GEMMA3 = Architecture("gemma3", ("gemma3_text",), _read_gemma3, _write_gemma3, _gemma3_move)
GPT2 = Architecture("gpt2", ("gpt2",), _read_gpt2, _write_gpt2, _gpt2_move)
