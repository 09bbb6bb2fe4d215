"""Where the tensors of a Hugging Face model lie in a GGUF file, and what llama.cpp's converter did to them.

Names come from the `gguf` package. What is not a matter of names is a `Move`: rows of queries and keys in pairs,
Gemma's norms from 1 and not 0, GPT-2's transposed kernels, gpt-oss's gate and up apart, all experts in one tensor.

Source: llama.cpp, `convert_hf_to_gguf.py` and the `gguf` package's `tensor_mapping.py`.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.interop.gguf.file import GgufFile, GgufTensor, gguf_package
from gptjax.interop.layout import Shape
from gptjax.interop.pairs import to_halves, to_pairs
from gptjax.interop.table import Unit
from gptjax.nn.config import MLAConfig, ModelConfig

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Move:
    """Between one tensor of Hugging Face's and one or several of GGUF's.

    Attributes:
      shapes: of GGUF's, from that of Hugging Face's.
      turned: which of GGUF's have rows that are not all inputs of an output.
    """

    to_hf: Callable[[Sequence[np.ndarray]], np.ndarray]
    to_gguf: Callable[[np.ndarray], list[np.ndarray]]
    shapes: Callable[[Shape], list[Shape]] = lambda shape: [shape]
    turned: tuple[int, ...] = ()


SAME = Move(lambda parts: parts[0], lambda value: [value])
FROM_ONE = Move(
    lambda parts: parts[0] - np.asarray(1, parts[0].dtype),
    lambda value: [value.astype(np.float32) + np.float32(1)],
)
"""Scales stored as they multiply, Hugging Face's being their offset from 1; that sum is rounded to float32."""
TRANSPOSED = Move(
    lambda parts: parts[0].swapaxes(-1, -2),
    lambda value: [value.swapaxes(-1, -2)],
    lambda shape: [(*shape[:-2], shape[-1], shape[-2])],
)
"""The last two dimensions the other way round."""


def pairs(num_heads: int) -> Move:
    """Rows of heads, for a rotation of neighbouring pairs."""
    return Move(
        lambda parts: to_halves(parts[0], num_heads=num_heads),
        lambda value: [to_pairs(value, num_heads=num_heads)],
    )


def taken_apart(inner: Move) -> Move:
    """Two tensors, which take turns in Hugging Face's last dimension; `inner` then applies to each."""

    def to_hf(parts: Sequence[np.ndarray]) -> np.ndarray:
        first, second = (inner.to_hf([part]) for part in parts)
        return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)

    return Move(
        to_hf,
        lambda value: [inner.to_gguf(value[..., start::2])[0] for start in (0, 1)],
        lambda shape: 2 * inner.shapes((*shape[:-1], shape[-1] // 2)),
    )


def absorbed_heads(attention: MLAConfig) -> Move:
    """DeepSeek's joint projection as two: that of keys `[N, R, nope]`, transposed, and of values `[N, v, R]`."""
    num_heads, nope, v = attention.num_heads, attention.nope_head_dim, attention.v_head_dim

    def to_hf(parts: Sequence[np.ndarray]) -> np.ndarray:
        joined = np.concatenate([parts[0].swapaxes(1, 2), parts[1]], axis=1)
        return joined.reshape(-1, joined.shape[-1])

    def to_gguf(value: np.ndarray) -> list[np.ndarray]:
        heads = value.reshape(num_heads, nope + v, -1)
        return [heads[:, :nope].swapaxes(1, 2), heads[:, nope:]]

    def shapes(shape: Shape) -> list[Shape]:
        return [(num_heads, shape[1], nope), (num_heads, v, shape[1])]

    return Move(to_hf, to_gguf, shapes, turned=(0,))


Moves = Mapping[str, Move | Callable[[ModelConfig], Move]]
"""By the ending of Hugging Face's name; others stay the same."""


def _move_of(name: str, moves: Moves, model: ModelConfig) -> Move:
    move = next((move for ending, move in moves.items() if name.endswith(ending)), SAME)
    return move if isinstance(move, Move) else move(model)


@dataclass(frozen=True)
class Place:
    """One tensor of Hugging Face's: the tensors of GGUF that it is made of.

    Attributes:
      names: of GGUF's.
      expert: where each of them holds all experts, the index of this one; None elsewhere.
      num_experts: how many such a tensor holds; 0 elsewhere.
    """

    names: tuple[str, ...]
    move: Move
    shape: Shape
    expert: int | None = None
    num_experts: int = 0

    def whole_shapes(self) -> list[Shape]:
        """Of the tensors in the file."""
        experts = (self.num_experts,) if self.num_experts else ()
        return [(*experts, *shape) for shape in self.move.shapes(self.shape)]


def places(
    architecture: str,
    units: Sequence[Unit],
    model: ModelConfig,
    *,
    moves: Moves,
    renamed: Mapping[str, tuple[str, ...]],
    present: Collection[str] = (),
) -> dict[str, Place]:
    """Where each tensor of a model lies, by its Hugging Face name.

    Args:
      units: of the model's family.
      present: names of a file; one of the package's table among them is taken before a renamed one.
      renamed: GGUF's names of a layer's tensors that the package's table does not have, by Hugging Face's within the
        layer.
    """
    gguf = gguf_package()
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(key, model.num_layers)
    experts = collections.Counter(_EXPERT.sub(".experts.", u.theirs) for u in units if _EXPERT.search(u.theirs))
    found = {}
    for unit in units:
        merged = _EXPERT.sub(".experts.", unit.theirs)
        expert = _EXPERT.search(unit.theirs)
        own = table.get_name(merged, try_suffixes=(".weight", ".bias"))
        names = _renamed(merged, renamed)
        move = _move_of(unit.theirs, moves, model)
        if names is not None and own in present:
            names, move = None, SAME
        if names is None and own is None:
            raise ValueError(f"{unit.theirs}: llama.cpp has no such tensor in architecture {architecture}")
        found[unit.theirs] = Place(
            names=names or (own,),
            move=move,
            shape=unit.theirs_shape,
            expert=int(expert[1]) if expert else None,
            num_experts=experts[merged],
        )
    return found


def _renamed(name: str, renamed: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None or layer[2] not in renamed:
        return None
    return tuple(f"blk.{layer[1]}.{one}" for one in renamed[layer[2]])


@dataclass(frozen=True)
class MovedTensor:
    """A tensor of Hugging Face's that is read from a GGUF file."""

    parts: tuple[GgufTensor, ...]
    place: Place
    dtype: np.dtype

    @property
    def shape(self) -> Shape:
        return self.place.shape

    def read(self) -> np.ndarray:
        return self.place.move.to_hf([part.read() for part in self.parts]).astype(self.dtype, copy=False)


def find(file: GgufFile, wanted: Mapping[str, Place], *, ignored: Sequence[str]) -> dict[str, MovedTensor]:
    """The tensors of a file under Hugging Face's names.

    Args:
      ignored: patterns of names that have no values of their own, or were read elsewhere.

    Raises:
      ValueError: naming the tensor that is missing, unknown, or of another shape.
    """
    found = {}
    for name, place in wanted.items():
        parts = []
        for theirs, shape in zip(place.names, place.whole_shapes(), strict=True):
            tensor = file.tensors.get(theirs)
            if tensor is None:
                raise ValueError(f"{file.path}: {theirs}: missing; expected {list(shape)} from the metadata")
            if tensor.shape != shape:
                raise ValueError(
                    f"{file.path}: {theirs}: got {list(tensor.shape)}, expected {list(shape)} from the metadata"
                )
            parts.append(tensor if place.expert is None else tensor.part(place.expert))
        found[name] = MovedTensor(tuple(parts), place, parts[0].dtype)
    names = {theirs for place in wanted.values() for theirs in place.names}
    unknown = [n for n in file.tensors if n not in names and not any(re.fullmatch(p, n) for p in ignored)]
    if unknown:
        raise ValueError(
            f"{file.path}: {unknown[0]}: {list(file.tensors[unknown[0]].shape)} is no tensor of this architecture "
            f"with this metadata ({len(unknown)} unknown)"
        )
    return found
