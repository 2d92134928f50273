"""What a kind of cluster has to offer: the modules of this package are `Backend`s.

A backend is stateless: all that is known of a run lies in its run directory and, while it lives, with its scheduler.
`launch.submission` writes the run directory and its record before it calls `submit`; from then on the supervisor that the
backend starts, wherever that is, is the only one that changes the record.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from launch.plan import Plan
from launch.record import RunRecord, State
from launch.run_dir import RunDir


@dataclass(frozen=True)
class Sighting:
    """What a backend says about a run that no supervisor holds at this moment.

    Attributes:
        live: whether it waits, runs or will run again.
        state: its state, where that is not what the record says; None for the record's.
        detail: one line in plain words, such as why it waits; "" when there is nothing to say.
        answered: False when the scheduler could not be asked; `live` is then the record's word.
        facts: more for `status`, label to text.
        holds: whether something is held for it though it does not live, which `cancel` gives back.
    """

    live: bool
    state: State | None = None
    detail: str = ""
    answered: bool = True
    facts: tuple[tuple[str, str], ...] = ()
    holds: bool = False


class Backend(Protocol):
    """The functions of a module `launch.backends.<name>`."""

    def preview(self, plans: Sequence[Plan]) -> str:
        """Return exactly what would be submitted, for `--dry-run`; creates nothing and needs no cluster."""

    def submit(self, plans: Sequence[Plan], locks: Sequence[int]) -> str:
        """Start runs, which stand in the record as submitted, and return a line about that.

        Args:
            plans: one run, or the elements of a sweep, which differ in run and arguments only.
            locks: for each, the descriptor that holds the run's lock. It is closed after this call.

        Raises:
            UserError: the cluster refuses; nothing was started.
        """

    def shape(self, plan: Plan) -> str:
        """Return the processes and devices of a run, for people."""

    def look(self, runs: Sequence[tuple[RunDir, RunRecord]]) -> list[Sighting]:
        """Return how runs stand that are not known to have ended; changes nothing and returns within seconds."""

    def cancel(self, run: RunDir, record: RunRecord) -> None:
        """Ask a run that lives, or for which something is held, to save and stop.

        Raises:
            UserError: the cluster cannot be asked.
        """

    def stop_seconds(self, record: RunRecord) -> float:
        """Return how long it may take until nothing lives of a run that is asked to save and stop."""

    def release(self, run: RunDir, record: RunRecord) -> None:
        """Return once nothing is held any more for a run that has ended.

        Raises:
            UserError: something still is.
        """


def backend_named(name: str) -> Backend:
    """Return the backend of a cluster's `backend:`. Loaded only now, for some bring libraries that are slow to import."""
    return cast(Backend, importlib.import_module(f"launch.backends.{name}"))
