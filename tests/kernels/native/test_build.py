"""Where libraries come from, and what happens where they cannot."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.kernels.native import build

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cc"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def environ_of(tmp_path, **more):
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": os.environ["PATH"]} | more


def answer(source, environ):
    library, _ = build.library(source, source.parent, environ)
    return library.answer()


def libraries(tmp_path):
    return sorted(Path(tmp_path, "cache", "gptjax", "native").iterdir())


def test_what_was_compiled_is_found_again_and_a_change_compiles_anew(tmp_path, source, monkeypatch):
    environ = environ_of(tmp_path)
    assert answer(source, environ) == 42
    (path,) = libraries(tmp_path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(build, "_compile", lambda *_: pytest.fail("compiled twice"))
        assert answer(source, environ) == 42
    monkeypatch.setattr(build.process, "processor", lambda: ["another one"])
    assert answer(source, environ) == 42
    assert len(libraries(tmp_path)) == 2
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert answer(source, environ) == 43
    (tmp_path / "more.h").write_text("")
    assert answer(source, environ) == 43
    assert len(libraries(tmp_path)) == 4


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:-100], lambda old: b"x" + old[1:]])
def test_a_damaged_library_is_compiled_anew(tmp_path, source, damage):
    # In processes of their own: the loader knows a library by its file, and this one is replaced.
    code = (
        "import os, pathlib, sys; from gptjax.kernels.native import build\n"
        "source = pathlib.Path(sys.argv[1])\n"
        "print(build.library(source, source.parent)[0].answer())"
    )
    run = [sys.executable, "-c", code, str(source)]
    environ = os.environ | environ_of(tmp_path)
    assert subprocess.check_output(run, env=environ, text=True) == "42\n"
    (path,) = libraries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert subprocess.check_output(run, env=environ, text=True) == "42\n"
    assert libraries(tmp_path) == [path] and build._is_whole(path)


def test_processes_may_compile_at_once(tmp_path, source):
    code = (
        "import pathlib, sys; from gptjax.kernels.native import build\n"
        "source = pathlib.Path(sys.argv[1])\n"
        "print(build.library(source, source.parent)[0].answer())"
    )
    run = [sys.executable, "-c", code, str(source)]
    environ = os.environ | environ_of(tmp_path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = [pool.submit(subprocess.check_output, run, env=environ, text=True) for _ in range(4)]
        assert [future.result() for future in found] == ["42\n"] * 4
    (path,) = libraries(tmp_path)
    assert build._is_whole(path)


def test_why_there_is_none(tmp_path, source):
    def reason(**more):
        with pytest.raises(build.Unavailable) as raised:
            build.library(source, source.parent, environ_of(tmp_path, **more))
        return str(raised.value)

    assert reason(GPTJAX_CPU_KERNELS="0") == "GPTJAX_CPU_KERNELS=0"
    assert "no C++ compiler" in reason(PATH=str(tmp_path))
    assert "no C++ compiler (nothing-of-the-kind)" in reason(CXX="nothing-of-the-kind")
    assert "answer.cc" in reason(XDG_CACHE_HOME=str(source))  # a file is in its way
    assert not (tmp_path / "cache").exists()
    answer(source, environ_of(tmp_path))
    directory = tmp_path / "cache" / "gptjax" / "native"
    directory.chmod(0o770)
    assert "others can write there" in reason()
    directory.chmod(0o700)
    source.write_text("not C++\n")
    assert "cannot compile answer" in reason() and "error" in reason()
    assert len(libraries(tmp_path)) == 1  # nothing half made stays


def test_where_nothing_can_be_written_only_what_is_there_is_used(tmp_path, source, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")  # root, who may run this, is never refused

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(build.Unavailable, match="Permission denied"):
        build.library(source, source.parent, environ_of(tmp_path))
    monkeypatch.undo()
    assert answer(source, environ_of(tmp_path)) == 42
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    assert answer(source, environ_of(tmp_path)) == 42
