"""The bytes that each id of a `tokenizer.json` stands for.

Its decoder says how the strings of its vocabulary are written. Two ways can be read:

    ByteLevel     one character per byte: those of Latin-1 that print stand for themselves, the other 68
                  for U+0100 on, in order
    the others    as text, with U+2581 for a space (Replace or Metaspace) and `<0xAB>` for a byte (ByteFallback)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[str, int]:
    """The byte of each character of the ByteLevel alphabet.

    Source: GPT-2's encoder (Radford et al. 2019, section 2.2): printable characters are kept as they are.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


@dataclass(frozen=True)
class Decoding:
    """How a decoder reads a vocabulary.

    Attributes:
      to_bytes: of one string of the vocabulary.
      added_to_bytes: of a token that is matched before the vocabulary is.
      strips_space: whether the space that a text begins with is taken off.
    """

    to_bytes: Callable[[str], bytes]
    added_to_bytes: Callable[[str], bytes]
    strips_space: bool


def decoding_of(content: Mapping[str, Any]) -> Decoding:
    """Reads the `decoder` of a `tokenizer.json`.

    Raises:
      ValueError: if it cannot be expressed as bytes of each id, joined.
    """
    steps = list(_steps(content.get("decoder")))
    names = [step.get("type") for step in steps]
    if [name for name in names if name != "Fuse"] == ["ByteLevel"]:
        return Decoding(_byte_level(), _text("", falls_back=False), strips_space=False)
    spaces, falls_back, strips = "", False, False
    for at, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": " "} if len(pattern) == 1:
                spaces += pattern
            case {"type": "Metaspace", "replacement": str(replacement)} if len(replacement) == 1:
                spaces += replacement
                strips |= _prepends(step)
            case {"type": "ByteFallback"}:
                falls_back = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if "Fuse" in names[:at]:
                strips |= bool(start)
            case _:
                raise ValueError(
                    f"decoder: {step.get('type')!r} cannot be expressed as the bytes of each token, joined; expected "
                    "ByteLevel, or Replace or Metaspace with ByteFallback, Fuse and a Strip of the first space"
                )
    if not steps:
        raise ValueError("decoder: missing; expected ByteLevel, Metaspace, ByteFallback or Fuse")
    to_bytes = _text(spaces, falls_back=falls_back)
    return Decoding(to_bytes, to_bytes, strips)


def pieces(
    decoding: Decoding, vocabulary: Mapping[str, int], *, added: Mapping[int, str], empty: Iterable[int]
) -> tuple[bytes, ...]:
    """The bytes of each id; none for ids that nothing has.

    Args:
      vocabulary: the id of each string.
      added: the string of tokens that are matched before the vocabulary is.
      empty: ids that stand for no text.
    """
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, id in vocabulary.items():
        found[id] = decoding.to_bytes(text)
    for id, text in added.items():
        found[id] = decoding.added_to_bytes(text)
    for id in empty:
        found[id] = b""
    return tuple(found)


def _steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The decoder, or what a sequence of them holds; without recursion, as a file may nest them without end."""
    left = [decoder]
    while left:
        step = left.pop()
        if not isinstance(step, Mapping):
            continue
        if step.get("type") != "Sequence":
            yield step
        elif isinstance(step.get("decoders"), list):
            left.extend(reversed(step["decoders"]))


def _prepends(step: Mapping[str, Any]) -> bool:
    """Whether a Metaspace put a space before the text; older files say it in another way."""
    return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"


def _byte_level() -> Callable[[str], bytes]:
    byte_of = byte_characters()

    def to_bytes(text: str) -> bytes:
        try:
            return bytes([byte_of[character] for character in text])
        except KeyError:  # a token that was put there by hand, as text
            return text.encode(errors="replace")

    return to_bytes


def _text(spaces: str, *, falls_back: bool) -> Callable[[str], bytes]:
    table = str.maketrans(dict.fromkeys(spaces, " "))

    def to_bytes(text: str) -> bytes:
        byte = _BYTE.fullmatch(text) if falls_back else None
        return bytes([int(byte[1], 16)]) if byte else text.translate(table).encode(errors="replace")

    return to_bytes
