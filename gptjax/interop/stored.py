"""The parameters of a checkpoint by slices: floats as they are, kernels in few bits as what they consist of."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint import arrays
from gptjax.checkpoint import stream as array_stream
from gptjax.nn import quantized, storage, transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.formats import WeightFormat
from gptjax.nn.quantized import QuantizedArray


class Steps(NamedTuple):
    """A kernel in few bits as whole numbers of steps: `w = scale * steps`.

    Attributes:
      steps: int16, in the shape of the kernel.
      scale: float32, likewise.
    """

    steps: np.ndarray
    scale: np.ndarray


class Scales(NamedTuple):
    """What the codes of a kernel are multiplied with.

    Attributes:
      scale: float32, one a group.
      offset: `-scale * zero`, the value of code 0.
    """

    format: WeightFormat
    scale: np.ndarray
    offset: np.ndarray


Slice = np.ndarray | QuantizedArray


def float_model(model: ModelConfig) -> ModelConfig:
    """The model whose parameters are what kernels in few bits stand for."""
    return dataclasses.replace(model, quant=None)


class StoredParams:
    """What a checkpoint's `params` hold, a slice at a time; see `checkpoint.stream.ArraysReader`.

    Attributes:
      kernels: those in few bits, by path, in shapes alone.
    """

    def __init__(self, directory: pathlib.Path, model: ModelConfig, sliced_dims: Mapping[str, int]) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(transformer.abstract_params(model), is_leaf=quantized.is_quantized)
        self.kernels: dict[str, QuantizedArray] = {
            storage.name(path): leaf for path, leaf in leaves if quantized.is_quantized(leaf)
        }
        files = {name: dims for path, dims in sliced_dims.items() for name in self.files(path)}
        self._reader = array_stream.ArraysReader(directory / "params", files)

    def files(self, path: str) -> list[str]:
        """The arrays that a parameter is stored as."""
        return [f"{path}/{part}" for part in arrays.flatten(self.kernels[path])] if path in self.kernels else [path]

    def read(self, path: str, index: tuple[int, ...]) -> tuple[Slice, list[int]]:
        """`parameter[index]`, and the checksum of that part of each of its `files`."""
        parts = [self._reader.read(name, index) for name in self.files(path)]
        sums = [array_stream.bit_sum(part) for part in parts]
        if path not in self.kernels:
            return parts[0], sums
        return jax.tree.unflatten(jax.tree.structure(self.kernels[path]), parts), sums

    def scales(self, path: str, index: tuple[int, ...]) -> Scales | None:
        """Of `parameter[index]`; None if it is floats."""
        if path not in self.kernels:
            return None
        format = self.kernels[path].format
        scale = self._reader.read(f"{path}/scale", index).astype(np.float32)
        zero = 2.0 ** (format.bits - 1) if format.symmetric else self._reader.read(f"{path}/zero", index)
        return Scales(format, scale, -scale * np.asarray(zero, np.float32))


def floats_of(part: Slice) -> np.ndarray:
    """The floats; float32 where they were in few bits."""
    return np.asarray(_dequantize(part)) if isinstance(part, QuantizedArray) else part


def steps_of(part: QuantizedArray) -> Steps:
    """The codes of a kernel of whole numbers, counted from its zeros."""
    scale = np.asarray(part.scale, np.float32)
    zero = np.full(scale.shape, 2 ** (part.format.bits - 1)) if part.zero is None else np.asarray(part.zero)
    codes = np.asarray(_unpack(part), np.int16)
    groups = codes.reshape(*scale.shape, -1)
    counted = groups - zero.astype(np.int16)[..., None]
    spread = np.broadcast_to(scale[..., None], groups.shape)
    as_kernel = part.layout.from_rows
    return Steps(*(np.asarray(as_kernel(jnp.asarray(x.reshape(codes.shape)))) for x in (counted, spread)))


def most_steps(format: WeightFormat) -> tuple[int, int]:
    """The least and the largest number of steps that a format's kernels may have."""
    if format.dtype == "int8" and format.symmetric:
        return -127, 127
    if format.symmetric:
        return -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
    return 1 - 2**format.bits, 2**format.bits - 1


_dequantize = jax.jit(functools.partial(quantized.dequantize, dtype=jnp.float32))
_unpack = jax.jit(quantized.unpack)
