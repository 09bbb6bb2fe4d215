import os

import pytest

from gptjax.data import listing


@pytest.fixture
def tree(tmp_path):
    for name in ("b.py", "a/b.py", "a/c/d.py", "a/c/e.txt", "ab.py", ".git/f.py", "a/.hidden.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a/b.py", "a/c/d.py", "a/c/e.txt", "ab.py", "b.py"]),
        ("/**/*.py", ["a/b.py", "a/c/d.py", "ab.py", "b.py"]),
        ("/**", ["a/b.py", "a/c/d.py", "a/c/e.txt", "ab.py", "b.py"]),
        ("/*.py", ["ab.py", "b.py"]),
        ("/*/*.py", ["a/b.py"]),
        ("/a/**/*.py", ["b.py", "c/d.py"]),
        ("/**/c/*", ["a/c/d.py", "a/c/e.txt"]),
        ("/[b].py", ["b.py"]),
        ("/.g*/*", [".git/f.py"]),
        ("/*/.*", ["a/.hidden.py"]),
    ],
)
def test_a_directory_and_globs(tree, pattern, expected):
    found = listing.files(f"{tree}{pattern}")
    assert list(found) == expected
    assert all(path.read_text().endswith(id) for id, path in found.items())


@pytest.mark.parametrize("pattern", ["", "/**/*.py"])
def test_links_are_followed_and_loops_are_not(tree, tmp_path_factory, pattern):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "g.py").write_text("g.py")
    (tree / "link").symlink_to(elsewhere)
    for name, target in (("loop", "."), ("a/up", ".."), ("a/c/up", "../.."), ("gone.py", "nowhere"), ("me", "me")):
        (tree / name).symlink_to(target)
    os.mkfifo(tree / "pipe.py")
    found = listing.files(f"{tree}{pattern}")
    assert [id for id in found if id.endswith(".py")] == ["a/b.py", "a/c/d.py", "ab.py", "b.py", "link/g.py"]


def test_nothing_there_is_named(tmp_path):
    for where in (tmp_path, tmp_path / "*.py", tmp_path / "none" / "*.py"):
        with pytest.raises(ValueError, match="no files there; expected a directory of text, or a glob"):
            listing.files(str(where))


def test_a_directory_that_cannot_be_read_is_not_left_out(tree, monkeypatch):
    real = os.listdir

    def listdir(path):
        if path == str(tree / "a" / "c"):  # its mode would not keep root out
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(PermissionError, match=str(tree / "a" / "c")):
        listing.files(str(tree))
