"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.nn.config import NormConfig
from gptjax.nn.init import declare
from gptjax.types import Array


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis of `x`, with the dtype of `x`.

    RMSNorm: `x / sqrt(mean(x ** 2) + eps) * scale`; LayerNorm subtracts the mean first.

    Attributes:
      axis: logical axis of the normalised dimension.
    """

    cfg: NormConfig
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.cfg
        shape, axes = x.shape[-1:], (self.axis,)
        scale = self.param("scale", declare(shape, axes, constant=0.0 if cfg.zero_centered else 1.0))
        y = x.astype(jnp.float32)
        if cfg.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.eps)
        scale = scale.astype(jnp.float32)  # one more than a scale of 16 bits has no place in them
        y = y * (1.0 + scale if cfg.zero_centered else scale)
        if cfg.bias:
            y = y + self.param("bias", declare(shape, axes))
        return y.astype(x.dtype)
