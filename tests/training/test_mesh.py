from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jasmine.errors import UserError
from jasmine.training.mesh import MeshConfig, arrange, check_batch, make_mesh, mesh_shape


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=8), (1, 8, 1)),
        (MeshConfig(fsdp=-1, data=1, tensor=2), (1, 4, 2)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_minus_one_takes_what_the_others_leave(config, shape):
    assert mesh_shape(config, 8) == shape


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MeshConfig(fsdp=3), "3 does not divide the 8 devices; sizes that do: 1, 2, 4, 8"),
        (MeshConfig(data=2, fsdp=2, tensor=1), "is 4 devices, but the job has 8"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of them -1"),
        (MeshConfig(tensor=0), "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(config, says):
    with pytest.raises(UserError, match=says):
        mesh_shape(config, 8)


def test_batch_that_does_not_split_names_the_nearest():
    mesh = make_mesh(MeshConfig(tensor=2))
    check_batch(12, mesh)
    with pytest.raises(UserError, match=r"--batch_size=14 does not split over 4 .* 12 or 16"):
        check_batch(14, mesh)
    with pytest.raises(UserError, match="nearest that does: 4"):
        check_batch(3, mesh)
    with pytest.raises(UserError, match=r"× 2 accumulation steps.* 8 or 16"):
        check_batch(12, mesh, accumulation=2)


def test_mesh_keeps_processes_in_order():
    mesh = make_mesh(MeshConfig(fsdp=2))
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()]


class Chip(SimpleNamespace):
    """As much of a TPU's device as arranging a mesh reads."""


def test_data_axis_spans_slices_and_the_others_stay_inside():
    chips = [
        Chip(id=k, process_index=k // 4, slice_index=k // 8, platform="tpu", device_kind="unknown", coords=(k % 8, 0, 0),
             core_on_chip=0)
        for k in range(16)
    ]  # fmt: skip
    mesh = arrange(chips, (4, 2, 2))
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh)
    assert mesh.shape == (4, 2, 2)
    assert [set(row.flat) for row in slices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"--mesh.data=1 cannot span 2 slices; make it a multiple of 2"):
        arrange(chips, (1, 8, 2))
