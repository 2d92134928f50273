"""How a run stands now: its record, corrected by what lives of it.

A record alone cannot say that its supervisor was killed, nor why a job waits in a queue. Whoever holds the run's lock
is alive for certain, and the record then needs no correction; where nobody does, the run's backend is asked. A scheduler
that does not answer corrects nothing.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.backends import Sighting, backend_named
from launch.errors import UserError
from launch.objects import in_parallel
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

    @property
    def backend(self) -> str:
        """The name of the backend that it was last submitted to."""
        return _backend_of(self.record)


def read_standing(run: RunDir) -> Standing:
    """Return how an existing run stands.

    Raises:
        UserError: there is no such run, or its record is unreadable.
    """
    (found,) = read_standings([run])
    if isinstance(found, UserError):
        raise found
    return found


def read_standings(runs: Sequence[RunDir]) -> list[Standing | UserError]:
    """Return for each directory how its run stands, or what `read_standing` raises; asks each scheduler once for all."""
    found: dict[Path, Standing | UserError] = {}
    unsure: dict[str, list[tuple[RunDir, RunRecord, bool]]] = {}
    for run, read in zip(runs, in_parallel(_read, runs, of=runs[0].root) if runs else [], strict=True):
        if isinstance(read, UserError):
            found[run.root] = read
            continue
        held, record = read
        if record is None:
            found[run.root] = UserError(f"{run.root} is not a run directory: it has no run.json")
        elif record.state not in ACTIVE or (held and _backend_of(record) == "local"):
            found[run.root] = Standing(record, Sighting(live=held))
        else:
            unsure.setdefault(_backend_of(record), []).append((run, record, held))
    for name, several in unsure.items():
        sightings = backend_named(name).look([(run, record) for run, record, _ in several])
        for (run, record, held), seen in zip(several, sightings, strict=True):
            if held:
                seen = dataclasses.replace(seen, live=True, state=None)
            found[run.root] = Standing(record.model_copy(update={"state": seen.state or record.state}), seen)
    return [found[run.root] for run in runs]


def _read(run: RunDir) -> tuple[bool, RunRecord | None] | UserError:
    """Return whether somebody holds a run, and its record."""
    try:
        held = run.is_live()  # first: the supervisor writes its last state before it lets go of the lock
        return held, read_record(run)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"{run.root}: cannot be read: {error.strerror}")


def _backend_of(record: RunRecord) -> str:
    return record.submissions[-1].plan.settings.get("backend", "local") if record.submissions else "local"


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
        number = settled.attempts[-1].number if settled.attempts else 1
        run.append_event("ended", number, state=settled.state, reason=settled.reason)
    finally:
        run.release(lock)
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
