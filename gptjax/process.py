"""What the operating system knows of a process."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """The most memory that was resident at once: of this process or, with `RUSAGE_CHILDREN`, of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit
