"""Kernels in few bits: what is stored, and the float values that it stands for.

A kernel maps inputs to outputs. Stored are its rows, one an output, each of all its inputs, as whole numbers (codes)
below `2 ** bits`: `w = scale * (code - zero)`. Scales and zeros are those of `group_size` consecutive inputs, or of the
whole row. A zero is a code, so that a pruned weight is exactly 0 in every format.

Codes are packed without gaps: those of 3 bits are a plane of their low two and one of their high bit. In a plane of p
bits a block of 32 codes is `4 * p` bytes, of which byte j holds codes j, j + 4 p, j + 8 p, ... from its low bits up;
for 4 bits this is the order of GGUF's Q4_0, which vector units unpack with one shift. Rows that are no multiple of 32
have blocks of 16 or 8, and are filled up to a multiple of 8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.nn.formats import MIN_GROUP_SIZE, WeightFormat
from gptjax.types import Array

_BLOCKS = (32, 16, 8)
_PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)
_FLOAT32_DIGITS, _FLOAT16_DIGITS = 24, 11


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which dimensions of a kernel are inputs and which outputs; the rest, before them, count separate kernels.

    Attributes:
      in_shape, out_shape: their sizes.
      in_first: whether inputs come before outputs, as in all but the embedding.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_first: bool = True

    @property
    def num_inputs(self) -> int:
        return math.prod(self.in_shape)

    def turned(self) -> Layout:
        """Of the transposed kernel, which has the same rows."""
        return dataclasses.replace(self, in_first=not self.in_first)

    def to_rows(self, kernel: Array) -> Array:
        """`[*lead, *in, *out]` to `[*lead, *out, inputs]`."""
        num_in, num_out = len(self.in_shape), len(self.out_shape)
        lead = kernel.ndim - num_in - num_out
        if self.in_first:
            kernel = jnp.moveaxis(kernel, range(lead, lead + num_in), range(-num_in, 0))
        return kernel.reshape(*kernel.shape[: lead + num_out], self.num_inputs)

    def split(self, rows: Array) -> Array:
        """`[*lead, *out, inputs]` to `[*lead, *out, *in]`; a shard has fewer of the first inputs."""
        return rows.reshape(*rows.shape[:-1], -1, *self.in_shape[1:])

    def from_rows(self, rows: Array) -> Array:
        """The inverse of `to_rows`."""
        num_in, num_out = len(self.in_shape), len(self.out_shape)
        lead = rows.ndim - 1 - num_out
        kernel = self.split(rows)
        return jnp.moveaxis(kernel, range(-num_in, 0), range(lead, lead + num_in)) if self.in_first else kernel


@flax.struct.dataclass
class QuantizedArray:
    """A kernel in few bits; stands in a tree of parameters where the float kernel would.

    Attributes:
      planes: uint8 `[*lead, *out, bytes of a row]` each; one int8 plane for symmetric 8 bits, one float8 for fp8.
      scale: `[*lead, *out, groups]`; float16, and float32 for whole rows.
      zero: uint8 codes of the value 0, like `scale`; None where it is the middle code.
      format: of the codes.
      activations: what the kernel's inputs are rounded to, row by row, when it is multiplied with them.
    """

    planes: tuple[Array, ...]
    scale: Array
    zero: Array | None
    layout: Layout = flax.struct.field(pytree_node=False)
    format: WeightFormat = flax.struct.field(pytree_node=False)
    activations: str = flax.struct.field(pytree_node=False, default="none")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for."""
        lead = self.scale.shape[: self.scale.ndim - 1 - len(self.layout.out_shape)]
        ins, outs = self.layout.in_shape, self.layout.out_shape
        return (*lead, *ins, *outs) if self.layout.in_first else (*lead, *outs, *ins)

    @property
    def ndim(self) -> int:
        return len(self.shape)


@flax.struct.dataclass
class RoundedKernel:
    """A float kernel that every product rounds first, passing gradients through.

    Attributes:
      format: None leaves the kernel as it is.
      activations: as for `QuantizedArray`.
    """

    kernel: Array
    layout: Layout = flax.struct.field(pytree_node=False)
    format: WeightFormat | None = flax.struct.field(pytree_node=False)
    activations: str = flax.struct.field(pytree_node=False, default="none")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    def rounded(self) -> Array:
        """The kernel in its format's numbers."""
        return self.kernel if self.format is None else fake_quantize(self.kernel, self.format, self.layout)


Kernel = Array | QuantizedArray | RoundedKernel
"""What products take; while a model is calibrated also `taps.Tapped`."""


def is_quantized(leaf: Any) -> bool:
    """For `jax.tree.map(is_leaf=...)`: a kernel in few bits is one leaf."""
    return isinstance(leaf, QuantizedArray)


def transposed(table_VD: Kernel) -> Kernel:
    """The `[D, V]` kernel of a table `[V, D]`; rows in few bits are those of both."""
    if isinstance(table_VD, QuantizedArray):
        return dataclasses.replace(table_VD, layout=table_VD.layout.turned())
    if isinstance(table_VD, RoundedKernel):
        kernel = jnp.swapaxes(table_VD.kernel, 0, 1)
        return dataclasses.replace(table_VD, kernel=kernel, layout=table_VD.layout.turned())
    return jnp.swapaxes(table_VD, 0, 1)


def look_up(table_VD: Kernel, index: Array, dtype: Any) -> Array:
    """The rows `[..., D]` of a table."""
    if isinstance(table_VD, QuantizedArray):
        return dequantize_rows(jax.tree.map(lambda array: array[index], table_VD), dtype)
    table = table_VD.rounded() if isinstance(table_VD, RoundedKernel) else table_VD
    return table.astype(dtype)[index]


def check(format: WeightFormat, layout: Layout, *, path: str) -> None:
    """Whether a kernel can have a format.

    Raises:
      ValueError: naming the kernel and the size that does not divide.
    """
    inputs, group = layout.num_inputs, format.group_size
    if group is not None and inputs % group:
        divisors = [size for size in range(MIN_GROUP_SIZE, inputs + 1) if inputs % size == 0]
        fitting = [size for size in divisors if size <= 256] or divisors
        raise ValueError(
            f"{path}: group_size={group} does not divide its {inputs} inputs; "
            + (f"expected one of {', '.join(map(str, fitting))}, or 0" if fitting else "expected 0")
            + ", a scale for all of a row"
        )


def group_scale(rows: Array, format: WeightFormat) -> tuple[Array, Array | None]:
    """Scales and zeros that just reach the largest values of each group, rounded to what is stored.

    Args:
      rows: float32 `[..., outputs, inputs]`.

    Returns:
      `(scale, zero)`, each `[..., outputs, groups]`; zero is None where the format is symmetric.
    """
    grouped = _grouped(rows.astype(jnp.float32), format)
    if format.symmetric:
        return stored_scale(jnp.abs(grouped).max(-1) / _largest(format), format), None
    low, high = jnp.minimum(grouped.min(-1), 0.0), jnp.maximum(grouped.max(-1), 0.0)

    def spread_over(num_steps: float) -> tuple[Array, Array, Array]:
        scale = stored_scale((high - low) / num_steps, format)
        zero = jnp.clip(jnp.round(-low / _nonzero(scale)), 0, _largest(format)).astype(jnp.uint8)
        error = jnp.square(decode(encode(rows, scale, zero, format), scale, zero, format) - rows)
        return scale, zero, _grouped(error, format).sum(-1)

    # Rounding the zero can leave the last code without a value: what was rounded so is found to be on that grid.
    all_codes, one_less = spread_over(_largest(format)), spread_over(_largest(format) - 1)
    on_grid = one_less[2] == 0
    return jnp.where(on_grid, one_less[0], all_codes[0]), jnp.where(on_grid, one_less[1], all_codes[1])


def stored_scale(scale: Array, format: WeightFormat) -> Array:
    """A scale as it is stored: with few enough digits that its product with a code is exact in float32.

    Formats of others keep scales in float16, and of 4 bits the product with the zero as well: what is stored here has
    so few digits that they hold the very values. It costs 2 ** -12 of a scale, 2 ** -8 of those beside such a zero.
    """
    digits = _FLOAT16_DIGITS - (format.bits if format.bits == 4 and not format.symmetric else 0)
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    dropped = jnp.uint32(_FLOAT32_DIGITS - digits)
    rounded = (bits + (jnp.uint32(1) << (dropped - 1))) >> dropped << dropped
    stored = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return stored if format.group_size is None else stored.astype(jnp.float16)


def encode(rows: Array, scale: Array, zero: Array | None, format: WeightFormat) -> Array:
    """The nearest codes of float values `[..., outputs, inputs]`: int32, or float8 for fp8."""
    grouped = _grouped(rows.astype(jnp.float32), format) / _nonzero(scale.astype(jnp.float32))[..., None]
    if format.dtype == "fp8_e4m3":
        return jnp.clip(grouped, -_FP8_MAX, _FP8_MAX).astype(jnp.float8_e4m3fn).reshape(rows.shape)
    middle = _middle(format) if zero is None else zero.astype(jnp.float32)[..., None]
    lowest = 1.0 if format.symmetric and format.dtype == "int8" else 0.0  # -127 to 127: products may be negated
    codes = jnp.clip(jnp.round(grouped) + middle, lowest, 2.0**format.bits - 1)
    return codes.astype(jnp.int32).reshape(rows.shape)


def decode(codes: Array, scale: Array, zero: Array | None, format: WeightFormat) -> Array:
    """The float32 values of codes as `encode` gives them."""
    grouped = _grouped(codes, format).astype(jnp.float32)
    if format.dtype != "fp8_e4m3":
        grouped = grouped - (_middle(format) if zero is None else zero.astype(jnp.float32)[..., None])
    return (grouped * scale.astype(jnp.float32)[..., None]).reshape(codes.shape)


def pack(
    codes: Array,
    scale: Array,
    zero: Array | None,
    *,
    format: WeightFormat,
    layout: Layout,
    activations: str = "none",
) -> QuantizedArray:
    """The leaf of codes `[*lead, *out, inputs]` as `encode` gives them."""
    if format.dtype == "fp8_e4m3":
        planes: tuple[Array, ...] = (codes,)
    elif format.dtype == "int8" and format.symmetric:
        planes = ((codes - 128).astype(jnp.int8),)
    else:
        planes, shift = (), 0
        for bits in _PLANES[format.bits]:
            planes += (_pack_plane((codes >> shift) & (2**bits - 1), bits),)
            shift += bits
    return QuantizedArray(planes, scale, zero, layout, format, activations)


def unpack(leaf: QuantizedArray) -> Array:
    """The codes `[*lead, *out, inputs]`; the inverse of `pack`."""
    format = leaf.format
    if format.dtype == "fp8_e4m3":
        return leaf.planes[0]
    if format.dtype == "int8" and format.symmetric:
        return leaf.planes[0].astype(jnp.int32) + 128
    codes, shift = jnp.zeros((), jnp.int32), 0
    for plane, bits in zip(leaf.planes, _PLANES[format.bits], strict=True):
        codes = codes | (_unpack_plane(plane, bits).astype(jnp.int32) << shift)
        shift += bits
    return codes[..., : leaf.layout.num_inputs]


def quantize(kernel: Array, *, format: WeightFormat, layout: Layout, activations: str = "none") -> QuantizedArray:
    """Rounds a float kernel to the nearest codes, with scales that just reach its largest values."""
    rows = layout.to_rows(kernel)
    scale, zero = group_scale(rows, format)
    codes = encode(rows, scale, zero, format)
    return pack(codes, scale, zero, format=format, layout=layout, activations=activations)


def dequantize_rows(leaf: QuantizedArray, dtype: Any = jnp.float32) -> Array:
    """The values as `[*lead, *out, inputs]`."""
    return decode(unpack(leaf), leaf.scale, leaf.zero, leaf.format).astype(dtype)


def dequantize(leaf: QuantizedArray, dtype: Any = jnp.float32) -> Array:
    """The values as the kernel that it stands for."""
    return leaf.layout.from_rows(dequantize_rows(leaf, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_quantize(kernel: Array, format: WeightFormat, layout: Layout) -> Array:
    """`dequantize(quantize(kernel))` whose gradient is that of the identity (Bengio et al. 2013, arXiv:1308.3432)."""
    rows = layout.to_rows(kernel)
    scale, zero = group_scale(rows, format)
    return layout.from_rows(decode(encode(rows, scale, zero, format), scale, zero, format)).astype(kernel.dtype)


fake_quantize.defvjp(
    lambda kernel, format, layout: (fake_quantize(kernel, format, layout), None),
    lambda format, layout, _, gradient: (gradient,),
)


def num_bytes(leaf: QuantizedArray) -> int:
    """What it takes to store it."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))


def abstract(shape: tuple[int, ...], format: WeightFormat, layout: Layout, *, activations: str) -> QuantizedArray:
    """The leaf of a kernel of this shape, as `jax.ShapeDtypeStruct`s."""
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(quantize, format=format, layout=layout, activations=activations), kernel)


def with_activations(leaf: QuantizedArray, activations: str) -> QuantizedArray:
    """The same kernel for inputs that are rounded to `activations`."""
    return dataclasses.replace(leaf, activations=activations)


def _grouped(rows: Array, format: WeightFormat) -> Array:
    """`[..., inputs]` as `[..., groups, inputs of a group]`."""
    size = rows.shape[-1] if format.group_size is None else format.group_size
    return rows.reshape(*rows.shape[:-1], -1, size)


def _middle(format: WeightFormat) -> float:
    return 2.0 ** (format.bits - 1)


def _largest(format: WeightFormat) -> float:
    """The code, or its distance from the middle, that the largest value of a group gets."""
    if format.dtype == "fp8_e4m3":
        return _FP8_MAX
    return 2.0 ** (format.bits - 1) - 1 if format.symmetric else 2.0**format.bits - 1


def _nonzero(scale: Array) -> Array:
    return jnp.where(scale == 0, 1, scale)


def _pack_plane(codes: Array, bits: int) -> Array:
    if bits == 8:
        return codes.astype(jnp.uint8)
    per_byte = 8 // bits
    if padding := -codes.shape[-1] % _BLOCKS[-1]:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    block = _block(codes.shape[-1])
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte, block // per_byte).astype(jnp.uint8)
    shifts = (bits * jnp.arange(per_byte, dtype=jnp.uint8))[:, None]
    packed = (parts << shifts).sum(-2, dtype=jnp.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def _unpack_plane(plane: Array, bits: int) -> Array:
    if bits == 8:
        return plane
    per_byte = 8 // bits
    bytes_of_block = _block(plane.shape[-1] * per_byte) // per_byte
    parts = plane.reshape(*plane.shape[:-1], -1, 1, bytes_of_block)
    shifts = (bits * jnp.arange(per_byte, dtype=jnp.uint8))[:, None]
    codes = (parts >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*plane.shape[:-1], -1)


def _block(inputs: int) -> int:
    return next(size for size in _BLOCKS if inputs % size == 0)
