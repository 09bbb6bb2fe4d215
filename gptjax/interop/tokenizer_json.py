"""Our tokenizers as a `tokenizer.json` of the `tokenizers` package, with the same ids.

Pieces of SentencePiece are written with plain spaces, not with U+2581 for them: a genuine U+2581
is then spelled in bytes, as `data.tokenizer` does it, and survives.

Where ids can differ from ours:

    characters   a character outside the alphabet: ours refuses it, the package leaves it out
    unigram      a text that spells a special token or a byte piece, such as `<s>` or `<0x0A>`
    nfkc models  grapheme clusters of several characters, which the package normalises as one
    user-defined pieces: a text between two of them that is, whole, a piece that no merges lead to
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import sentencepiece

from gptjax.data import pieces as pieces_lib
from gptjax.data.pieces import SPACE
from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import sentencepiece_model
from gptjax.interop.sentencepiece_model import PieceType

_UNIGRAM, _BPE = 1, 2
# Their parts are gone through in pairs; trained ones have 16 characters at most.
_MAX_PIECE = 1 << 10
_BYTES_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}


def of(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's content, and the texts of special tokens by transformers' names.

    Raises:
      ValueError: for a SentencePiece model that cannot be expressed.
    """
    if tokenizer.kind == "bytes":
        return _bytes(tokenizer)
    if tokenizer.kind == "characters":
        return _characters(tokenizer), {}
    if tokenizer.kind == "sentencepiece":
        return _sentencepiece(tokenizer)
    raise ValueError(f"tokenizer of kind {tokenizer.kind}: it is a tokenizer.json already")


def special(id: int, text: str) -> dict[str, Any]:
    """An entry of `added_tokens`: a special token, found in the text as it is."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": text, **flags}


def byte_level_bpe(vocabulary: dict[str, int], merges: list[Any], *, add_prefix_space: bool) -> dict[str, Any]:
    """The content for GPT-2's `vocab.json` and `merges.txt`."""
    level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
    return _content(_bpe(vocabulary, merges), pre_tokenizer=level, decoder=level)


def with_first_space_alone(content: dict[str, Any]) -> dict[str, Any]:
    """The same, but a space is put before the text alone, and not behind each special token in it (`legacy=False`)."""
    *others, prefix = content["normalizer"]["normalizers"]
    assert prefix["content"] == " ", "the prefix is put last"
    space = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}
    isolate = content["pre_tokenizer"]
    steps = [space] if isolate is None else [space, isolate]
    return {
        **content,
        "normalizer": {"type": "Sequence", "normalizers": others},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }


def start_template(id: int, text: str) -> dict[str, Any]:
    """A post-processor that puts one special token before a text."""

    def part(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": text, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    tokens = {text: {"id": text, "ids": [id], "tokens": [text]}}
    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": tokens,
    }


def _content(
    model: dict[str, Any],
    *,
    decoder: dict[str, Any],
    added: list[dict[str, Any]] | None = None,
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    start: tuple[int, str] | None = None,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added or [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if start is None else start_template(*start),
        "decoder": decoder,
        "model": model,
    }


def _bpe(vocabulary: dict[str, int], merges: list[Any], **options: Any) -> dict[str, Any]:
    defaults = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **defaults, **flags, **options, "vocab": vocabulary, "merges": merges}


def _bytes(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, str]]:
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id]
    names = dict(zip(_BYTES_SPECIAL.values(), ids, strict=True))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = dict(sorted(pieces_lib.byte_characters().items(), key=lambda item: item[1]))
    added = [special(id, text) for text, id in names.items() if id is not None]
    start = (tokenizer.bos_id, _BYTES_SPECIAL["bos_token"]) if tokenizer.bos_id is not None else None
    content = _content(_bpe(vocabulary, []), pre_tokenizer=level, decoder=level, added=added, start=start)
    return content, dict(_BYTES_SPECIAL)


def _characters(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = {piece.decode(): id for id, piece in enumerate(tokenizer.pieces)}
    return _content(_bpe(vocabulary, []), decoder={"type": "Fuse"})


def _sentencepiece(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, str]]:
    proto = _proto(tokenizer.serialized)
    texts = [
        p.piece if p.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.BYTE) else p.piece.replace(SPACE, " ")
        for p in proto.pieces
    ]
    if len(set(texts)) < len(texts):
        raise ValueError("tokenizer: two pieces differ only in how a space is written; it cannot be expressed")
    falls_back = proto.trainer_spec.byte_fallback
    user_defined = [
        text for piece, text in zip(proto.pieces, texts, strict=True) if piece.type == PieceType.USER_DEFINED
    ]
    added = [
        special(id, texts[id])
        for id, piece in enumerate(proto.pieces)
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL)
    ]
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}] if falls_back else []
    decoders.append({"type": "Fuse"})
    if tokenizer.has_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    start_id = tokenizer.start_id
    content = _content(
        _model(proto, texts, ignore_merges=bool(user_defined)),
        added=added,
        normalizer={"type": "Sequence", "normalizers": list(_normalizers(proto, tokenizer))},
        pre_tokenizer=_isolate(user_defined),
        decoder={"type": "Sequence", "decoders": decoders},
        start=None if start_id is None else (start_id, texts[start_id]),
    )
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.unk_id,
        "pad_token": tokenizer.pad_id,
        "mask_token": tokenizer.mask_id,
    }
    return content, {name: texts[id] for name, id in ids.items() if id is not None}


def _proto(serialized: bytes) -> Any:
    proto = sentencepiece_model.parse(serialized)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    whole = [piece.piece for piece in proto.pieces if piece.type == PieceType.USER_DEFINED]
    if any(len(piece.piece) > _MAX_PIECE for piece in proto.pieces):
        raise ValueError(f"SentencePiece model: it has a piece of more than {_MAX_PIECE:,} characters")
    for wrong, name in (
        (trainer.model_type not in (_UNIGRAM, _BPE), "model_type is neither unigram nor bpe"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix is set"),
        (not normalizer.escape_whitespaces, "escape_whitespaces is not set"),
        (any(piece.type == PieceType.UNUSED for piece in proto.pieces), "it has unused pieces"),
        (any(" " in text for text in whole), "a user-defined piece has a space, and so is never found"),
        (trainer.model_type == _UNIGRAM and _overlap(whole), "user-defined pieces of a unigram model can overlap"),
        (whole != _normalized(proto, whole), "user-defined pieces are kept from its normalisation"),
    ):
        if wrong:
            raise ValueError(f"SentencePiece model: {name}, which a tokenizer.json cannot express")
    return proto


def _overlap(texts: list[str]) -> bool:
    """Whether one is in another, or begins as one ends: a text can then be cut into them in two ways."""
    starts = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    joined = "\0".join(texts)
    return any(joined.count(text) > 1 for text in texts) or any(
        text[at:] in starts for text in texts for at in range(1, len(text))
    )


def _normalized(proto: Any, texts: list[str]) -> list[str]:
    """What the normaliser makes of texts of which it does not know that they are pieces."""
    normalizer = sentencepiece.SentencePieceNormalizer(
        model_proto=proto.SerializeToString(),
        add_dummy_prefix=False,
        escape_whitespaces=True,
        remove_extra_whitespaces=False,
    )
    return [normalizer.Normalize(text) for text in texts]


def _model(proto: Any, texts: list[str], *, ignore_merges: bool) -> dict[str, Any]:
    falls_back = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        scored = [[text, piece.score] for text, piece in zip(texts, proto.pieces, strict=True)]
        unk_id = next(id for id, piece in enumerate(proto.pieces) if piece.type == PieceType.UNKNOWN)
        return {"type": "Unigram", "unk_id": unk_id, "vocab": scored, "byte_fallback": falls_back}
    unk = next(text for text, piece in zip(texts, proto.pieces, strict=True) if piece.type == PieceType.UNKNOWN)
    return _bpe(
        {text: id for id, text in enumerate(texts)},
        [[left, right] for *_, left, right in sorted(_merges(proto, texts))],
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=falls_back,
        ignore_merges=ignore_merges,
    )


def _merges(proto: Any, texts: list[str]) -> Iterator[tuple[float, int, int, str, str]]:
    """Every two pieces that make a third, which SentencePiece joins by the score of the third, highest first."""
    normal = {text: id for id, text in enumerate(texts) if proto.pieces[id].type == PieceType.NORMAL}
    for text, id in normal.items():
        for at in range(1, len(text)):
            if text[:at] in normal and text[at:] in normal:
                # Longest left part first: of equal pairs in a row SentencePiece joins the leftmost.
                yield -proto.pieces[id].score, id, -at, text[:at], text[at:]


def _normalizers(proto: Any, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
    falls_back = proto.trainer_spec.byte_fallback
    if not falls_back:
        yield replace({"String": SPACE}, " ")
    if spec.remove_extra_whitespaces:
        yield replace({"Regex": r"\A +| +\z"}, "")
        yield replace({"Regex": " {2,}"}, " ")
    if tokenizer.has_dummy_prefix:
        # Ours puts none before a text that begins with bytes for U+2581.
        yield replace({"Regex": rf"\A(?!{SPACE})" if falls_back else r"\A(?=[\s\S])"}, " ")


def _isolate(user_defined: list[str]) -> dict[str, Any] | None:
    """Pieces that are always whole, the longest first."""
    if not user_defined:
        return None
    pattern = "|".join(re.escape(text) for text in sorted(user_defined, key=len, reverse=True))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
