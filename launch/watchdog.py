"""Finds out that a job hangs, and at which process, from the beats that all of its processes write.

jax's heartbeats see a process that is gone. One that is alive but stuck holds up all the others in a collective, and no
error comes. Nothing but steps counts as progress while a job is stepping; what takes long by nature (joining, compiling,
saving, evaluating) has ten times as long. Times are the caller's: nothing here sleeps or reads a clock.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LEAST_SECONDS = 120.0
STEPS = 10
# A process whose heart beats once a second is stopped, or its machine is, when it has been silent for this long.
SILENT_SECONDS = 10.0


@dataclass(frozen=True)
class Hang:
    """A job without progress; `host` is the process that holds it up, None where none stands out."""

    host: int | None
    reason: str


class Watchdog:
    """Compares the beats of one attempt's processes with those it saw before."""

    def __init__(self, timeout: float | Literal["auto"]) -> None:
        self._chosen = timeout
        self._seen: dict[int, tuple[int, str]] = {}
        self._moved_at: float | None = None

    def timeout(self, step_times: list[float]) -> float:
        """Return the seconds without a step after which a job hangs."""
        if self._chosen != "auto":
            return float(self._chosen)
        return max(LEAST_SECONDS, STEPS * statistics.median(step_times) if step_times else 0.0)

    def look(self, beats: Mapping[int, Mapping[str, Any]], now: float, step_times: list[float]) -> Hang | None:
        """Return whether the job hangs.

        Args:
            beats: by process, the newest `time`, `step` and `doing` of each that has written any.
            now: in Unix seconds.
            step_times: seconds of some recent steps.
        """
        at = {host: (int(beat["step"]), str(beat["doing"])) for host, beat in beats.items()}
        # The slowest process tells how far the job is: the others run ahead of it by a step or two, then wait.
        if not at or at != self._seen or self._moved_at is None:
            self._seen, self._moved_at = at, now
            return None
        still = now - self._moved_at
        timeout = self.timeout(step_times)
        stepping = all(doing == "stepping" for _, doing in at.values())
        if still <= (timeout if stepping else STEPS * timeout):
            return None
        least, most = min(step for step, _ in at.values()), max(step for step, _ in at.values())
        doing = " and ".join(sorted({doing for _, doing in at.values()}))
        what = f"no progress for {still:.0f} s at step {most} ({doing})"
        newest = max(float(beat["time"]) for beat in beats.values())
        silent = [host for host, beat in beats.items() if newest - float(beat["time"]) > SILENT_SECONDS]
        behind = [host for host, (step, _) in at.items() if step < most]
        if silent:
            return Hang(silent[0], f"{what}; process {silent[0]} is stopped, or its machine is")
        if len(behind) == 1:
            return Hang(behind[0], f"{what}; process {behind[0]} is still at step {least}")
        return Hang(None, f"{what}; no process stands out")
