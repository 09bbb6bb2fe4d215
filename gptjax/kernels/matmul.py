"""The product of activations and a weight, with a weight gradient that every backend does well.

The transpose rule of `dot_general` asks for a gradient with the weight's dimensions in the
wrong order and transposes afterwards; XLA:CPU fuses that transpose into the producer and
leaves its fast GEMM. Here both gradients are one `dot_general` each whose result already
has the right order whenever such an operand order exists.
"""

from __future__ import annotations

import jax.numpy as jnp

from gptjax.types import Array


def einsum(spec: str, x: Array, w: Array) -> Array:
    """`jnp.einsum(spec, x, w)` for one activation and one weight, such as `"BTD,DNH->BTNH"`.

    Reverse-mode differentiable only.
    """
    return jnp.einsum(spec, x, w)
