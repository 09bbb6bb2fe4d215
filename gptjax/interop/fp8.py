"""Weights in float8 with a scale for each block, as DeepSeek-V3 and Qwen3-FP8 are published: unpacked to bfloat16.

`X` of PyTorch's `[out, in]` is in e4m3, and `X_scale_inv` holds what the values of each block of `weight_block_size`
are multiplied by; blocks at the lower and the right edge may be cut. The products are rounded to bfloat16, which is
what transformers and DeepSeek's own script make of them, takes half of float32's bytes, and is what layers that were
left as they are have, with which they are one array here. Activations are not rounded, as on hardware with float8.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; transformers, `integrations/finegrained_fp8.py`, which takes
cut blocks for smaller ones, and so refuses or misreads sizes that are no multiple of a block's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from gptjax.interop.layout import Shape
from gptjax.interop.reader import ConfigReader
from gptjax.interop.source import Readable

_SCALES = "_scale_inv"
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALE_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_VALUE_OF_CODE = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)


def unpacked(found: Mapping[str, Readable], section: ConfigReader) -> dict[str, Readable]:
    """The tensors with `X` for each pair of `X` and `X_scale_inv`.

    Args:
      section: `quantization_config`.

    Raises:
      ValueError: if the config has another scheme, one of a pair lacks the other, or their shapes do not fit.
    """
    section.require("fmt", "e4m3", default="e4m3")
    section.require("activation_scheme", "dynamic", default="dynamic")
    section.require("expert_dtype", "fp8", default="fp8")
    # Which tensors are packed, and how scales are stored, is seen from the tensors.
    section.ignore(["modules_to_not_convert", "ignored_layers", "modules_to_convert", "scale_fmt", "dequantize"])
    block = section.take("weight_block_size", list, [128, 128])
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"{section.path}: weight_block_size: got {block!r:.80}, expected two sizes, of out and in")
    tensors = dict(found)
    for name in found:
        if name.endswith(_SCALES):
            base = name.removesuffix(_SCALES)
            tensors[base] = _checked(base, tensors.get(base), tensors.pop(name), (block[0], block[1]))
    for name, tensor in tensors.items():
        if tensor.dtype == _E4M3:
            raise ValueError(f"{name}{_SCALES}: missing; expected it beside {name}, which is in float8")
    return tensors


def _checked(name: str, values: Readable | None, scales: Readable, block: tuple[int, int]) -> Packed:
    if values is None:
        raise ValueError(f"{name}: missing; expected it beside {name}{_SCALES}")
    if values.dtype != _E4M3 or len(values.shape) != 2:
        raise ValueError(
            f"{name}: got {list(values.shape)} of {values.dtype}, expected [out, in] of {_E4M3}, since it has scales"
        )
    grid = [-(-size // part) for size, part in zip(values.shape, block, strict=True)]
    if list(scales.shape) != grid or scales.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{name}{_SCALES}: got {list(scales.shape)} of {scales.dtype}, expected {grid} of float32 or bfloat16, one "
            f"for each block of {list(block)} of {list(values.shape)}"
        )
    return Packed(name, values, scales, block)


@dataclass(frozen=True)
class Packed:
    """A tensor `[out, in]` that is unpacked when it is read."""

    name: str
    values: Readable
    scales: Readable
    block: tuple[int, int]

    @property
    def shape(self) -> Shape:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def read(self) -> np.ndarray:
        """The values.

        Raises:
          ValueError: if a scale is not a finite number.
        """
        scales = self.scales.read().astype(np.float32)
        if not np.isfinite(scales).all():
            raise ValueError(f"{self.name}{_SCALES}: has a scale that is not a finite number")
        codes = self.values.read().view(np.uint8)
        found = np.empty(self.shape, np.uint16)
        height, width = self.block
        for (row, column), scale in np.ndenumerate(scales):
            with np.errstate(over="ignore"):  # as transformers: what bfloat16 cannot hold is infinite
                bits_of_code = (_VALUE_OF_CODE * scale).astype(self.dtype).view(np.uint16)
            part = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
            found[part] = bits_of_code[codes[part]]
        return found.view(self.dtype)
