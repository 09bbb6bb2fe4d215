"""The directory of checkpoints: which are complete, and how one is removed.

`<workdir>/ckpt/<step>` is complete or was damaged later; what is still being written has another
name (on gs://, where renaming copies, it lacks a marker file).
"""

from __future__ import annotations

from absl import logging
from etils import epath

DIRECTORY = "ckpt"
_UNCOMMITTED = ".orbax-checkpoint-tmp"
COMMIT_MARK = "commit_success.txt"
"""Orbax's sign, in a checkpoint and in each of its items, that it is complete."""


def committed_steps(directory: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a `ckpt` directory, ascending."""
    if not directory.exists():
        return []
    names = [path for path in directory.iterdir() if path.name.isdigit() and is_committed(path)]
    return sorted(int(path.name) for path in names)


def require_committed(path: epath.Path) -> None:
    """Raises:
    ValueError: with the path, if there is no checkpoint or it was never complete.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; committed steps are {committed_steps(path.parent)}")
    if not is_committed(path):
        raise ValueError(f"{path}: saving was interrupted before the checkpoint was complete; use another step")


def is_committed(path: epath.Path) -> bool:
    """Whether the directory of a step was completely written once."""
    # Elsewhere than on gs:// a directory gets its name when it is complete, so whatever is missing
    # from it was lost later: that is a damaged checkpoint, and not an uncommitted one to be removed.
    return not _commits_by_mark(path) or (path / COMMIT_MARK).exists()


def _commits_by_mark(path: epath.Path) -> bool:
    return str(path).startswith("gs://")


def remove_uncommitted(directory: epath.Path) -> None:
    """Removes what no one will complete; only for the one who writes there."""
    if not directory.exists():  # on gs:// a directory without files is none, even when it was just made
        return
    for path in directory.iterdir():
        if _UNCOMMITTED in path.name or (path.name.isdigit() and not is_committed(path)):
            logging.warning("%s: is incomplete, as saving or removing it was interrupted; removed.", path)
            path.rmtree()


def remove(path: epath.Path) -> None:
    """Removes a checkpoint so that a kill half-way leaves an uncommitted one, not a damaged one."""
    if _commits_by_mark(path):
        (path / COMMIT_MARK).unlink()
    else:
        path = path.rename(path.parent / f"{path.name}{_UNCOMMITTED}-removed")
    path.rmtree()


def absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants local paths; `absolute` would spoil one with a scheme.

    Raises:
      ValueError: for a scheme that is not known.
    """
    try:
        return epath.Path(path) if "://" in str(path) else epath.Path(path).absolute()
    except KeyError as error:
        raise ValueError(f"{path}: unknown scheme; expected a local path or gs://") from error
