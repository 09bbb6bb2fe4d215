"""The default corpus: the source of the Python standard library found on this very machine.

It needs no network and no licence question, is the same text on every machine with the same
Python, and is real: about 9 MB of code and English in 550 modules.
"""

from __future__ import annotations

import os
import pathlib
import sysconfig

# Tests repeat the library's own calls; encodings and pydoc_data are tables and pages that a
# program wrote; idlelib is an application; the others are not the standard library's.
_LEFT_OUT = {"test", "tests", "idlelib", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def modules() -> dict[str, pathlib.Path]:
    """The modules' files by path relative to the library (`asyncio/events.py`), sorted.

    Raises:
      ValueError: if this Python came without its source.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, pathlib.Path] = {}
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _LEFT_OUT and not _is_build_setting(name)]
        paths = [
            pathlib.Path(directory, name) for name in names if name.endswith(".py") and not _is_build_setting(name)
        ]
        found |= {path.relative_to(root).as_posix(): path for path in paths}
    if len(found) < 100:
        raise ValueError(
            f"{root}: expected the source of the Python standard library, found {len(found)} modules; "
            "install the full Python package or name another source"
        )
    return dict(sorted(found.items()))


def _is_build_setting(name: str) -> bool:
    """Whether a file or directory describes the machine: `_sysconfigdata_*.py`, `config-3.11-*`."""
    return name.startswith(("_sysconfigdata", "config-"))
