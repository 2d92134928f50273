"""The one training loop. A baseline brings a `Task`; everything else about a run happens here, once.

`step` counts finished optimizer updates. The update from `step` to `step + 1` uses batch(seed, step) and the key
fold_in(key(seed), step), so a run is a function of its config: stopped anywhere and resumed on any topology, it goes on
with the same examples and draws. The host runs ahead of the devices by at most two steps, and waits for them only
where a metric is logged.
"""

import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jasmine.data.episodes import Episodes
from jasmine.data.sampling import WindowSampler
from jasmine.data.tokens import TokenDataset, open_training_data
from jasmine.errors import EXIT_SAVED, UserError
from jasmine.training import distributed, run_files
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.config import TrainConfig
from jasmine.training.data_feed import DataFeed
from jasmine.training.flops import peak_flops, step_flops
from jasmine.training.heartbeat import Heartbeat
from jasmine.training.mesh import check_batch, make_mesh
from jasmine.training.metrics import MetricsLog
from jasmine.training.optimizer import make_optimizer
from jasmine.training.preemption import StopSignal
from jasmine.training.preflight import preflight
from jasmine.training.runs import TrainedRun, frozen_parts, pin
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, TrainState, abstract_state, initial_state
from jasmine.training.step import FrozenParams, make_evaluation, make_update
from jasmine.training.task import BaseTask, Batch, DataInfo, Metrics

STEPS_AHEAD = 2
# Options that may differ between the attempts of a run; any other makes it another function of the step.
FREE_OPTIONS = {
    "data_dir", "val_data_dir", "ckpt_dir", "restore_ckpt", "num_workers", "stop_at_step", "mesh", "remat",
    "use_flash_attention", "log", "tensorboard", "name", "project", "entity", "tags", "log_interval", "log_gradients",
    "log_batch_checksum", "profile_steps", "log_checkpoint_interval", "log_checkpoint_keep_period", "keep_checkpoints",
    "val_interval", "val_steps",
}  # fmt: skip


def train(
    make_task: Callable[[Any, DataInfo, Mapping[str, TrainedRun]], BaseTask], config: TrainConfig, job: str
) -> None:
    """Trains until `num_steps` (or `stop_at_step`), or until a signal asks to save and leave.

    Args:
        make_task: from the config, what the data is and the frozen parts to the task; a baseline's `Task`.
        job: the baseline's name, for records.

    Raises:
        UserError: anything the user can mend; before the run directory is touched wherever that is possible.
        SystemExit: 75 after a signal, with everything saved.
    """
    stop_signal = StopSignal()
    config.check()
    run_dir = run_files.run_directory(config)
    dataset = _open(config.data_dir, "train", config)
    val_dataset = _open(config.val_data_dir, "val", config) if config.val_data_dir else None
    task = make_task(config, DataInfo.of(dataset), frozen_parts(config, run_dir))
    task.check()

    heartbeat = Heartbeat(run_dir)
    heartbeat.doing("joining")
    distributed.initialize()
    stop_signal.start()
    heartbeat.doing("preflight")
    preflight(run_dir)
    heartbeat.doing("restoring")
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, mesh, config.grad_accumulation_steps)
    lock = run_files.prepare(run_dir)
    _say(distributed.topology())
    _say(f"mesh {' × '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}; run directory {run_dir}")
    _say(
        f"data {config.data_dir}: {len(dataset.lengths):,} episodes, {dataset.num_frames:,} frames of "
        f"{'×'.join(map(str, dataset.frame_shape))}{', as tokens' if isinstance(dataset, TokenDataset) else ''}"
    )
    run = _Run(task, config, job, run_dir, mesh, dataset, val_dataset, stop_signal, heartbeat)
    # Not closed after an error: its message must come out at once, and closing waits for sinks, saves and peers.
    run.restore_or_begin()
    saved_by_signal = run.steps()
    run.close()
    stop_signal.close()
    heartbeat.close()
    lock.close()
    if saved_by_signal:
        sys.exit(EXIT_SAVED)


def _open(path: str, split: str, config: TrainConfig) -> Episodes | TokenDataset:
    height, width, channels = config.image_height, config.image_width, config.image_channels
    shape = (height, width, channels) if height and width and channels else None
    dataset = open_training_data(path, split, frame_shape=shape)
    if isinstance(dataset, TokenDataset):
        dataset.check_seq_len(config.seq_len)
    WindowSampler(dataset.lengths, config.seq_len, config.seed, source=path)  # refuses clips longer than every episode
    return dataset


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


class _Run:
    """The life of one attempt: restored or begun, stepped, closed."""

    def __init__(
        self,
        task: BaseTask,
        config: TrainConfig,
        job: str,
        run_dir: epath.Path,
        mesh: Mesh,
        dataset: Episodes | TokenDataset,
        val_dataset: Episodes | TokenDataset | None,
        stop_signal: StopSignal,
        heartbeat: Heartbeat,
    ):
        self.heartbeat = heartbeat
        self.task, self.config, self.job, self.run_dir, self.mesh = task, config, job, run_dir, mesh
        self.dataset, self.val_dataset, self.stop_signal = dataset, val_dataset, stop_signal
        self.rules = ShardingRules()
        if config.dtype == "float32":
            # Accelerators would multiply float32 in bfloat16 or TF32 by default; who asks for float32 compares curves.
            jax.config.update("jax_default_matmul_precision", "highest")
        self.definition = ModelDefinition(task)
        self.optimizer = make_optimizer(config)
        self.abstract = abstract_state(self.definition, self.optimizer, mesh, self.rules, config.ema_decay > 0)
        self.checkpoints = Checkpointer(run_dir / "checkpoints", config)
        self.evaluate = make_evaluation(task, self.definition, mesh, self.rules)
        self.state: TrainState
        self.frozen: FrozenParams = {}
        self.step = 0
        self.feed: DataFeed | None = None
        self.log: MetricsLog | None = None
        self.compiled: Any = None
        self.flops = 0.0
        self.tracing = False

    # --- beginning ---------------------------------------------------------------------------------------------

    def restore_or_begin(self) -> None:
        config = self.config
        counts = self.definition.count()
        _say("parameters: " + "  ".join(f"{name} {count:,}" for name, count in counts.items()))
        if not config.restore_ckpt and self.checkpoints.steps():
            raise UserError(
                f"{self.run_dir} holds checkpoints (newest: step {self.checkpoints.steps()[-1]}) and --no-restore_ckpt would "
                f"train over them; name another folder, or leave the flag out to go on"
            )
        for name, part in self.task.frozen.items():
            _say(f"{name}: step {part.step} of {part.path} ({part.job})")
            self.frozen[name] = pin(self.run_dir, name, part, self.mesh, self.rules)
        restored = self.checkpoints.restore(self.abstract)
        if restored is None:
            self.state = initial_state(self.task, self.definition, self.optimizer, self.abstract)
        else:
            self.state = restored.state
            self.step = int(restored.state.step)
            self._warn_of_changes(restored.meta.get("config", {}))
        if jax.process_index() == 0:
            run_files.rewind_metrics(self.run_dir, self.step)
            run_files.write_config(self.run_dir, config, self.job, self.task.data)
        topology = {"mesh": dict(self.mesh.shape), "processes": jax.process_count(), "devices": self.mesh.size}
        self._event("resumed" if restored else "started", step=self.step, **topology)
        _say(f"resumed from the checkpoint of step {self.step}" if restored else "starting from step 0")
        self.log = MetricsLog(self.run_dir, config, self.job, counts)
        self.feed = DataFeed(self.dataset, config, self.mesh, self.rules, seed=config.seed, start_step=self.step)

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        now = dataclasses.asdict(self.config)
        for name in now.keys() & before.keys() - FREE_OPTIONS:
            if before[name] != now[name]:
                _say(f"warning: --{name} is {now[name]} but was {before[name]}: from here on it is another run's curve")

    def _compile(self, batch: Batch) -> None:
        begin = time.perf_counter()
        update = make_update(self.task, self.definition, self.optimizer, self.mesh, self.rules, self.abstract)
        self.compiled = update.lower(self.state, self.frozen, batch).compile()
        elapsed = time.perf_counter() - begin
        self.flops = step_flops(self.task, self.definition, self.frozen, batch)
        memory = self.compiled.memory_analysis()
        total = sum(
            getattr(memory, f"{kind}_size_in_bytes", 0) * sign
            for kind, sign in (("argument", 1), ("output", 1), ("temp", 1), ("alias", -1))
        )
        _say(
            f"compiled in {elapsed:.1f} s; per device {total / 2**20:,.0f} MiB; "
            f"{self.flops / 1e9:,.2f} GFLOPs a step over all devices"
        )
        self._event("compiled", seconds=elapsed, bytes_per_device=total, model_flops=self.flops)

    # --- stepping ----------------------------------------------------------------------------------------------

    def steps(self) -> bool:
        """Runs to the end or to a signal. Returns whether a signal ended it."""
        config, feed, log = self.config, self.feed, self.log
        assert feed is not None
        assert log is not None
        last = config.stop_at_step or config.num_steps
        profile = config.profile_window()
        in_flight: deque[jax.Array] = deque()
        since_step, since_time, since_wait = self.step, time.perf_counter(), 0.0
        begun_at = self.step
        while self.step < last:
            batch = None
            while batch is None:  # storage may stall; a signal must not wait for it
                if self.stop_signal.reached(self.step):
                    self._leave()
                    return True
                batch = feed.get(timeout=1.0)
            if self.compiled is None:
                self.heartbeat.doing("compiling")
                self._compile(batch)
                if jax.process_count() > 1:  # else the first step's time is what the slowest process took to compile
                    multihost_utils.sync_global_devices("compiled")
                since_time, since_wait = time.perf_counter(), feed.waited_seconds
                self.heartbeat.doing("stepping")
            if profile and profile[0] <= self.step < profile[1] and not self.tracing:
                # Without Python's frames: their hook kills threads that start meanwhile, such as those of a save.
                profiler = jax.profiler.ProfileOptions()
                profiler.python_tracer_level = 0
                jax.profiler.start_trace(str(self.run_dir / "profile"), profiler_options=profiler)
                self.tracing = True
            # Nothing crosses to a device unasked in the hot path: a stray host scalar would stall every step.
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.compiled(self.state, self.frozen, batch)
            self.step += 1
            self.heartbeat.step = self.step
            in_flight.append(metrics["loss"])
            if len(in_flight) > STEPS_AHEAD:
                jax.block_until_ready(in_flight.popleft())
            if self.step == begun_at + 1:
                jax.block_until_ready(metrics)
                self._event("first_step", step=self.step)
            if profile and self.tracing and self.step == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                self.tracing = False
                _say(f"profiler trace of steps {profile[0]} to {profile[1]} in {self.run_dir / 'profile'}")

            evaluates = self.val_dataset is not None and (self.step % config.val_interval == 0 or self.step == last)
            if self.step % config.log_interval == 0 or self.step == last or evaluates:
                values: dict[str, Any] = dict(jax.device_get(metrics))
                now = time.perf_counter()
                steps = self.step - since_step
                values |= self._speed((now - since_time) / steps, (feed.waited_seconds - since_wait) / steps)
                if evaluates:
                    self.heartbeat.doing("evaluating")
                    values |= self._evaluate()
                    self.heartbeat.doing("stepping")
                log.write(self.step, values)
                self.checkpoints.poll()
                since_step, since_time, since_wait = self.step, time.perf_counter(), feed.waited_seconds
            if self.step % config.log_checkpoint_interval == 0 or self.step == last:
                since_time += self._save()  # a save's time is in its event; here it would look like a slow step
        self.heartbeat.doing("saving")
        if not self.checkpoints.wait() or self.step not in self.checkpoints.steps():
            raise UserError(f"finished step {self.step}, but {self.checkpoints.problem}")
        self._event("finished", step=self.step)
        _say(f"finished at step {self.step}; run directory {self.run_dir}")
        return False

    def _speed(self, step_time: float, data_wait: float) -> dict[str, float]:
        frames = self.config.batch_size * self.config.seq_len
        speed = {"step_time": step_time, "frames_per_second": frames / step_time, "data_wait": data_wait}
        peak = peak_flops(self.mesh.devices.flat[0])
        if peak is not None:
            speed["mfu"] = self.flops / step_time / (peak * self.mesh.size)
        return speed

    def _evaluate(self) -> dict[str, float]:
        """Means over the same validation batches every time, and the pictures of the first of them."""
        assert self.val_dataset is not None
        assert self.log is not None
        config = self.config
        sampler = WindowSampler(self.val_dataset.lengths, config.seq_len, config.seed)
        count = min(config.val_steps, math.ceil(sampler.num_windows / config.batch_size))
        val_feed = DataFeed(self.val_dataset, config, self.mesh, self.rules, seed=config.seed)
        params = self.state.params if self.state.ema is None else self.state.ema
        collected: list[Metrics] = []
        pictures: dict[str, jax.Array] = {}
        try:
            for index in range(count):
                key = jax.random.fold_in(jax.random.key(config.seed), index)
                metrics, media = self.evaluate(params, self.frozen, next(val_feed), key)
                collected.append(metrics)
                pictures = pictures or media
        finally:
            val_feed.close()
        host = jax.device_get(collected)
        if jax.process_index() == 0:
            for name, image in jax.device_get(pictures).items():
                run_files.write_png(self.run_dir / "media" / f"{name}_{self.step:07d}.png", np.asarray(image))
                run_files.write_png(self.run_dir / f"{name}.png", np.asarray(image))
                self.log.picture(self.step, name, np.asarray(image))
        means = {f"val_{name}": float(np.mean([metrics[name] for metrics in host])) for name in host[0]}
        self._event("evaluated", step=self.step, **means)
        return means

    # --- saving and leaving ------------------------------------------------------------------------------------

    def _save(self) -> float:
        """Begins a save; returns the seconds that training stood still for it."""
        begin = time.perf_counter()
        self.heartbeat.doing("saving")
        meta = {
            "step": self.step,
            "job": self.job,
            "config": dataclasses.asdict(self.config),
            "examples_seen": self.step * self.config.batch_size,
            "devices": self.mesh.size,
            "processes": jax.process_count(),
            "attempt": run_files.attempt(),
        }
        # Metrics of this step are on disk already: a run resumed from here has no gap in its curve.
        begun = self.checkpoints.save(self.step, self.state, meta)
        self.heartbeat.doing("stepping")
        blocked = time.perf_counter() - begin
        self._event("checkpoint", step=self.step, begun=begun, blocked_seconds=blocked)
        return blocked

    def _leave(self) -> None:
        signal_name = self.stop_signal.received_signal or "a signal to another process"
        _say(f"{signal_name}: saving at step {self.step} and leaving")
        self._event("signalled", step=self.step, signal=signal_name)
        self._save()
        self.heartbeat.doing("saving")
        if not self.checkpoints.wait():
            raise UserError(f"{signal_name} at step {self.step}, but {self.checkpoints.problem}")
        self._event("saved", step=self.step)
        _say(f"saved step {self.step}; run me again to go on (exit code {EXIT_SAVED})")

    def _event(self, event: str, **fields: Any) -> None:
        if jax.process_index() == 0:
            run_files.log_event(self.run_dir, event, **fields)

    def close(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
        if self.feed is not None:
            self.feed.close()
        if self.log is not None:
            self.log.close()
        self.checkpoints.close()
