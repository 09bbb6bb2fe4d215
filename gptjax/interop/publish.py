"""How a conversion appears: whole and proven under its name, or not at all.

Work goes on in `<name>.partial`, which a kill leaves and the next call takes up. What is finished
is proven there, and then gets its name in one rename, or `<name>.rejected`.
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptjax import lock
from gptjax.interop.certificate import Certificate
from gptjax.interop.stream import JOURNAL_FILE
from gptjax.json_files import read_json, write_json

CERTIFICATE_FILE = "certificate.json"
JOB_FILE = "job.json"
# What a directory has besides the artefact while it is worked in. The journal stays until the proof is done, or a kill
# in the middle of that would have everything written again.
WORK_FILES = frozenset({CERTIFICATE_FILE, JOB_FILE, JOURNAL_FILE, lock.FILE_NAME})
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RejectedError(ValueError):
    """A conversion that was carried out, but is not within its tolerance."""

    def __init__(self, certificate: Certificate, path: pathlib.Path) -> None:
        lines = [*certificate.problems, *filter(None, [certificate.first_different_layer])]
        super().__init__(f"rejected, and kept in {path}: {'; '.join(lines)}")
        self.certificate = certificate


@contextmanager
def directory(final: pathlib.Path, *, job: Mapping[str, Any]) -> Iterator[pathlib.Path]:
    """The directory to work in for an artefact to be called `final`; no other process gets it meanwhile.

    Args:
      job: what is made; what an earlier call left of the same is taken up.

    Raises:
      ValueError: if something has that name already, was rejected under it, or is half done and something else.
    """
    _check_free(final)
    partial = _partial(final)
    _make(partial, final)
    with lock.exclusive(partial):
        try:
            _check_free(final)  # another process may have finished since
            _check_job(partial, job)
            yield partial
        except Exception as error:
            if _is_full(error):
                free = shutil.disk_usage(partial).free / 1e6
                raise ValueError(
                    f"{partial}: there is no room for it ({free:,.0f} MB are free); make some and repeat the same "
                    "command, which goes on from here"
                ) from error
            raise
        finally:
            if {path.name for path in partial.glob("*")} <= {lock.FILE_NAME, JOB_FILE}:  # nothing was begun
                shutil.rmtree(partial, ignore_errors=True)


def check_place(final: pathlib.Path) -> None:
    """Before work begins that would be lost.

    Raises:
      ValueError: if nothing can be made there.
    """
    partial = _partial(final)
    if not partial.exists():
        _make(partial, final)
        partial.rmdir()


def _partial(final: pathlib.Path) -> pathlib.Path:
    return final.with_name(final.name + ".partial")


def _make(partial: pathlib.Path, final: pathlib.Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not partial.exists():
            raise ValueError(f"{final}: cannot be made ({error.strerror}); name another place") from error


def _is_full(error: Exception) -> bool:
    """Whether a disk or a quota is full, or a file may not become so large; TensorStore only has it in its text."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return "RESOURCE_EXHAUSTED" in str(error) or any(os.strerror(code) in str(error) for code in _FULL)


def _check_free(final: pathlib.Path) -> None:
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final}: is there already, and is not overwritten; name another, or remove it")
    rejected = _rejected(final)
    if rejected.exists():
        raise ValueError(
            f"{rejected}: an earlier attempt, which was rejected, is not overwritten; {CERTIFICATE_FILE} in it says "
            "why: remove it to try again"
        )


def _rejected(final: pathlib.Path) -> pathlib.Path:
    return final.with_name(final.name + ".rejected")


def _check_job(partial: pathlib.Path, job: Mapping[str, Any]) -> None:
    """Some formats' files have no journal of their own that would tell one conversion from another."""
    found = read_json(partial / JOB_FILE)
    begun = any(path.name != lock.FILE_NAME and not path.name.startswith(JOB_FILE) for path in partial.iterdir())
    if begun and found != job:
        raise ValueError(
            f"{partial}: holds a conversion that was interrupted, of another source or with other settings; delete "
            "that directory to begin this one"
        )
    write_json(partial / JOB_FILE, job)


def settle(partial: pathlib.Path, final: pathlib.Path, certificate: Certificate) -> None:
    """Gives the artefact its certificate and its name.

    Raises:
      RejectedError: if the certificate says no; the artefact is then called `<name>.rejected`.
    """
    write_json(partial / CERTIFICATE_FILE, certificate.to_json())
    for name in (JOURNAL_FILE, JOB_FILE, lock.FILE_NAME):
        (partial / name).unlink(missing_ok=True)
    if certificate.accepted:
        if final.exists():
            final.rmdir()  # empty, as `directory` saw; one that was filled meanwhile is an error here
        partial.rename(final)
        return
    rejected = _rejected(final)
    partial.rename(rejected)
    raise RejectedError(certificate, rejected)
