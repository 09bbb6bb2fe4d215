"""Settings that make training on CPU faster; they must be made before JAX's first computation."""

from __future__ import annotations

import os

import jaxlib

# XLA aborts on a flag that it does not know, so this one is set only for the releases known to have it.
_KNOWN_RELEASES = ((0, 10),)
_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def configure_training() -> None:
    """Gives matrix products back to XLA:CPU's Eigen kernels, faster than YNNPACK fusions in most training.

    Not in decoding, whose products have few rows. Adds to `XLA_FLAGS`, and leaves a value of the same flag
    that is already there. Other platforms do not read it.
    """
    release = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release in _KNOWN_RELEASES and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=".strip()


def start_environment() -> dict[str, str]:
    """This process's environment, with what the C library reads when a process that trains on CPU starts.

    The temporary arrays of each step are new memory: huge pages make that a few hundred page faults
    instead of fifty thousand.
    """
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
