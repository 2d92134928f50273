"""Where the time of training goes, on the host of each process: cheap enough to be measured at every step.

Steps are collective: all processes take equally long for one, whoever holds them up. What tells them apart is what each does
meanwhile: it waits for its data, it waits for its devices (and through them for all other processes), or it works itself, on
dispatching the step and on whatever else its machine does. A host that is starved or slow shows in its own share, while the
others show a larger share of waiting for devices. Where the devices are the host's processor, its own work may be theirs.

A *device* that is slow does not show, since all hosts, its own included, wait for it alike; the preflight, which times the
devices of each process alone, sees that one.
"""

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

STEPPING = ("data", "devices")
"""What a process waits for in a step; the rest of it is its own work."""
APART = ("compile", "checkpoint", "evaluation", "restore")
"""What stands between steps."""
# Summaries of steps come at least so far apart, and in an attempt that lasts they become rarer in proportion: a hundred for
# the first quarter of an hour, another 70 whenever its length has doubled.
WINDOW_SECONDS, WINDOWS = 10.0, 100
BIN = 1.1  # the ratio of neighbouring bins of step times
RECENT_SECONDS = 60.0


class Pace:
    """One process's account of an attempt.

    Attributes:
        spent: seconds so far by what they were spent on, `STEPPING` and `APART`.
        steps: steps so far.
        inside: what time is being spent on at this moment, and since when by the clock.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], None], clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            write: gets a summary of the steps since the one before, for people who compare processes.
            clock: seconds from anywhere.
        """
        self.spent = dict.fromkeys((*STEPPING, *APART), 0.0)
        self.steps = 0
        self.inside: tuple[str, float] | None = None
        self._write, self._clock = write, clock
        self._began = clock()
        self._last: tuple[float, dict[str, float]] | None = None  # the end of the step before
        self._window: tuple[float, dict[str, float]] | None = None
        self._histogram: Counter[int] = Counter()
        self._seconds = self._longest = 0.0

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Counts the time inside as spent on something."""
        begin = self._clock()
        self.inside = (what, begin)
        try:
            yield
        finally:
            self.inside = None  # first: whoever looks meanwhile may miss this time once, but not count it twice
            self.spent[what] += self._clock() - begin

    def step(self, step: int) -> None:
        """Notes the end of a step. The first one, which ends the start of an attempt, is not among those compared."""
        now, spent = self._clock(), dict(self.spent)
        self.steps += 1
        if self._last is None or self._window is None:
            self._last = self._window = (now, spent)
            return
        then, before = self._last
        self._last = (now, spent)
        seconds = now - then - sum(spent[what] - before[what] for what in APART)
        self._histogram[math.floor(math.log(max(seconds, 1e-9), BIN))] += 1
        self._seconds += seconds
        self._longest = max(self._longest, seconds)
        if now - self._window[0] >= max(WINDOW_SECONDS, (now - self._began) / WINDOWS):
            self.summarise(step)

    def summarise(self, step: int) -> None:
        """Writes what there is to say of the steps since the last time, up to `step`: `steps`, their `seconds` and those of
        the `longest`, the seconds of `STEPPING`, and a `histogram` of step times, from n to the number of those between
        `BIN**n` and `BIN**(n + 1)` seconds."""
        if self._last is None or self._window is None or not self._histogram:
            return
        now, spent = self._last
        waited = {what: round(spent[what] - self._window[1][what], 4) for what in STEPPING}
        bins = {str(n): count for n, count in sorted(self._histogram.items())}
        steps = {
            "steps": self._histogram.total(),
            "seconds": round(self._seconds, 4),
            "longest": round(self._longest, 6),
        }
        record = {"time": time.time(), "step": step, **steps, **waited, "histogram": bins}
        self._window = (now, spent)
        self._histogram = Counter()
        self._seconds = self._longest = 0.0
        self._write(record)


class Recent:
    """What a process did in the last minute of its steps; looked at from another thread than the one that trains."""

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.perf_counter):
        self._pace, self._clock = pace, clock
        self._looks: deque[tuple[float, int, dict[str, float]]] = deque()

    def look(self) -> dict[str, float]:
        """The `seconds` since a look about a minute ago, or the first one, the `steps` in them, and what of them was spent on
        what."""
        steps, spent, inside = self._pace.steps, dict(self._pace.spent), self._pace.inside
        now = self._clock()
        if steps == 0:
            self._looks.clear()
        self._looks.append((now, steps, spent))
        while len(self._looks) > 2 and now - self._looks[1][0] >= RECENT_SECONDS:
            self._looks.popleft()
        then, steps_before, before = self._looks[0]
        if inside is not None:
            spent = {**spent, inside[0]: spent[inside[0]] + now - inside[1]}
        parts = {what: round(min(seconds - before[what], now - then), 3) for what, seconds in spent.items()}
        return {"seconds": round(now - then, 3), "steps": steps - steps_before, **parts}
