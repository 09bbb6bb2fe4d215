"""Models in several GGUF files, as llama.cpp's gguf-split and the `gguf` package write them."""

import pathlib
import shutil

import numpy as np
import pytest

from gptjax.interop import formats, gguf, importing
from gptjax.interop.gguf import file as gguf_file
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.runner import GptjaxRunner
from tests.interop.gguf import models as gguf_models

package = pytest.importorskip("gguf")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split(whole: pathlib.Path, stem: pathlib.Path, **options) -> list[pathlib.Path]:
    """The files of the `gguf` package's writer, with all that `whole` has."""
    reader = package.GGUFReader(whole)
    writer = package.GGUFWriter(stem, reader.fields["general.architecture"].contents(), **options)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types if len(field.types) == 2 else [field.types[0], None]
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return sorted(stem.parent.glob(f"{stem.stem}-*-of-*.gguf"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    gguf_models.saved(gguf_models.CONFIGS["llama"], folder / "ckpt")
    gguf_write.write(folder / "ckpt", folder / "whole.gguf", quantization="f32")
    (folder / "parts").mkdir()
    files = split(folder / "whole.gguf", folder / "parts" / "model.gguf", split_max_tensors=8)
    assert [file.name for file in files] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return folder / "whole.gguf", files


@pytest.fixture
def parts(made, tmp_path):
    return [pathlib.Path(shutil.copy(file, tmp_path)) for file in made[1]]


def values(source):
    return {name: tensor.read() for name, tensor in source.tensors.items()}


def test_all_of_them_are_the_model(made):
    whole, files = made
    wanted, got = gguf.open_source(whole), gguf.open_source(files[0])
    assert got.model == wanted.model and got.files == tuple(files)
    assert got.hashes().keys() == {file.name for file in files}
    a, b = values(wanted), values(got)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert gguf.open_source(files[0].parent).path == files[0]
    assert formats.recognise(files[0].parent) == "gguf"


def test_a_first_file_without_tensors(made, tmp_path):
    files = split(made[0], tmp_path / "small.gguf", split_max_tensors=20, small_first_shard=True)
    assert gguf_file._read_one(files[0]).tensors == {}
    assert gguf.open_source(files[0]).tensors.keys() == gguf.open_source(made[0]).tensors.keys()


def test_llama_cpp_runs_the_same_files(parts, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    found = importing.import_model(parts[0], tmp_path / "ckpt")
    assert found.accepted and "llama.cpp" in found.referees["source"]
    assert found.source["sha256"].keys() == {file.name for file in parts}
    from gptjax.interop.referees import llama_cpp

    ours, theirs = GptjaxRunner.load(tmp_path / "ckpt"), llama_cpp.of_file(parts[0])
    assert np.abs(ours.logits([5, 6, 7]) - theirs.logits([5, 6, 7])).max() < 3e-4
    with pytest.raises(ValueError, match="first split"):
        llama_cpp.LlamaCppRunner(parts[1])


def test_a_later_file_names_the_first(parts):
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: split\.no: got 1 of 3 .* ends in -00001-of-00003"):
        gguf.open_source(parts[1])


def test_a_first_file_of_another_name(parts, tmp_path):
    parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"model\.gguf: split\.no: got 0 .* name ends in -00001-of-00003\.gguf"):
        gguf.open_source(tmp_path / "model.gguf")


def test_a_missing_file_is_named(parts):
    parts[2].unlink()
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.gguf: missing; model-00001-of-00003\.gguf is the"):
        gguf.open_source(parts[0])


def test_a_cut_file_is_named(parts):
    parts[1].write_bytes(parts[1].read_bytes()[:-64])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf: .* it is cut or damaged"):
        gguf.open_source(parts[0])


def test_files_in_each_other_s_place(parts):
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ValueError, match=r"00003-of-00003\.gguf: got .*'split\.no': 1.* expected number 2 of 3"):
        gguf.open_source(parts[0])


@pytest.mark.parametrize(
    ("second", "total", "message"),
    [
        ("b", 3, r"00001-of-00002\.gguf: split\.tensors\.count: got 3, expected 2"),
        ("a", 2, r"00002-of-00002\.gguf: a: in an earlier file"),
    ],
)
def test_forged_counts_and_names(tmp_path, second, total, message):
    for number, name in enumerate(("a", second)):
        writer = package.GGUFWriter(tmp_path / f"forged-0000{number + 1}-of-00002.gguf", "llama")
        for key, value in {"split.no": number, "split.count": 2, "split.tensors.count": total}.items():
            writer.add_uint16(key, value)
        writer.add_tensor(name, np.zeros(4, np.float32))
        finish(writer)
    with pytest.raises(ValueError, match=message):
        gguf_file.read_header(tmp_path / "forged-00001-of-00002.gguf")


@pytest.mark.parametrize("count", ["three", [3, 3], -1])
def test_a_count_that_is_none(tmp_path, count):
    file = tmp_path / "model-00001-of-00003.gguf"
    writer = package.GGUFWriter(file, "llama")
    {str: writer.add_string, list: writer.add_array, int: writer.add_int32}[type(count)]("split.count", count)
    finish(writer)
    with pytest.raises(ValueError, match=r"00003\.gguf: split\.count: got .*, expected a whole number"):
        gguf_file.read_header(file)
