"""Settings that make training on CPU faster."""

from __future__ import annotations

import ctypes
import os
import re
import sys

import jax
import jaxlib

# XLA aborts on a flag that it does not know, so this one is set only for the releases known to have it.
_KNOWN_RELEASES = ((0, 10),)
_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_DEVICES = re.compile(r"xla_force_host_platform_device_count=(\d+)")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def configure_training() -> None:
    """Sets up JAX, before its first computation, for a process that trains on CPU. Other platforms do not mind.

    Matrix products go back to XLA:CPU's Eigen kernels: YNNPACK fusions are slower in most training, though not
    in decoding, whose products have few rows. Simulated devices get enough threads. Both are
    variables of the environment (`XLA_FLAGS`, `NPROC`), left alone where they say otherwise.

    On one device, steps run in the thread that calls them, so that the memory of each is what `keep_freed_memory`
    kept of the last: another thread's part of the heap holds no block over 64 MiB. The host's own work is then not
    hidden behind the device's, of which it took processor time before.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
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

    Blocks over 64 MiB that a thread other than the first asks for are mapped all the same. One arena for all
    threads would not help: they wait for each other.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def start_environment() -> dict[str, str]:
    """This process's environment, with what the C library reads when a process that trains on CPU starts.

    Memory in huge pages: fewer page faults while it grows, and fewer misses of the TLB.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
