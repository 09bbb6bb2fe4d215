"""The product of activations and a weight, with a weight gradient that every backend does well.

The transpose rule of `dot_general` makes the gradient of a weight `[D, F]` as `[F, D]` and
transposes it. XLA:CPU folds that transpose into what produced or uses the product and leaves
its fast GEMM. Here each gradient is one product whose operands are ordered so that its
result needs no transpose.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gptjax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(spec: str, x: Array, w: Array) -> Array:
    """`jnp.einsum(spec, x, w)` of an activation and a weight, such as `"BTD,DNH->BTNH"`.

    Differentiable in reverse mode only. A dimension must not be summed over when only one
    operand has it, which a product of an activation and a weight never does.
    """
    return jnp.einsum(spec, x, w)


def _forward(spec: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum(spec, x, w), (x, w)


def _backward(spec: str, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    inputs, y_dims = spec.split("->")
    x_dims, w_dims = inputs.split(",")
    dx = jnp.einsum(f"{y_dims},{w_dims}->{x_dims}", dy, w)
    # `jnp.einsum` picks the operand order that leaves the result as `w_dims` says.
    dw = jnp.einsum(f"{x_dims},{y_dims}->{w_dims}", x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_forward, _backward)
