"""The one table that maps the logical axes of arrays to the axes of the mesh.

Models name the axes of every parameter by meaning (`embed`, `mlp`, `heads` …) and never name a mesh axis. Changing
data parallel to FSDP or tensor parallel is therefore a change of the mesh's shape, not of the model. The table
refuses collisions (one mesh axis for two axes of one array), and an axis that a mesh axis does not divide stays whole.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.errors import UserError

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axes. An axis that is None in an array is never split; names that are not here are refused.

    `batch` is split over data *and* fsdp: FSDP is data parallelism whose parameters are split as well. `embed` carries
    FSDP because every large matrix has it on one side; `mlp` and `heads` carry tensor parallelism because the pairs
    of matrices around them (in/out, qkv/out) then need a single reduction (Megatron-LM, arXiv 1909.08053, section 3).
    """

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = ("fsdp",)
    mlp: MeshAxes = ("tensor",)
    heads: MeshAxes = ("tensor",)
    layers: MeshAxes = ()

    def spec(self, logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """The partition of an array.

        Args:
            logical: one name or None for each axis of the array.
            shape: its shape. An axis that its mesh axes do not divide evenly is left whole.
            mesh: supplies the sizes of the mesh axes.

        Raises:
            UserError: an unknown logical axis, or two axes of the array on the same mesh axis.
        """
        if len(logical) != len(shape):
            raise ValueError(f"{len(logical)} logical axes {tuple(logical)} for an array of shape {tuple(shape)}")
        taken: dict[str, str] = {}
        parts: list[str | MeshAxes | None] = []
        for name, size in zip(logical, shape, strict=True):
            axes = self._mesh_axes(name, mesh)
            for axis in axes:
                if axis in taken:
                    raise UserError(
                        f"sharding rules: mesh axis {axis!r} would split both {taken[axis]!r} and {name!r} of one array; "
                        f"give one of them another mesh axis in ShardingRules"
                    )
                taken[axis] = str(name)
            if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0:
                parts.append(axes if len(axes) > 1 else axes[0])
            else:
                parts.append(None)
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)

    def _mesh_axes(self, name: str | None, mesh: Mesh) -> MeshAxes:
        if name is None:
            return ()
        known = {field.name for field in dataclasses.fields(self)}
        if name not in known:
            raise UserError(f"sharding rules: unknown logical axis {name!r}; there are {', '.join(sorted(known))}")
        return tuple(axis for axis in getattr(self, name) if mesh.shape[axis] > 1)


_active: contextvars.ContextVar[tuple[Mesh, ShardingRules] | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use_sharding(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """Within it, `constrain` pins activations to `mesh` by `rules`. Enter it around tracing."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def traced_device() -> jax.Device:
    """A device of the kind that is traced for: of this process, unless the mesh is of another kind, which only compiles."""
    active, here = _active.get(), jax.local_devices()[0]
    if active is None or active[0].devices.flat[0].platform == here.platform:
        return here
    return active[0].devices.flat[0]


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation's sharding by logical axes (trailing ones may be left out); outside a mesh a no-op."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    names = (*logical, *([None] * (x.ndim - len(logical))))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(names, x.shape, mesh)))


def tree_shardings(shapes: Any, logical: Mapping[str, Any], mesh: Mesh, rules: ShardingRules) -> Any:
    """Shardings for a nested dict of abstract arrays.

    Args:
        shapes: nested dict of `jax.ShapeDtypeStruct`.
        logical: the same nesting, with a tuple of logical axes for each leaf. A leaf with more axes than its tuple is a
            stack of layers (or of groups of them): `layers` is put in front for each.
    """

    def one(shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        stacked = ("layers",) * (len(shape.shape) - len(names))
        return NamedSharding(mesh, rules.spec((*stacked, *names), shape.shape, mesh))

    return jax.tree.map(one, shapes, logical, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))
