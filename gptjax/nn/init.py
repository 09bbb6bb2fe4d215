"""Initial values of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

Initializer = nn.initializers.Initializer
# Variance of a standard normal truncated at two standard deviations, 1 - 2 * 2 * pdf(2) / 0.9545.
_TRUNCATED_STD = 0.87962566103423978


def fan_in(in_dims: Sequence[int], *, scale: float = 1.0) -> Initializer:
    """Truncated normal of standard deviation `scale / sqrt(product of the contracted dimensions)`.

    Args:
      in_dims: dimensions of the kernel that a product contracts.
      scale: gain; residual branches use `1 / sqrt(2 * num_layers)` so that the variance of the
        residual stream does not grow with depth (GPT-2, section 2.3).
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        fan = math.prod(shape[dim] for dim in in_dims)
        std = scale / math.sqrt(fan) / _TRUNCATED_STD
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


def embedding() -> Initializer:
    """Normal with standard deviation 0.02 (GPT-2)."""
    return nn.initializers.normal(0.02)
