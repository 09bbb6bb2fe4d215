"""What makes XLA:CPU faster; settings must be made before JAX's first computation."""

from __future__ import annotations

import os

import jax.numpy as jnp
import jaxlib

from gptjax.parallel.mesh import platform
from gptjax.types import Array

# XLA aborts on a flag that it does not know, so this one is set only for the releases known to have it.
_KNOWN_RELEASES = ((0, 10),)
_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def configure() -> None:
    """Gives matrix products back to XLA:CPU's Eigen kernels, which are faster than YNNPACK fusions.

    Adds to `XLA_FLAGS`, and leaves a value of the same flag that is already there. Other
    platforms do not read it.
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


def computed_once(x: Array) -> Array:
    """`x`, which on CPU is not computed anew inside every fusion that reads it.

    XLA:CPU drops optimization barriers and takes sines and cosines for cheap. A product is never part of
    a fusion, and one with the identity is exact.
    """
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype) if platform() == "cpu" else x
