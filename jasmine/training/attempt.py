"""One attempt at a run: goes on from the newest checkpoint or begins, steps, evaluates, saves, and leaves.

`step` counts finished optimizer updates. The update from `step` to `step + 1` uses batch(seed, step) and the key
fold_in(key(seed), step), so a run is a function of its config: stopped anywhere and resumed on any topology, it goes on
with the same examples and draws. The host runs ahead of the devices by at most two steps, and waits for them only
where a metric is logged. A step whose loss or gradients are not finite is never saved (`jasmine.training.nonfinite`).
"""

import contextlib
import dataclasses
import difflib
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jasmine.data.episodes import EpisodeDataset, Episodes
from jasmine.data.tokens import TokenDataset
from jasmine.errors import EXIT_SAVED, UserError
from jasmine.training import distributed, nonfinite, objects, run_files
from jasmine.training.checkpoint import Checkpointer, OtherModelError, Restored
from jasmine.training.config import TrainConfig, changed_options
from jasmine.training.data_feed import DataFeed
from jasmine.training.distributed import say
from jasmine.training.flops import peak_flops, step_flops
from jasmine.training.heartbeat import Heartbeat
from jasmine.training.metrics import MetricsLog
from jasmine.training.optimizer import make_optimizer
from jasmine.training.preemption import StopSignal
from jasmine.training.runs import pin
from jasmine.training.save_clock import SaveClock
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, TrainState, abstract_state, initial_state
from jasmine.training.step import FrozenParams, make_update
from jasmine.training.step_trace import StepTrace
from jasmine.training.task import BaseTask, Batch
from jasmine.training.validation import Validation

STEPS_AHEAD = 2
# Between two events that say how far training is: what a kill takes out of the record is less.
MARK_SECONDS = 60.0


class Attempt:
    """Its life is `restore_or_begin`, `steps`, `close`; all processes of the job go through it together.

    Args:
        task, config, job: as `jasmine.training.loop.train` has them.
        run_dir: the run's directory, which this job has for itself.
        mesh: of all devices of the job.
        dataset, val_dataset: what is trained on, and evaluated on.
        stop_signal: says when to save and leave.
        heartbeat: is told what the process is doing.
    """

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
        self.pace = heartbeat.pace()
        self.marked = time.monotonic()
        self.task, self.config, self.job, self.run_dir, self.mesh = task, config, job, run_dir, mesh
        self.dataset, self.stop_signal = dataset, stop_signal
        self.rules = ShardingRules()
        self.definition = ModelDefinition(task)
        self.optimizer = make_optimizer(config)
        self.abstract = abstract_state(self.definition, self.optimizer, mesh, self.rules, config.ema_decay > 0)
        self.checkpoints = Checkpointer(run_dir / "checkpoints", config, on_saved=self._saved)
        self.validation: Validation | None = None
        if val_dataset is not None:
            self.validation = Validation(val_dataset, task, self.definition, config, mesh, self.rules)
        self.state: TrainState
        self.frozen: FrozenParams = {}
        self.step = 0
        self.left_out: tuple[int, ...] = ()
        self.watch = nonfinite.FiniteWatch(config, self._skipped)
        self.state_check = nonfinite.StateCheck(mesh)
        self.save_clock = SaveClock(config.save_every_minutes)
        self.stepped = False
        self.feed: DataFeed | None = None
        self.log: MetricsLog | None = None
        self.compiled: Any = None
        self.flops = 0.0
        self.trace = StepTrace(config.profile_window(), run_dir)

    # --- beginning ---------------------------------------------------------------------------------------------

    def restore_or_begin(self) -> None:
        """Makes the run ready for its next step. UserError if its directory holds what cannot be gone on with."""
        config = self.config
        counts = self.definition.count()
        say("parameters: " + "  ".join(f"{name} {count:,}" for name, count in counts.items()))
        if not config.restore_ckpt and self.checkpoints.steps():
            raise UserError(
                f"{self.run_dir} holds checkpoints (newest: step {self.checkpoints.steps()[-1]}) and --no-restore_ckpt would "
                f"train over them; name another folder, or leave the flag out to go on"
            )
        for name, part in self.task.frozen.items():
            self.frozen[name] = pin(self.run_dir, name, part, self.mesh, self.rules)
        begin = time.perf_counter()
        restored = self._restore()
        timing = {}
        if restored is not None:
            timing = {"restore_seconds": time.perf_counter() - begin}
            for name, before, now in changed_options(restored.meta.get("config", {}), config):
                say(f"warning: --{name} is {now} but was {before}: from here on it is another run's curve")
        if jax.process_index() == 0:
            run_files.write_config(self.run_dir, config, self.job, self.task.data)
        topology = {"mesh": dict(self.mesh.shape), "processes": jax.process_count(), "devices": self.mesh.size}
        self._event("resumed" if restored else "started", step=self.step, **topology, **timing)
        say(f"resumed from the checkpoint of step {self.step}" if restored else "starting from step 0")
        if self.left_out:
            say(f"batches left out by rollbacks: {', '.join(map(str, self.left_out))}")
        self.log = MetricsLog(self.run_dir, config, self.job, counts)

    def _restore(self) -> Restored | None:
        """Puts the run at its newest checkpoint, or its beginning, and takes what came later out of its metrics."""
        try:
            restored = self.checkpoints.restore(self.abstract)
        except OtherModelError as error:
            changed = changed_options(run_files.read_options(self.run_dir), self.config)
            told = ", ".join(f"--{name} is {now} but was {before}" for name, before, now in changed)
            raise UserError(f"{error} ({told})" if told else str(error)) from error
        left_out = {*self.left_out, *nonfinite.read_left_out(self.run_dir)}
        if restored is None:
            self.state = initial_state(self.task, self.definition, self.optimizer, self.abstract)
            self.step = 0
        else:
            self.state = restored.state
            self.step = int(restored.state.step)
            left_out |= set(restored.meta.get("left_out", ()))
        self.left_out = tuple(sorted(left_out))
        if jax.process_index() == 0:
            run_files.rewind_metrics(
                self.run_dir, self.step, restored.meta.get("unsent_metrics", ()) if restored else ()
            )
        self.feed = DataFeed(
            self.dataset,
            self.config,
            self.mesh,
            self.rules,
            seed=self.config.seed,
            start_step=self.step,
            stop_step=self.config.stop_at_step or self.config.num_steps,
            left_out=self.left_out,
        )
        return restored

    def _check_best_metric(self, batch: Batch) -> None:
        """Raises UserError where `best_metric` is none of those that the run will have."""
        names = list(jax.tree.unflatten(self.compiled.out_tree, [None] * self.compiled.out_tree.num_leaves)[1])
        if self.validation is not None:
            names += self.validation.metric_names(self.state, self.frozen, batch)
        if self.config.best_metric not in names:
            near = difflib.get_close_matches(self.config.best_metric, names, n=1)
            raise UserError(
                f"--best_metric={self.config.best_metric}: there is no such metric"
                f"{f'; did you mean {near[0]}?' if near else ''} (there are {', '.join(sorted(names))})"
            )

    def _compile(self, batch: Batch) -> None:
        begin = time.perf_counter()
        with self.pace.spending("compile"):
            update = make_update(self.task, self.definition, self.optimizer, self.mesh, self.rules, self.abstract)
            self.compiled = update.lower(self.state, self.frozen, batch).compile()
        elapsed = time.perf_counter() - begin
        if self.config.keep_best:
            self._check_best_metric(batch)
        self.flops = step_flops(self.task, self.definition, self.frozen, batch)
        memory = self.compiled.memory_analysis()
        total = sum(
            getattr(memory, f"{kind}_size_in_bytes", 0) * sign
            for kind, sign in (("argument", 1), ("output", 1), ("temp", 1), ("alias", -1))
        )
        say(
            f"compiled in {elapsed:.1f} s; per device {total / 2**20:,.0f} MiB; "
            f"{self.flops / 1e9:,.2f} GFLOPs a step over all devices"
        )
        self._event("compiled", seconds=elapsed, bytes_per_device=total, model_flops=self.flops)

    # --- stepping ----------------------------------------------------------------------------------------------

    def steps(self) -> bool:
        """Runs to the end or to a signal. Returns whether a signal ended it.

        Raises:
            NotFiniteError: a step is not finite, and the options do not say to go on.
        """
        while True:
            try:
                return self._steps()
            except nonfinite.NotFinite as found:
                if self.config.on_nonfinite != "rollback" or len(self.left_out) >= self.config.max_rollbacks:
                    self._stop(found)
                self._roll_back(found)

    def _steps(self) -> bool:
        config, feed, log = self.config, self.feed, self.log
        assert feed is not None
        assert log is not None
        last = config.stop_at_step or config.num_steps
        since_step, since_time, since_wait = self.step, time.perf_counter(), 0.0
        while self.step < last:
            batch = self._next_batch(feed)
            if batch is None:
                self._leave()
                return True
            if self.compiled is None:
                self.heartbeat.doing("compiling")
                self._compile(batch)
                if jax.process_count() > 1:  # else the first step's time is what the slowest process took to compile
                    with self.pace.spending("compile"):
                        multihost_utils.sync_global_devices("compiled")
                since_time, since_wait = time.perf_counter(), feed.waited_seconds
                self.heartbeat.doing("stepping")
            self.trace.before(self.step)
            # Nothing crosses to a device unasked in the hot path: a stray host scalar would stall every step.
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.compiled(self.state, self.frozen, batch)
            self.step += 1
            self.heartbeat.step = self.step
            self.watch.add(self.step, metrics)
            with self.pace.spending("devices"):
                self.watch.settle(STEPS_AHEAD)
            if not self.stepped:
                self.stepped = True
                with self.pace.spending("devices"):
                    jax.block_until_ready(metrics)
                self._mark("first_step")
            self.trace.after(self.step, metrics)

            evaluates = self.validation is not None and (self.step % config.val_interval == 0 or self.step == last)
            values: dict[str, Any] = {}
            if self.step % config.log_interval == 0 or self.step == last or evaluates:
                with self.pace.spending("devices"):
                    self.watch.settle()
                    values |= jax.device_get(metrics)
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
            saves = (
                self.save_clock.due(self.step) or self.step % config.log_checkpoint_interval == 0 or self.step == last
            )
            if saves or (evaluates and config.keep_best and config.best_metric.startswith("val_")):
                # A save's time is in its event; here it would look like a slow step.
                since_time += self._save(values or metrics)
            self.pace.step(self.step)
            if time.monotonic() - self.marked >= MARK_SECONDS:
                self._mark("step_mark")
        self.heartbeat.doing("saving")
        with self.pace.spending("checkpoint"):
            complete = self.checkpoints.wait()
        if not complete or self.step not in self.checkpoints.steps():
            raise self.checkpoints.failure(f"finished step {self.step}, but ")
        self._mark("finished")
        say(f"finished at step {self.step}; run directory {self.run_dir}")
        return False

    def _next_batch(self, feed: DataFeed) -> Batch | None:
        """The batch of the step to come, or None where a signal asks to leave: it does not wait for storage that stalls."""
        from_bucket = isinstance(self.dataset, EpisodeDataset | TokenDataset) and self.dataset.staged is not None
        while not self.stop_signal.reached(self.step):
            with self.pace.spending("data"):
                batch = feed.get(timeout=1.0)
            stepping = self.compiled is not None
            if batch is not None:
                if stepping:
                    self.heartbeat.doing("stepping")
                return batch
            if stepping and from_bucket:
                # A bucket that does not answer is given up where it is read, and in words; the watchdog is not to be first.
                self.heartbeat.doing("fetching data")
        return None

    def _speed(self, step_time: float, data_wait: float) -> dict[str, float]:
        frames = self.config.batch_size * self.config.seq_len
        speed = {"step_time": step_time, "frames_per_second": frames / step_time, "data_wait": data_wait}
        peak = peak_flops(self.mesh.devices.flat[0])
        if peak is not None:
            speed["mfu"] = self.flops / step_time / (peak * self.mesh.size)
        return speed

    def _evaluate(self) -> dict[str, float]:
        assert self.validation is not None
        assert self.log is not None
        begin = time.perf_counter()
        means, pictures = self.validation.run(self.state, self.frozen)
        if jax.process_index() == 0:
            for name, image in jax.device_get(pictures).items():
                run_files.write_png(self.run_dir / "media" / f"{name}_{self.step:07d}.png", np.asarray(image))
                run_files.write_png(self.run_dir / f"{name}.png", np.asarray(image))
                self.log.picture(self.step, name, np.asarray(image))
        seconds = time.perf_counter() - begin
        self.pace.spent["evaluation"] += seconds
        self._mark("evaluated", seconds=seconds, **means)
        return means

    # --- saving and leaving ------------------------------------------------------------------------------------

    def _save(self, metrics: Mapping[str, Any] | None = None) -> float:
        """Begins a save; returns the seconds that training stood still for it. `metrics`: of this step."""
        begin = time.perf_counter()
        self.heartbeat.doing("saving")
        self.watch.settle()
        if where := self.state_check(self.state):
            raise nonfinite.NotFinite(self.step, {}, where)
        self.save_clock.saved()
        best = self.config.best_metric
        metrics = {best: float(metrics[best])} if self.config.keep_best and metrics and best in metrics else None
        meta = {
            "step": self.step,
            "job": self.job,
            "config": dataclasses.asdict(self.config),
            "examples_seen": self.step * self.config.batch_size,
            "left_out": list(self.left_out),
            "devices": self.mesh.size,
            "processes": jax.process_count(),
            "attempt": run_files.attempt(),
        }
        # A run resumed from here has no gap in its curve: metrics of its steps are on disk already, or in Cloud Storage.
        # What that does not take now comes later, or is found in the checkpoint if a kill comes first.
        objects.flush(10)
        if unsent := run_files.unsent_metrics(self.run_dir):
            meta["unsent_metrics"] = unsent
        begun = self.checkpoints.save(self.step, self.state, meta, metrics)
        self.heartbeat.doing("stepping")
        blocked = time.perf_counter() - begin
        self.pace.spent["checkpoint"] += blocked
        self._mark("checkpoint", begun=begun, blocked_seconds=blocked)
        return blocked

    def _saved(self, step: int) -> None:
        self._event("checkpoint_committed", step=step)

    def _leave(self) -> None:
        signal_name = self.stop_signal.received_signal or "a signal to another process"
        say(f"{signal_name}: saving at step {self.step} and leaving")
        self._mark("signalled", signal=signal_name)
        self._save()
        self.heartbeat.doing("saving")
        with self.pace.spending("checkpoint"):
            complete = self.checkpoints.wait()
        if not complete:
            raise self.checkpoints.failure(f"{signal_name} at step {self.step}, but ")
        self._mark("saved")
        say(f"saved step {self.step}; run me again to go on (exit code {EXIT_SAVED})")

    def _mark(self, event: str, **fields: Any) -> None:
        """An event that says how far training is, and where its time has gone until now."""
        self.marked = time.monotonic()
        spent = {what: round(seconds, 3) for what, seconds in self.pace.spent.items()}
        self._event(event, step=self.step, **fields, spent=spent)

    # --- losses and gradients that are not finite --------------------------------------------------------------

    def _note(self, found: nonfinite.NotFinite, action: str) -> nonfinite.Finding:
        """Writes down, once for the run, what is known of a step that is not finite."""
        finding = nonfinite.Finding.of(found, self.run_dir, self.dataset, self.config, self.left_out)
        if jax.process_index() == 0:
            finding.write(self.config, action)
            first = [dataclasses.asdict(window) for window in finding.windows[:4]]
            named = {"step": found.step, "batch": finding.batch, "cause": str(found), "action": action}
            self._event("nonfinite", **named, windows=first, file=str(finding.path))
        return finding

    def _skipped(self, found: nonfinite.NotFinite) -> None:
        finding = self._note(found, "skipped")
        say(f"warning: {found}; this update is left out (windows: {finding.path})")

    def _roll_back(self, found: nonfinite.NotFinite) -> None:
        assert self.feed is not None
        begin = time.perf_counter()
        finding = self._note(found, "rolled back")
        self.heartbeat.doing("restoring")
        self.watch.forget()
        self.feed.close()
        self.left_out = tuple(sorted((*self.left_out, finding.batch)))
        if jax.process_index() == 0:
            nonfinite.write_left_out(self.run_dir, self.left_out)
            run_files.flush(self.run_dir)  # lines under way belong before those that are about to be taken out
        self.checkpoints.wait()
        del self.state  # there may be no room for two
        self._restore()
        self.heartbeat.doing("stepping")
        self.pace.spent["restore"] += time.perf_counter() - begin
        self._mark("rolled_back", back_from=found.step, left_out=list(self.left_out))
        say(
            f"warning: {found}; back at step {self.step}, batch {finding.batch} is left out, {len(self.left_out)} of at most "
            f"{self.config.max_rollbacks} (windows: {finding.path})"
        )

    def _stop(self, found: nonfinite.NotFinite) -> NoReturn:
        finding = self._note(found, "stopped")
        self.checkpoints.wait()  # the one before may still be on its way
        if jax.process_count() > 1:  # the first to leave takes the others with it: all is written by then
            with contextlib.suppress(Exception):
                distributed.coordination_client().wait_at_barrier("jasmine/nonfinite", 60_000)
        raise finding.error(self.config, self.left_out, self.checkpoints.steps())

    def _event(self, event: str, **fields: Any) -> None:
        if jax.process_index() == 0:
            run_files.log_event(self.run_dir, event, **fields)

    def close(self) -> None:
        """Waits for what is under way to storage, and ends the threads."""
        self.pace.summarise(self.step)
        self.trace.close()
        if self.feed is not None:
            self.feed.close()
        if self.log is not None:
            self.log.close()
        self.checkpoints.close()
        run_files.flush(self.run_dir)
