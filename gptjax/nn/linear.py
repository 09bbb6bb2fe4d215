"""The one matmul seam: every product of an activation with a stored kernel goes through `einsum`.

Low-precision and factored kernels enter here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.kernels import matmul
from gptjax.nn import init
from gptjax.types import Array


def einsum(spec: str, x: Array, kernel: Array) -> Array:
    """`jnp.einsum(spec, x, kernel)` with the kernel cast to the dtype of `x`."""
    return matmul.einsum(spec, x, kernel.astype(x.dtype))


class Linear(nn.Module):
    """`y = einsum(spec, x, kernel) + bias`.

    Attributes:
      spec: einsum of the activation and the kernel, such as `BTD,DNH->BTNH`.
      shape: of the kernel.
      axes: logical axes of the kernel's dimensions.
      num_in: how many leading dimensions of the kernel are contracted; the rest is the output.
      scale: gain of the initial values.
    """

    spec: str
    shape: Sequence[int]
    axes: Sequence[str | None]
    num_in: int = 1
    bias: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel_init = init.fan_in(range(self.num_in), scale=self.scale)
        kernel = self.param("kernel", nn.with_partitioning(kernel_init, tuple(self.axes)), tuple(self.shape))
        y = einsum(self.spec, x, kernel)
        if self.bias:
            bias_init = nn.with_partitioning(nn.initializers.zeros, tuple(self.axes[self.num_in :]))
            y = y + self.param("bias", bias_init, tuple(self.shape[self.num_in :])).astype(y.dtype)
        return y


def compute_dtype(dtype: str, platform: str) -> jnp.dtype:
    """The dtype of activations; `auto` is bfloat16 except on CPU, which has no fast bfloat16."""
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return jax.dtypes.canonicalize_dtype(dtype)
