"""Text to token ids and back, without loss.

A tokenizer is its serialised bytes: `load` recognises the kind from the content, and the
SHA-256 of those bytes is the fingerprint that stores and checkpoints record. Four kinds exist:

    sentencepiece   byte-pair merges over Unicode with byte fallback; `train_bpe` makes one
    bytes           the 256 byte values
    characters      one id per character of an alphabet, nothing else
    huggingface     a `tokenizer.json` of another model, in `data.huggingface`

Decoding joins the bytes of the pieces, so any id sequence decodes and text always survives the
round trip: tabs, newlines, runs of spaces, and characters never seen in training.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece
from etils import epath

from gptjax.data import chat

FILE_NAME = "tokenizer.model"

# SentencePiece writes a space as this character inside pieces, and so would decode a
# genuine one to a space; encoding spells it in byte pieces instead.
_SPACE = "\u2581"

# A model's bytes followed by these are the same model with `normalizer_spec.add_dummy_prefix = false`:
# protobuf takes the last value of a field.
_NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])

_NUM_FIXED_PIECES = 5 + 256
_TRAIN_CHUNK_CHARACTERS = 4096
# The merge queue of one call grows with the text, so long documents are encoded in parts.
_ENCODE_CHUNK_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """An immutable vocabulary; make one with `load`, `from_bytes`, `train_bpe` and the like.

    Attributes:
      kind: which algorithm encodes.
      pieces: the bytes each id stands for; empty for special ids.
      serialized: what `from_bytes` reads back.
      encode_fn: texts and a thread count to one int32 array per text.
      pad_id, bos_id, eos_id, unk_id, mask_id: special ids, None where the vocabulary has none.
      has_dummy_prefix: whether encoding puts a space before the text, which decoding takes off.
      has_start: whether texts begin with `start_id`; some models of others were trained without.
      other_eos_ids: that end a text too, such as the end of a turn.
      special_tokens: the texts of special tokens by transformers' names, such as `bos_token`.
      chat_template: a Jinja template for `apply_chat_template`.
    """

    kind: Literal["sentencepiece", "bytes", "characters", "huggingface"]
    pieces: tuple[bytes, ...]
    serialized: bytes = dataclasses.field(repr=False)
    encode_fn: Callable[[Sequence[str], int], list[np.ndarray]] = dataclasses.field(repr=False)
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    mask_id: int | None = None
    has_dummy_prefix: bool = False
    has_start: bool = True
    other_eos_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.serialized).hexdigest()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        return frozenset(id for id, piece in enumerate(self.pieces) if not piece)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens at which a model has said all; `eos_id` is the first."""
        return (() if self.eos_id is None else (self.eos_id,)) + self.other_eos_ids

    @property
    def start_id(self) -> int | None:
        """The token that documents begin with, so that their first piece can be predicted too."""
        if not self.has_start:
            return None
        return self.bos_id if self.bos_id is not None else self.eos_id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special ids.

        Raises:
          ValueError: on a lone surrogate, which is no Unicode text, or a character outside the alphabet.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text` behind `start_id`: how a document begins that a model is to continue."""
        return ([] if self.start_id is None else [self.start_id]) + self.encode(text)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[np.ndarray]:
        """One int32 array of ids per text; threads (all cores unless told) share the texts."""
        return self.encode_fn(texts, num_threads or available_cores())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids vanish and bytes that are no UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.has_dummy_prefix and text.startswith(" ") else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, which may stop in the middle of a character."""
        pieces = self.pieces
        return b"".join([pieces[id] for id in ids])

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation, which begins as its template says: it is for `encode`, not `encode_prompt`.

        See `chat.render`; `variables` are further names that the template reads, such as `tools`.
        """
        if self.chat_template is None:
            raise ValueError(f"this {self.kind} tokenizer came without a chat template; write the prompt as text")
        names = {**self.special_tokens, **variables}
        return chat.render(self.chat_template, messages, add_generation_prompt=add_generation_prompt, variables=names)

    def to_bytes(self) -> bytes:
        return self.serialized

    def __reduce__(self) -> tuple:
        return from_bytes, (self.serialized,)


def available_cores() -> int:
    """Cores this process may use, which containers and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from a file, or from `tokenizer.model` in a directory, local or gs://.

    Raises:
      ValueError: if nothing is there, or it is no tokenizer this module knows.
    """
    file = epath.Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise ValueError(f"{file}: no tokenizer there; make one with experiments.prepare_data")
    try:
        return from_bytes(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def save(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> Tokenizer:
    """Writes the tokenizer to a file, whole or not at all, and returns it.

    Raises:
      ValueError: if another tokenizer is there: what was made with it would be lost.
    """
    file = pathlib.Path(path)
    if file.exists() and load(file).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{file}: another tokenizer is already there; delete it or choose another directory")
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".writing")
    beside.write_bytes(tokenizer.serialized)
    beside.replace(file)
    return tokenizer


def from_bytes(serialized: bytes) -> Tokenizer:
    """Rebuilds a tokenizer from `Tokenizer.to_bytes()`, or from a SentencePiece model file."""
    if not serialized.lstrip().startswith(b"{"):
        return _sentencepiece(serialized)
    try:
        description = json.loads(serialized)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a tokenizer: {error}") from error
    match description:
        case {"kind": "bytes"}:
            return byte_level()
        case {"kind": "characters", "characters": str(alphabet)}:
            return characters(alphabet)
        case {"kind": "huggingface"}:
            from gptjax.data import huggingface  # which makes Tokenizers, so it imports this module

            return huggingface.from_description(description, serialized)
    raise ValueError(f"not a tokenizer: expected a kind that is known, got keys {sorted(description)}")


def train_bpe(texts: Iterable[str], vocab_size: int, *, max_bytes: int = 1 << 27) -> Tokenizer:
    """Learns byte-pair merges with SentencePiece, set up for source code as much as for prose.

    Pieces may hold line ends and runs of blanks (eight spaces) and symbols beside letters (`self.`);
    a space begins a piece, or is among spaces only. The rarest characters, one in ten thousand of
    the text, get no piece of their own: they fall back to bytes.

    `texts` is read in order until `max_bytes` of UTF-8. `vocab_size` includes the 5 special ids and
    the 256 bytes.

    Raises:
      ValueError: without text, or if it does not yield exactly `vocab_size` pieces.
    """
    if vocab_size <= _NUM_FIXED_PIECES:
        raise ValueError(f"vocab_size={vocab_size}: expected over {_NUM_FIXED_PIECES}, the 5 special ids and 256 bytes")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            # Longer chunks are dropped without a word; ours only exceed their size by one line.
            max_sentence_length=1 << 30,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=["<mask>"],
            # The model records it: a number that depends on the machine would change the fingerprint.
            num_threads=8,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or "there is no text to learn from"
        # There is no such option here.
        reason = reason.replace(" or decrease character_coverage with --character_coverage option", "")
        raise ValueError(f"vocab_size={vocab_size}: cannot train a tokenizer: {reason}") from error
    return _sentencepiece(model.getvalue())


def byte_level() -> Tokenizer:
    """Ids 0..255 are bytes; pad, bos, eos and mask follow."""
    pieces = (*(bytes([value]) for value in range(256)), b"", b"", b"", b"")
    serialized = json.dumps({"kind": "bytes"}).encode()

    def encode_fn(texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        del num_threads
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    return Tokenizer("bytes", pieces, serialized, encode_fn, pad_id=256, bos_id=257, eos_id=258, mask_id=259)


def characters(text: str) -> Tokenizer:
    """One id per distinct character of `text`, by code point; no special ids at all."""
    if not text:
        raise ValueError("characters: the text is empty; an alphabet needs at least one character")
    alphabet = sorted(set(text))
    serialized = json.dumps({"kind": "characters", "characters": "".join(alphabet)}).encode()
    code_points = np.array([ord(character) for character in alphabet], np.uint32)

    def encode_fn(texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        del num_threads
        return [_search(code_points, text) for text in texts]

    return Tokenizer("characters", tuple(utf8(character) for character in alphabet), serialized, encode_fn)


def _search(code_points: np.ndarray, text: str) -> np.ndarray:
    wanted = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
    ids = np.minimum(np.searchsorted(code_points, wanted), len(code_points) - 1)
    missing = np.flatnonzero(code_points[ids] != wanted)
    if missing.size:
        character = text[int(missing[0])]
        raise ValueError(
            f"character {character!r} at {missing[0]} is not among the {len(code_points)} of this tokenizer; "
            "use one trained on such text, or a byte-level one"
        )
    return ids.astype(np.int32)


def _sentencepiece(serialized: bytes) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(serialized)
        size = processor.vocab_size()
    except RuntimeError as error:
        # What it says of the file concerns its own source code.
        raise ValueError("not a tokenizer: it holds neither a SentencePiece model nor one of gptjax's") from error
    if size == 0:
        raise ValueError("not a SentencePiece model: it holds no pieces")
    unk = processor.unk_id()
    mask = processor.piece_to_id("<mask>")
    space_ids = np.array([processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()], np.int32)
    spells_space = processor.is_byte(int(space_ids[0]))
    has_dummy_prefix = processor.normalize("a") == _SPACE + "a"
    later = processor
    if has_dummy_prefix:
        # For the parts after a text's first: a space before each of them would be one that the text does not have.
        later = sentencepiece.SentencePieceProcessor()
        later.load_from_serialized_proto(serialized + _NO_DUMMY_PREFIX)

    def parts_of(text: str) -> Iterator[str | None]:
        """What is encoded by itself; None is a genuine `_SPACE`."""
        for number, piece in enumerate(text.split(_SPACE) if spells_space else [text]):
            if number:
                yield None
            yield from _chunks(piece, _ENCODE_CHUNK_CHARACTERS)

    def encode_fn(texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        for text in texts:
            if not text.isascii():
                utf8(text)
        split = [list(parts_of(text)) for text in texts]
        firsts = iter(processor.encode([p[0] for p in split if p and p[0] is not None], num_threads=num_threads))
        others = iter(later.encode([x for p in split for x in p[1:] if x is not None], num_threads=num_threads))

        def ids_of(number: int, part: str | None) -> np.ndarray:
            return space_ids if part is None else np.array(next(others if number else firsts), np.int32)

        return [_joined([ids_of(number, part) for number, part in enumerate(parts)]) for parts in split]

    return Tokenizer(
        kind="sentencepiece",
        pieces=tuple(_piece_bytes(processor, id) for id in range(size)),
        serialized=serialized,
        encode_fn=encode_fn,
        pad_id=_id_or_none(processor.pad_id()),
        bos_id=_id_or_none(processor.bos_id()),
        eos_id=_id_or_none(processor.eos_id()),
        unk_id=_id_or_none(unk),
        mask_id=mask if mask != unk and processor.is_control(mask) else None,
        has_dummy_prefix=has_dummy_prefix,
    )


def _id_or_none(id: int) -> int | None:
    return id if id >= 0 else None


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    piece = processor.id_to_piece(id)
    if processor.is_control(id) or processor.is_unknown(id):
        return b""
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(id) else piece.replace(_SPACE, " ").encode()


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32, copy=False) if arrays else np.zeros(0, np.int32)


def utf8(text: str) -> bytes:
    """Raises: ValueError for a lone surrogate, which is no text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ValueError(f"text has the lone surrogate {character!r} at {error.start}: decode it as UTF-8") from error


def _training_chunks(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        for chunk in _chunks(text, _TRAIN_CHUNK_CHARACTERS):
            left -= len(utf8(chunk))
            if left < 0:
                return
            yield chunk.replace(_SPACE, " ")


def _chunks(text: str, size: int) -> Iterator[str]:
    """Cuts `text` before a line without indentation, `size` to `2 * size` characters at a time.

    There a cut can part no piece, save where one would join a newline to the word after it.
    Where so much text has no newline the cut falls anywhere.
    """
    start = 0
    while start < len(text):
        limit = min(len(text), start + 2 * size)
        stop = text.find("\n", start + size, limit) + 1 or limit
        while stop < limit and text[stop] in " \t\n":
            stop += 1
        yield text[start:stop]
        start = stop
