"""How an attempt ended, and what follows: the rules that all backends share.

- all exited 0: finished;
- all left with their state saved (75): started again, out of the budget for preemptions;
- anything else: started again from the last checkpoint, out of the budget for failures. No restart where it would only
  repeat the failure: exit code 2 without any progress is the user's mistake, and by 65 the job says so itself, as of a
  loss that is not finite.

A request to cancel, or to leave this machine, ends the run however the attempt went. A machine that was tested and found
wrong, or at which two attempts failed, is left out of the next ones for a time, where the scheduler can be told so.
"""

from dataclasses import dataclass
from typing import Literal

from launch.record import Attempt, Blame, HostExit, State
from launch.worker import EXIT_SAVED

EXIT_WOULD_REPEAT = 65
BLAMES_TO_EXCLUDE = 2

Ask = Literal["cancel", "signal"]


@dataclass(frozen=True)
class Ending:
    """The end of a run: its state, its exit code and a line that says why."""

    state: State
    code: int
    reason: str | None = None


def kind(one: HostExit) -> Literal["finished", "saved", "stopped", "failed"]:
    """Return how one process ended."""
    if one.code == 0:
        return "finished"
    if one.code == EXIT_SAVED:
        return "saved"
    # Told to leave before it could listen, as while it still imports: nothing was done that could be lost.
    return "stopped" if one.signal in one.forwarded else "failed"


def outcome(exits: list[HostExit]) -> Literal["finished", "preempted", "failed"]:
    """Return how an attempt whose processes have all ended went."""
    kinds = {kind(one) for one in exits}
    return "finished" if kinds == {"finished"} else "failed" if "failed" in kinds else "preempted"


def exit_code(attempt: Attempt) -> int:
    """Return the exit code that stands for an attempt: that of the process that failed first, or 65, which all come to."""
    if attempt.outcome == "finished":
        return 0
    if any(one.code == EXIT_WOULD_REPEAT for one in attempt.exits):
        return EXIT_WOULD_REPEAT
    first = next((one for one in attempt.exits if one.host == attempt.first_failed), None)
    return EXIT_SAVED if attempt.outcome == "preempted" else first.code if first else 1


def ending(
    attempt: Attempt, *, asked: Ask | None, progress: bool, spent: int, budget: tuple[str, int | None]
) -> Ending | None:
    """Return how the run ends after `attempt`, or None where it goes on with another.

    Args:
        asked: why its processes were told to leave, if somebody did.
        progress: whether any step was logged in it.
        spent: how many restarts after an outcome like this one there have been.
        budget: the key that limits them, and its value (None: no limit).
    """
    code = exit_code(attempt)
    if attempt.outcome == "finished":
        return Ending("finished", 0)
    if asked == "cancel":
        return Ending("cancelled", code, None if code == EXIT_SAVED else "the job had not saved its state")
    if attempt.outcome == "failed" and code == 2 and not progress:
        return Ending("failed", code, "the job refused its options or its data; not tried again")
    if attempt.outcome == "failed" and code == EXIT_WOULD_REPEAT:
        return Ending("failed", code, "the job says that a restart would only repeat its failure; not tried again")
    if asked == "signal":
        if code == EXIT_SAVED:
            return Ending("preempted", code, "the supervisor was told to stop; resume the run to go on")
        return Ending("failed", code, "the supervisor was told to stop, and the job could not save its state")
    key, limit = budget
    if limit is not None and spent >= limit:
        assert attempt.outcome is not None
        return Ending(attempt.outcome, code, f"its restarts are used up ({key}: {limit})")
    return None


def nodes_to_exclude(blames: list[Blame], now: float, hours: float) -> list[str]:
    """Return the nodes that were blamed for certain, or twice, in the last `hours`; `now` is in Unix seconds."""
    recent = [blame for blame in blames if blame.time > now - 3600 * hours]
    names = [blame.node for blame in recent]
    certain = {blame.node for blame in recent if blame.certain}
    return sorted(certain | {node for node in names if names.count(node) >= BLAMES_TO_EXCLUDE})
