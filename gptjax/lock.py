"""One process at a time in a directory."""

from __future__ import annotations

import fcntl
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

from absl import logging

FILE_NAME = "lock"


@contextmanager
def exclusive(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes out of a directory, made if missing, while the block runs and this process lives.

    The file `lock` that it leaves there is empty and means nothing by itself. Object stores (gs://) have no
    locks; neither have some network file systems, which is logged.

    Raises:
      ValueError: if another process is in, or the directory cannot be one.
    """
    if "://" in os.fspath(directory):
        yield
        return
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{directory}: expected a directory, new or old; a file is in its way") from error
    with open(pathlib.Path(directory, FILE_NAME), "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{directory}: another process is working there (it holds {file.name}); wait for it to end, stop it, "
                "or choose another directory"
            ) from error
        except OSError as error:
            logging.warning("%s: no locks there (%s), so nothing keeps a second process out.", directory, error)
        yield
