"""llama2.c's `.bin` files: a header of sizes, then every value of a Llama in float32.

Version 0 begins with the sizes; a negative vocabulary says that the head is not the embedding. Version 1 has a
magic number, another order, and no tables of rotations. Theirs rotates neighbouring pairs, Hugging Face's Llama
halves, so rows of the query and key projections change places.

Source: https://github.com/karpathy/llama2.c, `export.py` and `run.c`.
"""

from __future__ import annotations

import math
import pathlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from absl import logging
from etils import epath

from gptjax.checkpoint import reading
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import sentencepiece_model, stream
from gptjax.interop.checkpoint import CheckpointTensors
from gptjax.interop.families import llama
from gptjax.interop.layout import Shape
from gptjax.interop.pairs import to_halves, to_pairs
from gptjax.interop.safetensors import Stored
from gptjax.interop.sentencepiece_model import Pieces, PieceType
from gptjax.interop.source import Source
from gptjax.interop.table import inference_form, read_config
from gptjax.nn.config import ModelConfig

MAGIC = 0x616B3432
_HEADER_BYTES = {0: 28, 1: 256}
_EPS, _THETA = 1e-5, 10_000.0  # constants of run.c
_MAX_SIZE = 1 << 24  # of any one dimension; more is no model but a damaged file
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # torch.save's, new and old
_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True)
class Header:
    """What a file says of its model."""

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool

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
class Rotated:
    """A projection whose heads of `num_heads` have their rows in pairs."""

    stored: Stored
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
    """A `.bin` file of version 0 or 1, and the tokenizer beside it where there is just one.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    header = read_header(file)
    places, _ = _plan(header, file)
    heads = {"q_proj": header.n_heads, "k_proj": header.n_kv_heads}
    tensors = {
        name: Rotated(stored, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else stored
        for name, stored in places.items()
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
      ValueError: if they are none of a model, or the file is cut, longer, or quantised.
    """
    num_bytes = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(_HEADER_BYTES[1])
    if len(start) < _HEADER_BYTES[0]:
        raise ValueError(f"{file}: {num_bytes} bytes are no llama2.c model; its header alone has {_HEADER_BYTES[0]}")
    version = 0
    if struct.unpack_from("<I", start)[0] == MAGIC:
        version = struct.unpack_from("<i", start, 4)[0]
        if version == 2:
            raise ValueError(f"{file}: version 2, quantised to int8, is not supported; export version 0 or 1")
        if version != 1 or len(start) < _HEADER_BYTES[1]:
            raise ValueError(f"{file}: version {version} of {num_bytes} bytes; expected 0 or 1, whole")
    sizes = struct.unpack_from("<7i", start, 8 if version else 0)
    tied = bool(start[36]) if version else sizes[5] > 0
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = sizes
    header = Header(version, dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), seq_len, tied)
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
    expected = _HEADER_BYTES[version] + 4 * sum(math.prod(shape) for shape in _totals(header))
    if expected != num_bytes:
        raise ValueError(f"{file}: {num_bytes:,} bytes, expected {expected:,} from its header: cut or added to")
    return header


def _totals(header: Header) -> Iterator[Shape]:
    """Of the stacked tensors, without going through the layers, of which a damaged file may claim millions."""
    one_layer = [shape for _, shape in _layer_parts(header)]
    yield header.n_layers, sum(math.prod(shape) for shape in one_layer)
    yield header.vocab_size + 1, header.dim
    if header.version == 0:
        yield header.seq_len, header.head_dim
    if not header.tied:
        yield header.vocab_size, header.dim


def _layer_parts(header: Header) -> list[tuple[str, Shape]]:
    dim, hidden, kv = header.dim, header.hidden_dim, header.kv_dim
    norms: list[tuple[str, Shape]] = [("input_layernorm", (dim,)), ("post_attention_layernorm", (dim,))]
    attention = [("q_proj", (dim, dim)), ("k_proj", (kv, dim)), ("v_proj", (kv, dim)), ("o_proj", (dim, dim))]
    mlp = [("gate_proj", (hidden, dim)), ("down_proj", (dim, hidden)), ("up_proj", (hidden, dim))]
    attention = [(f"self_attn.{name}", shape) for name, shape in attention]
    mlp = [(f"mlp.{name}", shape) for name, shape in mlp]
    parts = [norms[0], *attention, norms[1], *mlp] if header.version == 0 else [*norms, *attention, *mlp]
    return [(f"{name}.weight", shape) for name, shape in parts]


def _plan(header: Header, file: pathlib.Path) -> tuple[dict[str, Stored], int]:
    """Where every tensor lies, under Hugging Face's names (`freq_cis_*` for the tables), and where the file ends."""
    layered = _layer_parts(header)
    embedding: tuple[str, Shape] = "model.embed_tokens.weight", (header.vocab_size, header.dim)
    final: tuple[str, Shape] = "model.norm.weight", (header.dim,)

    def stacks(parts: list[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
        return [(f"model.layers.{i}.{name}", shape) for name, shape in parts for i in range(header.n_layers)]

    order = [embedding, *stacks(layered), final]
    if header.version == 1:
        order = [*stacks(layered[:2]), final, embedding, *stacks(layered[2:])]
    else:
        order += [(f"freq_cis_{part}", (header.seq_len, header.head_dim // 2)) for part in ("real", "imag")]
    if not header.tied:
        order.append(("lm_head.weight", embedding[1]))
    places, at = {}, _HEADER_BYTES[header.version]
    for name, shape in order:
        size = 4 * math.prod(shape)
        places[name] = Stored(file, at, size, shape, _FLOAT32)
        at += size
    return places, at


def _find_tokenizer(file: pathlib.Path, vocab_size: int) -> tuple[pathlib.Path | None, Tokenizer | None]:
    """The one beside the file whose vocabulary is of its size; a SentencePiece model before a `.bin`."""
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
        if len(found) == 1:
            return next(iter(found.items()))
        if found:
            names = ", ".join(path.name for path in found)
            logging.warning("%s: no tokenizer taken: several beside it have %d tokens: %s", file, vocab_size, names)
            return None, None
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


def write(checkpoint: epath.PathLike, file: pathlib.Path, *, num_threads: int | None = None) -> None:
    """Writes version 0 of a checkpoint's model, in float32; goes on with what an earlier call left.

    The tokenizer is left to the caller: llama2.c reads it from a file of its own.

    Raises:
      ValueError: if llama2.c cannot run the model: it has one epsilon, one rotation, and neither biases nor windows.
    """
    meta = reading.read_meta(epath.Path(checkpoint))
    header = _header_of(meta.model)
    tensors = CheckpointTensors(checkpoint, llama.LLAMA, meta.model, dtype=_FLOAT32)
    places, num_bytes = _plan(header, file)
    journal = stream.Journal(file.with_name(file.name + ".journal"), job={"checkpoint": meta.checksums})
    sizes = (header.dim, header.hidden_dim, header.n_layers, header.n_heads, header.n_kv_heads)
    with open(file, "r+b" if file.exists() else "w+b") as opened:
        vocab_size = header.vocab_size if header.tied else -header.vocab_size
        opened.write(struct.pack("<7i", *sizes, vocab_size, header.seq_len))
        opened.truncate(num_bytes)
    heads = {"q_proj": header.n_heads, "k_proj": header.n_kv_heads}

    def convert(task: stream.Tensor) -> list[int]:
        value, sums = tensors[task.name].read_with_sums()
        projection = task.name.split(".")[-2]
        places[task.name].write(to_pairs(value, num_heads=heads[projection]) if projection in heads else value)
        return sums

    tasks = [stream.Tensor(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    stream.run(tasks, convert, journal, label="export", num_threads=num_threads)
    tensors.verify(journal.notes)
    frequencies = _THETA ** -(np.arange(0, header.head_dim, 2) / header.head_dim)
    angles = np.outer(np.arange(header.seq_len), frequencies)
    places["freq_cis_real"].write(np.cos(angles).astype(_FLOAT32))
    places["freq_cis_imag"].write(np.sin(angles).astype(_FLOAT32))
    journal.remove()


def _header_of(model: ModelConfig) -> Header:
    block = model.blocks[0]
    d_ff = getattr(block.mlp, "d_ff", 0)
    num_kv_heads = getattr(block.attention, "num_kv_heads", 1)
    sizes = (model.d_model, d_ff, model.num_layers, block.attention.num_heads, num_kv_heads, model.vocab_size)
    header = Header(0, *sizes, model.seq_len, model.tie_embeddings)
    if inference_form(read_config(llama.LLAMA, header.config(), path="llama2.c")) != inference_form(model):
        raise ValueError(
            "llama2.c runs Llamas with heads of d_model / num_heads, RMSNorm of eps 1e-5, rotation of theta 10000, "
            "SwiGLU, and neither biases, windows nor scaled rotations; this model is another: export it as hf or gguf"
        )
    return header
