import dataclasses

import pytest
from jax.sharding import PartitionSpec as P

from jasmine.errors import UserError
from jasmine.training.mesh import MeshConfig, make_mesh
from jasmine.training.sharding import ShardingRules


def test_logical_axes_become_mesh_axes():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    rules = ShardingRules()
    assert rules.spec(("embed", "mlp"), (64, 128), mesh) == P("fsdp", "tensor")
    assert rules.spec(("layers", "heads", None, "embed"), (4, 8, 16, 64), mesh) == P(None, "tensor", None, "fsdp")
    assert rules.spec(("batch", None), (8, 3), mesh) == P(("data", "fsdp"))


def test_axes_of_size_one_and_axes_that_do_not_divide_stay_whole():
    rules = ShardingRules()
    assert rules.spec(("embed", "mlp"), (64, 128), make_mesh(MeshConfig())) == P()
    assert rules.spec(("embed", "mlp"), (63, 128), make_mesh(MeshConfig(fsdp=8))) == P()


def test_collisions_and_unknown_axes_are_refused():
    mesh = make_mesh(MeshConfig(fsdp=8))
    colliding = dataclasses.replace(ShardingRules(), mlp=("fsdp",))
    with pytest.raises(UserError, match="'fsdp' would split both 'embed' and 'mlp'"):
        colliding.spec(("embed", "mlp"), (64, 128), mesh)
    with pytest.raises(UserError, match="unknown logical axis 'width'"):
        colliding.spec(("width",), (64,), mesh)
