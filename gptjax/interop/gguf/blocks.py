"""Kernels in few bits as blocks of ggml's with the very same values, made from codes and never from floats.

A block is 32 consecutive inputs of an output, of which ours with one scale may be a multiple:

    Q4_0, Q5_0, Q8_0    w = d * (code - 2 ** (bits - 1)), d in float16
    Q4_1                w = d * code + m, d and m in float16

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gptjax.interop.stored import Scales, Steps, most_steps

BLOCK = 32


def kind_of(parts: Sequence[Scales], *, row_size: int) -> tuple[str, str]:
    """The smallest of ggml's types for what a tensor is made of, or why there is none.

    Args:
      row_size: inputs of an output.

    Returns:
      `(kind, reason)`, of which one is empty.
    """
    formats = {part.format for part in parts}
    sizes = {format.group_size for format in formats if format.group_size is not None}
    if row_size % BLOCK:
        return "", f"its rows of {row_size} are no blocks of {BLOCK}"
    if wrong := sorted(size for size in sizes if size % BLOCK):
        return "", f"its groups of {wrong[0]} are no blocks of {BLOCK}"
    if any(format.dtype == "fp8_e4m3" for format in formats):
        return "", "blocks have whole numbers, not fp8"
    if not all(_in_float16(part.scale) for part in parts):
        return "", "its scales have more digits than the float16 of blocks"
    low, high = (limit(most_steps(format)[side] for format in formats) for side, limit in ((0, min), (1, max)))
    if -8 <= low and high <= 7:
        return "Q4_0", ""
    if all(format.bits <= 4 for format in formats) and all(_in_float16(part.offset) for part in parts):
        return "Q4_1", ""
    if -16 <= low and high <= 15:
        return "Q5_0", ""
    if -128 <= low and high <= 127:
        return "Q8_0", ""
    return "", f"its numbers from {low} to {high} are none of 8 bits"


def pack(rows: Steps, kind: str) -> np.ndarray:
    """The blocks of a tensor's rows, of a kind that `kind_of` found.

    Args:
      rows: `[outputs, inputs]`.

    Returns:
      Bytes, `[outputs, bytes of a row]`.
    """
    outputs = rows.steps.shape[0]
    steps = rows.steps.reshape(outputs, -1, BLOCK)
    scales = rows.scale.reshape(steps.shape)
    d = scales[..., :1]
    assert (scales == d).all(), "a block has one scale"
    return np.concatenate([part.view(np.uint8) for part in _PACK[kind](steps, d)], axis=-1).reshape(outputs, -1)


def _q8_0(steps: np.ndarray, d: np.ndarray) -> list[np.ndarray]:
    return [_float16(d), steps.astype(np.int8)]


def _q4_0(steps: np.ndarray, d: np.ndarray) -> list[np.ndarray]:
    return [_float16(d), _nibbles(steps + 8)]


def _q4_1(steps: np.ndarray, d: np.ndarray) -> list[np.ndarray]:
    least = steps.min(-1, keepdims=True)
    return [_float16(d), _float16(d * least.astype(np.float32)), _nibbles(steps - least)]


def _q5_0(steps: np.ndarray, d: np.ndarray) -> list[np.ndarray]:
    codes = steps + 16
    fifth = ((codes >> 4).astype(np.uint32) << np.arange(BLOCK, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return [_float16(d), fifth[..., None], _nibbles(codes & 15)]


_PACK: Mapping[str, Callable[[np.ndarray, np.ndarray], list[np.ndarray]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
}
KINDS = tuple(_PACK)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """The first half of a block in the low bits, the second in the high ones."""
    low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    return (low | high << 4).astype(np.uint8)


def _in_float16(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def _float16(values: np.ndarray) -> np.ndarray:
    assert _in_float16(values), "the kind was chosen so"
    return np.ascontiguousarray(values, "<f2")
