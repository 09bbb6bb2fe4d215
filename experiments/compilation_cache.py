"""Compiled programs are kept between runs, so that a command that was run before starts faster.

They go to `$XDG_CACHE_HOME/gptjax/jax` (`~/.cache/gptjax/jax`), one directory for each kind of processor and release of
jaxlib: XLA compiles for the very processor it runs on, and what it compiled for another one may crash. To keep
them elsewhere set JAX_COMPILATION_CACHE_DIR, to keep none JAX_ENABLE_COMPILATION_CACHE=false; to start anew
remove the directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

from gptjax import process

# As `parallel.hosts` reads them: of a job step, since a shell in an allocation for several tasks is one process.
_PROCESSES = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def configure(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets JAX's variables, unless they are set; must come before JAX is imported.

    A job of several processes is left alone: JAX writes the programs of the first one only, and where some
    processes compile and others do not, those that share the work of tuning kernels wait for each other.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environ or any(environ.get(name, "1") != "1" for name in _PROCESSES):
        return
    try:
        path = directory(environ)
        # Who can write there can run code as this user.
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return
    environ["JAX_COMPILATION_CACHE_DIR"] = str(path)
    # Half of the time to the first token goes to programs that take less than JAX's threshold of a second.
    environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def directory(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Where the programs of this machine go."""
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gptjax" / "jax" / f"{platform.machine()}-{_fingerprint()}"


def _fingerprint() -> str:
    """A hash of the processor's model and features, and of jaxlib's release."""
    text = "\n".join([*process.processor(), importlib.metadata.version("jaxlib")])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
