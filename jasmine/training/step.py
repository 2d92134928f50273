"""One optimizer update, and one evaluation, as compiled functions of the global batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.training.optimizer import learning_rate
from jasmine.training.sharding import ShardingRules, constrain, use_sharding
from jasmine.training.state import ModelDefinition, Params, TrainState
from jasmine.training.task import BaseTask, Batch, Keys, Metrics

FrozenParams = dict[str, Params]


def batch_checksum(contents: jax.Array) -> jax.Array:
    """uint32 of the pixels of a global batch, or of its tokens: integers of any shape. Each is weighed by its place, so that
    swapped examples show; integers wrap, so that the order of summation, and with it the topology, does not."""
    place = jnp.arange(contents.size, dtype=jnp.uint32).reshape(contents.shape)
    weight = (place ^ (place >> 16)) * jnp.uint32(0x45D9F3B)
    weight = (weight ^ (weight >> 16)) * jnp.uint32(0x45D9F3B) | jnp.uint32(1)
    return jnp.sum((contents.astype(jnp.uint32) + 1) * weight, dtype=jnp.uint32)


def _contents(batch: Batch) -> jax.Array:
    """What a batch shows, as integers: pixels, tokens, or the bits of latents."""
    if "latents" in batch:
        return jax.lax.bitcast_convert_type(batch["latents"], jnp.uint32)
    return batch["videos"] if "videos" in batch else batch["tokens"]


def frozen_modules(task: BaseTask, frozen: FrozenParams) -> dict[str, Any]:
    """The live frozen parts of a task; works under jit."""
    return {name: task.frozen[name].definition.module(params) for name, params in frozen.items()}


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The random key of the update that takes `step` to `step + 1`."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_gradients(
    task: BaseTask, definition: ModelDefinition
) -> Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics, Params]]:
    """`(params, prepared batch, key) -> (loss, metrics, gradients)` of a whole batch, to be traced under `use_sharding`."""
    parts = task.config.grad_accumulation_steps

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        value, metrics = task.loss(definition.module(params), batch, Keys(key))
        return value.astype(jnp.float32), metrics

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradients(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics, Params]:
        if parts == 1:
            (value, metrics), grads = value_and_grad(params, batch, key)
            return value, metrics, grads

        # Part i takes every parts-th example, so that each device keeps the examples that it has.
        def cut(x: jax.Array) -> jax.Array:
            return constrain(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), None, "batch")

        def add(total: Any, scanned: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            part, index = scanned
            (value, metrics), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b / parts, total, (value, metrics, grads)), None

        cut_batch = jax.tree.map(cut, batch)
        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], cut_batch), key)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][0], shapes[0][1], shapes[1]))
        return jax.lax.scan(add, zero, (cut_batch, jnp.arange(parts)))[0]

    return gradients


def make_update(
    task: BaseTask,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules,
    abstract: TrainState,
) -> Any:
    """The jitted `(state, frozen, batch) -> (state, metrics)`, not yet compiled. The state is donated and keeps the shardings
    of `abstract`; `frozen` holds the parameters of the task's frozen parts by name; metrics are replicated scalars. With
    `on_nonfinite` at skip, an update of a loss or gradient norm that is not finite changes nothing but the step; `skipped`
    among the metrics is the number of those so far."""
    config = task.config
    schedule = learning_rate(config)
    gradients = make_gradients(task, definition)

    def update(state: TrainState, frozen: FrozenParams, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_sharding(mesh, rules):
            prepared = task.prepare(frozen_modules(task, frozen), batch)
            value, metrics, grads = gradients(state.params, prepared, step_key(config.seed, state.step))
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                ema = jax.tree.map(lambda a, p: a + (1 - config.ema_decay) * (p - a), ema, params)
            logged = {"loss": value, "lr": schedule(state.step), "grad_norm": optax.global_norm(grads), **metrics}
            if config.log_gradients:
                for name, part in grads.items():
                    logged[f"gradient_std/{name}"] = _std(part)
            if config.log_batch_checksum:
                logged["batch_checksum"] = batch_checksum(_contents(batch))
            new = TrainState(state.step + 1, params, opt_state, ema)
            if config.on_nonfinite == "skip":
                kept = dataclasses.replace(state, step=state.step + 1)
                finite = jnp.isfinite(logged["loss"]) & jnp.isfinite(logged["grad_norm"])
                new = jax.tree.map(lambda updated, before: jnp.where(finite, updated, before), new, kept)
                # The optimizer counts the updates that it has made, and its schedule goes by that.
                logged["lr"] = schedule(_updates(state.opt_state))
                logged["skipped"] = new.step - _updates(new.opt_state)
            return new, logged

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def _updates(opt_state: Any) -> jax.Array:
    """How many updates an optimizer has made: int32."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def _std(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    count = sum(leaf.size for leaf in leaves)
    mean = sum(leaf.sum() for leaf in leaves) / count
    return jnp.sqrt(sum(jnp.square(leaf - mean).sum() for leaf in leaves) / count)


def make_evaluation(
    task: BaseTask, definition: ModelDefinition, mesh: Mesh, rules: ShardingRules
) -> Callable[[Params, FrozenParams, Batch, jax.Array], tuple[Metrics, dict[str, jax.Array]]]:
    """The compiled `(params, frozen, batch, key) -> (metrics, media)`, results replicated."""

    def evaluate(
        params: Params, frozen: FrozenParams, batch: Batch, key: jax.Array
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        with use_sharding(mesh, rules):
            return task.evaluate(definition.module(params), frozen_modules(task, frozen), batch, Keys(key))

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))
