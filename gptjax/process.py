"""What the operating system knows of a process, and of what it runs on."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

_DESCRIBING = ("model name", "flags", "CPU implementer", "CPU part", "Features")


def peak_memory_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """The most memory that was resident at once: of this process or, with `RUSAGE_CHILDREN`, of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def processor() -> list[str]:
    """Lines that name the processor's model and features: what machine code for it depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    return list(dict.fromkeys(line for line in lines if line.startswith(_DESCRIBING)))
