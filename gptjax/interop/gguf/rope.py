"""Stretched rotations as GGUF says them: keys for linear and YaRN, a tensor of factors for Llama 3's.

Source: llama.cpp, `convert_hf_to_gguf.py` (`generate_extra_tensors`, `set_gguf_parameters`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptjax.interop.reader import ConfigReader
from gptjax.nn import rope as rope_lib
from gptjax.nn.config import RopeConfig, RopeScaling

FACTORS_TENSOR = "rope_freqs.weight"
MAX_FACTORS = 1 << 16
# What models are published with, and so what factors that fit several are taken for: in all of them the factors say
# no more than the ratios of these three.
_LLAMA3_LOW = 1.0
_LLAMA3_HIGH = 4.0
_LLAMA3_LENGTHS = tuple(2**power for power in range(4, 20))
_TOLERANCE = 1e-4


def read(reader: ConfigReader, *, theta: float, dims: int, factors: np.ndarray | None) -> dict[str, Any] | None:
    """`rope_scaling` of a Hugging Face config.

    Args:
      dims: how many dimensions of a head are rotated.
      factors: the values of `FACTORS_TENSOR`, where the file has it.

    Raises:
      ValueError: for a scaling that is not supported, or whose factors are not Llama 3's.
    """
    reader.ignore(["rope.scaling.finetuned"])
    old_factor = reader.optional("rope.scale_linear", float)
    kind = reader.require("rope.scaling.type", "none", "linear", "yarn", default="linear" if old_factor else "none")
    factor = reader.optional("rope.scaling.factor", float) or old_factor
    original = reader.optional("rope.scaling.original_context_length", int)
    if factors is not None:
        if kind != "none":
            raise ValueError(f"{reader.path}: {FACTORS_TENSOR} beside rope.scaling.type {kind!r} is not supported")
        return fit_llama3(factors, theta=theta, dims=dims, path=reader.path)
    if kind == "none" or factor is None:
        if factor not in (None, 1.0):
            raise ValueError(f"{reader.path}: rope.scaling.factor: got {factor}, expected none without a type")
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        reader.require(key, 1.0, default=1.0)
    keys = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key in ("beta_fast", "beta_slow"):
        value = reader.optional(f"rope.scaling.yarn_{key}", float)
        keys |= {} if value is None else {key: value}
    return keys


def write(scaling: dict[str, Any] | None, *, theta: float, dims: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """The keys, without their architecture, and the factors; what GGUF cannot say is lost.

    Args:
      scaling: `rope_scaling` of a Hugging Face config.
    """
    if scaling is None or scaling["rope_type"] == "default":
        return {}, None
    if scaling["rope_type"] == "llama3":
        return {}, _factors(_llama3(scaling), theta=theta, dims=dims)
    keys = {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        given = [key for key in ("beta_fast", "beta_slow") if key in scaling]
        keys |= {f"rope.scaling.yarn_{key}": float(scaling[key]) for key in given}
    return keys, None


def _llama3(scaling: dict[str, Any]) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=scaling["factor"],
        original_seq_len=scaling["original_max_position_embeddings"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
    )


def _factors(scaling: RopeScaling, *, theta: float, dims: int) -> np.ndarray:
    """What frequencies are divided by, float32 `[dims / 2]`."""
    plain = rope_lib.frequencies(RopeConfig(theta=theta), dims).astype(np.float64)
    return (plain / rope_lib.frequencies(RopeConfig(theta=theta, scaling=scaling), dims)).astype(np.float32)


def fit_llama3(factors: np.ndarray, *, theta: float, dims: int, path: str) -> dict[str, Any]:
    """The scaling that has these factors.

    Raises:
      ValueError: if none has.
    """
    factor = float(str(np.float32(factors.max()))) if factors.size else 0.0
    if factors.shape == (dims // 2,) and factor > 1.0 and np.isfinite(factors).all():
        rounded = [float(round(factor)), factor]
        for original in _LLAMA3_LENGTHS + _fitted_length(factors, factor, theta=theta, dims=dims):
            for candidate in rounded:
                scaling = {
                    "rope_type": "llama3",
                    "factor": candidate,
                    "original_max_position_embeddings": original,
                    "low_freq_factor": _LLAMA3_LOW,
                    "high_freq_factor": _LLAMA3_HIGH,
                }
                if np.allclose(_factors(_llama3(scaling), theta=theta, dims=dims), factors, rtol=_TOLERANCE):
                    return scaling
    raise ValueError(
        f"{path}: {FACTORS_TENSOR}: the factors {np.array2string(factors, threshold=8)} are not those of Llama 3's "
        "scaling, and others (LongRoPE) are not supported"
    )


def _fitted_length(factors: np.ndarray, factor: float, *, theta: float, dims: int) -> tuple[int, ...]:
    """The original length, from where a factor lies between 1 and the largest.

    There `1 / f = (1 - s) / factor + s` with `s = (original / wavelength - low) / (high - low)`.
    """
    between = np.flatnonzero((factors > 1.001) & (factors < factor * 0.999))
    if between.size == 0:
        return ()
    at = int(between[0])
    share = (1 / float(factors[at]) - 1 / factor) / (1 - 1 / factor)
    frequency = float(rope_lib.frequencies(RopeConfig(theta=theta), dims)[at])
    turns = share * (_LLAMA3_HIGH - _LLAMA3_LOW) + _LLAMA3_LOW
    return (max(round(turns * 2 * np.pi / frequency), 1),)
