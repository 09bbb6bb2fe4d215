"""Products with kernels in few bits.

Where the platform multiplies numbers of 8 bits, inputs that are rounded to such are multiplied as they are. Otherwise
the kernel's values are made for the product alone: a compiler that can fuses that into it, and where it cannot no more
than one kernel is ever there in full. On one CPU device `kernels.native` does both, which XLA:CPU does slowly.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.kernels import matmul
from gptjax.kernels.native import few_bits as native
from gptjax.nn import quantized
from gptjax.nn.quantized import QuantizedArray, RoundedKernel
from gptjax.parallel.mesh import platform
from gptjax.types import Array

_DTYPES = {"int8": jnp.int8, "fp8_e4m3": jnp.float8_e4m3fn}
_INT8_MAX = 127.0
_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


class _Dims(NamedTuple):
    """The letters of a product: of x, of its result, those summed over, and the kernel's by what they are."""

    x: str
    y: str
    summed: str
    lead: str
    ins: str
    outs: str

    @property
    def axes(self) -> tuple[int, ...]:
        """Of x, that are summed over."""
        return tuple(map(self.x.index, self.summed))

    @property
    def kept(self) -> str:
        """Of x, that the result has too."""
        return "".join(dim for dim in self.x if dim not in self.summed)

    @property
    def is_matrix(self) -> bool:
        """Whether all rows of x are multiplied with one matrix, of the kernel's own rows."""
        return self.summed == self.ins and not set(self.lead + self.outs) & set(self.x)


def einsum(spec: str, x: Array, kernel: QuantizedArray | RoundedKernel) -> Array:
    """`jnp.einsum(spec, x, kernel)` in the dtype of `x`; differentiable in reverse mode only."""
    dims = _dims(spec, kernel)
    if isinstance(kernel, RoundedKernel):
        if kernel.activations != "none":
            x = _round_through(x, dims.axes, kernel.activations)
        return matmul.einsum(spec, x, kernel.rounded().astype(x.dtype))
    num_rows = math.prod(x.shape[dims.x.index(dim)] for dim in dims.kept)
    if dims.is_matrix and num_rows <= _most_rows(kernel) and _is_native(kernel):
        return _native(spec, x, kernel)
    return _dequantized(spec, x, kernel)


def _dims(spec: str, kernel: QuantizedArray | RoundedKernel) -> _Dims:
    x, w, y = spec.replace("->", ",").split(",")
    num_in, num_out = len(kernel.layout.in_shape), len(kernel.layout.out_shape)
    lead, rest = w[: len(w) - num_in - num_out], w[len(w) - num_in - num_out :]
    ins, outs = (rest[:num_in], rest[num_in:]) if kernel.layout.in_first else (rest[num_out:], rest[:num_out])
    return _Dims(x, y, "".join(dim for dim in x if dim not in y), lead, ins, outs)


def _dequantized(spec: str, x: Array, kernel: QuantizedArray) -> Array:
    """The product by XLA."""
    dims = _dims(spec, kernel)
    if dims.summed != dims.ins:  # latent attention uses a kernel the other way too
        return matmul.einsum(spec, x, kernel.layout.from_rows(_values(kernel, x.dtype)))
    rows_spec = f"{dims.x},{dims.lead}{dims.outs}{dims.ins}->{dims.y}"
    if _multiplies(kernel):
        codes, scale = _rounded(x, dims.axes, kernel.activations)
        weights = kernel.layout.split(kernel.planes[0])
        accumulator = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
        y = jnp.einsum(rows_spec, codes, weights, preferred_element_type=accumulator).astype(jnp.float32)
        scale = _aligned(scale.squeeze(dims.axes), dims.kept, dims.y)
        return (y * scale * _aligned(kernel.scale[..., 0], dims.lead + dims.outs, dims.y)).astype(x.dtype)
    if kernel.activations != "none":
        x = _round_through(x, dims.axes, kernel.activations)
    return matmul.einsum(rows_spec, x, kernel.layout.split(_values(kernel, x.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(spec: str, x: Array, kernel: QuantizedArray) -> Array:
    """As `_dequantized`, with no values in memory; inputs that are rounded to 8 bits are multiplied as such."""
    dims = _dims(spec, kernel)
    if kernel.activations == "fp8_e4m3":
        x = _round_through(x, dims.axes, kernel.activations)
    inputs_as: Literal["none", "int8"] = "int8" if kernel.activations == "int8" else "none"
    y = native.product(rows(spec, x).astype(jnp.float32), _flat(kernel), inputs_as=inputs_as)
    sizes = dict(zip(dims.x, x.shape, strict=True)) | dict(zip(dims.outs, kernel.layout.out_shape, strict=True))
    split = y.reshape([sizes[dim] for dim in dims.kept + dims.outs])
    return split.transpose([(dims.kept + dims.outs).index(dim) for dim in dims.y]).astype(x.dtype)


_native.defvjp(
    lambda spec, x, kernel: (_native(spec, x, kernel), (x, kernel)),
    lambda spec, residuals, dy: jax.vjp(functools.partial(_dequantized, spec), *residuals)[1](dy),
)


def _values(kernel: QuantizedArray, dtype: Any) -> Array:
    """As `quantized.dequantize_rows`."""
    return _native_values(kernel).astype(dtype) if _is_native(kernel) else quantized.dequantize_rows(kernel, dtype)


@jax.custom_vjp
def _native_values(kernel: QuantizedArray) -> Array:
    values = native.dequantize(_flat(kernel), num_inputs=kernel.layout.num_inputs)
    return values.reshape(*kernel.scale.shape[:-1], -1)


_native_values.defvjp(
    lambda kernel: (_native_values(kernel), kernel),
    lambda kernel, dy: jax.vjp(quantized.dequantize_rows, kernel)[1](dy),
)


def _most_rows(kernel: QuantizedArray) -> float:
    """Rows of inputs up to which `_native` is the faster: with more, values are best made once, for XLA's product."""
    if kernel.activations != "int8":
        return 16
    return math.inf if kernel.format.group_size is None else 32


def _is_native(kernel: QuantizedArray) -> bool:
    format = kernel.format
    kind = native.Kind(format.dtype, kernel.layout.num_inputs, format.group_size)
    return native.is_available(kind)


def _flat(kernel: QuantizedArray) -> native.Rows:
    """All rows, of all kernels and outputs, in one dimension."""
    planes, scale, zero = jax.tree.map(
        lambda array: array.reshape(-1, array.shape[-1]), (kernel.planes, kernel.scale, kernel.zero)
    )
    return native.Rows(planes, scale, zero, kernel.format.bits)


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
    return x_MD, kernel.layout.from_rows(_values(kernel, x_MD.dtype))


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
