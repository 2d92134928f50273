"""When a save is due by the clock (`--save_every_minutes`), at the same step on all processes.

Clocks differ and host loops are a few steps apart, so process 0 alone decides. It does so at certain steps only and says
each time which is the next one, some seconds on; the others wait for its word there. So they agree without a thread, and
training pays a message every few seconds, nothing where the option is not used.
"""

import time
from collections.abc import Callable

import jax

from jasmine.training import distributed

CHECK_SECONDS = 5.0
_KEY = "jasmine/save"
_ANSWER_SECONDS = 600
# Words that stay to be read: exchanges between devices keep the others from falling more than a few steps behind.
_KEPT = 8


class SaveClock:
    """Time since the last save. Every process makes one at the same step and asks it at every step from there on.

    Args:
        minutes: between saves, from the beginning of one to that of the next; 0: never due.
        clock: seconds, monotonic; only that of process 0 counts.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self._seconds = 60 * minutes
        self._clock = clock
        self._saved_at = self._checked_at = clock()
        self._next_check = -1
        self._said: list[str] = []
        self._gap = 0

    def due(self, step: int) -> bool:
        """Whether to save now, with `step` finished updates."""
        if self._seconds <= 0:
            return False
        if jax.process_count() == 1:
            return self._clock() - self._saved_at >= self._seconds
        if step < self._next_check:
            return False
        client = distributed.coordination_client()
        key = f"{_KEY}/{step}"
        if jax.process_index() == 0:
            now = self._clock()
            # Not more than twice as far as the last time: the steps may become slower.
            pace = (now - self._checked_at) / max(self._gap, 1)
            wanted = min(CHECK_SECONDS, self._seconds / 10) / max(pace, 1e-6)
            self._gap, self._checked_at = max(1, min(int(wanted), 2 * self._gap)), now
            client.key_value_set(key, f"{int(now - self._saved_at >= self._seconds)} {step + self._gap}")
            self._said.append(key)
            if len(self._said) > _KEPT:
                client.key_value_delete(self._said.pop(0))
        said, following = client.blocking_key_value_get(key, 1000 * _ANSWER_SECONDS).split()
        self._next_check = int(following)
        return said == "1"

    def saved(self) -> None:
        """Notes that a save begins, for whatever reason."""
        self._saved_at = self._clock()
