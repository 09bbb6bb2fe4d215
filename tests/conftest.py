"""Eight simulated CPU devices, a compilation cache that outlives the run, and optional real data.

The environment is set when this file is imported, before any test imports JAX, and so also
reaches the processes that tests start.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from etils import epath

from experiments import compilation_cache

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
_TESTS_BETWEEN_LOOKS, _MANY_MAPPINGS = 20, 20_000


def _set_environment() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    # Compiling takes most of the time of tests this small, and half of it is LLVM optimising.
    if "xla_backend_optimization_level" not in flags:
        flags = f"{flags} --xla_backend_optimization_level=0"
        os.environ["XLA_FLAGS"] = flags
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={NUM_DEVICES}".strip()
    # XLA:CPU runs independent collectives of a device side by side and blocks a thread in each: with one thread a
    # device, two all-reduces that devices enter in different order wait for each other for ever, now and then.
    os.environ.setdefault("NPROC", str(4 * NUM_DEVICES))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache.directory()))
    # Tests compile thousands of small programs, below JAX's thresholds for being worth storing.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # Charts are drawn to files; a display may be absent.
    os.environ.setdefault("MPLBACKEND", "Agg")


_set_environment()


_num_tests = 0


def pytest_runtest_teardown() -> None:
    """Lets go of compiled programs before they are too many for one process.

    Each takes some tens of memory mappings, of which Linux gives a process 65,530 (`vm.max_map_count`). Without one,
    LLVM crashes, after some fifteen hundred tests.
    """
    global _num_tests
    _num_tests += 1
    maps = Path("/proc/self/maps")
    if _num_tests % _TESTS_BETWEEN_LOOKS or not maps.exists() or maps.read_bytes().count(b"\n") < _MANY_MAPPINGS:
        return
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real tokenizers, texts and tiny checkpoints; the test is skipped without it."""
    directory = Path(os.environ.get("GPTJAX_DATA") or REPOSITORY.parent / "shared" / "data")
    if not directory.is_dir():
        pytest.skip(f"no real data at {directory}; set GPTJAX_DATA to its directory")
    return directory


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The address of an empty bucket that is not there: its files lie in the test's directory.

    etils, asked to take gs:// for the local file system, opens `gs://bucket/x` as a relative path.
    As in a bucket, a directory is there as long as a file is in it, and need not be made.
    """
    monkeypatch.chdir(tmp_path)

    def open_file(original, path, mode):
        if "r" not in mode:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return original(path, mode)

    with epath.testing.mock_epath(
        open=open_file,
        exists=lambda original, path: os.path.isfile(path) or any(names for *_, names in os.walk(path)),
        mkdir=lambda original, path, **options: None,
        makedirs=lambda original, path, **options: None,
    ):
        yield "gs://bucket"
