"""How a conversion appears: whole and proven under its name, or not at all.

Work goes on in `<name>.partial`, which a kill leaves and the next call takes up. What is finished
is proven there, and then gets its name in one rename, or `<name>.rejected`.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from gptjax import lock
from gptjax.interop.certificate import Certificate
from gptjax.json_files import write_json

CERTIFICATE_FILE = "certificate.json"


class RejectedError(ValueError):
    """A conversion that was carried out, but is not within its tolerance."""

    def __init__(self, certificate: Certificate, path: pathlib.Path) -> None:
        lines = [*certificate.problems, *filter(None, [certificate.first_different_layer])]
        super().__init__(f"rejected, and kept in {path}: {'; '.join(lines)}")
        self.certificate = certificate


@contextmanager
def directory(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """The directory to work in for an artefact to be called `final`; no other process gets it meanwhile.

    Raises:
      ValueError: if something has that name already.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final}: is there already, and is not overwritten; name another, or remove it")
    partial = final.with_name(final.name + ".partial")
    with lock.exclusive(partial):
        try:
            yield partial
        finally:
            # Refused before there was anything to go on with, for a missing package say: nothing is left behind.
            if partial.exists() and [path.name for path in partial.iterdir()] == [lock.FILE_NAME]:
                shutil.rmtree(partial)


def settle(partial: pathlib.Path, final: pathlib.Path, certificate: Certificate) -> None:
    """Gives the artefact its certificate and its name.

    Raises:
      RejectedError: if the certificate says no; the artefact is then called `<name>.rejected`.
    """
    write_json(partial / CERTIFICATE_FILE, certificate.to_json())
    (partial / lock.FILE_NAME).unlink(missing_ok=True)
    if certificate.accepted:
        if final.exists():
            final.rmdir()  # empty, as `directory` saw; one that was filled meanwhile is an error here
        partial.rename(final)
        return
    rejected = final.with_name(final.name + ".rejected")
    if rejected.exists() and (rejected / CERTIFICATE_FILE).exists():
        shutil.rmtree(rejected)  # an earlier one of ours
    partial.rename(rejected)
    raise RejectedError(certificate, rejected)
