"""Start-up in a job of several processes, and which rows each loads; two real ones are in train/test_multihost.py."""

import jax
import numpy as np
import pytest

from gptjax.parallel import hosts, rules
from gptjax.parallel.mesh import MeshConfig, make_mesh

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture
def started(monkeypatch):
    """The arguments of each `jax.distributed.initialize`, in an environment without a job."""
    calls = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(hosts, "_on_tpu_vm", lambda: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"SLURM_NTASKS": "4"}, []),  # a shell of salloc or sbatch: srun starts the tasks, and not this one
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, [{}]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [{}]),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            [{"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}],
        ),
    ],
)
def test_processes_of_a_job_are_connected_once_and_a_single_one_is_left_alone(
    started, monkeypatch, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.initialize()
    hosts.initialize()
    assert started == expected


def test_a_tpu_vm_needs_no_variables(started, monkeypatch):
    monkeypatch.setattr(hosts, "_on_tpu_vm", lambda: True)
    hosts.initialize()
    assert started == [{}]


def test_an_address_without_its_numbers_is_refused(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a number, got 'two'"):
        hosts.initialize()
    assert started == []


class Layout:
    """What `row_group` reads of a sharding: the rows of each of this process's devices."""

    def __init__(self, *rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {device: (slice(*rows), slice(None)) for device, rows in enumerate(self._rows)}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout((0, 4), (4, 8)), (0, 2)),
        (Layout((8, 12), (12, 16)), (1, 2)),
        (Layout((None, None), (None, None)), (0, 1)),  # every device has all rows, and a part of each
        (Layout((4, 8), (4, 8)), (1, 4)),
    ],
)
def test_a_process_loads_the_run_of_rows_that_its_devices_hold(layout, expected):
    assert hosts.row_group(layout, (16, 4)) == expected


@pytest.mark.parametrize("layout", [Layout((0, 4), (8, 12)), Layout((2, 4), (4, 6)), Layout((0, 4), (4, 8), (8, 12))])
def test_rows_that_are_not_one_run_are_refused(layout):
    with pytest.raises(ValueError, match="not one run of them: make the batch axes"):
        hosts.row_group(layout, (16, 4))


def test_one_process_has_all_rows_and_places_them():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=1, context=2, tensor=1))
    sharding = rules.batch_sharding(mesh)
    rows = np.arange(32).reshape(8, 4)
    assert hosts.row_group(sharding, rows.shape) == (0, 1)
    found = hosts.to_global({"tokens": rows}, sharding)["tokens"]
    assert found.sharding.shard_shape(rows.shape) == (2, 2)
    np.testing.assert_array_equal(found, rows)
