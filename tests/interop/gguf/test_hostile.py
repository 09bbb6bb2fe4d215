"""Damaged, forged and unknown GGUF files are refused by name, quickly, and without taking memory."""

import struct
import tracemalloc

import numpy as np
import pytest

from gptjax.interop import formats, gguf
from gptjax.interop.gguf import file as gguf_file
from gptjax.interop.gguf import write as gguf_write
from tests.interop.gguf import models as gguf_models

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    gguf_models.saved(gguf_models.CONFIGS["llama"], directory / "ckpt")
    gguf_write.write(directory / "ckpt", directory / "model.gguf", quantization="f16")
    return directory / "model.gguf"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def entry(name: str, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def info(name: str, dims: tuple, *, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def padded(content: bytes, values: int = 0) -> bytes:
    return content + b"\0" * (-len(content) % 32) + b"\0" * values


ARCHITECTURE = entry("general.architecture", 8, text("llama"))
CASES = {
    "empty": (b"", "0 bytes from|4 bytes from 0"),
    "another magic": (header(magic=b"GGML"), "it is no GGUF file"),
    "version 1": (header(version=1), "GGUF version 1: expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "written for big-endian machines"),
    "cut in the counts": (header()[:20], "the file is cut or damaged"),
    "absurd number of tensors": (header(tensors=1 << 60), "tensors: more than a file's header can hold"),
    "absurd number of keys": (header(keys=1 << 60), "keys: more than a file's header can hold"),
    "absurd string": (header(keys=1) + struct.pack("<Q", 1 << 62) + b"x" * 20, "a key: .* the file is cut or damaged"),
    "absurd list": (
        header(keys=1) + entry("x", 9, struct.pack("<IQ", 4, 1 << 61)),
        "numbers of x: more than a file's header can hold",
    ),
    "absurd list of strings": (
        header(keys=1) + entry("x", 9, struct.pack("<IQ", 8, 1 << 61)),
        "strings of x: more than a file's header can hold",
    ),
    "more keys than any model has": (
        header(keys=1 << 17) + b"\0" * (1 << 21),
        "keys: more than a file's header can hold",
    ),
    "list of lists": (header(keys=1) + entry("x", 9, struct.pack("<IQ", 9, 1)), "a list of type 9; expected"),
    "unknown type of value": (header(keys=1) + entry("x", 99, b""), "type 99 of a value is not known"),
    "name that is no text": (header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 20, "is no UTF-8"),
    "key twice": (header(keys=2) + 2 * entry("x", 7, b"\1"), "x: twice in the metadata"),
    "alignment": (
        padded(header(keys=1, tensors=1) + entry("general.alignment", 4, struct.pack("<I", 3)) + info("x", (1,)), 8),
        "general.alignment: got 3",
    ),
    "tensor twice": (padded(header(tensors=2) + 2 * info("x", (1,)), 8), "x: twice in the file"),
    "tensors that overlap": (padded(header(tensors=2) + info("x", (1,)) + info("y", (1,)), 8), "x and y overlap"),
    "offset outside": (padded(header(tensors=1) + info("x", (4,), offset=1 << 40), 8), "are not in a file of"),
    "offset that overflows": (
        padded(header(tensors=1) + info("x", (4,), offset=(1 << 64) - 32), 8),
        "are not in a file of",
    ),
    "offset between": (padded(header(tensors=1) + info("x", (1,), offset=4), 64), "offset 4 is no multiple of 32"),
    "shape that overflows": (
        padded(header(tensors=1) + info("x", (1 << 32, 1 << 32, 1 << 32)), 64),
        "are not in a file of",
    ),
    "no dimensions": (padded(header(tensors=1) + info("x", ()), 64), "0 dimensions, expected 1 to 4"),
    "absurd dimensions": (
        header(tensors=1) + text("x") + struct.pack("<I", 1 << 31) + b"\0" * 64,
        "dimensions, expected 1 to 4",
    ),
    "empty tensor": (padded(header(tensors=1) + info("x", (0,)), 64), "is not rows of blocks"),
    "half a block": (padded(header(tensors=1) + info("x", (16,), kind=8), 64), "is not rows of blocks of 32"),
    "unknown type": (padded(header(tensors=1) + info("x", (16,), kind=77), 64), "type 77 is not one that can be read"),
    "integers": (padded(header(tensors=1) + info("x", (16,), kind=26), 64), "type I32 is not one that can be read"),
    "no architecture": (padded(header(tensors=1) + info("x", (1,)), 4), "general.architecture: got None"),
    "another architecture": (
        padded(header(keys=1) + entry("general.architecture", 8, text("mamba"))),
        "general.architecture: got 'mamba', expected one of llama",
    ),
    "no embedding": (
        padded(header(keys=2) + ARCHITECTURE + entry("llama.attention.head_count", 4, struct.pack("<I", 4))),
        "token_embd.weight: missing",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forged_files_are_refused_by_name(tmp_path, name):
    content, message = CASES[name]
    file = tmp_path / "forged.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        gguf.open_source(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(file) in str(error.value) and peak < 1 << 23


@pytest.mark.parametrize("share", [0.001, 0.01, 0.02, 0.5, 0.999])
def test_files_cut_anywhere_are_refused(whole, tmp_path, share):
    content = whole.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="cut.gguf"):
        gguf.open_source(file)


def test_random_damage_to_a_header_is_never_more_than_a_value_error(whole, tmp_path):
    content = np.frombuffer(whole.read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    file = tmp_path / "damaged.gguf"
    for _ in range(60):
        damaged = content.copy()
        damaged[random.integers(0, 3000, 3)] = random.integers(0, 256, 3)
        file.write_bytes(damaged.tobytes())
        try:
            gguf.open_source(file)
        except ValueError:
            pass


def rewritten(whole, file, *, drop=(), rename=None, metadata=None, reshape=None):
    """A copy of the file with other tensors or metadata."""
    found = gguf_file.read_header(whole)
    tensors = {name: t for name, t in found.tensors.items() if name not in drop}
    names = {name: (rename or {}).get(name, name) for name in tensors}
    shapes = {names[name]: ((reshape or {}).get(name, t.shape), t.kind) for name, t in tensors.items()}
    made = gguf_file.write_header(file, {**found.metadata, **(metadata or {})}, shapes)
    for name, tensor in tensors.items():
        made.tensors[names[name]].write(tensor._stored(tensor.offset, tensor.num_bytes).read())
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, r"blk\.1\.ffn_up\.weight: missing; expected \[96, 64\]"),
        ({"rename": {"blk.1.ffn_up.weight": "blk.1.ffn_upp.weight"}}, r"blk\.1\.ffn_up\.weight: missing"),
        ({"reshape": {"blk.0.ffn_up.weight": (64, 96)}}, r"ffn_up\.weight: got \[64, 96\], expected \[96, 64\]"),
        ({"metadata": {"llama.block_count": 1}}, r"blk\.1\..*is no tensor of this architecture"),
        ({"metadata": {"llama.block_count": 1 << 31}}, "block_count: got 2147483648, expected 1 to"),
        ({"metadata": {"llama.attention.head_count": 0}}, "head_count: got 0, expected 1 to"),
        ({"metadata": {"llama.attention.head_count": "four"}}, "head_count: got 'four', expected int"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "expected a finite number"),
        ({"metadata": {"llama.logit_scale": 2.0}}, "logit_scale: 2.0 is not known"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "rope.dimension_count: got 8, expected 16"),
        ({"metadata": {"llama.vocab_size": 97}}, "vocab_size: got 97, expected 96"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type: got 'longrope'"),
        ({"metadata": {"llama.expert_count": 10**9}}, "expert_count: got 1000000000, expected 1 to"),
        (
            {"metadata": {"llama.block_count": 1024, "llama.expert_count": 4096, "llama.expert_used_count": 2}},
            "4,194,304 experts in all layers together, expected at most",
        ),
        (
            {"metadata": {"llama.attention.head_count_kv": [2] * 2000}},
            "llama.attention.head_count_kv: got a list of 2,000, expected at most 1024",
        ),
        ({"metadata": {"llama.attention.head_count": [4, 2]}}, r"head_count: got \[4, 2\], expected int"),
        ({"metadata": {"general.architecture": "x" * 10_000}}, "general.architecture: got 'x{79}, expected one of"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "tokens: missing"),
        (
            {"metadata": {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a", "b"]}},
            "model: got 'bert', expected llama, gpt2 or none",
        ),
        (
            {"metadata": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}},
            "scores: expected 2 numbers",
        ),
        (
            {
                "metadata": {
                    "tokenizer.ggml.model": "llama",
                    "tokenizer.ggml.tokens": ["a", "b"],
                    "tokenizer.ggml.bos_token_id": 7,
                }
            },
            "bos_token_id: got 7, expected 0 to 1",
        ),
        (
            {
                "metadata": {
                    "tokenizer.ggml.model": "gpt2",
                    "tokenizer.ggml.tokens": ["a", "b"],
                    "tokenizer.ggml.pre": "of my own",
                }
            },
            "pre: got 'of my own', expected one of gpt-2",
        ),
    ],
)
def test_what_disagrees_is_named(whole, tmp_path, change, message):
    file = rewritten(whole, tmp_path / "changed.gguf", **change)
    with pytest.raises(ValueError, match=message) as error:
        gguf.open_source(file)
    assert str(file) in str(error.value)


def test_numbers_by_layer_that_are_all_the_same_are_one(whole, tmp_path):
    file = rewritten(whole, tmp_path / "listed.gguf", metadata={"llama.attention.head_count_kv": [2, 2]})
    assert gguf.open_source(file).model == gguf.open_source(whole).model


def test_a_file_that_shrinks_while_it_is_read(whole, tmp_path):
    file = rewritten(whole, tmp_path / "shrinks.gguf")
    source = gguf.open_source(file)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(ValueError, match="shrinks.gguf: ends at byte"):
        for tensor in source.tensors.values():
            tensor.read()


def test_formats_are_told_by_their_content(whole, tmp_path):
    (tmp_path / "model.bin").write_bytes(whole.read_bytes())
    assert formats.recognise(tmp_path / "model.bin") == "gguf"
    assert formats.recognise(whole.parent) == "gguf"
    (tmp_path / "pickle.bin").write_bytes(b"PK\3\4" + b"\0" * 400)
    with pytest.raises(ValueError, match="it may be a pickle"):
        formats.open_source(tmp_path / "pickle.bin")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="2 GGUF files, expected one"):
        formats.open_source(tmp_path / "two")


def test_llama_cpp_s_refusal_is_repeated(whole, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from gptjax.interop.referees.llama_cpp import LlamaCppRunner

    file = rewritten(whole, tmp_path / "lacking.gguf", drop=["blk.1.ffn_up.weight"])
    with pytest.raises(ValueError, match=r"lacking\.gguf: .*blk\.1\.ffn_up\.weight"):
        LlamaCppRunner(file)
    runner = LlamaCppRunner(whole)
    with pytest.raises(ValueError, match="token 96: expected 0 to 95"):
        runner.logits([96])
    with pytest.raises(ValueError, match="expected at most the context of 256"):
        runner.logits([1] * 300)
    assert runner.encode("a") is None
    assert runner.logits([1, 2]).shape == (2, 96)  # it goes on after an error
