"""llama.cpp's architectures: how GGUF's metadata and Hugging Face's configs say the same of a model.

An architecture is a table of keys that drives both directions, what llama.cpp takes for granted of it, and functions
for the rest. A model that llama.cpp would not run as it is is found by writing its metadata and reading them back.

Source: llama.cpp, `convert_hf_to_gguf.py` and `src/llama-model.cpp`; key names in the `gguf` package's `constants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptjax.interop.gguf import rope
from gptjax.interop.gguf.names import FromOne, Move, MoveOf, Pairs, Same, Transposed
from gptjax.interop.layout import Shape
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.nn.config import AttentionConfig, ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Key:
    """What both say with one key each.

    Attributes:
      theirs: Hugging Face's.
      name: GGUF's, which has the architecture before it.
      kind: of the value; a whole number is at least 1, or as its default 0.
      default: of llama.cpp's where the key is absent; None where it must be there.
      most: of a whole number to be believed.
    """

    theirs: str
    name: str
    kind: type = int
    default: Any = None
    most: int = 2**31 - 1

    def read(self, reader: ConfigReader) -> Any:
        if self.kind is int and self.default != 0:
            return reader.size(self.name, self.default, most=self.most)
        return reader.take(self.name, self.kind, self.default)


COMMON = (
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("num_hidden_layers", "block_count", most=MAX_LAYERS),
    Key("num_attention_heads", "attention.head_count"),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
    Key("rope_theta", "rope.freq_base", float, 10_000.0),
)
"""Of all that descend from Llama."""


def expert_keys(num_experts: str) -> tuple[Key, Key]:
    """Keys of a mixture of experts, whose number has several names."""
    return Key(num_experts, "expert_count", most=MAX_EXPERTS), Key("num_experts_per_tok", "expert_used_count")


def read_keys(reader: ConfigReader, keys: Sequence[Key]) -> dict[str, Any]:
    """Hugging Face's values of a table's keys."""
    return {key.theirs: key.read(reader) for key in keys}


def write_keys(config: Mapping[str, Any], keys: Sequence[Key]) -> dict[str, Any]:
    """The inverse of `read_keys`."""
    return {key.name: key.kind(config.get(key.theirs, key.default)) for key in keys}


@dataclass(frozen=True)
class Found:
    """What else of a file its config depends on.

    Attributes:
      shapes: of the tensors, by GGUF's names.
      rope_factors: the values of `rope_freqs.weight`.
    """

    shapes: Mapping[str, Shape]
    rope_factors: np.ndarray | None = None

    def has_biases(self, name: str) -> bool:
        """Whether a projection of the first layer has."""
        return f"blk.0.{name}.bias" in self.shapes


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
      keys: that both configs have.
      fixed: what of Hugging Face's config is always so.
      read_rest: keys of Hugging Face's config besides, given those so far.
      write_rest: the inverse; may lose what llama.cpp cannot be told.
      renamed: see `names.places`.
      rope_factors: whether llama.cpp reads `rope_freqs.weight`, and so can be told of Llama 3's rotation.
    """

    name: str
    families: tuple[str, ...]
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    read_rest: Callable[[ConfigReader, Found, Mapping[str, Any]], dict[str, Any]]
    write_rest: Callable[[Mapping[str, Any]], Written]
    move_of: MoveOf = _same
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rope_factors: bool = False

    def read(self, reader: ConfigReader, found: Found) -> dict[str, Any]:
        """Hugging Face's config, `model_type` included; the vocabulary is as large as the embedding."""
        shape = found.shapes.get("token_embd.weight")
        if shape is None:
            raise ValueError(f"{reader.path}: token_embd.weight: missing")
        reader.require("vocab_size", shape[0], default=shape[0])
        reader.ignore(["tensor_data_layout"])
        config = {"vocab_size": shape[0], "tie_word_embeddings": "output.weight" not in found.shapes}
        config |= read_keys(reader, self.keys) | self.fixed
        return config | self.read_rest(reader, found, config)

    def write(self, config: Mapping[str, Any]) -> Written:
        """The inverse of `read`."""
        rest = self.write_rest(config)
        keys = write_keys(config, self.keys) | {"vocab_size": config["vocab_size"]}
        return Written(keys | dict(rest.keys), rest.rope_factors)


def read_heads(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    """Attention with heads that are rotated as a whole."""
    num_heads = config["num_attention_heads"]
    head_dim = reader.size("attention.key_length", config["hidden_size"] // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        reader.require(key, head_dim, default=head_dim)
    scaling = rope.read(reader, theta=config["rope_theta"], dims=head_dim, factors=found.rope_factors)
    num_kv_heads = reader.size("attention.head_count_kv", num_heads)
    heads = {"num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    return heads | ({} if scaling is None else {"rope_scaling": scaling})


def write_heads(config: Mapping[str, Any]) -> Written:
    """The inverse of `read_heads`."""
    head_dim, scaling = config["head_dim"], config.get("rope_scaling")
    theta = config.get("rope_theta", 0.0)  # a model of local layers alone names none
    keys, factors = rope.write(scaling, theta=theta, dims=head_dim)
    keys |= {"attention.head_count_kv": config["num_key_value_heads"]}
    keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    return Written(keys, factors)


_D_FF = Key("intermediate_size", "feed_forward_length")
_MIXTRAL = expert_keys("num_local_experts")


def _read_llama(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    heads = read_heads(reader, found, config)
    if reader.take("expert_count", int, 0):
        reader.require("expert_feed_forward_length", config["intermediate_size"], default=config["intermediate_size"])
        return heads | {"model_type": "mixtral"} | read_keys(reader, _MIXTRAL)
    reader.require("expert_used_count", 0, default=0)
    biases = {"attention_bias": found.has_biases("attn_q"), "mlp_bias": found.has_biases("ffn_gate")}
    return heads | {"model_type": "llama"} | biases


def _write_llama(config: Mapping[str, Any]) -> Written:
    heads = write_heads(config)
    experts = write_keys(config, _MIXTRAL) if "num_local_experts" in config else {}
    return Written(dict(heads.keys) | experts, heads.rope_factors)


def _llama_move(name: str, model: ModelConfig) -> Move:
    attention = model.blocks[0].attention
    assert isinstance(attention, AttentionConfig), "heads"
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}
    projection = name.split(".")[-2]
    return Pairs(heads[projection]) if projection in heads else Same()


def _read_qwen3(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    return read_heads(reader, found, config) | {"attention_bias": found.has_biases("attn_q")}


_GEMMA3_PERIOD = 6  # each sixth layer sees everything
_SOFTCAP = "final_logit_softcapping"


def _read_gemma3(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    reader.require("attention.sliding_window_pattern", _GEMMA3_PERIOD, default=_GEMMA3_PERIOD)
    heads, num_layers = read_heads(reader, found, config), config["num_hidden_layers"]
    scalar = heads["head_dim"]
    if num_layers == 62:  # llama.cpp knows the model of 27B by this
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return heads | {
        "layer_types": [SLIDING if layer % _GEMMA3_PERIOD else FULL for layer in range(1, num_layers + 1)],
        "query_pre_attn_scalar": scalar,
        _SOFTCAP: reader.optional(_SOFTCAP, float),
    }


def _write_gemma3(config: Mapping[str, Any]) -> Written:
    heads, softcap = write_heads(config), config.get(_SOFTCAP)
    return Written(dict(heads.keys) | ({} if softcap is None else {_SOFTCAP: float(softcap)}), heads.rope_factors)


def _gemma3_move(name: str, model: ModelConfig) -> Move:
    return FromOne() if name.endswith("norm.weight") else Same()


def _read_gpt2(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_inner": reader.size("feed_forward_length")}


def _write_gpt2(config: Mapping[str, Any]) -> Written:
    return Written({"feed_forward_length": config["n_inner"] or 4 * config["n_embd"]})


def _gpt2_move(name: str, model: ModelConfig) -> Move:
    return Transposed() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else Same()


_QWEN3 = {"model_type": "qwen3", "use_sliding_window": False}

LLAMA = Architecture(
    name="llama",
    families=("llama", "mistral", "mixtral"),
    keys=(*COMMON, _D_FF),
    fixed={},
    read_rest=_read_llama,
    write_rest=_write_llama,
    move_of=_llama_move,
    rope_factors=True,
)
QWEN3 = Architecture("qwen3", ("qwen3",), (*COMMON, _D_FF), _QWEN3, _read_qwen3, write_heads)
QWEN3_MOE = Architecture(
    name="qwen3moe",
    families=("qwen3_moe",),
    keys=(*COMMON, _D_FF, *expert_keys("num_experts"), Key("moe_intermediate_size", "expert_feed_forward_length")),
    fixed=_QWEN3 | {"model_type": "qwen3_moe", "norm_topk_prob": True},
    read_rest=_read_qwen3,
    write_rest=write_heads,
)
GEMMA3 = Architecture(
    name="gemma3",
    families=("gemma3_text",),
    keys=(
        *COMMON,
        _D_FF,
        Key("sliding_window", "attention.sliding_window"),
        Key("rope_local_base_freq", "rope.freq_base_swa", float, 10_000.0),
    ),
    fixed={"model_type": "gemma3_text"},
    read_rest=_read_gemma3,
    write_rest=_write_gemma3,
    move_of=_gemma3_move,
)
GPT2 = Architecture(
    name="gpt2",
    families=("gpt2",),
    keys=(
        Key("n_positions", "context_length"),
        Key("n_embd", "embedding_length"),
        Key("n_layer", "block_count", most=MAX_LAYERS),
        Key("n_head", "attention.head_count"),
        Key("layer_norm_epsilon", "attention.layer_norm_epsilon", float),
    ),
    fixed={"model_type": "gpt2", "activation_function": "gelu_new"},
    read_rest=_read_gpt2,
    write_rest=_write_gpt2,
    move_of=_gpt2_move,
)
