"""Settings that make training on CPU faster; they must be made before JAX's first computation."""

from __future__ import annotations

import ctypes
import os
import sys

import jaxlib

# XLA aborts on a flag that it does not know, so this one is set only for the releases known to have it.
_KNOWN_RELEASES = ((0, 10),)
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def configure_training() -> None:
    """Gives matrix products back to XLA:CPU's Eigen kernels, and lets the process keep the memory that a step frees.

    YNNPACK fusions are slower in most training, though not in decoding, whose products have few rows. Adds to
    `XLA_FLAGS`, and leaves a value of the same flag that is already there. Other platforms do not read it.
    """
    _keep_freed_memory()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Simulated devices that enter two all-reduces in different order wait for each other, each in a thread,
        # until no thread is left: with more threads than that the rest goes on.
        os.environ.setdefault("NPROC", "32")
    release = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release in _KNOWN_RELEASES and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=".strip()


def _keep_freed_memory() -> None:
    """Makes glibc's malloc reuse large blocks; by default it maps each anew, a page fault for every 4 KiB.

    Blocks over 64 MiB that a thread other than the first asks for are mapped all the same; `start_environment`
    makes those cheaper. One arena for all threads would not be: they wait for each other.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def start_environment() -> dict[str, str]:
    """This process's environment, with what the C library reads when a process that trains on CPU starts.

    The temporary arrays of each step are new memory: huge pages make that a few hundred page faults
    instead of fifty thousand.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
