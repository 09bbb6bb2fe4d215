"""Many hosts as one: start-up, and global arrays from the rows that each host loads."""

from __future__ import annotations

import glob
import os
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def initialize() -> None:
    """Connects the processes of a job, before any other use of JAX; alone, it does nothing.

    Recognised: `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, tasks that
    `srun` or `mpirun` started together, and TPU VMs, where the metadata server knows the rest.

    Raises:
      ValueError: if the address is set without the two numbers.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=_required_int("JAX_NUM_PROCESSES"),
            process_id=_required_int("JAX_PROCESS_ID"),
        )
    elif _several_tasks("SLURM_STEP_NUM_TASKS") or _several_tasks("OMPI_COMM_WORLD_SIZE") or _on_tpu_vm():
        jax.distributed.initialize()
    else:
        return
    logging.info(
        "process %d of %d, %d local of %d devices",
        jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
    )  # fmt: skip


def _required_int(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, so {name} must be a number, got {value!r}")
    return int(value)


def _several_tasks(name: str) -> bool:
    # Of a job step, not of the job: a shell in an allocation for several tasks is one process.
    return os.environ.get(name, "1").isdecimal() and int(os.environ.get(name, "1")) > 1


def _on_tpu_vm() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0]
    return wanted == "tpu" and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and _has_libtpu()


def _has_libtpu() -> bool:
    try:
        import libtpu  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


def is_lead() -> bool:
    """True on the one process that logs and writes small files."""
    return jax.process_index() == 0


def check_same(checksum: int, what: str) -> None:
    """Compares a number of 32 bits over all processes; each calls it alike.

    Raises:
      ValueError: on every process, unless all have the same.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.uint32(checksum)).tolist()
    if len(set(found)) > 1:
        shown = ", ".join(f"{value:08x}" for value in found)
        raise ValueError(f"{what}: not the same on all hosts (checksums {shown}, by process); copy one to all")


def row_group(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """Which rows of a global `[B, T]` batch this process must load: `(group, num_groups)`.

    The batch falls into `num_groups` equal runs of rows. Processes that hold different parts of
    the same rows (context or tensor parallelism across hosts) are in the same group.

    Raises:
      ValueError: when a process's devices hold rows that are not one such run.
    """
    places: Any = sharding.addressable_devices_indices_map(shape)
    slices = {index[0].indices(shape[0])[:2] for index in places.values()}
    start, stop = min(first for first, _ in slices), max(last for _, last in slices)
    size = stop - start
    if sum(last - first for first, last in slices) != size or shape[0] % size or start % size:
        raise ValueError(
            f"process {jax.process_index()} holds rows {sorted(slices)} of {shape[0]}, not one run of them: "
            "make the batch axes of the mesh (data, fsdp, expert) a multiple or a divisor of the number of hosts"
        )
    return start // size, shape[0] // size


def to_global(rows: Any, sharding: NamedSharding) -> Any:
    """Global arrays from the rows of this process's `row_group`; leaves are `[B / num_groups, T, ...]`.

    On a single device they stay as they are: a jitted function takes numpy in a fifth of the time of `device_put`.
    """
    if sharding.mesh.size == 1:
        return rows

    def assemble(local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        rows_per_group, length = local.shape[:2]
        num_rows = _num_rows(sharding, rows_per_group)
        first = row_group(sharding, (num_rows, length))[0] * rows_per_group

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(num_rows)
            return local[start - first : stop - first, *index[1:]]

        return jax.make_array_from_callback((num_rows, *local.shape[1:]), sharding, part)

    return jax.device_put(rows, sharding) if jax.process_count() == 1 else jax.tree.map(assemble, rows)


def _num_rows(sharding: NamedSharding, rows_per_group: int) -> int:
    """The global number of rows whose group for this process has `rows_per_group` of them."""
    probe = int(np.prod([sharding.mesh.shape[axis] for axis in sharding.mesh.axis_names]))
    length = sharding.mesh.size
    return rows_per_group * row_group(sharding, (probe, length))[1]
