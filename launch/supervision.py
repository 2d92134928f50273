"""What supervisors do whose processes run on other machines: they see an attempt through its run directory alone."""

import contextlib
import re
import signal
import time
from collections.abc import Sequence
from typing import Any

from launch.logs import last_words
from launch.objects import in_parallel, is_object
from launch.options import baselines
from launch.outcome import kind
from launch.plan import Plan
from launch.record import Attempt, HostExit
from launch.run_dir import RunDir, last_json_lines, read_tail
from launch.watchdog import UNWATCHED_SECONDS, Hang, Watchdog

# Of what a process said last, in an event.
MOST_WORDS = 300
# Where jax says in a log whom it misses: the last bytes, and the numbers of processes that follow, a line each.
LOG_TAIL = 16 << 10
_MISSED = re.compile(r"stopped sending heartbeats\):\n((?:\d{1,6}\n)+)")
# A process that loses another one fails a moment after it, and its report may be there first, as objects may by seconds.
NEIGHBOUR_SECONDS, OBJECT_NEIGHBOUR_SECONDS = 0.2, 3.0
# Of how many attempts it is asked whether the job's processes have written beats.
EARLIER_ATTEMPTS = 5


def collect_exits(run: RunDir, attempt: Attempt, waiting: set[int]) -> bool:
    """Move hosts that have reported their end from `waiting` to the attempt; return whether there were any."""
    found = _reported_exits(run, attempt, waiting)
    if any(kind(one) == "failed" for one in found) and len(found) < len(waiting):
        wait_for_neighbours(run)
        found = _reported_exits(run, attempt, waiting)
    for one in sorted(found, key=lambda one: one.ended):
        waiting.discard(one.host)
        note_exit(run, attempt, one)
    return bool(found)


def wait_for_neighbours(run: RunDir) -> None:
    """Wait for the reports of those that failed just before the one that reported first."""
    time.sleep(OBJECT_NEIGHBOUR_SECONDS if is_object(run.root) else NEIGHBOUR_SECONDS)


def _reported_exits(run: RunDir, attempt: Attempt, hosts: set[int]) -> list[HostExit]:
    found = []
    reported = {path.name for path in run.attempt(attempt.number).glob("*.exit.json")}
    for host in sorted(hosts):
        if run.exit_file(attempt.number, host).name in reported:
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.append(HostExit.model_validate_json(run.exit_file(attempt.number, host).read_text()))
    return found


def note_exit(run: RunDir, attempt: Attempt, one: HostExit) -> None:
    """Add the end of one process to its attempt; the first one that failed is remembered as such."""
    one.node = one.node or (attempt.nodes[one.host] if attempt.nodes else None)
    attempt.exits.append(one)
    fields: dict[str, Any] = {"host": one.host, "node": one.node, "code": one.code, "signal": one.signal}
    run.append_event("host_exited", attempt.number, **fields)
    if attempt.first_failed is None and kind(one) == "failed":
        attempt.first_failed = one.host
        run.append_event("failed", attempt.number, cause=_cause(run, attempt, one), **fields)


def _cause(run: RunDir, attempt: Attempt, one: HostExit) -> str:
    """Return what one process failed of; one that was killed had no time to say."""
    if attempt.cause:
        return attempt.cause
    if one.signal == signal.SIGKILL.name:
        return f"process {one.host} died of {one.signal}"
    said = None
    with contextlib.suppress(OSError):
        said = last_words(run.log(attempt.number, one.host))
    how = f"died of {one.signal}" if one.signal else f"exited with code {one.code}"
    return f"process {one.host} {how}" + (f": {said[:MOST_WORDS]}" if said else "")


def missed_by_others(run: RunDir, attempt: Attempt) -> list[int] | None:
    """Return the processes that jax missed, if the first one to fail was ended by jax for the sake of others; None if it was
    not. Jax aborts a process (SIGABRT) when another one sends no heartbeats any more, or has not joined in time.

    The log of process 0, which has jax's service, names the ones that were missed. Of those that did not join it says
    nothing; they have written no beat.
    """
    first = next((one for one in attempt.exits if one.host == attempt.first_failed), None)
    if first is None or first.signal != signal.SIGABRT.name or attempt.processes == 1:
        return None
    tails = []
    for host in {0, first.host}:
        with contextlib.suppress(OSError):
            tails.append(read_tail(run.log(attempt.number, host), LOG_TAIL).decode(errors="replace"))
    named = [number for tail in tails for found in _MISSED.findall(tail) for number in found.split()]
    if missed := {int(number) for number in named if int(number) < attempt.processes}:
        return sorted(missed)
    hosts = range(attempt.processes)
    beats = in_parallel(lambda host: run.beat(attempt.number, host), hosts, of=run.root)
    unheard = [host for host in hosts if beats[host] is None]
    if first.host in unheard:
        return None  # jax aborts nobody who has not begun to join
    if 0 < len(unheard) < attempt.processes:
        return unheard
    return [] if any("JAX distributed service detected fatal errors" in tail for tail in tails) else None


def has_progressed(run: RunDir, attempt: Attempt, size: int) -> bool:
    """Return whether the job has logged a step in an attempt.

    Lines of metrics name their attempt, and the file gets shorter when the job goes back to a checkpoint. A program whose
    lines do not name it has logged one if the file is longer than `size`, what it was in bytes before the attempt.
    """
    named = [line["attempt"] for line in last_json_lines(run.metrics, 20) if "attempt" in line]
    return attempt.number in named if named else run.metrics_size() > size


def watchdog_of(run: RunDir, plan: Plan, attempt: int) -> Watchdog:
    """Return the watchdog of an attempt that is about to begin."""
    earlier = [number for number in run.attempts() if number < attempt][-EARLIER_ATTEMPTS:]
    tells = plan.job in baselines() or any(run.beat(number, 0) is not None for number in earlier)
    return Watchdog(plan.settings["hang_timeout"], tells=tells)


def find_hang(run: RunDir, attempt: Attempt, hosts: Sequence[int], watchdog: Watchdog) -> Hang | None:
    """Look at the beats of all processes once; return what holds them up, None while nothing does."""
    found = in_parallel(lambda host: run.beat(attempt.number, host), hosts, of=run.root)
    known = {host: beat for host, beat in zip(hosts, found, strict=True) if beat is not None}
    times = [line.get("step_time") for line in last_json_lines(run.metrics, 20)]
    now = time.monotonic()
    if now - watchdog.looked_at > UNWATCHED_SECONDS + len(hosts) / 8:  # storage was away, for the processes as well
        watchdog.begin_anew()
    watchdog.looked_at = now
    return watchdog.look(known, now, [one for one in times if isinstance(one, float)], hosts)
