"""The reference library reads what we write and the other way round; a hostile file is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest

from gptjax.interop import safetensors

reference = pytest.importorskip("safetensors.numpy", reason="the reference implementation is not installed")

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "c": np.zeros((0, 5), np.float16),
    "d": np.array(7, np.int64),
}


def folder_with(tmp_path, tensors=None, *, max_shard_bytes=1 << 30):
    tensors = TENSORS if tensors is None else tensors
    plan = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    writer = safetensors.SafetensorsWriter(tmp_path, safetensors.plan_shards(plan, max_shard_bytes=max_shard_bytes))
    for name, value in reversed(tensors.items()):
        writer.write(name, value)
    return tmp_path


@pytest.mark.parametrize("max_shard_bytes", [1, 20, 1 << 30])
def test_round_trip_in_one_file_and_in_many(tmp_path, max_shard_bytes):
    found = safetensors.SafetensorsFolder(folder_with(tmp_path, max_shard_bytes=max_shard_bytes))
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        got = found[name].read()
        assert got.dtype == value.dtype and got.shape == value.shape and np.array_equal(got, value)
    assert (tmp_path / safetensors.INDEX_FILE).exists() == (max_shard_bytes < 1000)


def test_the_reference_reads_ours(tmp_path):
    found = reference.load_file(folder_with(tmp_path) / safetensors.SINGLE_FILE)
    assert all(
        np.array_equal(found[name].astype(np.float32), value.astype(np.float32)) for name, value in TENSORS.items()
    )


def test_we_read_the_references(tmp_path):
    values = {name: value for name, value in TENSORS.items() if name != "b"}
    reference.save_file(values, tmp_path / safetensors.SINGLE_FILE)
    found = safetensors.SafetensorsFolder(tmp_path)
    assert all(np.array_equal(found[name].read(), value) for name, value in values.items())


def test_writing_again_keeps_what_is_there(tmp_path):
    folder = folder_with(tmp_path)
    plan = {name: (value.shape, value.dtype) for name, value in TENSORS.items()}
    safetensors.SafetensorsWriter(folder, safetensors.plan_shards(plan, max_shard_bytes=1 << 30))
    assert np.array_equal(safetensors.SafetensorsFolder(folder)["a.weight"].read(), TENSORS["a.weight"])


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "header longer than the file": (lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"), "cut"),
    "nothing": (lambda path: path.write_bytes(b""), "cut"),
    "no json": (lambda path: raw(path, b"not json at all"), "not JSON"),
    "deep json": (lambda path: raw(path, b"[" * 100_000), "not JSON"),
    "a list": (lambda path: raw(path, b"[1, 2]"), "JSON object"),
    "cut": (lambda path: raw(path, {"w": F32}, b"1234"), "cut or damaged"),
    "more than the header says": (lambda path: raw(path, {"w": F32}, b"0" * 9), "added to"),
    "overlap": (lambda path: raw(path, {"w": F32, "v": F32}, b"0" * 8), "overlap"),
    "size and range disagree": (lambda path: raw(path, {"w": F32 | {"shape": [3]}}, b"0" * 8), "do not hold"),
    "negative": (lambda path: raw(path, {"w": F32 | {"shape": [-2]}}, b"0" * 8), "0 or more"),
    "huge": (lambda path: raw(path, {"w": F32 | {"shape": [1 << 40, 1 << 40]}}, b"0" * 8), "do not hold"),
    "dtype of no name": (lambda path: raw(path, {"w": F32 | {"dtype": ["F32"]}}, b"0" * 8), "F32"),
    "unknown dtype": (lambda path: raw(path, {"w": F32 | {"dtype": "Q7"}}, b"0" * 8), "Q7"),
    "no entry": (lambda path: raw(path, {"w": 3}, b""), "w"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x02}q\x00." * 10), "not a safetensors file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path, case):
    write, message = HOSTILE[case]
    path = tmp_path / safetensors.SINGLE_FILE
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        safetensors.SafetensorsFolder(tmp_path)
    assert str(path) in str(error.value)


def test_of_one_file_and_an_index_the_file_is_read_as_transformers_does(tmp_path):
    raw(tmp_path / "model.safetensors", {"w": F32}, b"0" * 8)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "other.safetensors"}}))
    assert list(safetensors.SafetensorsFolder(tmp_path)) == ["w"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ".."])
def test_an_index_names_no_file_elsewhere(tmp_path, name):
    (tmp_path / safetensors.INDEX_FILE).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="weight_map names"):
        safetensors.SafetensorsFolder(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    folder = folder_with(tmp_path, max_shard_bytes=20)
    index = json.loads((folder / safetensors.INDEX_FILE).read_text())
    files = index["weight_map"]
    (folder / safetensors.INDEX_FILE).write_text(json.dumps({"weight_map": files | {"b": files["a.weight"]}}))
    with pytest.raises(ValueError, match="says that b is in"):
        safetensors.SafetensorsFolder(folder)
    (folder / safetensors.INDEX_FILE).write_text(
        json.dumps({"weight_map": {name: file for name, file in files.items() if name != "d"}})
    )
    with pytest.raises(ValueError, match="has d, which"):
        safetensors.SafetensorsFolder(folder)
    (folder / files["a.weight"]).unlink()
    with pytest.raises(ValueError, match="missing"):
        safetensors.SafetensorsFolder(folder)


def test_a_file_cut_after_it_was_opened(tmp_path):
    found = safetensors.SafetensorsFolder(folder_with(tmp_path))
    path = tmp_path / safetensors.SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="ends at byte"):
        found["a.weight"].read()
        found["d"].read()
