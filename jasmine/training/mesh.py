"""The mesh of all devices of the job: axes `data`, `fsdp`, `tensor`, and the checks that a batch fits it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from jasmine.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. -1 takes what the others leave."""

    data: int = -1
    """Data parallel: parameters replicated. Over several TPU slices it is the axis that spans them."""
    fsdp: int = 1
    """Data parallel with parameters and optimizer state split (FSDP)."""
    tensor: int = 1
    """Tensor parallel: heads and feed-forward width split."""


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Fills in the -1.

    Raises:
        UserError: the sizes do not multiply to `num_devices`; says what would.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = ", ".join(f"--mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {wanted}: sizes are positive, and at most one of them -1 (takes what the others leave)")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if num_devices % fixed:
            divisors = ", ".join(str(d) for d in range(1, num_devices + 1) if num_devices % d == 0)
            raise UserError(
                f"mesh {wanted}: {fixed} does not divide the {num_devices} devices; sizes that do: {divisors}"
            )
        sizes[sizes.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise UserError(f"mesh {wanted} is {fixed} devices, but the job has {num_devices}; leave --mesh.data at -1")
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of the job, or over `devices`. With several slices, `data` is split over them (slow network
    between)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(arrange(devices, mesh_shape(config, len(devices))), AXES)


def arrange(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours on the inner axes near each other in the network.

    Raises:
        UserError: `data` cannot be split over the slices that the devices are in.
    """
    num_slices = 1 + max(getattr(device, "slice_index", 0) or 0 for device in devices)
    if num_slices > 1:
        if shape[0] % num_slices:
            raise UserError(
                f"--mesh.data={shape[0]} cannot span {num_slices} slices; make it a multiple of {num_slices}, as only "
                f"data parallelism may cross the network between slices"
            )
        within = (shape[0] // num_slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(within, (num_slices, 1, 1), devices, allow_split_physical_axes=True)
    if devices[0].platform == "cpu":
        # Processes in order, so that each one's share of the batch is contiguous.
        return np.array(devices).reshape(shape)
    # On a 16×16 torus `fsdp` of 64 is 16 × 4: an axis of the mesh may take part of one of the network.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises UserError, naming the nearest batch sizes that fit, unless the batch splits evenly over the devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * accumulation
    if batch_size >= unit and batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    nearest = f"{below} or {above}" if below else f"{above}"
    times = f" × {accumulation} accumulation steps" if accumulation > 1 else ""
    raise UserError(
        f"--batch_size={batch_size} does not split over {shards} data-parallel devices{times}; "
        f"the nearest that does: {nearest}"
    )
