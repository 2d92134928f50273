"""Goes to one step of a run again and shows where it goes wrong: `--replay_step N`, beside the options of the run.

From the newest checkpoint before step N the same compiled update does the steps up to N - 1, on whatever topology is at
hand, and then step N is taken apart. Nothing is written into the run, which another job may be training meanwhile.
"""

import traceback
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.data.episodes import Episodes
from jasmine.data.records import WindowId
from jasmine.data.sampling import batch_of
from jasmine.data.tokens import TokenDataset
from jasmine.training import nonfinite
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.config import TrainConfig
from jasmine.training.data_feed import DataFeed
from jasmine.training.distributed import say
from jasmine.training.heartbeat import Heartbeat
from jasmine.training.optimizer import make_optimizer
from jasmine.training.preemption import StopSignal
from jasmine.training.sharding import ShardingRules, tree_shardings, use_sharding
from jasmine.training.state import ModelDefinition, TrainState, abstract_state, initial_state
from jasmine.training.step import FrozenParams, frozen_modules, make_gradients, make_update, step_key
from jasmine.training.task import BaseTask, Batch

SHOWN_WINDOWS = 64


def replay(
    task: BaseTask,
    config: TrainConfig,
    run_dir: epath.Path,
    mesh: Mesh,
    dataset: Episodes | TokenDataset,
    stop_signal: StopSignal,
    heartbeat: Heartbeat,
) -> bool:
    """Replays `config.replay_step`; process 0 prints what it finds. Returns False if a signal ended it before.

    Raises:
        UserError: the run's checkpoints do not fit the options, or are damaged.
        ClusterError: they cannot be read now.
    """
    step = config.replay_step
    rules, definition, optimizer = ShardingRules(), ModelDefinition(task), make_optimizer(config)
    abstract = abstract_state(definition, optimizer, mesh, rules, config.ema_decay > 0)
    frozen: FrozenParams = {
        name: part.load(tree_shardings(part.definition.shapes, part.definition.logical, mesh, rules))[1]
        for name, part in task.frozen.items()
    }
    state, all_left_out = _state_before(step, task, config, run_dir, definition, optimizer, abstract)
    left_out = nonfinite.left_out_before(step, all_left_out)
    begin = int(state.step)
    say(f"replay of step {step} of {run_dir}, from {f'the checkpoint of step {begin}' if begin else 'its beginning'}")

    feed = DataFeed(dataset, config, mesh, rules, seed=config.seed, start_step=begin, left_out=left_out)
    update = None
    try:
        for finished in range(begin, step):
            if stop_signal.reached(finished):
                say(f"{stop_signal.received_signal}: leaving at step {finished}; nothing was to be saved")
                return False
            batch = next(feed)
            if update is None:
                heartbeat.doing("compiling")
                made = make_update(task, definition, optimizer, mesh, rules, abstract)
                update = made.lower(state, frozen, batch).compile()
            if finished == step - 1:
                heartbeat.doing("compiling")
                say(f"batch {batch_of(finished, left_out)}, its windows, and the ranges of what they hold:")
                _show_windows(nonfinite.windows_of(dataset, config, step, left_out), batch, mesh)
                _take_apart(task, config, definition, mesh, rules, state, frozen, batch)
            heartbeat.doing("stepping")
            state, metrics = update(state, frozen, batch)
            jax.block_until_ready(metrics)
            heartbeat.step = finished + 1
    finally:
        feed.close()
    say("the update as it was trained:", *_lines(jax.device_get(metrics)))
    where = nonfinite.StateCheck(mesh)(state)
    say(f"after it, not finite first: {where}" if where else "after it parameters and optimizer are finite")
    return True


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"  {name} {_number(value)}" for name, value in values.items()]


def _number(value: Any) -> str:
    plain = np.asarray(value).item()
    return f"{plain:.6g}" if isinstance(plain, float) else str(int(plain))


def _show_windows(windows: list[WindowId], batch: Batch, mesh: Mesh) -> None:
    def ranges(batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        rows = {name: array.reshape(array.shape[0], -1) for name, array in batch.items()}
        return {name: (array.min(1), array.max(1)) for name, array in rows.items()}

    found = jax.device_get(jax.jit(ranges, out_shardings=NamedSharding(mesh, PartitionSpec()))(batch))
    for row, window in enumerate(windows[:SHOWN_WINDOWS]):
        held = [f"{name} {_number(low[row])} to {_number(high[row])}" for name, (low, high) in found.items()]
        say(f"  {nonfinite.describe(window)}: {', '.join(held)}")
    if len(windows) > SHOWN_WINDOWS:
        say(f"  and {len(windows) - SHOWN_WINDOWS} more")
    for name, (low, high) in found.items():
        shape = "×".join(map(str, batch[name].shape))
        say(f"  all {shape} {batch[name].dtype} of {name}: {_number(low.min())} to {_number(high.max())}")


def _state_before(
    step: int,
    task: BaseTask,
    config: TrainConfig,
    run_dir: epath.Path,
    definition: ModelDefinition,
    optimizer: Any,
    abstract: TrainState,
) -> tuple[TrainState, set[int]]:
    """The newest state that the run has from before `step`, and the batches that the run leaves out."""
    left_out = set(nonfinite.read_left_out(run_dir))
    directory = run_dir / "checkpoints"
    restored = None
    if directory.exists():
        checkpoints = Checkpointer(directory, config, read_only=True)
        restored = checkpoints.restore(abstract, step - 1)
        checkpoints.close()
    if restored is None:
        return initial_state(task, definition, optimizer, abstract), left_out
    return restored.state, left_out | set(restored.meta.get("left_out", ()))


def _take_apart(
    task: BaseTask,
    config: TrainConfig,
    definition: ModelDefinition,
    mesh: Mesh,
    rules: ShardingRules,
    state: TrainState,
    frozen: FrozenParams,
    batch: Batch,
) -> None:
    """Prints the norms of the gradients, the first thing that is not finite, and what made it."""
    gradients = make_gradients(task, definition)
    replicated = NamedSharding(mesh, PartitionSpec())

    def prepared(frozen: FrozenParams, batch: Batch) -> Batch:
        return task.prepare(frozen_modules(task, frozen), batch)

    def look(state: TrainState, frozen: FrozenParams, batch: Batch) -> dict[str, Any]:
        with use_sharding(mesh, rules):
            ready = prepared(frozen, batch)
            loss, metrics, grads = gradients(state.params, ready, step_key(config.seed, state.step))
            parts = {"params": state.params, "optimizer": state.opt_state, "batch": ready}
            parts |= {"loss": {"loss": loss, **metrics}, "gradient": grads}
            leaves = [(nonfinite.name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]]
            return {
                "squares": {name: jnp.square(leaf).sum() for name, leaf in leaves if name.startswith("gradient.")},
                "bad": {
                    name: (~jnp.isfinite(leaf)).sum()
                    for name, leaf in leaves
                    if jnp.issubdtype(leaf.dtype, jnp.inexact)
                },
            }

    def trace(state: TrainState, frozen: FrozenParams, batch: Batch) -> Any:
        with use_sharding(mesh, rules):
            return gradients(state.params, prepared(frozen, batch), step_key(config.seed, state.step))

    found = jax.device_get(jax.jit(look, out_shardings=replicated)(state, frozen, batch))
    say("norms of the gradients:")
    modules: dict[str, float] = {}
    for name, square in found["squares"].items():
        module = ".".join(name.split(".")[1:3])
        modules[module] = modules.get(module, 0.0) + float(square)
    say(*[f"  {name} {square**0.5:.6g}" for name, square in modules.items()])
    # In the order in which they are computed; jax sorts the parts of a tree by name.
    order = ("params", "optimizer", "batch", "loss", "gradient")
    bad = {name: int(count) for name, count in found["bad"].items() if count}
    first = min(bad, key=lambda name: order.index(name.partition(".")[0]), default=None)
    if first is None:
        say("everything that goes into the update is finite")
        return
    say(f"not finite first: {first} ({bad[first]} values), of {len(bad)} arrays that are not")
    checked = checkify.checkify(trace, errors=checkify.nan_checks)
    try:
        made = jax.jit(checked)(state, frozen, batch)[0].get_exception()
    except NotImplementedError as error:  # checks do not reach into every kind of operation
        say(f"which operation made it is not known: {error}")
        return
    if made is None:
        say("no operation made a NaN: a number became too large")
        return
    frames = traceback.extract_tb(made.traceback_info.as_python_traceback())
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    where = f" at {ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}" if ours else ""
    say(f"first operation to make a NaN: {made.prim}{where}")
