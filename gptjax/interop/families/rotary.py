"""Rotary positions as Hugging Face's configs write them, in the forms before and since transformers 5.

Before: `rope_theta` and `rope_scaling`. Since: `rope_parameters` with both, of the model or of each type of layer.
Written is the form before, which transformers 5 reads too.

Source: transformers, `modeling_rope_utils.py`.
"""

from __future__ import annotations

from typing import Any

from gptjax.interop.reader import ConfigReader
from gptjax.nn.config import RopeConfig, RopeScaling


def read(reader: ConfigReader, *, theta: float, seq_len: int) -> RopeConfig:
    """The rotation of all of a model's layers.

    Args:
      theta: where the config names none.
      seq_len: the context, from which some scalings count.
    """
    theta = reader.take("rope_theta", float, theta)
    # Of the two forms together transformers takes the older.
    newer, older = reader.section("rope_parameters"), reader.section("rope_scaling")
    return read_section(reader, older or newer, theta=theta, seq_len=seq_len)


def read_section(reader: ConfigReader, section: ConfigReader | None, *, theta: float, seq_len: int) -> RopeConfig:
    """The rotation that a section of the config describes, or of `theta` alone where there is none.

    Raises:
      ValueError: for a kind of scaling, or a partial rotation, that is not supported.
    """
    # The layers of these families rotate whole heads, whatever their config says.
    reader.require("partial_rotary_factor", 1.0, default=1.0)
    if section is None:
        return RopeConfig(theta=theta)
    section.require("partial_rotary_factor", 1.0, default=1.0)
    theta = section.take("rope_theta", float, theta)
    return RopeConfig(theta=theta, scaling=_scaling(section, seq_len))


def _scaling(section: ConfigReader, seq_len: int) -> RopeScaling | None:
    old_name = "type" in section and "rope_type" not in section
    kind = section.require(
        "type" if old_name else "rope_type", "default", "linear", "llama3", "yarn", default="default"
    )
    section.ignore(["type"])
    if kind == "default":
        section.ignore(["factor"])
        section.finish()
        return None
    factor = section.take("factor", float)
    if not factor > 0:
        raise ValueError(f"{section.path}: factor: got {factor}, expected above 0")
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
    """The keys of a config for one rotation of all layers; they cannot say that it is of a part of each head."""
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling is not None:
        keys["rope_scaling"] = write_scaling(rope.scaling)
    return keys


def write_section(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of a config since transformers 5, for one type of layer."""
    scaling = {"rope_type": "default"} if rope.scaling is None else write_scaling(rope.scaling)
    return {"rope_theta": rope.theta, **scaling}


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """`rope_scaling` of a config."""
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        keys["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        keys |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor")
        plain = RopeScaling(kind="yarn", factor=1.0, original_seq_len=1)
        keys |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) != getattr(plain, name)}
    return keys
