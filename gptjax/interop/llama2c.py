"""llama2.c's `.bin` files: a header of sizes, then every value of a Llama.

Version 0 begins with the sizes; a negative vocabulary says that the head is not the embedding. Version 1 has a
magic number, another order, and no tables of rotations. Version 2 is version 1 with each matrix in int8, and a
float32 for each group of so many values. Theirs rotates neighbouring pairs, Hugging Face's Llama halves, so rows of
the query and key projections change places.

Source: https://github.com/karpathy/llama2.c, `export.py`, `run.c` and `runq.c`.
"""

from __future__ import annotations

import math
import pathlib
import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from absl import logging

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import sentencepiece_model
from gptjax.interop.families import llama
from gptjax.interop.layout import Shape
from gptjax.interop.pairs import to_halves
from gptjax.interop.safetensors import Stored
from gptjax.interop.sentencepiece_model import Pieces, PieceType
from gptjax.interop.source import Readable, Source
from gptjax.interop.table import read_config

MAGIC = 0x616B3432
_HEADER_BYTES = {0: 28, 1: 256, 2: 256}
_EPS, _THETA = 1e-5, 10_000.0  # constants of run.c
_MAX_SIZE = 1 << 24  # of any one dimension; more is no model but a damaged file
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # torch.save's, new and old
_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True)
class Header:
    """What a file says of its model.

    Attributes:
      group_size: how many values of a matrix have a scale in common; 0 for float32.
    """

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool
    group_size: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.n_kv_heads

    def config(self) -> dict[str, object]:
        """As Hugging Face's `config.json` says it."""
        return {
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": _EPS,
            "rope_theta": _THETA,
        }


@dataclass(frozen=True)
class Grouped:
    """A matrix in int8 and the float32 that each group of its values is multiplied by."""

    values: Stored
    scales: Stored
    dtype: ClassVar[np.dtype] = _FLOAT32

    @property
    def shape(self) -> Shape:
        return self.values.shape

    def read(self) -> np.ndarray:
        """The products.

        Raises:
          ValueError: if the scales are none, or the file has become shorter.
        """
        scales = self.scales.read()
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ValueError(
                f"{self.scales.file}: scales from byte {self.scales.offset}: expected finite, not negative"
            )
        return (self.values.read().reshape(len(scales), -1) * scales[:, None]).reshape(self.shape)


@dataclass(frozen=True)
class Rotated:
    """A projection whose heads of `num_heads` have their rows in pairs."""

    stored: Readable
    num_heads: int

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def read(self) -> np.ndarray:
        return to_halves(self.stored.read(), num_heads=self.num_heads)


def is_llama2c(file: pathlib.Path) -> bool:
    """Whether the content begins as such a file does."""
    try:
        read_header(file)
    except (ValueError, OSError):
        return False
    return True


def open_source(file: pathlib.Path) -> Source:
    """A `.bin` file of version 0, 1 or 2, and the tokenizer beside it where there is just one.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    header = read_header(file)
    heads = {"q_proj": header.n_heads, "k_proj": header.n_kv_heads}
    tensors = {
        name: Rotated(stored, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else stored
        for name, stored in _plan(header, file).items()
        if not name.startswith("freq_cis")
    }
    tokenizer_file, tokenizer = _find_tokenizer(file, header.vocab_size)
    return Source(
        path=file,
        format="llama2c",
        family=llama.LLAMA,
        model=read_config(llama.LLAMA, header.config(), path=str(file)),
        tensors=tensors,
        tokenizer=tokenizer,
        files=(file,) if tokenizer_file is None else (file, tokenizer_file),
        raw_config=header.config(),
    )


def read_header(file: pathlib.Path) -> Header:
    """The sizes in the first bytes, checked against the size of the file.

    Raises:
      ValueError: if they are none of a model, or the file is cut or longer.
    """
    num_bytes = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(_HEADER_BYTES[1])
    if len(start) < _HEADER_BYTES[0]:
        raise ValueError(f"{file}: {num_bytes} bytes are no llama2.c model; its header alone has {_HEADER_BYTES[0]}")
    version = 0
    if struct.unpack_from("<I", start)[0] == MAGIC:
        version = struct.unpack_from("<i", start, 4)[0]
        if version not in (1, 2) or len(start) < _HEADER_BYTES[1]:
            raise ValueError(f"{file}: version {version} of {num_bytes} bytes; expected 0, 1 or 2, whole")
    sizes = struct.unpack_from("<7i", start, 8 if version else 0)
    tied = bool(start[36]) if version else sizes[5] > 0
    group_size = struct.unpack_from("<i", start, 37)[0] if version == 2 else 0
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = sizes
    header = Header(version, dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), seq_len, tied, group_size)
    numbers = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, header.vocab_size, seq_len)
    if not all(0 < number <= _MAX_SIZE for number in numbers):
        pickle = "it may be a pickle, which runs code when it is opened"
        kind = pickle if start.startswith(_PICKLES) else "it is damaged"
        raise ValueError(f"{file}: sizes {sizes} are none of a llama2.c model; {kind}, or of another format")
    if header.dim % (2 * header.n_heads) or header.n_heads % header.n_kv_heads:
        raise ValueError(
            f"{file}: dim {header.dim}, {header.n_heads} heads, {header.n_kv_heads} kv heads: expected even heads and "
            "a multiple of the kv heads"
        )
    if version == 2 and (group_size < 1 or dim % group_size):
        raise ValueError(f"{file}: groups of {group_size} values: expected a divisor of dim {dim}")
    expected = _HEADER_BYTES[version] + _total_bytes(header)
    if expected != num_bytes:
        raise ValueError(f"{file}: {num_bytes:,} bytes, expected {expected:,} from its header: cut or added to")
    return header


def _num_bytes(header: Header, shape: Shape) -> int:
    size = math.prod(shape)
    return size + 4 * (size // header.group_size) if _is_grouped(header, shape) else 4 * size


def _is_grouped(header: Header, shape: Shape) -> bool:
    return header.group_size > 0 and len(shape) > 1


def _total_bytes(header: Header) -> int:
    """Without going through the layers, of which a damaged file may claim millions."""
    one_layer = sum(_num_bytes(header, shape) for _, shape in _layer_parts(header))
    matrices = (1 if header.tied else 2) * _num_bytes(header, (header.vocab_size, header.dim))
    tables = _num_bytes(header, (header.seq_len, header.head_dim)) if header.version == 0 else 0
    return header.n_layers * one_layer + matrices + _num_bytes(header, (header.dim,)) + tables


def _layer_parts(header: Header) -> list[tuple[str, Shape]]:
    dim, hidden, kv = header.dim, header.hidden_dim, header.kv_dim
    norms: list[tuple[str, Shape]] = [("input_layernorm", (dim,)), ("post_attention_layernorm", (dim,))]
    attention = [("q_proj", (dim, dim)), ("k_proj", (kv, dim)), ("v_proj", (kv, dim)), ("o_proj", (dim, dim))]
    mlp = [("gate_proj", (hidden, dim)), ("down_proj", (dim, hidden)), ("up_proj", (hidden, dim))]
    attention = [(f"self_attn.{name}", shape) for name, shape in attention]
    mlp = [(f"mlp.{name}", shape) for name, shape in mlp]
    parts = [norms[0], *attention, norms[1], *mlp] if header.version == 0 else [*norms, *attention, *mlp]
    return [(f"{name}.weight", shape) for name, shape in parts]


def _plan(header: Header, file: pathlib.Path) -> dict[str, Stored | Grouped]:
    """Where every tensor lies, under Hugging Face's names (`freq_cis_*` for the tables)."""
    layered = _layer_parts(header)
    embedding: tuple[str, Shape] = "model.embed_tokens.weight", (header.vocab_size, header.dim)
    final: tuple[str, Shape] = "model.norm.weight", (header.dim,)

    def stacks(parts: list[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
        return [(f"model.layers.{i}.{name}", shape) for name, shape in parts for i in range(header.n_layers)]

    order = [embedding, *stacks(layered), final]
    if header.version > 0:
        order = [*stacks(layered[:2]), final, embedding, *stacks(layered[2:])]
    else:
        order += [(f"freq_cis_{part}", (header.seq_len, header.head_dim // 2)) for part in ("real", "imag")]
    if not header.tied:
        order.append(("lm_head.weight", embedding[1]))
    places: dict[str, Stored | Grouped] = {}
    at = _HEADER_BYTES[header.version]
    for name, shape in order:
        num_bytes, size = _num_bytes(header, shape), math.prod(shape)
        if _is_grouped(header, shape):
            num_scales = size // header.group_size
            scales = Stored(file, at + size, 4 * num_scales, (num_scales,), _FLOAT32)
            places[name] = Grouped(Stored(file, at, size, shape, np.dtype(np.int8)), scales)
        else:
            places[name] = Stored(file, at, num_bytes, shape, _FLOAT32)
        at += num_bytes
    return places


def _find_tokenizer(file: pathlib.Path, vocab_size: int) -> tuple[pathlib.Path | None, Tokenizer | None]:
    """The one beside the file whose vocabulary is of its size; a SentencePiece model before a `.bin`."""
    others: list[str] = []
    for pattern, read in (("*.model", tokenizer_lib.load), ("*.bin", read_tokenizer)):
        found = {}
        for path in sorted(file.parent.glob(pattern)):
            if path == file or not path.is_file() or path.stat().st_size > 1 << 26:
                continue
            try:
                tokenizer = read(path)
            except ValueError:
                continue  # a model, or a tokenizer of another kind
            if tokenizer.vocab_size == vocab_size:
                found[path] = tokenizer
            else:
                others.append(f"{path.name} has {tokenizer.vocab_size:,}")
        if len(found) == 1:
            return next(iter(found.items()))
        if found:
            names = ", ".join(path.name for path in found)
            logging.warning("%s: no tokenizer taken: several beside it have %d tokens: %s", file, vocab_size, names)
            return None, None
    logging.warning(
        "%s: no tokenizer beside it has its %d tokens%s: it is read without one",
        file, vocab_size, f" ({', '.join(others)})" if others else "",
    )  # fmt: skip
    return None, None


def read_tokenizer(file: pathlib.Path) -> Tokenizer:
    """llama2.c's `tokenizer.bin`: the longest piece's size, then score, size and bytes of each piece.

    Raises:
      ValueError: if the file is none.
    """
    content = file.read_bytes()
    texts: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(content):
        if at + 8 > len(content):
            raise ValueError(f"{file}: ends inside of piece {len(texts)}; it is cut or no tokenizer of llama2.c")
        score, size = struct.unpack_from("<fi", content, at)
        piece = content[at + 8 : at + 8 + max(size, 0)]
        if size < 0 or len(piece) != size or not math.isfinite(score):
            raise ValueError(f"{file}: piece {len(texts)} of {size} bytes, score {score}: no tokenizer of llama2.c")
        texts.append(_piece_text(file, len(texts), piece))
        scores.append(score)
        at += 8 + size
    if len(texts) < 3:
        raise ValueError(f"{file}: {len(texts)} pieces; a tokenizer of llama2.c has <unk>, <s>, </s> and more")
    types = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL]
    types += [PieceType.BYTE if _is_byte(text) else PieceType.NORMAL for text in texts[3:]]
    texts[1:3] = ["<s>", "</s>"]  # theirs are written with line ends around
    return sentencepiece_model.build(Pieces(texts=texts, scores=scores, types=types, bos_id=1, eos_id=2))


def _piece_text(file: pathlib.Path, id: int, piece: bytes) -> str:
    try:
        return piece.decode().replace(" ", "\u2581")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: piece {id} is no UTF-8; no tokenizer of llama2.c") from error


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
