"""The state of a run on the devices: born sharded, donated from step to step, all that a checkpoint needs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.training.optimizer import optimizer_shardings
from jasmine.training.sharding import ShardingRules, tree_shardings
from jasmine.training.task import BaseTask

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step`: int32, finished updates. `params`: nested dict of float32. `ema`: like params, or None without averaging.

    An abstract state has a `jax.ShapeDtypeStruct` with a sharding for each array.
    """

    step: Any
    params: Params
    opt_state: Any
    ema: Params | None


class ModelDefinition:
    """A model without its arrays: shapes, logical axes, and the way from a dict of parameters to a live module."""

    def __init__(self, task: BaseTask):
        abstract = nnx.eval_shape(lambda: task.build(nnx.Rngs(0)))
        self.graph, state = nnx.split(abstract)
        self._variables = dict(nnx.to_flat_state(state))
        self.shapes: Params = _nest({path: variable.get_value() for path, variable in self._variables.items()})
        self.logical: Params = _nest(
            {path: variable.get_metadata()["logical"] for path, variable in self._variables.items()}
        )

    def module(self, params: Params) -> nnx.Module:
        """The model with these parameters; works under jit."""
        flat = [(path, variable.replace(_at(params, path))) for path, variable in self._variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def params(self, module: nnx.Module) -> Params:
        """The parameters of a live model as a nested dict."""
        return _nest({path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module))})

    def count(self) -> dict[str, int]:
        """Parameters by component (top-level attribute of the model), and `total`."""
        counts = {
            name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in self.shapes.items()
        }
        return {**counts, "total": sum(counts.values())}


def _nest(flat: dict[tuple[Any, ...], Any]) -> Params:
    nested: Params = {}
    for path, value in flat.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(str(name), {})
        inner[str(path[-1])] = value
    return nested


def _at(nested: Params, path: tuple[Any, ...]) -> Any:
    for name in path:
        nested = nested[str(name)]
    return nested


def abstract_state(
    definition: ModelDefinition, optimizer: optax.GradientTransformation, mesh: Mesh, rules: ShardingRules, ema: bool
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; allocates nothing."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = tree_shardings(definition.shapes, definition.logical, mesh, rules)

    def with_sharding(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    params = jax.tree.map(with_sharding, definition.shapes, shardings)
    opt_shapes = jax.eval_shape(optimizer.init, definition.shapes)
    opt_shardings = optimizer_shardings(optimizer, definition.shapes, shardings, replicated)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        params=params,
        opt_state=jax.tree.map(with_sharding, opt_shapes, opt_shardings),
        ema=params if ema else None,
    )


def initial_state(
    task: BaseTask, definition: ModelDefinition, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Step 0. Every array is made where it will live; the draws depend on the seed alone, not on the mesh."""

    def init() -> TrainState:
        params = definition.params(task.build(nnx.Rngs(jax.random.key(task.config.seed))))
        ema = jax.tree.map(jnp.copy, params) if abstract.ema is not None else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    # Run once, so on CPUs not worth optimising: compiling the draws well takes four times as long as compiling them.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_cpu = abstract.step.sharding.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()
