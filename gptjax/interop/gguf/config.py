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
from gptjax.interop.gguf.names import FROM_ONE, TRANSPOSED, Move, Moves, pairs
from gptjax.interop.layout import Shape
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.nn.config import ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Key:
    """What both say with one key each; Hugging Face's may stand for several of GGUF's, which then say the same.

    Attributes:
      theirs: Hugging Face's.
      name: GGUF's, which has the architecture before it.
      kind: of the value; a whole number is at least 1, or as its default 0.
      default: where the key is absent, or how to find it from the keys before; None where it must be there.
      most: of a whole number to be believed.
    """

    theirs: str
    name: str
    kind: type = int
    default: Any = None
    most: int = 2**31 - 1

    def default_for(self, config: Mapping[str, Any]) -> Any:
        return self.default(config) if callable(self.default) else self.default

    def read(self, reader: ConfigReader, config: Mapping[str, Any]) -> Any:
        if self.theirs in config:
            return reader.require(self.name, config[self.theirs], default=config[self.theirs])
        if self.kind is int and self.default != 0:
            return reader.size(self.name, self.default_for(config), most=self.most)
        return reader.take(self.name, self.kind, self.default)


def _width_by_heads(config: Mapping[str, Any]) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


COMMON = (
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("num_hidden_layers", "block_count", most=MAX_LAYERS),
    Key("num_attention_heads", "attention.head_count"),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
    Key("rope_theta", "rope.freq_base", float, 10_000.0),
)
"""Of all that descend from Llama."""
HEADS = (
    Key("num_key_value_heads", "attention.head_count_kv", default=lambda config: config["num_attention_heads"]),
    Key("head_dim", "attention.key_length", default=_width_by_heads),
    Key("head_dim", "attention.value_length"),
    Key("head_dim", "rope.dimension_count"),
)
"""Of those with heads that are rotated as a whole."""


def expert_keys(num_experts: str) -> tuple[Key, Key]:
    """Of a mixture of experts, whose number has several names."""
    return Key(num_experts, "expert_count", most=MAX_EXPERTS), Key("num_experts_per_tok", "expert_used_count")


def read_keys(reader: ConfigReader, keys: Sequence[Key], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with Hugging Face's values of a table's keys."""
    found = dict(config)
    for key in keys:
        found[key.theirs] = key.read(reader, found)
    return found


def write_keys(config: Mapping[str, Any], keys: Sequence[Key]) -> dict[str, Any]:
    """GGUF's values of a table's keys, of which those that the config lacks are left out."""
    given = {key: config.get(key.theirs) for key in keys}
    values = {key.name: key.default_for(config) if value is None else value for key, value in given.items()}
    return {key.name: key.kind(values[key.name]) for key in keys if values[key.name] is not None}


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


def _nothing(*arguments: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
      families: that are exported as it.
      keys: that both configs have.
      fixed: what of Hugging Face's config is always so.
      read_rest: keys of Hugging Face's config besides, given those so far.
      write_rest: the inverse, without keys of rotations; may lose what llama.cpp cannot be told.
      rotated: Hugging Face's key for how many dimensions of a head are.
      has_rope_factors: whether llama.cpp reads `rope_freqs.weight`, and so can be told of Llama 3's rotation.
      moves, renamed: see `names.places`.
    """

    name: str
    families: tuple[str, ...]
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    read_rest: Callable[[ConfigReader, Found, Mapping[str, Any]], dict[str, Any]] = _nothing
    write_rest: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    rotated: str = "head_dim"
    has_rope_factors: bool = False
    moves: Moves = field(default_factory=dict)
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, reader: ConfigReader, found: Found) -> dict[str, Any]:
        """Hugging Face's config, `model_type` included; the vocabulary is as large as the embedding."""
        shape = found.shapes.get("token_embd.weight")
        if shape is None:
            raise ValueError(f"{reader.path}: token_embd.weight: missing")
        reader.require("vocab_size", shape[0], default=shape[0])
        reader.ignore(["tensor_data_layout"])
        outer = {"vocab_size": shape[0], "tie_word_embeddings": "output.weight" not in found.shapes}
        config = read_keys(reader, self.keys, outer) | dict(self.fixed)
        if "rope_theta" in config:
            dims, factors = config[self.rotated], found.rope_factors
            scaling = rope.read(reader, theta=config["rope_theta"], dims=dims, factors=factors)
            config |= {} if scaling is None else {"rope_scaling": scaling}
        return config | self.read_rest(reader, found, config)

    def write(self, config: Mapping[str, Any]) -> Written:
        """The inverse of `read`."""
        keys = write_keys(config, self.keys) | {"vocab_size": config["vocab_size"]}
        theta, dims = config.get("rope_theta", 0.0), config.get(self.rotated, 0)
        scaling, factors = rope.write(config.get("rope_scaling"), theta=theta, dims=dims)
        return Written(keys | scaling | self.write_rest(config), factors)


_D_FF = Key("intermediate_size", "feed_forward_length")
_MIXTRAL = expert_keys("num_local_experts")


def _read_llama(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    if reader.take("expert_count", int, 0):
        reader.require("expert_feed_forward_length", config["intermediate_size"], default=config["intermediate_size"])
        return read_keys(reader, _MIXTRAL, {"model_type": "mixtral"})
    reader.require("expert_used_count", 0, default=0)
    biases = {"attention_bias": found.has_biases("attn_q"), "mlp_bias": found.has_biases("ffn_gate")}
    return {"model_type": "llama"} | biases


def _write_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    return write_keys(config, _MIXTRAL)


def _pairs_of(heads: str) -> Callable[[ModelConfig], Move]:
    return lambda model: pairs(getattr(model.blocks[0].attention, heads))


def _read_qwen3(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": found.has_biases("attn_q")}


_GEMMA3_PERIOD = 6  # each sixth layer sees everything
_SOFTCAP = "final_logit_softcapping"


def _read_gemma3(reader: ConfigReader, found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    reader.require("attention.sliding_window_pattern", _GEMMA3_PERIOD, default=_GEMMA3_PERIOD)
    num_layers, scalar = config["num_hidden_layers"], config["head_dim"]
    if num_layers == 62:  # llama.cpp knows the model of 27B by this
        scalar = _width_by_heads(config)
    return {
        "layer_types": [SLIDING if layer % _GEMMA3_PERIOD else FULL for layer in range(1, num_layers + 1)],
        "query_pre_attn_scalar": scalar,
        _SOFTCAP: reader.optional(_SOFTCAP, float),
    }


def _write_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    return write_keys(config, [Key(_SOFTCAP, _SOFTCAP, float)])


LLAMA = Architecture(
    name="llama",
    families=("llama", "mistral", "mixtral"),
    keys=(*COMMON, *HEADS, _D_FF),
    read_rest=_read_llama,
    write_rest=_write_llama,
    has_rope_factors=True,
    moves={
        f"{projection}.{kind}": _pairs_of(heads)
        for projection, heads in (("q_proj", "num_heads"), ("k_proj", "num_kv_heads"))
        for kind in ("weight", "bias")
    },
)
QWEN3 = Architecture(
    name="qwen3",
    families=("qwen3",),
    keys=(*COMMON, *HEADS, _D_FF),
    fixed={"model_type": "qwen3", "use_sliding_window": False},
    read_rest=_read_qwen3,
)
QWEN3_MOE = Architecture(
    name="qwen3moe",
    families=("qwen3_moe",),
    keys=(*QWEN3.keys, *expert_keys("num_experts"), Key("moe_intermediate_size", "expert_feed_forward_length")),
    fixed={"model_type": "qwen3_moe", "use_sliding_window": False, "norm_topk_prob": True},
    read_rest=_read_qwen3,
)
GEMMA3 = Architecture(
    name="gemma3",
    families=("gemma3_text",),
    keys=(
        *QWEN3.keys,
        Key("sliding_window", "attention.sliding_window"),
        Key("rope_local_base_freq", "rope.freq_base_swa", float, 10_000.0),
    ),
    fixed={"model_type": "gemma3_text"},
    read_rest=_read_gemma3,
    write_rest=_write_gemma3,
    moves={"norm.weight": FROM_ONE},
)
GPT2 = Architecture(
    name="gpt2",
    families=("gpt2",),
    keys=(
        Key("n_positions", "context_length"),
        Key("n_embd", "embedding_length"),
        Key("n_layer", "block_count", most=MAX_LAYERS),
        Key("n_head", "attention.head_count"),
        Key("n_inner", "feed_forward_length", default=lambda config: 4 * config["n_embd"]),
        Key("layer_norm_epsilon", "attention.layer_norm_epsilon", float),
    ),
    fixed={"model_type": "gpt2", "activation_function": "gelu_new"},
    moves=dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), TRANSPOSED),
)
