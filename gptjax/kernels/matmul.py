"""The product of activations and a weight, with a weight gradient that XLA:CPU does well.

The transpose rule of `dot_general` makes the gradient of a weight `[D, F]` as `[F, D]` and
transposes it, and XLA:CPU rewrites a product over the two dimensions B and T by transposing
what it multiplies. Both transposes are fused into the elementwise work around the product,
which they make several times slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.parallel import rules
from gptjax.parallel.mesh import platform
from gptjax.types import Array

_MIN_ROWS_TOGETHER = 256
_OUTPUTS = "NHF"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(spec: str, x: Array, w: Array) -> Array:
    """`jnp.einsum(spec, x, w)` of an activation and a weight, such as `"BTD,DNH->BTNH"`.

    Differentiable in reverse mode only. A dimension must not be summed over when only one
    operand has it, which a product of an activation and a weight never does.
    """
    return _product(spec, x, w)


def project(x_BTD: Array, kernels: Sequence[Array]) -> list[Array]:
    """The products `[B, T, ...]` of one input and several kernels `[D, ...]`.

    With many rows on CPU they are one product: small ones leave XLA:CPU's threads waiting for each other, and the
    gradient of the input is one product more instead of a sum of several. With few rows, putting the kernels side
    by side would cost more than the products.
    """
    rows, d_model = math.prod(x_BTD.shape[:2]), x_BTD.shape[2]
    if platform() != "cpu" or rules.current_mesh() is not None or rows < _MIN_ROWS_TOGETHER:
        letters = [_OUTPUTS[: kernel.ndim - 1] for kernel in kernels]
        return [einsum(f"BTD,D{out}->BT{out}", x_BTD, kernel) for out, kernel in zip(letters, kernels, strict=True)]
    flat = [kernel.reshape(d_model, -1) for kernel in kernels]
    y_BTF = einsum("BTD,DF->BTF", x_BTD, jnp.concatenate(flat, axis=1))
    parts = jnp.split(y_BTF, np.cumsum([kernel.shape[1] for kernel in flat])[:-1], axis=2)
    return [part.reshape(*x_BTD.shape[:2], *kernel.shape[1:]) for part, kernel in zip(parts, kernels, strict=True)]


def computed_once(x: Array) -> Array:
    """`x`, which on CPU is not computed anew inside every fusion that reads it.

    XLA:CPU drops optimization barriers and takes sines and cosines for cheap. A product is never part of
    a fusion, and one with the identity is exact.
    """
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype) if platform() == "cpu" else x


def _product(spec: str, x: Array, w: Array) -> Array:
    """The product, with the dimensions that it sums over merged into one where that is a mere reshape.

    Over two dimensions XLA:CPU transposes both operands before every product, which costs decoding
    as much as the product itself, and a gradient a pass over the activations.
    """
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    summed = "".join(dim for dim in x_dims if dim not in y_dims)
    if len(summed) < 2 or summed not in x_dims or summed not in w_dims:
        return jnp.einsum(spec, x, w)
    one = summed[0]
    x, w = _merged(x, x_dims.index(summed), len(summed)), _merged(w, w_dims.index(summed), len(summed))
    return jnp.einsum(f"{x_dims.replace(summed, one)},{w_dims.replace(summed, one)}->{y_dims}", x, w)


def _merged(x: Array, start: int, num_dims: int) -> Array:
    return x.reshape(*x.shape[:start], -1, *x.shape[start + num_dims :])


def _forward(spec: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum(spec, x, w), (x, w)


def _backward(spec: str, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    dx = _product(f"{y_dims},{w_dims}->{x_dims}", dy, w)
    plain = functools.partial(jnp.einsum, f"{x_dims},{y_dims}->{w_dims}")
    flat = functools.partial(_flat_weight_gradient, x_dims, w_dims, y_dims)
    if _is_flat(x_dims, w_dims, y_dims):
        # Elsewhere rows must stay [B, T]: merging two sharded dimensions would gather them.
        dw = jax.lax.platform_dependent(x, dy, cpu=flat, default=plain)
    else:
        dw = plain(x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_forward, _backward)


def _is_flat(x_dims: str, w_dims: str, y_dims: str) -> bool:
    """Whether x is rows then inputs, y is rows then outputs, and w is those in either order."""
    num_rows = len([dim for dim in x_dims if dim in y_dims])
    rows, ins, outs = x_dims[:num_rows], x_dims[num_rows:], y_dims[num_rows:]
    return y_dims.startswith(rows) and w_dims in (ins + outs, outs + ins) and not set(rows) & set(w_dims)


def _flat_weight_gradient(x_dims: str, w_dims: str, y_dims: str, x: Array, dy: Array) -> Array:
    num_rows = len([dim for dim in x_dims if dim in y_dims])
    rows = math.prod(x.shape[:num_rows])
    operands = [x, dy] if w_dims.startswith(x_dims[num_rows:]) else [dy, x]
    left, right = (operand.reshape(rows, -1) for operand in operands)
    dw = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))
    return dw.reshape(*operands[0].shape[num_rows:], *operands[1].shape[num_rows:])
