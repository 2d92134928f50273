"""The meetings of the processes that write one checkpoint, in which nobody waits for one whose part of it has failed.

Orbax has them meet when all have written and when the first has made the checkpoint whole, and, whatever has happened, at the
very end. A process that fails leaves out what it has not come to and waits at the end; the others wait where it never comes,
and training with them, until the timeout. Here it says that it has failed and joins the meetings that it left out, and
whoever comes out of one of them and finds that said fails as well. So all processes take a save for failed, or none.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable

import jax
from orbax.checkpoint._src.futures import future, synchronization  # what they do has no public name

from jasmine.errors import ClusterError, UserError
from jasmine.training import distributed, objects

_MEETINGS = ("async_write_complete", "async_commit_complete")  # parts of Orbax's names for them
_END = "set_value_start"  # of whether a save is under way, which is said at its beginning and at its end
_SIGNAL = synchronization.HandlerAwaitableSignal
_FOLDERS = (_SIGNAL.STEP_DIRECTORY_CREATION, _SIGNAL.ITEM_DIRECTORY_CREATION)


class SaveBarrier:
    """Orbax's `barrier_sync_fn`. Each process makes one, and calls `begin` before each save, all alike."""

    _numbers = itertools.count()  # of saves, for names that no earlier one had

    def __init__(self, settle: Callable[[], None]) -> None:
        """
        Args:
            settle: returns once this process writes nothing any more, whether or not that has gone well.
        """
        self._settle = settle
        self._save = -1
        self._begun = False
        self._joined: set[str] = set()

    def begin(self) -> None:
        """A save is to begin; the one before is over."""
        self._save = next(self._numbers)
        self._begun = False
        self._joined = set()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the others at the meeting of this name.

        Raises:
            ClusterError: another process has failed to save, for a reason that may pass.
            UserError: it has, for one that the user has to mend.
        """
        meeting = next((one for one in _MEETINGS if one in key), None)
        if meeting is not None:
            self._meet(meeting, timeout_ms)
            self._look()
            return
        if _END in key:
            error = sys.exc_info()[1]  # Orbax comes to the end by a `finally`
            if self._begun and error is not None:
                self._fail(error, timeout_ms)
            self._begun = True
        self._wait(key, timeout_ms)

    def _fail(self, error: BaseException, timeout_ms: int) -> None:
        """Say so, and join the meetings that were left out."""
        self._tell(error)
        self._settle()  # what has failed may be a small file, while a thread still writes, and will come to the meetings
        for meeting in _MEETINGS:
            if meeting not in self._joined:
                self._meet(meeting, timeout_ms)

    def _meet(self, meeting: str, timeout_ms: int) -> None:
        self._joined.add(meeting)
        try:
            self._wait(meeting, timeout_ms)
        except Exception:  # it takes too long, or one is gone: there is nobody to meet
            self._joined.update(_MEETINGS)
            raise

    def _wait(self, name: str, timeout_ms: int) -> None:
        distributed.coordination_client().wait_at_barrier(f"{self._name}/{name}/{self._begun}", timeout_ms)

    def _tell(self, error: BaseException) -> None:
        kind = ClusterError if objects.may_pass(error) else UserError
        said = f"{kind.__name__} {objects.reason(error)} (on process {jax.process_index()})"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
            distributed.coordination_client().key_value_set(f"{self._name}/failed", said)
        if jax.process_index() == 0:  # the others may be waiting for folders that it should have made
            operation = synchronization.OperationIdGenerator.get_current_operation_id()
            future.set_signals(_FOLDERS, operation_id=operation)

    def _look(self) -> None:
        found = dict(distributed.coordination_client().key_value_dir_get(self._name))
        if said := found.get(f"{self._name}/failed"):
            kind, _, reason = said.partition(" ")
            raise (ClusterError if kind == ClusterError.__name__ else UserError)(reason)

    @property
    def _name(self) -> str:
        return f"jasmine/checkpoint/{self._save}"
