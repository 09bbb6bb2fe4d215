"""Device meshes: how many devices go to which kind of parallelism."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gptjax.parallel import rules

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Part of `jax.jit`'s cache key, as the contexts of `rules` are.
_portable = jax.make_user_context(None)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on at most one axis takes all that remain.

    Attributes:
      data: replicas of the parameters, each with its part of the batch.
      fsdp: parts of the batch whose parameters and optimizer state are sharded too (ZeRO-3).
      expert: parts of the experts; the batch is split over it as well.
      context: parts of the sequence.
      tensor: parts of heads, feed-forward and vocabulary (Megatron).
      rules: name of the partitioning table in `parallel.rules.PRESETS`.
    """

    data: int
    fsdp: int
    expert: int
    context: int
    tensor: int
    rules: str = "standard"

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are >= 1, with -1 on at most one axis")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """The sizes with -1 replaced, for `num_devices` devices.

        Raises:
          ValueError: when the product is not the number of devices.
        """
        fixed = math.prod(size for size in self.sizes if size != -1)
        sizes = tuple(num_devices // fixed if size == -1 else size for size in self.sizes)
        if math.prod(sizes) != num_devices:
            wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))
            raise ValueError(
                f"mesh {wanted} does not fit {num_devices} device(s): the product of the sizes "
                f"must be {num_devices}; set one axis to -1 to take what is left"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES`, laid out so that neighbours on an axis are near in the network.

    A mesh with fixed sizes whose product is below the number of local devices takes the first ones
    on a single host; several hosts must use every device.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = math.prod(config.sizes)
    if 0 < wanted < len(devices) and jax.process_count() == 1:
        devices = devices[:wanted]
    sizes = config.resolve(len(devices))
    if devices[0].platform == "cpu":
        grid = np.array(devices).reshape(sizes)
    elif len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        grid = _multislice_grid(sizes, devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(config: MeshConfig) -> Iterator[Mesh]:
    """Traces and runs what is inside on the mesh of `config`, under its partitioning rules."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh), rules.use(config.rules):
        yield mesh


def all_devices(axis: str) -> MeshConfig:
    """A mesh that has every device on one axis."""
    sizes = {name: -1 if name == axis else 1 for name in AXES}
    return MeshConfig(**sizes)  # type: ignore[arg-type]  # `rules` is not among them


def _multislice_grid(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Slices are joined by the slow data-centre network, which only the `data` axis may cross."""
    num_slices = len({device.slice_index for device in devices})
    if sizes[0] % num_slices:
        raise ValueError(
            f"mesh data={sizes[0]} is not a multiple of the {num_slices} slices: only the data axis may cross slices"
        )
    inside = (sizes[0] // num_slices, *sizes[1:])
    across = (num_slices, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices=devices, allow_split_physical_axes=True)


def portable(name: Literal["any", "plain"]) -> AbstractContextManager[None]:
    """Traces what is inside as one program for any platform and sizes; `platform()` is then `name`.

    Kernels take forms that lower everywhere, with symbolic dimensions too. Give `ModelConfig.dtype`: what is inside
    cannot know what `auto` means where it will run.

    Args:
      name: `any` may still branch by `jax.lax.platform_dependent`; `plain` is elementary operations alone, which
        converters to other formats understand.
    """
    return _portable(name)


def is_portable() -> bool:
    """Whether what is being traced must run anywhere; see `portable`."""
    return _portable.value is not None


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: where the computation being traced will run; or `any` or `plain`, see `portable`.

    The mesh in use decides, so that lowering for a pod from a laptop picks the pod's kernels.
    """
    if _portable.value is not None:
        return _portable.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
