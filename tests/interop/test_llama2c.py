"""llama2.c's files: the same values as Hugging Face's form of the model, and files that are none."""

import pathlib
import shutil
import struct

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import hf, importing, llama2c
from gptjax.interop.pairs import to_halves, to_pairs

HEADER = (8, 12, 2, 2, 1, 7, 16)  # dim, hidden, layers, heads, kv heads, vocabulary, context


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models" / "stories260K"


def flat(source):
    return {name: np.asarray(tensor.read()) for name, tensor in source.tensors.items()}


def layers_of(header, *, vocab):
    """Random values of a version-0 file, by name of the reference, in its order."""
    dim, hidden, layers, heads, kv_heads, _, seq_len = header
    kv, head = dim // heads * kv_heads, dim // heads
    random = np.random.default_rng(0)
    shapes = {
        "embed": (vocab, dim),
        "att_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "real": (seq_len, head // 2),
        "imag": (seq_len, head // 2),
        "head": (vocab, dim),
    }
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def bytes_of(values, names):
    return b"".join(values[name].tobytes() for name in names)


def version_0(tmp_path: pathlib.Path, *, tied: bool) -> tuple[pathlib.Path, dict]:
    values = layers_of(HEADER, vocab=7)
    names = [name for name in values if name != "head" or not tied]
    sizes = (*HEADER[:5], 7 if tied else -7, HEADER[6])
    file = tmp_path / "model.bin"
    file.write_bytes(struct.pack("<7i", *sizes) + bytes_of(values, names))
    return file, values


def version_1(tmp_path: pathlib.Path, values: dict, *, tied: bool) -> pathlib.Path:
    names = "att_norm ffn_norm norm embed wq wk wv wo w1 w2 w3".split() + ([] if tied else ["head"])
    start = struct.pack("<Ii7iB", llama2c.MAGIC, 1, *HEADER, tied)
    file = tmp_path / "model_v1.bin"
    file.write_bytes(start.ljust(256, b"\0") + bytes_of(values, names))
    return file


def test_both_forms_of_a_real_model_are_bit_identical(stories):
    ours, theirs = llama2c.open_source(stories / "stories260K.bin"), hf.open_source(stories / "hf")
    assert ours.model == theirs.model
    a, b = flat(ours), flat(theirs)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert ours.tokenizer.fingerprint == tokenizer_lib.load(stories / "hf" / "tokenizer.model").fingerprint


def test_the_tokenizer_of_llama2c_gives_the_ids_of_the_model_file(stories, tmp_path):
    shutil.copy(stories / "stories260K.bin", tmp_path)
    shutil.copy(stories / "tok512.bin", tmp_path)
    built = llama2c.open_source(tmp_path / "stories260K.bin").tokenizer
    wanted = llama2c.open_source(stories / "stories260K.bin").tokenizer
    for text in ("Once upon a time, there was a girl named Lily.", "Zoë said: 天!", "two\nlines", "x" * 40, ""):
        assert built.encode(text) == wanted.encode(text)
        assert built.decode(built.encode(text)) == text
    assert (built.bos_id, built.eos_id, built.unk_id) == (1, 2, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_both_versions_hold_the_same_model(tmp_path, tied):
    file, values = version_0(tmp_path, tied=tied)
    a, b = llama2c.open_source(file), llama2c.open_source(version_1(tmp_path, values, tied=tied))
    assert a.model == b.model and a.model.tie_embeddings == tied
    x, y = flat(a), flat(b)
    assert x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)
    assert np.array_equal(x["model.layers.1.mlp.down_proj.weight"], values["w2"][1])
    rows = [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of two pairs
    assert np.array_equal(x["model.layers.1.self_attn.q_proj.weight"], values["wq"][1][rows])
    assert ("lm_head.weight" in x) != tied


def test_two_tokenizers_of_one_size_are_ambiguous(stories, tmp_path):
    shutil.copy(stories / "stories260K.bin", tmp_path)
    for name in ("a.model", "b.model"):
        shutil.copy(stories / "tok512.model", tmp_path / name)
    assert llama2c.open_source(tmp_path / "stories260K.bin").tokenizer is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-4], "cut or added to"),
        (lambda b: b + b"\0", "cut or added to"),
        (lambda b: b[:20], "no llama2.c model"),
        (lambda b: b"\xff" * 28 + b[28:], "are none of a llama2.c model"),
        (lambda b: struct.pack("<7i", 8, 12, 1 << 24, 2, 1, 1 << 24, 1 << 24) + b[28:], "expected .* from its header"),
        (lambda b: struct.pack("<7i", 9, 12, 2, 2, 1, 7, 16) + b[28:], "expected even heads"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, change, message):
    file, _ = version_0(tmp_path, tied=True)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        llama2c.open_source(file)
    assert str(file) in str(error.value)
    assert not llama2c.is_llama2c(file)


def version_2(tmp_path: pathlib.Path, values: dict, *, tied: bool, group_size: int = 4) -> tuple[pathlib.Path, dict]:
    """The file and its values, as `runq.c` multiplies them out."""
    start = struct.pack("<Ii7iBi", llama2c.MAGIC, 2, *HEADER, tied, group_size)
    content = bytes_of(values, ("att_norm", "ffn_norm", "norm"))
    rounded = dict(values)
    for name in "embed wq wk wv wo w1 w2 w3".split() + ([] if tied else ["head"]):
        stack = values[name].reshape(-1, *values[name].shape[-2:])
        rounded[name] = np.empty_like(stack)
        for layer, matrix in enumerate(stack):
            groups = matrix.reshape(-1, group_size)
            scales = np.abs(groups).max(1) / np.float32(127)
            integers = np.round(groups / scales[:, None]).astype(np.int8)
            content += integers.tobytes() + scales.tobytes()
            rounded[name][layer] = (integers.astype(np.float32) * scales[:, None]).reshape(matrix.shape)
        rounded[name] = rounded[name].reshape(values[name].shape)
    file = tmp_path / "model_v2.bin"
    file.write_bytes(start.ljust(256, b"\0") + content)
    return file, rounded


@pytest.mark.parametrize("tied", [True, False])
def test_quantised_files_hold_what_their_scales_make_of_them(tmp_path, tied):
    _, values = version_0(tmp_path, tied=tied)
    file, rounded = version_2(tmp_path, values, tied=tied)
    a, b = llama2c.open_source(version_1(tmp_path, rounded, tied=tied)), llama2c.open_source(file)
    assert llama2c.is_llama2c(file) and a.model == b.model
    x, y = flat(a), flat(b)
    assert x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)
    assert all(value.dtype == np.float32 == b.tensors[name].dtype for name, value in y.items())
    assert np.abs(rounded["w1"] - values["w1"]).max() > 0  # they are rounded


def test_quantised_files_that_are_damaged_are_refused_by_name(tmp_path):
    _, values = version_0(tmp_path, tied=True)
    file, _ = version_2(tmp_path, values, tied=True)
    content = bytearray(file.read_bytes())
    for group_size in (0, -4, 3, 1 << 30):
        file.write_bytes(content[:37] + struct.pack("<i", group_size) + content[41:])
        with pytest.raises(ValueError, match=r"model_v2\.bin: groups of .* expected a divisor of dim 8"):
            llama2c.open_source(file)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model_v2\.bin: .* cut or added to"):
        llama2c.open_source(file)
    file.write_bytes(content[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(ValueError, match=r"model_v2\.bin: scales from byte .* expected finite"):
        flat(llama2c.open_source(file))
    file.write_bytes(content[:4] + struct.pack("<i", 3) + content[8:])
    with pytest.raises(ValueError, match="version 3 of .* expected 0, 1 or 2"):
        llama2c.open_source(file)


def test_llama_cpp_runs_a_quantised_file_as_we_do(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    _, values = version_0(tmp_path, tied=True)
    file, _ = version_2(tmp_path, values, tied=True)
    found = importing.import_model(file, tmp_path / "ckpt")
    assert found.accepted and "llama.cpp" in found.referees["source"]


def test_pairs_and_halves_are_inverse():
    rows = np.arange(24).reshape(12, 2)
    assert np.array_equal(to_pairs(to_halves(rows, num_heads=2), num_heads=2), rows)
    assert to_halves(np.arange(12), num_heads=2).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
