"""Products with kernels in few bits on one CPU device, several times as fast as XLA:CPU's; see `few_bits.cc`.

Kernels are given as what `nn.quantized` stores: rows of codes in planes, with scales and zeros by groups of inputs.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from gptjax.kernels.native import build
from gptjax.parallel import rules
from gptjax.parallel.mesh import platform
from gptjax.types import Array

_HANDLERS = ("product", "dequantize")
_BITS = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8}
_BLOCK = 32
_MAX_INPUTS = 1 << 16
_lock = threading.Lock()


class Kind(NamedTuple):
    """Of a kernel: numbers, inputs, and how many of these share a scale (None: all)."""

    dtype: str
    num_inputs: int
    group_size: int | None


class Rows(NamedTuple):
    """A kernel `[N, K]`.

    Attributes:
      planes: `[N, bytes of a row]` each.
      scale_NG: float16 or float32.
      zero_NG: uint8; None where the middle code is 0.
    """

    planes: tuple[Array, ...]
    scale_NG: Array
    zero_NG: Array | None
    bits: int


def is_available(kind: Kind) -> bool:
    """Whether the functions below can be used where this is called; on CPU logs, once, why not.

    XLA cannot divide them over the devices of a mesh, nor compile them for another platform.
    """
    if platform() != "cpu":
        return False
    reason = "a mesh divides them" if rules.current_mesh() is not None else _reason_against(kind)
    if reason is not None:
        _log(reason)
    return reason is None


def product(x_MK: Array, rows: Rows, *, inputs_as: Literal["none", "int8"]) -> Array:
    """`x @ rows.T`, float32 `[M, N]`.

    Args:
      x_MK: float32.
      inputs_as: `int8` multiplies each row of x rounded to 8 bits, with a scale of its own.
    """
    out = jax.ShapeDtypeStruct((x_MK.shape[0], rows.scale_NG.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(_target("product"), out, vmap_method="sequential")
    return call(x_MK, *_operands(rows), bits=rows.bits, rounds=inputs_as == "int8")


def dequantize(rows: Rows, *, num_inputs: int) -> Array:
    """The values, float32 `[N, K]`."""
    out = jax.ShapeDtypeStruct((rows.scale_NG.shape[0], num_inputs), jnp.float32)
    call = jax.ffi.ffi_call(_target("dequantize"), out, vmap_method="sequential")
    return call(*_operands(rows), bits=rows.bits)


def _reason_against(kind: Kind) -> str | None:
    dtype, num_inputs, group_size = kind
    if dtype not in _BITS or num_inputs > _MAX_INPUTS:
        return f"there are none for {dtype} with {num_inputs} inputs"
    if (dtype != "int8" and num_inputs % _BLOCK) or (group_size or _BLOCK) % _BLOCK:
        return f"{num_inputs} inputs, {group_size or 'all'} to a scale, are not whole blocks of {_BLOCK}"
    return _registered()[1]


@functools.cache
def _log(reason: str) -> None:
    logging.info("Products with kernels in few bits are XLA's, not our own faster ones: %s.", reason)


def _operands(rows: Rows) -> list[Array]:
    return [rows.scale_NG, *rows.planes] + ([] if rows.zero_NG is None else [rows.zero_NG])


def _target(name: str) -> str:
    # With the key: a program that was compiled for other handlers must not find these.
    return f"gptjax_few_bits_{name}_{_registered()[0]}"


def _registered() -> tuple[str, str | None]:
    """The key of the library, whose handlers are then known to XLA, or else why there is none."""
    with _lock:
        return _register()


@functools.cache
def _register() -> tuple[str, str | None]:
    try:
        library, key = build.library(Path(__file__).with_name("few_bits.cc"), Path(jax.ffi.include_dir()))
    except build.Unavailable as error:
        return "", str(error)
    for name in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, f"gptjax_few_bits_{name}"))
        jax.ffi.register_ffi_target(f"gptjax_few_bits_{name}_{key}", handler, platform="cpu")
    return key, None
