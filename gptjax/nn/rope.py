"""Rotary position embeddings and the ways of stretching them past the trained context."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from gptjax.kernels.matmul import computed_once
from gptjax.nn.config import RopeConfig, RopeScaling
from gptjax.types import Array


def tables(cfg: RopeConfig, head_dim: int, positions_BT: Array) -> tuple[Array, Array]:
    """`(cos, sin)`, each float32 `[B, T, rotated / 2]`, of `positions * frequency`."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies(cfg, head_dim))
    factor = attention_factor(cfg.scaling)
    return computed_once(jnp.cos(angles) * factor), computed_once(jnp.sin(angles) * factor)


def rotate(x_BTNH: Array, table: tuple[Array, Array]) -> Array:
    """Rotates the pairs `(i, i + rotated / 2)` of the leading dimensions of each head."""
    cos, sin = (part[:, :, None, :] for part in table)
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x_BTNH[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def rotated_dims(cfg: RopeConfig, head_dim: int) -> int:
    """How many leading dimensions of a head are rotated; always even."""
    return int(head_dim * cfg.fraction) // 2 * 2


def frequencies(cfg: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position, float32 `[rotated / 2]`: `theta ** (-2 i / rotated)`, then scaled."""
    dims = rotated_dims(cfg, head_dim)
    base = cfg.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    scaling = cfg.scaling
    if scaling is None:
        return base.astype(np.float32)
    stretched = base / scaling.factor
    match scaling.kind:
        case "linear":
            return stretched.astype(np.float32)
        case "llama3":
            keep = _llama3_keep(scaling, base)
        case "yarn":
            keep = _yarn_keep(scaling, cfg.theta, dims)
    return (stretched * (1 - keep) + base * keep).astype(np.float32)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What multiplies cos and sin, so that attention stays as sharp over a longer context.

    YaRN, eq. 22: `0.1 ln(factor) + 1`; DeepSeek takes the ratio of that at two mscales.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_mscale(scaling.factor, scaling.mscale) / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return _yarn_mscale(scaling.factor, 1.0)


def score_factor(scaling: RopeScaling | None) -> float:
    """What multiplies the scores of latent attention under DeepSeek's form of YaRN.

    Only a part of each head is rotated there, so what cos and sin do not carry is put on the
    scores: the square of the factor at `mscale_all_dim`. Source: DeepSeek-V3 `inference/model.py`.
    """
    if scaling is None or scaling.kind != "yarn" or not scaling.mscale_all_dim:
        return 1.0
    return _yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`, and 1 where the context is not stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3_keep(scaling: RopeScaling, base: np.ndarray) -> np.ndarray:
    """The share of each unscaled frequency: 1 for short wavelengths, 0 for long ones."""
    turns = scaling.original_seq_len * base / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _yarn_keep(scaling: RopeScaling, theta: float, dims: int) -> np.ndarray:
    """1 minus YaRN's ramp between the dimensions that turn beta_fast and beta_slow times."""

    def dim_of(turns: float) -> float:
        return dims * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (np.arange(dims // 2) - low) / max(high - low, 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)
