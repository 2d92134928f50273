"""Checkpoints of a run: `checkpoints/<step>/` by Orbax, written while training goes on, read on any topology.

A step's folder holds the state (parameters, optimizer, step) and `meta`, the run's config and data position for people to
read; what comes next follows from seed and step, so no loader state is kept. An unfinished save is never restored from,
one that is damaged, or cannot be read for a minute, is set aside and the one before it used, and a failed save is
reported and survived. Which of them stay is Orbax's to carry out, after the next one is complete: the newest ones, every so
many steps, and the best by a metric, whose value lies in the step's folder too: whoever resumes the run goes on by it.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jasmine.errors import ClusterError, UserError
from jasmine.training import checksums, distributed, objects, run_files
from jasmine.training.config import TrainConfig
from jasmine.training.nonfinite import name_of
from jasmine.training.save_barrier import SaveBarrier
from jasmine.training.state import TrainState

logger = logging.getLogger(__name__)

SAVE_TIMEOUT_SECONDS = 600
FAILED_SAVES_IN_A_ROW = 3
MOST_ERRORS = 100  # of one save
# Processes that hold the same array share the writing of it if each of its replicas gets this much. Orbax would have the
# devices of one process share it too, and every bias, and cut them up by a program for each shape and place, which takes
# seconds to compile: training stands still for that.
LEAST_SLICE_BYTES = 16 * 1024
# Between the readings of checkpoints that fail of what may pass; about as long as libraries wait for a bucket.
READ_PAUSES_SECONDS = (1, 2, 4, 8, 15, 30)
# How the reading of a checkpoint went, from well to worst.
_READ, _AWAY, _DAMAGED = range(3)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state from disk, in the shardings asked for, and what was written beside it."""

    state: TrainState
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _KeepBest:
    """A preservation policy: the `count` best of those with a value of `metric`. Orbax's own also keeps others while there
    are few."""

    metric: str
    mode: Literal["min", "max"]
    count: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints, ordered by step, are to stay. Of equal ones the earlier is the better."""
        have = [one for one in checkpoints if _finite((one.metrics or {}).get(self.metric))]
        have.sort(key=lambda one: one.metrics[self.metric], reverse=self.mode == "max")
        best = {one.step for one in have[: self.count]}
        return [one.step in best for one in checkpoints]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _share_writing() -> None:
    """Has this process write its part of what several hold; a checkpoint is read alike, whoever has written which part."""
    default = ocp.type_handlers.get_type_handler(jax.Array)
    store = getattr(default, "_array_metadata_store", None)  # of shapes and chunks; there is no public way to one
    handler = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1,
        min_slice_bytes_for_replica_parallel=LEAST_SLICE_BYTES,
        array_metadata_store=store,
    )
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class Checkpointer:
    """The `checkpoints` folder of a run, for the one job that trains it. Every process makes one and calls it alike."""

    def __init__(
        self,
        directory: epath.Path,
        config: TrainConfig,
        *,
        read_only: bool = False,
        on_saved: Callable[[int], None] = lambda step: None,
    ):
        """
        Args:
            read_only: only restores, and changes nothing; another job may be training in the run.
            on_saved: called with the step of a save that was found to be complete, once.

        Raises:
            UserError: the folder may not be made or written.
            ClusterError: it cannot be made or read now.
        """
        self.directory = directory
        self._failures = 0
        self._problem = ""  # what became of the last save that failed, as one line
        self._problem_may_pass = False
        # Orbax lists a step from the beginning of its save, whatever becomes of it.
        self._failed_steps: set[int] = set()
        self._saving: int | None = None
        self._on_saved = on_saved
        self._told = True  # of the save in `_saving`
        keep: list[Any] = [checkpoint_managers.LatestN(config.keep_checkpoints)]
        if config.log_checkpoint_keep_period > 0:
            keep.append(checkpoint_managers.EveryNSteps(config.log_checkpoint_keep_period))
        if config.keep_best > 0:
            keep.append(_KeepBest(config.best_metric, config.best_mode, config.keep_best))
        self._best_metric = config.best_metric if config.keep_best > 0 else None
        self._read_only = read_only
        self._barrier = SaveBarrier(self._settle) if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            # Has Orbax store the metrics; what stays is up to the policies above.
            best_fn=(lambda metrics: metrics[config.best_metric]) if config.keep_best > 0 else None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_SECONDS, barrier_sync_fn=self._barrier),
        )
        _share_writing()
        try:
            handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        except objects.errors(directory) as error:
            raise objects.storage_error(f"cannot write checkpoints to {directory}", error) from error

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return sorted(set(self._manager.all_steps()) - self._failed_steps)

    def save(
        self, step: int, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Begins a save and returns once the arrays are copied; writing goes on behind. The state may then be donated.

        Args:
            metrics: of this step. One that is not among them, or not finite, is never the best.

        Returns:
            whether it was begun. Failures, of this save or found out about an earlier one, are logged.

        Raises:
            UserError: several saves in a row failed, the last of something that the user has to mend.
            ClusterError: of something that may pass.
        """
        run_files.leave_if_replaced(self.directory.parent)
        described = {**meta, checksums.KEY: checksums.checksums(_parts(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(described))
        self.wait()  # for the save before
        self._give_up_if_hopeless()
        if step in self.steps():
            return True
        self._saving = step
        if self._barrier is not None:
            self._barrier.begin()
        self._failed_steps.discard(step)
        value = (metrics or {}).get(self._best_metric) if self._best_metric else None
        stored = {self._best_metric: float(value)} if value is not None and math.isfinite(value) else None
        try:
            self._manager.save(step, args=items, metrics=stored, force=True)
        except Exception as error:
            saved = self._failed(step, error)
            self._give_up_if_hopeless()
            return saved
        self._told = False
        return True

    def wait(self) -> bool:
        """Waits until what was begun is on disk. Returns False, having logged it, if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._settle()
            return self._failed(None, error)
        if self._saving in self._failed_steps:  # as is known already
            return False
        self._failures = 0
        self._tell()
        return True

    def _settle(self) -> None:
        """Waits for what a save that has failed still writes. Orbax stops waiting at each error that there is; what is left
        of them would be taken for one of the next save."""
        for _ in range(MOST_ERRORS):
            try:
                self._manager._checkpointer.wait_until_finished()
            except Exception:
                continue
            return

    def poll(self) -> None:
        """Notices how the save in the background has ended, without waiting for it."""
        # While one is under way, Orbax would wait for its metadata for as long as storage does not answer.
        if self._told or self._manager.is_saving_in_progress():
            return
        self.wait()

    def _tell(self) -> None:
        if not self._told and self._saving is not None and self._saving not in self._failed_steps:
            self._on_saved(self._saving)
        self._told = True

    def close(self) -> None:
        """Releases threads. Call `wait` first to know how the last save ended: here its failure is not news any more."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def _failed(self, step: int | None, error: Exception) -> bool:
        """Tells of a failure; returns whether the checkpoint is there all the same: what failed came after it, such as
        the deletion of an older one."""
        step = self._saving if step is None else step
        if step is not None and self._is_complete(step):
            print(
                f"warning: after the checkpoint of step {step} in {self.directory}: {objects.reason(error)}", flush=True
            )
            self._failures = 0
            self._tell()
            return True
        self._failures += 1
        self._told = True
        self._remove_partial()
        if step is not None:
            self._failed_steps.add(step)
        if jax.process_count() == 1:  # with more, reloading would wait for peers that may not have failed
            self._manager.reload()
        which = f"the checkpoint of step {step}"
        text = f"{which} could not be saved in {self.directory}: {objects.reason(error)}"
        if self._failures >= FAILED_SAVES_IN_A_ROW:
            text += f"; {self._failures} saves in a row failed"
        self._problem = f"{text}. The last good one: {self._newest()}"
        self._problem_may_pass = objects.may_pass(error)
        print(f"warning: {self._problem}", flush=True)
        return False

    def _give_up_if_hopeless(self) -> None:
        """Only where a save is to begin, which is the same step on all processes."""
        if self._failures >= FAILED_SAVES_IN_A_ROW:
            raise self.failure()

    def failure(self, where: str = "") -> UserError | ClusterError:
        """What to raise where training cannot go on without the last save that failed; `where` begins its message."""
        return (ClusterError if self._problem_may_pass else UserError)(where + self._problem)

    def _is_complete(self, step: int) -> bool:
        try:
            return bool(ocp.utils.is_checkpoint_finalized(self.directory / str(step)))
        except (OSError, ValueError):  # there is no such folder
            return False

    def _remove_partial(self) -> None:
        """Gives back the space of a save that failed; where the disk is full, the next one needs it."""
        if jax.process_index() == 0 and self._saving is not None:
            for partial in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    partial.rmtree()

    def _newest(self) -> str:
        steps = self.steps()
        return f"step {steps[-1]}" if steps else "none yet"

    def restore(self, abstract: TrainState, last: int | None = None) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none.

        Args:
            abstract: shapes, dtypes and shardings to restore into; the mesh may differ from the one that saved.
            last: look only at steps up to this one.

        Raises:
            OtherModelError: the model or optimizer differs from the saved one (names the parameter and both shapes).
            UserError: all checkpoints are damaged.
            ClusterError: none can be read now, for a reason that may pass.
        """
        pauses = list(READ_PAUSES_SECONDS)  # for all steps together: where storage is away, it is so for each of them
        unreadable: list[int] = []
        away, why = False, ""
        for step in reversed([step for step in self.steps() if last is None or step <= last]):
            restored, verdict, why = self._read(step, abstract)
            while verdict == _AWAY and pauses:
                pause = pauses.pop(0)
                print(
                    f"warning: checkpoint {step} in {self.directory} cannot be read now ({why}); trying again in {pause} s",
                    flush=True,
                )
                time.sleep(pause)
                restored, verdict, why = self._read(step, abstract)
            if restored is not None:
                self._set_aside(unreadable)
                return restored
            print(
                f"warning: checkpoint {step} in {self.directory} cannot be read ({why}); trying the one before it",
                flush=True,
            )
            unreadable.append(step)
            away = away or verdict == _AWAY
        if not unreadable:
            return None
        tried = f"(tried steps {', '.join(map(str, unreadable))})"
        if away:
            raise ClusterError(f"no checkpoint in {self.directory} can be read now {tried}: {why}")
        raise UserError(f"no checkpoint in {self.directory} can be read {tried}; move the folder away to start anew")

    def _read(self, step: int, abstract: TrainState) -> tuple[Restored | None, int, str]:
        """A step if all processes could read it, and how that went for the worst of them, with the reason: what follows from
        it they all do alike. Orbax's manager would have those that could read wait for those that could not."""
        folder = self.directory / str(step)
        mine, why = _READ, "on another process"
        restored = None
        try:
            handler = ocp.StandardCheckpointHandler()
            _check_compatible(handler.metadata(folder / "state").tree, abstract, folder)
            state = handler.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
            meta = ocp.JsonCheckpointHandler().restore(folder / "meta", args=ocp.args.JsonRestore())
            restored = Restored(state, meta or {})
        except UserError:
            raise
        except Exception as error:
            mine, why = _AWAY if objects.may_pass(error) else _DAMAGED, objects.reason(error)
        verdict = distributed.largest(mine)
        if verdict != _READ or restored is None:
            return None, verdict, why
        if not _as_saved(restored.state, restored.meta):
            return None, _DAMAGED, "its contents are not those that were saved"
        return restored, verdict, ""

    def _set_aside(self, steps: list[int]) -> None:
        """Moves unreadable steps out of the way, so that training can save those steps again. Deletes nothing."""
        if not steps or self._read_only:
            return
        if jax.process_index() == 0:
            aside = self.directory.parent / "unreadable_checkpoints"
            aside.mkdir(parents=True, exist_ok=True)
            if objects.is_object(aside):  # there a folder is what lies in it, and epath moves nothing into an empty one
                (aside / ".directory").write_text("")
            for step in steps:
                target = aside / str(step)
                count = 1
                while target.exists():
                    count += 1
                    target = aside / f"{step}-{count}"
                (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints set aside")
        self._manager.reload()


class OtherModelError(UserError):
    """The model or optimizer asked for is not the one that was saved."""


def _parts(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _as_saved(state: TrainState, meta: Mapping[str, Any]) -> bool:
    found = checksums.checksums(_parts(state))
    # Older checkpoints have one of the whole state, which is what those of its parts add up to.
    if checksums.KEY not in meta and "checksum" in meta:
        return int(meta["checksum"]) == sum(found.values()) % 2**32
    return checksums.agree(found, meta)


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _check_compatible(saved_tree: Any, abstract: TrainState, where: epath.Path) -> None:
    saved, wanted = _named_shapes(saved_tree), _named_shapes(abstract)
    # Parameters before moments: a user knows the model's names, and every moment of a changed parameter differs too.
    for name in sorted(wanted.keys() | saved.keys(), key=lambda n: (not n.startswith("params."), n)):
        if saved.get(name) == wanted.get(name):
            continue
        have = f"has shape {saved[name]} in the checkpoint" if name in saved else "is not in the checkpoint"
        want = f"shape {wanted[name]} in the model asked for" if name in wanted else "is not in the model asked for"
        raise OtherModelError(
            f"cannot resume from {where}: {name} {have}, {want}; use the options the run was made with, or another run name"
        )
