"""Checkpoints of a run: `checkpoints/<step>/` by Orbax, written while training goes on, read on any topology.

A step's folder holds the state (parameters, optimizer, step) and `meta`, the run's config and data position for people to
read; what comes next follows from seed and step, so no loader state is kept. An unfinished save is never restored from,
an unreadable one is set aside and the one before it used, and a failed save is reported and survived.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jasmine.errors import UserError
from jasmine.training import run_files
from jasmine.training.config import TrainConfig
from jasmine.training.state import TrainState

logger = logging.getLogger(__name__)

SAVE_TIMEOUT_SECONDS = 600
FAILED_SAVES_IN_A_ROW = 3


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state from disk, in the shardings asked for, and what was written beside it."""

    state: TrainState
    meta: Mapping[str, Any]


class Checkpointer:
    """The `checkpoints` folder of a run, for the one job that trains it. Every process makes one and calls it alike."""

    def __init__(self, directory: epath.Path, config: TrainConfig):
        """
        Raises:
            UserError: the folder cannot be made or written.
        """
        self.directory = directory
        self._failures = 0
        self.problem = ""  # what became of the last save that failed, as one line
        # Orbax lists a step from the beginning of its save, whatever becomes of it.
        self._failed_steps: set[int] = set()
        self._saving: int | None = None
        keep: list[Any] = [checkpoint_managers.LatestN(config.keep_checkpoints)]
        if config.log_checkpoint_keep_period > 0:
            keep.append(checkpoint_managers.EveryNSteps(config.log_checkpoint_keep_period))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_SECONDS),
        )
        try:
            handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {directory}: {error.strerror or error}") from error

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return sorted(set(self._manager.all_steps()) - self._failed_steps)

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> bool:
        """Begins a save and returns once the arrays are copied; writing goes on behind. The state may then be donated.

        Returns:
            whether it was begun. Failures, of this save or found out about an earlier one, are logged.

        Raises:
            UserError: several saves in a row failed.
        """
        run_files.leave_if_replaced(self.directory.parent)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta)))
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of the save before
            self._failed(None, error)
        else:
            self._failures = 0
        if step in self.steps():
            return True
        self._saving = step
        self._failed_steps.discard(step)
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            self._failed(step, error)
            return False
        return True

    def wait(self) -> bool:
        """Waits until what was begun is on disk. Returns False, having logged it, if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._failed(None, error)
            return False
        self._failures = 0
        return True

    def poll(self) -> None:
        """Notices a failure of the save in the background without waiting for it."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            self._failed(None, error)

    def close(self) -> None:
        """Releases threads. Call `wait` first to know how the last save ended: here its failure is not news any more."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def _failed(self, step: int | None, error: Exception) -> None:
        self._failures += 1
        step = self._saving if step is None else step
        self._remove_partial()
        if step is not None:
            self._failed_steps.add(step)
        if jax.process_count() == 1:  # with more, reloading would wait for peers that may not have failed
            self._manager.reload()
        which = f"the checkpoint of step {step}"
        text = f"{which} could not be saved in {self.directory}: {reason(error)}"
        self.problem = f"{text}. The last good one: {self._newest()}"
        if self._failures >= FAILED_SAVES_IN_A_ROW:
            raise UserError(
                f"{text}; {self._failures} saves in a row failed. The last good one: {self._newest()}"
            ) from error
        print(f"warning: {self.problem}", flush=True)

    def _remove_partial(self) -> None:
        """Gives back the space of a save that failed; where the disk is full, the next one needs it."""
        if jax.process_index() == 0 and self._saving is not None:
            for partial in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    partial.rmtree()

    def _newest(self) -> str:
        steps = self.steps()
        return f"step {steps[-1]}" if steps else "none yet"

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none.

        Args:
            abstract: shapes, dtypes and shardings to restore into; the mesh may differ from the one that saved.

        Raises:
            UserError: the model or optimizer differs from the saved one (names the parameter and both shapes), or no
                checkpoint is readable.
        """
        unreadable: list[int] = []
        for step in reversed(self.steps()):
            try:
                _check_compatible(self._manager.item_metadata(step)["state"].tree, abstract, self.directory / str(step))
                items = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()),
                )
                failure = None
            except UserError:
                raise
            except Exception as error:
                failure = error
            if not _everywhere(failure is None):
                print(
                    f"warning: checkpoint {step} in {self.directory} cannot be read "
                    f"({reason(failure) if failure else 'on another process'}); trying the one before it",
                    flush=True,
                )
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            return Restored(items["state"], items["meta"] or {})
        if unreadable:
            raise UserError(
                f"no checkpoint in {self.directory} can be read (tried steps {', '.join(map(str, unreadable))}); "
                f"move the folder away to start anew"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves unreadable steps out of the way, so that training can save those steps again. Deletes nothing."""
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self.directory.parent / "unreadable_checkpoints"
            aside.mkdir(parents=True, exist_ok=True)
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


def reason(error: BaseException | None) -> str:
    """The line of an error that tells a person most: of a chain of causes the operating system's, else the first line."""
    chain, current = [], error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return f"{link.strerror}" + (f" ({link.filename})" if link.filename else "")
    text = str(error).strip()
    for known in ("No space left on device", "Permission denied", "File too large", "Disk quota exceeded"):
        if known in text:
            return known
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def _everywhere(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(jax.numpy.asarray(ok)).all())


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _check_compatible(saved_tree: Any, abstract: TrainState, where: epath.Path) -> None:
    saved, wanted = _named_shapes(saved_tree), _named_shapes(abstract)
    # Parameters before moments: a user knows the model's names, and every moment of a changed parameter differs too.
    for name in sorted(wanted.keys() | saved.keys(), key=lambda n: (not n.startswith("params."), n)):
        if saved.get(name) == wanted.get(name):
            continue
        have = f"has shape {saved[name]} in the checkpoint" if name in saved else "is not in the checkpoint"
        want = f"shape {wanted[name]} in the model asked for" if name in wanted else "is not in the model asked for"
        raise UserError(
            f"cannot resume from {where}: {name} {have}, {want}; use the options the run was made with, or another run name"
        )
