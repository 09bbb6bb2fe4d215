"""GELU and SwiGLU with backward passes that read their inputs alone.

Differentiated line by line they keep what they computed on the way, a tanh or a sigmoid as large as the input.
Computing it again is cheaper than writing and reading it, and a step needs less memory.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gptjax.types import Array

_TWICE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


@jax.custom_vjp
def gelu_tanh(x: Array) -> Array:
    """`x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, differentiable in reverse mode only.

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    return jax.nn.gelu(x, approximate=True)


def _gelu_tanh_backward(x: Array, g: Array) -> tuple[Array]:
    # A sigmoid of twice the argument, where the forward pass has a tanh: if they were alike, XLA would keep one.
    wide = x.astype(jnp.float32)
    sigmoid = _sigmoid(_TWICE * wide * (1.0 + _CUBIC * wide * wide))
    slope = sigmoid * (1.0 + wide * (1.0 - sigmoid) * _TWICE * (1.0 + 3.0 * _CUBIC * wide * wide))
    return ((g * slope).astype(x.dtype),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_backward)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, differentiable in reverse mode only (Shazeer 2020, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(inputs: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = (x.astype(jnp.float32) for x in inputs)
    sigmoid = _sigmoid(gate)
    d_gate, d_up = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), g * gate * sigmoid
    return d_gate.astype(inputs[0].dtype), d_up.astype(inputs[1].dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)
