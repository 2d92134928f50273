"""Finds out that a job hangs, and at which process, from the beats that all of its processes write.

jax's heartbeats see a process that is gone. One that is alive but stuck holds up all the others in a collective, and no
error comes. Nothing but steps counts as progress while a job is stepping; what takes long by nature (joining, compiling,
fetching data, saving, evaluating) has ten times as long. The clocks of two machines are not compared: a process is silent
when what it writes stays the same.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

LEAST_SECONDS = 120.0
STEPS = 10
# A process whose heart beats once a second is stopped, or its machine is, when it has been silent for this long.
SILENT_SECONDS = 10.0
# By then a process that was stopped in the midst of the last step is known to be silent.
TELLING_SECONDS = 15.0
# Who has not been able to look for so long does not know what others did meanwhile, and may be the first to see a bucket that
# was away for all of them.
UNWATCHED_SECONDS = 30.0
_UNHEARD = {"step": 0, "doing": "starting"}


@dataclass(frozen=True)
class Hang:
    """A job without progress; `host` is the process that holds it up, None where none stands out."""

    host: int | None
    reason: str


class Silence:
    """For how long a sign of life has stayed the same, as far as one was there to see it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sign: object = None
        self._since = self._looked_at = clock()

    def seconds(self, sign: object, pause: float = 0.0) -> float:
        """Return for how many seconds the sign has been what it is now.

        Args:
            sign: what is seen now, None as long as there is nothing.
            pause: seconds that two looks may lie apart by nature.
        """
        now = self._clock()
        if sign != self._sign or now - self._looked_at > UNWATCHED_SECONDS + pause:
            self._sign, self._since = sign, now
        self._looked_at = now
        return now - self._since


class Watchdog:
    """Compares the beats of one attempt's processes with those it saw before. Times are the caller's: it reads no clock."""

    def __init__(self, timeout: float | Literal["auto"], *, tells: bool = False) -> None:
        """
        Args:
            timeout: seconds without a step, or `auto`.
            tells: whether the job's processes are known to write beats: then one that has not written any is starting. Other
                programs are left alone until they do.
        """
        self._chosen, self._tells = timeout, tells
        self.looked_at = 0.0  # the caller's to set
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all beats seen so far."""
        self._seen: dict[int, tuple[int, str]] = {}
        self._moved_at: float | None = None
        self._beats: dict[int, tuple[Mapping[str, Any], float]] = {}  # the last one of each, and when it was first seen

    def timeout(self, step_times: list[float]) -> float:
        """Return the seconds without a step after which a job hangs."""
        if self._chosen != "auto":
            return float(self._chosen)
        return max(LEAST_SECONDS, STEPS * statistics.median(step_times) if step_times else 0.0)

    def look(
        self, beats: Mapping[int, Mapping[str, Any]], now: float, step_times: list[float], hosts: Iterable[int] = ()
    ) -> Hang | None:
        """Return whether the job hangs.

        Args:
            beats: by process, the newest `time`, `step` and `doing` of each that has written any.
            now: in seconds by the caller's clock, which is not set meanwhile.
            step_times: seconds of some recent steps.
            hosts: all processes that have not ended.
        """
        if self._tells:
            beats = {**dict.fromkeys(hosts, _UNHEARD), **beats}
        for host, beat in beats.items():
            if host not in self._beats or self._beats[host][0] != beat:
                self._beats[host] = (beat, now)
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
        newest = max(self._beats[host][1] for host in beats)
        silent = [host for host in beats if newest - self._beats[host][1] > SILENT_SECONDS]
        behind = [host for host, (step, _) in at.items() if step < most]
        if silent:
            return Hang(silent[0], f"{what}; process {silent[0]} is stopped, or its machine is")
        if len(behind) == 1:
            return Hang(behind[0], f"{what}; process {behind[0]} is still at step {least}")
        if still <= TELLING_SECONDS:
            return None  # a short timeout: one of them may turn out to be silent
        return Hang(None, f"{what}; no process stands out")
