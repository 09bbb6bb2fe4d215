"""The default corpus: the source of the Python standard library found on this very machine.

It needs no network and no licence question, is the same text on every machine with the same
Python, and is real: about 9 MB of code and English in 550 modules.
"""

from __future__ import annotations

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
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = {id: path for id, path in sorted(found.items()) if _is_library(id)}
    if len(kept) < 100:
        raise ValueError(
            f"{root}: expected the source of the Python standard library, found {len(kept)} modules; "
            "install the full Python package or name another source"
        )
    return kept


def _is_library(id: str) -> bool:
    *directories, name = id.split("/")
    # Build settings (`_sysconfigdata_*`, `config-*/`) are the machine's, not the library's.
    is_build_setting = name.startswith("_sysconfigdata") or any(part.startswith("config-") for part in directories)
    return _LEFT_OUT.isdisjoint(directories) and not is_build_setting
