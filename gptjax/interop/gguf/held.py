"""Which tensors of a file are blocks of a checkpoint's own codes, and what becomes of the others in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from absl import logging

from gptjax.interop.checkpoint import CheckpointTensors
from gptjax.interop.gguf import blocks
from gptjax.interop.gguf.names import Place
from gptjax.interop.stored import Scales

FewBits = Literal["blocks", "blocks_or_f16", "blocks_or_f32", "floats"]


@dataclass
class _Whole:
    """A tensor of the file, and the scales of all that it is made of: None for what is floats."""

    row_size: int
    is_turned: bool
    source: str
    parts: list[Scales | None] = field(default_factory=list)


def kinds(places: Mapping[str, Place], tensors: CheckpointTensors, *, few_bits: FewBits) -> dict[str, str]:
    """The types in GGUF of the tensors in few bits, by name: of blocks, or `F16` and `F32` where none holds them.

    Raises:
      ValueError: naming a tensor that no block holds, if it is not to be written otherwise.
    """
    found, refused = {}, {}
    for name, whole in _wholes(places, tensors).items() if few_bits != "floats" else ():
        kind, reason = _kind(whole)
        if kind:
            found[name] = kind
        elif few_bits == "blocks":
            refused[name] = f"{whole.source}: no block of GGUF holds its numbers: {reason}"
        else:
            found[name] = few_bits.removeprefix("blocks_or_").upper()
            logging.info("gguf: %s is written in %s: %s", name, found[name].lower(), reason)
    if refused:
        more = f" ({len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(
            f"{next(iter(refused.values()))}{more}; leave it in floats when quantising (leave), or write such tensors "
            "as floats: few_bits blocks_or_f32 (the same values) or blocks_or_f16"
        )
    return found


def _wholes(places: Mapping[str, Place], tensors: CheckpointTensors) -> dict[str, _Whole]:
    found: dict[str, _Whole] = {}
    for source, place in places.items():
        if not tensors[source].is_in_few_bits:
            continue
        scales = tensors[source].scales()
        for side, (name, shape) in enumerate(zip(place.names, place.move.shapes(place.shape), strict=True)):
            whole = found.setdefault(name, _Whole(shape[-1], side in place.move.turned, source))
            whole.parts += scales
    return found


def _kind(whole: _Whole) -> tuple[str, str]:
    parts = [part for part in whole.parts if part is not None]
    if len(parts) < len(whole.parts):
        return "", "a part of it is floats"
    if whole.is_turned:
        return "", "llama.cpp has it the other way round, where scales change within a row"
    return blocks.kind_of(parts, row_size=whole.row_size)
