"""Where devices go; see test_rules.py for sizes that do not fit."""

import dataclasses

import jax
import pytest

from gptjax.parallel import mesh
from gptjax.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """What the layout reads of an accelerator."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "an accelerator without coordinates"


def test_only_the_data_axis_crosses_slices():
    devices = [Device(id, slice_index=id // 4) for id in range(16)]
    grid = mesh._multislice_grid((8, 1, 1, 1, 2), devices)
    assert grid.shape == (8, 1, 1, 1, 2)
    slices = [{device.slice_index for device in replica.flat} for replica in grid]
    assert slices == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]
    assert sorted(device.id for device in grid.flat) == list(range(16))


def test_a_data_axis_that_cannot_hold_the_slices_is_refused():
    devices = [Device(id, slice_index=id // 4) for id in range(16)]
    with pytest.raises(ValueError, match="data=2 is not a multiple of the 4 slices: only the data axis may cross"):
        mesh._multislice_grid((2, 8, 1, 1, 1), devices)


def test_the_mesh_in_use_names_the_platform_not_the_machine():
    grid = mesh.make_mesh(MeshConfig(data=-1, fsdp=1, expert=1, context=1, tensor=1))
    assert grid.size == jax.device_count()
    with jax.set_mesh(grid):
        assert mesh.platform() == "cpu"


def test_portable_programs_are_traced_apart_from_others():
    seen = []

    @jax.jit
    def program(x):
        seen.append(mesh.platform())
        return x

    program(1.0)
    with mesh.portable("plain"):
        assert mesh.is_portable()
        program(1.0)
    program(1.0)
    assert seen == ["cpu", "plain"] and not mesh.is_portable()
