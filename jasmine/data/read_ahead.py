"""Stages what one process is about to read, so that its steps do not wait for a bucket."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from jasmine.data.fetching import AbandonedError
from jasmine.data.staging import StagedFiles
from jasmine.errors import ClusterError, UserError

# Shards fetched at once; steps looked at; the share of a cache that cannot hold all that may be filled with what is not
# needed yet.
_THREADS = 4
_STEPS_AHEAD = 256
_SHARE_AHEAD = 0.25


class ReadAhead:
    """Threads that stage the shards of coming steps in the order of their need, until closed or all are there.

    It runs ahead of the step that was last `reached` by at most 256 steps. Where the cache cannot hold all shards, by at
    most a quarter of the cache, and not for the steps that are being read already: it would take room from them. What
    goes wrong here goes wrong again, and is told, when the shard is read.

    Args:
        files: the shards.
        shards_of: which shards the update of a step reads, sorted numbers.
        start_step: the first step.
        being_read: how many steps are read at once, from the one after the last reached.
        stop_step: nothing is staged for this step and later ones.
    """

    def __init__(
        self,
        files: StagedFiles,
        shards_of: Callable[[int], np.ndarray],
        start_step: int,
        being_read: int,
        stop_step: int | None = None,
    ) -> None:
        self._files, self._shards_of = files, shards_of
        self._lead = 0 if files.fits else being_read
        self._first = self._planned = start_step + self._lead
        self._stop_step = stop_step
        self._room = int(_SHARE_AHEAD * files.cache.limit)
        self._last_need: dict[int, int] = {}  # of the shards ahead: the last planned step that reads each
        self._needs: deque[tuple[int, int]] = deque()  # step and shard, of the step that is being planned
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"read-ahead-{k}", daemon=True) for k in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def reached(self, step: int) -> None:
        """The batch of `step` was taken: its shards are no longer ahead."""
        with self._changed:
            self._first = step + 1 + self._lead
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads: at once, or as soon as the storage says something."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            with suppress(UserError, ClusterError, AbandonedError):
                self._files.cache.stage(self._files.items[shard], stop=self._closed).close()

    def _next(self) -> int | None:
        with self._changed:
            while not self._closed.is_set():
                if not self._needs and not self._plan():
                    return None
                while self._needs:
                    step, shard = self._needs[0]
                    if shard not in self._last_need and not self._has_room(shard):
                        break
                    self._needs.popleft()
                    fresh = shard not in self._last_need
                    self._last_need[shard] = step
                    if fresh:
                        return shard
                if self._needs or self._planned >= self._first + _STEPS_AHEAD:
                    self._changed.wait()
        return None

    def _plan(self) -> bool:
        """Takes up the next step; False if no step needs anything more."""
        step = self._planned = max(self._planned, self._first)
        everything = self._files.fits and len(self._last_need) == len(self._files.items)
        if everything or (self._stop_step is not None and step >= self._stop_step):
            return False
        if step < self._first + _STEPS_AHEAD:
            self._needs.extend((step, int(shard)) for shard in self._shards_of(step))
            self._planned += 1
        return True

    def _has_room(self, shard: int) -> bool:
        if self._files.fits:
            return True
        self._last_need = {ahead: last for ahead, last in self._last_need.items() if last >= self._first}
        return sum(self._files.items[ahead].size for ahead in (*self._last_need, shard)) <= self._room
