"""Products with kernels in few bits.

Where the platform multiplies numbers of 8 bits, inputs that are rounded to such are multiplied as they are. Otherwise
the kernel's values are made for the product alone: a compiler that can fuses that into it, and where it cannot no more
than one kernel is ever there in full.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gptjax.kernels import matmul
from gptjax.nn import quantized
from gptjax.nn.quantized import QuantizedArray, RoundedKernel
from gptjax.parallel.mesh import platform
from gptjax.types import Array

_DTYPES = {"int8": jnp.int8, "fp8_e4m3": jnp.float8_e4m3fn}
_INT8_MAX = 127.0
_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


def einsum(spec: str, x: Array, kernel: QuantizedArray | RoundedKernel) -> Array:
    """`jnp.einsum(spec, x, kernel)` in the dtype of `x`."""
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    summed = "".join(dim for dim in x_dims if dim not in y_dims)
    if isinstance(kernel, RoundedKernel):
        if kernel.activations != "none":
            x = _round_through(x, tuple(x_dims.index(dim) for dim in summed), kernel.activations)
        return matmul.einsum(spec, x, kernel.rounded().astype(x.dtype))
    num_in, num_out = len(kernel.layout.in_shape), len(kernel.layout.out_shape)
    lead, rest = w_dims[: len(w_dims) - num_in - num_out], w_dims[len(w_dims) - num_in - num_out :]
    ins, outs = (rest[:num_in], rest[num_in:]) if kernel.layout.in_first else (rest[num_out:], rest[:num_out])
    if summed != ins:  # latent attention uses a kernel the other way too
        return matmul.einsum(spec, x, quantized.dequantize(kernel, x.dtype))
    axes = tuple(x_dims.index(dim) for dim in summed)
    rows_spec = f"{x_dims},{lead}{outs}{ins}->{y_dims}"
    if _multiplies(kernel):
        codes, scale = _rounded(x, axes, kernel.activations)
        weights = kernel.layout.split(kernel.planes[0])
        accumulator = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
        y = jnp.einsum(rows_spec, codes, weights, preferred_element_type=accumulator).astype(jnp.float32)
        kept = "".join(dim for dim in x_dims if dim not in summed)
        scale = _aligned(scale.squeeze(axes), kept, y_dims) * _aligned(kernel.scale[..., 0], lead + outs, y_dims)
        return (y * scale).astype(x.dtype)
    if kernel.activations != "none":
        x = _round_through(x, axes, kernel.activations)
    rows = quantized.dequantize_rows(kernel, x.dtype)
    return matmul.einsum(rows_spec, x, kernel.layout.split(rows))


def rows(spec: str, x: Array) -> Array:
    """The inputs of a product, `[rows, inputs]`."""
    x_dims, _, y_dims = spec.replace("->", ",").split(",")
    summed = [x_dims.index(dim) for dim in x_dims if dim not in y_dims]
    moved = jnp.moveaxis(x, summed, range(-len(summed), 0))
    return moved.reshape(-1, math.prod(x.shape[axis] for axis in summed))


def operands(x_MD: Array, kernel: QuantizedArray | RoundedKernel) -> tuple[Array, Array]:
    """The inputs and the kernel as floats: what a product that knows only those multiplies."""
    if kernel.activations != "none":
        x_MD = _round_through(x_MD, (x_MD.ndim - 1,), kernel.activations)
    if isinstance(kernel, RoundedKernel):
        return x_MD, kernel.rounded()
    return x_MD, quantized.dequantize(kernel, x_MD.dtype)


def _multiplies(kernel: QuantizedArray) -> bool:
    """Whether codes are multiplied as they are: XLA:CPU does that several times slower than floats."""
    same = _DTYPES.get(kernel.activations) == kernel.planes[0].dtype
    return same and kernel.format.group_size is None and platform() in ("gpu", "cuda", "tpu")


def _rounded(x: Array, axes: tuple[int, ...], kind: str) -> tuple[Array, Array]:
    """Codes and scale, one scale for all of `axes`."""
    largest = _INT8_MAX if kind == "int8" else _FP8_MAX
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axes, keepdims=True) / largest
    scaled = x / jnp.where(scale == 0, 1, scale)
    codes = jnp.round(scaled).astype(jnp.int8) if kind == "int8" else scaled.astype(jnp.float8_e4m3fn)
    return codes, scale


def _round_through(x: Array, axes: tuple[int, ...], kind: str) -> Array:
    """`x` as rounded, with the gradient of the identity."""
    codes, scale = _rounded(jax.lax.stop_gradient(x), axes, kind)
    rounded = (codes.astype(jnp.float32) * scale).astype(x.dtype)
    return x + jax.lax.stop_gradient(rounded - x)


def _aligned(values: Array, dims: str, y_dims: str) -> Array:
    """`values` with a dimension of 1 for each of `y_dims` that it lacks."""
    sizes = dict(zip(dims, values.shape, strict=True))
    return values.reshape([sizes.get(dim, 1) for dim in y_dims])
