"""SentencePiece models from a list of pieces, as other formats keep them, and back."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer


class PieceType(enum.IntEnum):
    """Numbered as in `sentencepiece_model.proto`, which GGUF's `tokenizer.ggml.token_type` follows."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A byte-pair vocabulary as SentencePiece sees it.

    Attributes:
      texts: of each id, a space being U+2581.
      scores: the higher, the earlier a piece is merged.
      types: a `PieceType` for each.
      bos_id, eos_id, pad_id: None where there is none; the unknown piece is known by its type.
      charsmap: of SentencePiece's normaliser; empty changes nothing.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""


def build(pieces: Pieces) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
      ValueError: if SentencePiece refuses it: two pieces alike, no unknown piece, byte pieces missing.
    """
    proto = parse(b"")
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True):
        proto.pieces.add(piece=text, score=float(score), type=int(kind))
    unknown = [id for id, kind in enumerate(pieces.types) if kind == PieceType.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"a SentencePiece vocabulary has 1 unknown piece, got {len(unknown)}")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(pieces.texts)
    trainer.byte_fallback = PieceType.BYTE in pieces.types
    trainer.unk_id = unknown[0]
    trainer.unk_piece = pieces.texts[unknown[0]]
    for name in ("bos", "eos", "pad"):
        id = getattr(pieces, f"{name}_id")
        if id is not None and not 0 <= id < len(pieces.texts):
            raise ValueError(f"{name} token {id}: expected 0 to {len(pieces.texts) - 1}, the ids of the vocabulary")
        setattr(trainer, f"{name}_id", -1 if id is None else id)
        if id is not None:
            # SentencePiece finds these by their text, and only among control pieces.
            setattr(trainer, f"{name}_piece", pieces.texts[id])
    normalizer.name = "identity" if not pieces.charsmap else "user_defined"
    normalizer.precompiled_charsmap = pieces.charsmap
    normalizer.add_dummy_prefix = pieces.add_dummy_prefix
    normalizer.remove_extra_whitespaces = pieces.remove_extra_whitespaces
    normalizer.escape_whitespaces = True
    return tokenizer_lib.from_bytes(proto.SerializeToString())


def take_apart(tokenizer: Tokenizer) -> Pieces:
    """The vocabulary of a tokenizer of kind `sentencepiece`.

    Raises:
      ValueError: if it merges by another rule than byte pairs.
    """
    proto = parse(tokenizer.serialized)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError("the tokenizer is a SentencePiece model of another type than BPE, which has no such form")
    return Pieces(
        texts=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        types=[piece.type for piece in proto.pieces],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        add_dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
        remove_extra_whitespaces=proto.normalizer_spec.remove_extra_whitespaces,
        charsmap=proto.normalizer_spec.precompiled_charsmap,
    )


def parse(serialized: bytes) -> Any:
    """The `ModelProto` of a SentencePiece model."""
    # Not above: it registers its messages for good, and needs protobuf, which little else here does.
    from sentencepiece import sentencepiece_model_pb2 as messages

    return messages.ModelProto.FromString(serialized)  # type: ignore[attr-defined]
