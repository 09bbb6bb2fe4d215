import subprocess
import sys

import pytest

from gptjax import lock


def test_one_at_a_time_and_free_again_however_it_ended(tmp_path):
    with lock.exclusive(tmp_path / "new"):
        with pytest.raises(ValueError, match="new: another process is working there .*new/lock"):
            with lock.exclusive(tmp_path / "new"):
                pass
    holding = f"import os, signal; from gptjax import lock; lock.exclusive({str(tmp_path)!r}).__enter__(); "
    subprocess.run([sys.executable, "-c", holding + "os.kill(os.getpid(), signal.SIGKILL)"], check=False)
    assert (tmp_path / lock.FILE_NAME).exists()
    with lock.exclusive(tmp_path):
        pass


def test_an_object_store_has_none():
    with lock.exclusive("gs://bucket/run"), lock.exclusive("gs://bucket/run"):
        pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"{path}: expected a directory"):
            with lock.exclusive(path):
                pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="absl"), lock.exclusive(tmp_path):
        pass
    assert "no locks there" in caplog.text
