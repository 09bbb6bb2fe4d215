"""Weights in MXFP4, as gpt-oss is published: unpacked to bfloat16, which holds each of their values exactly.

A block is 32 values of four bits (sign, two of exponent, one of mantissa) in 16 bytes, the first of each two in
the low bits, with one scale, a power of two. Blocks lie along the input dimension of PyTorch's `[out, in]`.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from gptjax.interop.layout import Shape
from gptjax.interop.reader import ConfigReader
from gptjax.interop.source import Readable

_BLOCK_BYTES = 16
_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_BY_CODE = np.concatenate([_VALUES, -_VALUES])
_SCALE_BIAS = 127
_NOT_A_NUMBER = 255
_NUM_CODES = 16


def unpacked(found: Mapping[str, Readable], section: ConfigReader) -> dict[str, Readable]:
    """The tensors with `X` for each pair of `X_blocks` and `X_scales`.

    Args:
      section: `quantization_config`.

    Raises:
      ValueError: if one lacks the other, or their shapes are not those of blocks.
    """
    section.ignore(["modules_to_not_convert", "dequantize"])
    tensors = dict(found)
    for name in found:
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            blocks, scales = tensors.pop(name), tensors.pop(f"{base}_scales", None)
            tensors[base] = _checked(base, blocks, scales)
    return tensors


def _checked(name: str, blocks: Readable, scales: Readable | None) -> Packed:
    if scales is None:
        raise ValueError(f"{name}_scales: missing; expected it beside {name}_blocks")
    bytes_ = np.dtype(np.uint8)
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK_BYTES or blocks.dtype != bytes_:
        raise ValueError(
            f"{name}_blocks: got {list(blocks.shape)} of {blocks.dtype}, expected [experts, out, in / 32, 16] of uint8"
        )
    if tuple(scales.shape) != tuple(blocks.shape[:-1]) or scales.dtype != bytes_:
        raise ValueError(
            f"{name}_scales: got {list(scales.shape)} of {scales.dtype}, expected {list(blocks.shape[:-1])} of uint8"
        )
    return Packed(name, blocks, scales)


@dataclass(frozen=True)
class Packed:
    """A tensor `[experts, in, out]` that is unpacked when it is read."""

    name: str
    blocks: Readable
    scales: Readable

    @property
    def shape(self) -> Shape:
        experts, outputs, groups, num_bytes = self.blocks.shape
        return (experts, groups * num_bytes * 2, outputs)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def read(self) -> np.ndarray:
        """The values.

        Raises:
          ValueError: if a scale is not a number.
        """
        blocks, scales = self.blocks.read(), self.scales.read()
        if (scales == _NOT_A_NUMBER).any():
            raise ValueError(f"{self.name}_scales: has a scale that is not a number ({_NOT_A_NUMBER})")
        experts, outputs, groups, num_bytes = self.blocks.shape
        values = np.empty((experts, groups, num_bytes, 2, outputs), np.uint16)
        table = _bits_by_scale_and_code()
        for expert in range(experts):
            # The bytes are transposed, being a quarter of the values.
            codes = np.ascontiguousarray(blocks[expert].reshape(outputs, -1).T).reshape(groups, num_bytes, outputs)
            first = scales[expert].T.astype(np.uint16)[:, None] * _NUM_CODES
            values[expert, :, :, 0] = table[first + (codes & 15)]
            values[expert, :, :, 1] = table[first + (codes >> 4)]
        return values.view(self.dtype).reshape(self.shape)


def _bits_by_scale_and_code() -> np.ndarray:
    """Of each bfloat16 value; the code counts fastest."""
    with np.errstate(over="ignore"):
        values = np.ldexp(_BY_CODE, np.arange(256)[:, None] - _SCALE_BIAS).astype(ml_dtypes.bfloat16)
    return values.reshape(-1).view(np.uint16)
