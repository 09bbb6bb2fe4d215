"""Tokenizers in GGUF's metadata: SentencePiece's vocabularies (`llama`) and byte-level BPE (`gpt2`).

How a byte-level BPE splits text before it merges is a name in GGUF, which llama.cpp has its own code for; here it is
the form that `tokenizer.json` files of such models have.

Source: llama.cpp, `src/llama-vocab.cpp` and `convert_hf_to_gguf_update.py`; GGUF's specification, "Tokenizer".
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import sentencepiece_model
from gptjax.interop.gguf.file import GgufFile
from gptjax.interop.sentencepiece_model import Pieces, PieceType

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_OTHER_ENDS = ("eot_token_id", "eom_token_id")

_WORDS = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_ENDS = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_MARKS = " ?[^\\s\\p{L}\\p{N}]+"
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_FRONT = "[^\\r\\n\\p{L}\\p{N}]?"
_CASES = (f"{_FRONT}{_UPPER}*{_LOWER}+", f"{_FRONT}{_UPPER}+{_LOWER}*")
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_SYMBOLS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    f"| ?[\\p{{P}}\\p{{S}}]+[\\r\\n]*|{_ENDS}"
)
_GPT2, _DIGITS = "GPT-2's own", "digits"  # what has a name in `tokenizer.json` too

_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    "llama-bpe": (f"{_SUFFIXES}|{_WORDS}|\\p{{N}}{{1,3}}|{_MARKS}[\\r\\n]*|{_ENDS}",),
    "qwen2": (f"{_SUFFIXES}|{_WORDS}|\\p{{N}}|{_MARKS}[\\r\\n]*|{_ENDS}",),
    "gpt-4o": (f"{_CASES[0]}{_SUFFIXES}?|{_CASES[1]}{_SUFFIXES}?|\\p{{N}}{{1,3}}|{_MARKS}[\\r\\n/]*|{_ENDS}",),
    "tekken": (f"{_CASES[0]}|{_CASES[1]}|\\p{{N}}|{_MARKS}[\\r\\n/]*|{_ENDS}",),
    "deepseek-v3": ("\\p{N}{1,3}", _CJK, _SYMBOLS),
}
"""By `tokenizer.ggml.pre`: patterns that cut the text one after the other."""
# Names for the same.
_ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm", "refact": "smollm", "command-r": "smollm",
    "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2", "jina-es": "gpt-2", "jina-de": "gpt-2",
    "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
_MARKS_APART = ("gpt-4o", "tekken")  # llama.cpp's own form of these patterns leaves combining marks out of words
_KEEPS_WHOLE = ("llama-bpe", "tekken")  # a word that is a token is not merged from its parts


def read(header: GgufFile) -> Tokenizer | None:
    """The tokenizer of a file; None where it has none.

    Raises:
      ValueError: if it is of a kind that is not supported, or its parts disagree.
    """
    values = {key.removeprefix(_PREFIX): value for key, value in header.metadata.items() if key.startswith(_PREFIX)}
    values["chat_template"] = header.metadata.get(_TEMPLATE)
    kind = values.get("model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    tokens, types = _vocabulary(header, values)
    values |= {"tokens": tokens, "types": types}
    try:
        if kind == "llama":
            return _sentencepiece(values)
        if kind == "gpt2":
            return _byte_level(values)
    except ValueError as error:
        raise ValueError(f"{header.path}: its tokenizer: {error}") from error
    raise ValueError(f"{header.path}: {_PREFIX}model: got {kind!r}, expected llama, gpt2 or none")


def _vocabulary(header: GgufFile, values: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens, types = values.get("tokens"), values.get("token_type")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{header.path}: {_PREFIX}tokens: missing; expected a list of strings")
    if types is None:
        types = np.full(len(tokens), int(PieceType.NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ValueError(f"{header.path}: {_PREFIX}token_type: expected {len(tokens)} numbers, as many as tokens")
    kinds = types.tolist()
    # What fills the vocabulary up to the rows of the embedding.
    while tokens and kinds[-1] == PieceType.UNUSED and tokens[-1] == _filler(len(tokens) - 1):
        tokens, kinds = tokens[:-1], kinds[:-1]
    for name in (*_IDS.values(), *_OTHER_ENDS):
        id = values.get(name)
        if id is not None and not (isinstance(id, int) and 0 <= id < len(tokens)):
            raise ValueError(f"{header.path}: {_PREFIX}{name}: got {id!r}, expected 0 to {len(tokens) - 1}")
    return tokens, kinds


def _filler(id: int) -> str:
    return f"[PAD{id}]"


def _sentencepiece(values: Mapping[str, Any]) -> Tokenizer:
    scores = values.get("scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(values["tokens"]):
        raise ValueError(f"{_PREFIX}scores: expected {len(values['tokens'])} numbers, as many as tokens")
    charsmap = values.get("precompiled_charsmap", np.zeros(0, np.uint8))
    types = list(values["types"])
    ids = {name: values.get(key) for name, key in _IDS.items()}
    if PieceType.UNKNOWN not in types:
        types[ids["unk"] or 0] = PieceType.UNKNOWN
    for name in ("bos", "eos", "pad"):
        id = ids[name]
        if id is not None and types[id] == PieceType.UNKNOWN:
            ids[name] = None  # SentencePiece has no such thing
        elif id is not None:
            types[id] = PieceType.CONTROL
    tokenizer = sentencepiece_model.build(
        Pieces(
            texts=values["tokens"],
            scores=scores[: len(values["tokens"])].tolist(),
            types=types,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            add_dummy_prefix=values.get("add_space_prefix", True),
            remove_extra_whitespaces=values.get("remove_extra_whitespaces", False),
            charsmap=np.asarray(charsmap).astype(np.uint8).tobytes(),
        )
    )
    has_start = values.get("add_bos_token", True)
    ends = _other_ends(values)
    if has_start and values["chat_template"] is None and not ends:
        return tokenizer
    # A SentencePiece model has no place for these.
    from gptjax.interop import tokenizer_json

    content, special = tokenizer_json.of(tokenizer)
    return _huggingface(values, content, special, has_start=has_start)


def _byte_level(values: Mapping[str, Any]) -> Tokenizer:
    tokens, types, merges = values["tokens"], list(values["types"]), values.get("merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge for merge in merges):
        raise ValueError(f"{_PREFIX}merges: expected a list of pairs with a space between")
    pre = values.get("pre", "default")
    name = _ALIASES.get(pre, pre)
    if name not in _SPLITS:
        known = ", ".join([*_SPLITS, *_ALIASES])
        raise ValueError(f"{_PREFIX}pre: got {pre!r}, expected one of {known}; how it splits text is not known here")
    for key in (*_IDS.values(), *_OTHER_ENDS):
        if key in values:  # some files have them among the others; llama.cpp takes them for what they are
            types[values[key]] = PieceType.CONTROL
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": tokens[id], **flags, "special": kind == PieceType.CONTROL}
        for id, kind in enumerate(types)
        if kind in (PieceType.CONTROL, PieceType.USER_DEFINED)
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    model = {
        "type": "BPE",
        "ignore_merges": name in _KEEPS_WHOLE,
        "vocab": vocabulary,
        "merges": [merge.split(" ", 1) for merge in merges],
    }
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{_PREFIX}tokens: {len(tokens) - len(vocabulary)} of them are there twice")
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(name, add_prefix_space=values.get("add_space_prefix", False)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    special = {f"{name}_token": tokens[values[key]] for name, key in _IDS.items() if key in values}
    return _huggingface(values, content, special, has_start=values.get("add_bos_token", name == "llama-bpe"))


def _pre_tokenizer(name: str, *, add_prefix_space: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    for split in _SPLITS[name]:
        if split == _DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif split != _GPT2:
            steps.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    steps.append(
        {
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": True,
            "use_regex": _GPT2 in _SPLITS[name],
        }
    )
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


def _huggingface(
    values: Mapping[str, Any], content: Mapping[str, Any], special: Mapping[str, str], *, has_start: bool
) -> Tokenizer:
    from gptjax.data import huggingface
    from gptjax.interop import tokenizer_json

    start = values.get(_IDS["bos"]) if has_start else None
    post_processor = None if start is None else tokenizer_json.start_template(start, values["tokens"][start])
    return huggingface.make(
        huggingface.Description(
            tokenizer={**content, "post_processor": post_processor},
            special_tokens=special,
            other_eos_ids=_other_ends(values),
            chat_template=values["chat_template"],
        )
    )


def _other_ends(values: Mapping[str, Any]) -> tuple[int, ...]:
    found = [values[name] for name in _OTHER_ENDS if name in values and values[name] != values.get("eos_token_id")]
    return tuple(dict.fromkeys(found))


def write(tokenizer: Tokenizer | None, *, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer.

    Args:
      vocab_size: the model's, which a shorter vocabulary is filled up to.

    Raises:
      ValueError: if it is one of those kinds, but llama.cpp cannot run it.
    """
    if tokenizer is None or tokenizer.kind in ("bytes", "characters"):
        if tokenizer is not None:
            logging.warning("gguf: written without its tokenizer: llama.cpp has none of kind %s", tokenizer.kind)
        return {_PREFIX + "model": "none"}
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, expected at most the model's {vocab_size}")
    if tokenizer.kind == "sentencepiece":
        keys = _from_pieces(sentencepiece_model.take_apart(tokenizer))
    else:
        keys = _from_description(json.loads(tokenizer.serialized)["tokenizer"], tokenizer)
    size = len(keys["tokens"])
    keys["tokens"] = [*keys["tokens"], *(_filler(id) for id in range(size, vocab_size))]
    keys["token_type"] = [*keys["token_type"], *[int(PieceType.UNUSED)] * (vocab_size - size)]
    if "scores" in keys:
        keys["scores"] = [*keys["scores"], *[-10_000.0] * (vocab_size - size)]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    keys |= {_IDS[name]: id for name, id in ids.items() if id is not None}
    keys["add_bos_token"] = tokenizer.start_id is not None and tokenizer.start_id == tokenizer.bos_id
    keys["add_eos_token"] = False
    others = getattr(tokenizer, "other_eos_ids", ())
    keys |= dict(zip(_OTHER_ENDS, others, strict=False))
    template = getattr(tokenizer, "chat_template", None)
    found = {_PREFIX + name: value for name, value in keys.items()}
    return found if template is None else found | {_TEMPLATE: template}


def _from_pieces(pieces: Pieces) -> dict[str, Any]:
    if pieces.remove_extra_whitespaces or pieces.charsmap:
        logging.warning(
            "gguf: the tokenizer normalises text (spaces in a row become one, or Unicode is composed), which llama.cpp "
            "does not do for models of this kind: such texts get other ids there"
        )
    return {
        "model": "llama",
        "tokens": list(pieces.texts),
        "scores": [float(score) for score in pieces.scores],
        "token_type": [int(kind) for kind in pieces.types],
        "add_space_prefix": pieces.add_dummy_prefix,
        "remove_extra_whitespaces": pieces.remove_extra_whitespaces,
    } | ({"precompiled_charsmap": pieces.charsmap} if pieces.charsmap else {})


def _from_description(content: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a `tokenizer.json` with a BPE, over bytes or with a fall-back to them."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"the tokenizer is a {model['type']}; llama.cpp runs a tokenizer.json only if it is a BPE")
    tokens = [_filler(id) for id in range(tokenizer.vocab_size)]
    types = [int(PieceType.UNUSED)] * len(tokens)
    for text, id in model["vocab"].items():
        tokens[id], types[id] = text, int(PieceType.NORMAL)
    for entry in content.get("added_tokens") or []:
        kind = PieceType.CONTROL if entry["special"] else PieceType.USER_DEFINED
        tokens[entry["id"]], types[entry["id"]] = entry["content"], int(kind)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        return _with_scores(content, tokens, types, merges, space=tokenizer.has_dummy_prefix)
    if any(" " in part for merge in merges for part in merge):
        raise ValueError("the tokenizer merges tokens with spaces in them, which GGUF cannot say")
    _check_normalizer(content.get("normalizer"))
    name, space = _split_of(content.get("pre_tokenizer"))
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in merges],
        "add_space_prefix": space,
    }


def _with_scores(
    content: Mapping[str, Any], tokens: list[str], types: list[int], merges: Sequence[Sequence[str]], *, space: bool
) -> dict[str, Any]:
    """SentencePiece's form, in which what is merged first has the higher score."""
    unknown = content["model"].get("unk_token")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for id, token in enumerate(tokens):
        if token == unknown:
            types[id] = int(PieceType.UNKNOWN)
        elif types[id] == PieceType.NORMAL:
            types[id] = int(PieceType.BYTE) if _BYTE.fullmatch(token) else types[id]
            tokens[id] = token.replace(" ", _SPACE)
    if PieceType.UNKNOWN not in types or PieceType.BYTE not in types:
        raise ValueError("the tokenizer has no unknown token or no bytes to fall back to, which llama.cpp needs")
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "add_space_prefix": space}


def known_difference(tokenizer: Tokenizer, text: str) -> str | None:
    """Why llama.cpp gives a text other ids than a `tokenizer.json` does; None if it is not known to."""
    content = json.loads(tokenizer.serialized)["tokenizer"]
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        return "a genuine U+2581, which llama.cpp takes for a space" if _SPACE in text else None
    if content.get("normalizer") and unicodedata.normalize("NFC", text) != text:
        return "Unicode that the tokenizer composes, which llama.cpp does not do"
    marked = any(unicodedata.category(character).startswith("M") for character in text)
    if marked and _split_of(content.get("pre_tokenizer"))[0] in _MARKS_APART:
        return "combining marks, which llama.cpp parts from their letters"
    return None


def _check_normalizer(normalizer: Any) -> None:
    """Of a byte-level BPE: llama.cpp has none, and text is nearly always composed already."""
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise ValueError(f"the tokenizer normalises text, which llama.cpp does not do: {json.dumps(normalizer)[:200]}")
    if normalizer is not None:
        logging.warning("gguf: the tokenizer composes Unicode (NFC), which llama.cpp does not do")


def _split_of(pre_tokenizer: Any) -> tuple[str, bool]:
    """The name of llama.cpp's that splits the same, and whether a space is put before the text."""
    for name in _SPLITS:
        for space in (False, True):
            if _steps(_pre_tokenizer(name, add_prefix_space=space)) == _steps(pre_tokenizer):
                return name, space
    raise ValueError(
        f"the tokenizer splits text in a way that is none of {', '.join(_SPLITS)}, which llama.cpp knows: "
        f"{json.dumps(pre_tokenizer)[:300]}"
    )


def _steps(step: Any) -> list[Any]:
    """A pre-tokenizer's steps, without what makes no difference to ids."""
    if not isinstance(step, Mapping):
        return [step]
    if step.get("type") == "Sequence":
        return [each for inner in step["pretokenizers"] for each in _steps(inner)]
    if step.get("type") == "ByteLevel":
        return [("ByteLevel", step.get("add_prefix_space", True), step.get("use_regex", True))]
    return [dict(step)]
