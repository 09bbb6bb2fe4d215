"""The kind `huggingface`: a `tokenizer.json`, run by the `tokenizers` package.

Serialised it is one JSON object, `Description`: that file, and what other files of its folder say.
`encode` puts no special tokens around a text, but as in the package, and so in `transformers`, the
text of a special token within it becomes that token, unless `split_special_tokens` says otherwise:
text of strangers can so hold control tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.data import pieces as pieces_lib
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer

KIND = "huggingface"
# Sixteen times the largest in use: an id beyond makes a table that fits no memory.
_MAX_VOCAB = 1 << 22
_MODELS = ("BPE", "Unigram")
# What reads the prefix that is put before a text, at its front.
_PROBE = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a tokenizer of this kind is made of.

    Attributes:
      tokenizer: the content of `tokenizer.json`; its post-processor puts the start token before a text, or none.
      special_tokens: texts by transformers' names, such as `bos_token`.
      other_eos_ids: that end a text besides `eos_token`.
      split_special_tokens: whether the text of a special token is taken for text.
      chat_template: in Jinja.
      settings: what else `tokenizer_config.json` says, for export.
    """

    tokenizer: Mapping[str, Any]
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    other_eos_ids: tuple[int, ...] = ()
    split_special_tokens: bool = False
    chat_template: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def make(description: Description) -> Tokenizer:
    """A tokenizer from its parts.

    Raises:
      ValueError: naming what is wrong or cannot be expressed.
      ImportError: without the package.
    """
    values = {"kind": KIND, **vars(description)}
    with _refused("tokenizer.json"):  # nested too deeply
        serialized = json.dumps(values, separators=(",", ":")).encode()
    return from_description(values, serialized)


def from_description(values: Mapping[str, Any], serialized: bytes) -> Tokenizer:
    """Rebuilds a tokenizer from its JSON object; `serialized` is the same in bytes. Raises as `make`."""
    description = parse(values)
    content = description.tokenizer
    _check_model(content)
    decoding = pieces_lib.decoding_of(content)
    backend = _backend(content)
    backend.encode_special_tokens = description.split_special_tokens
    ids = {name: backend.token_to_id(text) for name, text in description.special_tokens.items()}
    unk = content["model"].get("unk_token")
    named = {*ids.values(), backend.token_to_id(unk) if isinstance(unk, str) else None}
    pieces = _pieces(backend, decoding, empty={id for id in named if id is not None})
    _check_ids(description.other_eos_ids, len(pieces))
    prefix = _prefix(backend)
    bos_id = ids.get("bos_token")
    if len(prefix) > 1 or (prefix and bos_id not in (None, prefix[0])):
        raise ValueError(
            f"tokenizer.json: post_processor: puts the ids {prefix} before a text, expected only bos_token={bos_id}"
        )
    return Tokenizer(
        kind="huggingface",
        pieces=pieces,
        serialized=serialized,
        encode_fn=lambda texts, num_threads: _encode(backend, texts, num_threads),
        pad_id=ids.get("pad_token"),
        bos_id=prefix[0] if prefix else bos_id,
        eos_id=ids.get("eos_token"),
        unk_id=ids.get("unk_token"),
        mask_id=ids.get("mask_token"),
        has_dummy_prefix=decoding.strips_space,
        has_start=bool(prefix),
        other_eos_ids=tuple(id for id in description.other_eos_ids if id != ids.get("eos_token")),
        special_tokens=description.special_tokens,
        chat_template=description.chat_template,
    )


def description_of(tokenizer: Tokenizer) -> Description:
    """The parts of a tokenizer of this kind."""
    return parse(json.loads(tokenizer.serialized))


def parse(values: Mapping[str, Any]) -> Description:
    """The description that a JSON object holds.

    Raises:
      ValueError: naming the key that is missing, unknown or of another type.
    """
    expected: dict[str, type | tuple[type, ...]] = {
        "tokenizer": dict,
        "special_tokens": dict,
        "other_eos_ids": (list, tuple),
        "split_special_tokens": bool,
        "chat_template": (str, type(None)),
        "settings": dict,
    }
    found = {name: value for name, value in values.items() if name != "kind"}
    for name in found.keys() ^ expected.keys():
        raise ValueError(f"not a {KIND} tokenizer: {name}: {'unknown' if name in found else 'missing'} key")
    for name, kind in expected.items():
        if not isinstance(found[name], kind):
            raise ValueError(f"not a {KIND} tokenizer: {name}: got {type(found[name]).__name__}, expected {kind}")
    for name, text in found["special_tokens"].items():
        if not isinstance(text, str) or not name.endswith("_token"):
            raise ValueError(f"not a {KIND} tokenizer: special_tokens: {name}: expected x_token with a string")
    return Description(**{**found, "other_eos_ids": tuple(found["other_eos_ids"])})


def _check_model(content: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: for a model whose ids are not bytes of the text, or that is no model.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError("tokenizer.json: model: missing; expected a file that the tokenizers package wrote")
    kind = model.get("type", "BPE" if "merges" in model else None)  # the first files had no such key
    if kind not in _MODELS:
        raise ValueError(
            f"tokenizer.json: model.type: got {kind!r}, expected {' or '.join(_MODELS)}; others do not keep the "
            "text whole, so it could not be read back"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(f"tokenizer.json: model.{name}: got {model[name]!r}, expected none; it is not supported")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict | list) or not 0 < len(vocabulary) <= _MAX_VOCAB:
        raise ValueError(f"tokenizer.json: model.vocab: expected 1 to {_MAX_VOCAB:,} entries")


def _check_ids(ids: Sequence[Any], size: int) -> None:
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < size:
            raise ValueError(f"eos_token_id: got {id!r}, expected ids of the vocabulary, 0 to {size - 1}")


def _backend(content: Mapping[str, Any]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizer.json needs the tokenizers package; pip install 'gptjax[tokenizers]'") from error

    def load(**changes: Any) -> Any:
        with _refused("tokenizer.json"):
            return tokenizers.Tokenizer.from_str(json.dumps({**content, **changes}))

    try:
        backend = load()
    except ValueError as error:
        raise ValueError(f"{error}{_suspect(content, load)}") from error
    # A file may ask for them, but it is not for it to drop text.
    backend.no_truncation()
    backend.no_padding()
    _check_added(backend, content)
    return backend


def _suspect(content: Mapping[str, Any], load: Callable[..., Any]) -> str:
    """Names the part without which the package can run the file; it does not say so itself."""
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        with contextlib.suppress(ValueError):
            load(**{name: None})
            return f"; it could without {name}: {json.dumps(content[name]):.200}"
    return ""


def _check_added(backend: Any, content: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: for a token that the package, which counts them itself, gives another id than the file does.
    """
    for each in content.get("added_tokens") or ():
        given = backend.token_to_id(each["content"])
        if given != each["id"]:
            raise ValueError(
                f"tokenizer.json: added_tokens: {each['content']!r}: got id {each['id']}, expected {given}, the "
                "vocabulary's or the first that is free"
            )


def _pieces(backend: Any, decoding: pieces_lib.Decoding, *, empty: set[int]) -> tuple[bytes, ...]:
    """The bytes of each id; none of special tokens and of those in `empty`."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) >= _MAX_VOCAB:
        raise ValueError(f"tokenizer.json: {len(vocabulary)} tokens, expected 1 to {_MAX_VOCAB:,}, with ids below that")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(
            "tokenizer.json: model.vocab: two pieces have the same id, so one of them could not be read back"
        )
    added = backend.get_added_tokens_decoder()
    special = {id for id, token in added.items() if token.special}
    # A token that is matched in normalised text is a string of that here, with the space that it may begin with.
    strings = {id: backend.id_to_token(id) for id in added}
    return pieces_lib.pieces(decoding, vocabulary, added=strings, empty=special | empty)


def _prefix(backend: Any) -> list[int]:
    """The tokens that the post-processor puts before a text."""
    with _refused("tokenizer.json"):
        bare, whole = (backend.encode(_PROBE, add_special_tokens=special).ids for special in (False, True))
    before = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0) if bare else 0
    return whole[:before]


def _encode(backend: Any, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
    for text in texts:
        if not text.isascii():
            tokenizer_lib.utf8(text)
    with _refused("tokenizer"):
        if num_threads == 1 or len(texts) == 1:
            found = [backend.encode(text, add_special_tokens=False) for text in texts]
        else:
            found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(each.ids, np.int32) for each in found]


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """What the Rust library raises, and its panics, which are no `Exception`s, as a ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: the tokenizers package cannot run it: {error}") from error
