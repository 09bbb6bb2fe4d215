"""Rotary positions as Hugging Face's configs write them, in the forms before and since transformers 5.

Before: `rope_theta` and `rope_scaling`. Since: `rope_parameters` with both, of the model or of each type of layer.
Written is the form before, which transformers 5 reads too.

Source: transformers, `modeling_rope_utils.py`.
"""

from __future__ import annotations

from typing import Any

from gptjax.interop.reader import ConfigReader
from gptjax.nn.config import RopeConfig, RopeScaling


def read(reader: ConfigReader, *, theta: float, seq_len: int, layer_type: str | None = None) -> RopeConfig:
    """The rotation of a model's layers.

    Args:
      theta: where the config names none.
      seq_len: the context, from which some scalings count.
      layer_type: with parameters by type of layer, whose.
    """
    fraction = reader.take("partial_rotary_factor", float, 1.0)
    section = reader.section("rope_parameters")
    if section is not None and layer_type is not None and layer_type in section:
        nested = section.section(layer_type)
        assert nested is not None, "it is there"
        section = nested
    if section is None:
        theta = reader.take("rope_theta", float, theta)
        section = reader.section("rope_scaling")
    else:
        theta = section.take("rope_theta", float, theta)
        fraction = section.take("partial_rotary_factor", float, fraction)
        reader.ignore(["rope_theta", "rope_scaling"])
    scaling = None if section is None else _scaling(section, seq_len)
    return RopeConfig(theta=theta, fraction=fraction, scaling=scaling)


def _scaling(section: ConfigReader, seq_len: int) -> RopeScaling | None:
    old_name = "type" in section and "rope_type" not in section
    kind = section.require(
        "type" if old_name else "rope_type", "default", "linear", "llama3", "yarn", default="default"
    )
    section.ignore(["type", "rope_theta"])
    if kind == "default":
        section.ignore(["factor"])
        section.finish()
        return None
    factor = section.take("factor", float)
    if kind == "linear":
        section.ignore(["original_max_position_embeddings"])
        section.finish()
        return RopeScaling(kind="linear", factor=factor)
    original = section.take("original_max_position_embeddings", int, seq_len)
    if kind == "llama3":
        low, high = section.take("low_freq_factor", float), section.take("high_freq_factor", float)
        section.finish()
        return RopeScaling(
            kind="llama3", factor=factor, original_seq_len=original, low_freq_factor=low, high_freq_factor=high
        )
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_seq_len=original,
        beta_fast=section.take("beta_fast", float, 32.0),
        beta_slow=section.take("beta_slow", float, 1.0),
        attention_factor=section.optional("attention_factor", float),
        mscale=section.take("mscale", float, 0.0),
        mscale_all_dim=section.take("mscale_all_dim", float, 0.0),
        truncate=section.take("truncate", bool, True),
    )
    section.finish()
    return scaling


def write(rope: RopeConfig) -> dict[str, Any]:
    """The keys of a config for one rotation of all layers."""
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not None:
        keys["rope_scaling"] = write_scaling(rope.scaling)
    return keys


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """`rope_scaling` of a config."""
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        keys["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        keys |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        keys |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        optional = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
        keys |= {name: value for name, value in optional.items() if value}
        if scaling.attention_factor is not None:
            keys["attention_factor"] = scaling.attention_factor
    return keys
