"""The files of a directory or of a glob, in an order that depends on their names alone."""

from __future__ import annotations

import fnmatch
import glob
import os
import pathlib
from collections.abc import Iterator, Sequence


def files(where: str) -> dict[str, pathlib.Path]:
    """Files by their path relative to the directory, or to the part of a glob that is spelled out; sorted.

    Hidden files and directories (`.git`) match only a pattern with their dot. Links are followed, but
    never back into a directory that they lie in.

    Raises:
      ValueError: if there are no files.
      OSError: for a directory that cannot be read: leaving it out would leave out text.
    """
    base = pathlib.Path(where)
    pattern: Sequence[str] = ["**"]
    if not base.is_dir():
        while glob.has_magic(str(base)):
            base = base.parent
        pattern = pathlib.Path(where).relative_to(base).parts
    found = sorted(set(_matching(str(base), pattern, frozenset()))) if base.is_dir() else []
    if not found:
        raise ValueError(f"{where}: no files there; expected a directory of text, or a glob such as src/**/*.py")
    return {pathlib.Path(path).relative_to(base).as_posix(): pathlib.Path(path) for path in found}


def _matching(directory: str, pattern: Sequence[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files below `directory`; `above` are the inodes of the directories that a `**` has gone through."""
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        status = os.stat(directory)
        above = above | {(status.st_dev, status.st_ino)}
        yield from _matching(directory, rest or ("*",), frozenset())
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if head == "**":
            if not name.startswith(".") and os.path.isdir(path) and _inode(path) not in above:
                yield from _matching(path, pattern, above)
        elif fnmatch.fnmatchcase(name, head) and (head.startswith(".") or not name.startswith(".")):
            if not rest:
                yield from [path] if os.path.isfile(path) else []
            elif os.path.isdir(path):
                yield from _matching(path, rest, frozenset())


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
