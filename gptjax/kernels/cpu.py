"""Settings that make training on CPU faster."""

from __future__ import annotations

import ctypes
import os
import re
import sys

import jaxlib

# XLA aborts on a flag that it does not know, so this one is set only for the releases known to have it.
_KNOWN_RELEASES = ((0, 10),)
_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_DEVICES = re.compile(r"xla_force_host_platform_device_count=(\d+)")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def configure_training() -> None:
    """Gives matrix products back to XLA:CPU's Eigen kernels, and simulated devices enough threads.

    YNNPACK fusions are slower in most training, though not in decoding, whose products have few rows. Sets
    `XLA_FLAGS` and `NPROC`, which JAX reads at its first computation, where they do not say otherwise.
    Other platforms do not read them.
    """
    simulated = _DEVICES.search(os.environ.get("XLA_FLAGS", ""))
    if simulated:
        # Each collective blocks a thread of the pool, and devices may enter two of them in different order.
        os.environ.setdefault("NPROC", str(4 * int(simulated.group(1))))
    release = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release in _KNOWN_RELEASES and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=".strip()


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse large blocks; by default it maps each anew, a page fault for every 4 KiB.

    For a process that trains on CPU: its memory stays at its peak.

    Blocks over 64 MiB that a thread other than the first asks for are mapped all the same; `start_environment`
    makes those cheaper. One arena for all threads would not be: they wait for each other.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def start_environment() -> dict[str, str]:
    """This process's environment, with what the C library reads when a process that trains on CPU starts.

    The temporary arrays of each step are new memory: huge pages make that a few hundred page faults
    instead of fifty thousand.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
