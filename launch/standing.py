"""How a run stands now: its record, corrected by what lives of it.

A record alone cannot say that its supervisor was killed, nor why a job waits in a queue. Whoever holds the run's lock
is alive for certain, and the record then needs no correction; where nobody does, the run's backend is asked. A scheduler
that does not answer corrects nothing.
"""

import os
import time
from dataclasses import dataclass

from launch.backends import Sighting, backend_named
from launch.errors import UserError
from launch.record import ACTIVE, RunRecord, read_record, write_record
from launch.run_dir import RunDir


@dataclass(frozen=True)
class Standing:
    """A run's record with its state as it is now, and what its backend had to say."""

    record: RunRecord
    seen: Sighting

    @property
    def live(self) -> bool:
        """Whether anything of the run waits or lives."""
        return self.seen.live


def read_standing(run: RunDir) -> Standing:
    """Return how an existing run stands.

    Raises:
        UserError: there is no such run, or its record is unreadable.
    """
    held = run.is_live()  # first: the supervisor writes its last state before it lets go of the lock
    record = read_record(run)
    if record is None:
        raise UserError(f"{run.root} is not a run directory: it has no run.json")
    if record.state not in ACTIVE:
        return Standing(record, Sighting(live=held))
    name = record.submissions[-1].plan.settings.get("backend", "local") if record.submissions else "local"
    if held and name == "local":
        return Standing(record, Sighting(live=True))
    seen = backend_named(name).look(run, record)
    if held:
        return Standing(record, Sighting(True, None, seen.detail, seen.answered, seen.facts))
    return Standing(record.model_copy(update={"state": seen.state or record.state}), seen)


def settle(run: RunDir, standing: Standing) -> RunRecord:
    """Write down the end of a run that nothing of it could write down itself, such as a job that was cancelled while it
    waited; return the record."""
    record = standing.record
    if standing.live or record.state in ACTIVE:
        return record
    stored = read_record(run)
    if stored is None or stored.state not in ACTIVE:
        return record
    lock = run.lock()
    try:
        settled = record.model_copy(update={"reason": standing.seen.detail or None, "changed": time.time()})
        write_record(run, settled)
        run.append_event("ended", state=settled.state, reason=settled.reason)
    finally:
        os.close(lock)
    return settled


def is_live(run: RunDir) -> bool:
    """Return whether anything of the run waits or lives; a directory without a record is no run, but may be in use."""
    return run.is_live() or (run.record.exists() and read_standing(run).live)


class Watch:
    """`is_live` for a loop: asks a scheduler every few seconds only, however often it is called."""

    def __init__(self, run: RunDir, seconds: float = 2.0) -> None:
        self.run, self.seconds = run, seconds
        self._asked = float("-inf")

    def __call__(self) -> bool:
        if self.run.is_live():
            return True
        standing = read_record(self.run)
        if standing is None or standing.state not in ACTIVE:
            return False
        if time.monotonic() - self._asked < self.seconds:
            return True
        self._asked = time.monotonic()
        return is_live(self.run)
