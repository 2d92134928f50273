"""Names the processes that hold up the others, and those that wait for their data, from what each says about its own time.

Steps are collective, so one process that is late makes all of them late, and a step takes equally long everywhere. Who it is
shows in what each does meanwhile (`jasmine.training.pace`): a process that waits for data, or is busy itself, for a larger
share of its time than the others is the one that they wait for. A device that is slow is not seen this way, as its own host
waits for it like all the others; the preflight times every process's device alone (`slow_devices`).
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.objects import in_parallel
from launch.record import Attempt
from launch.run_dir import RunDir, is_count, is_number, read_json_lines

# Of histograms of step times: the ratio of neighbouring bins, and how many there can be on each side of a second.
BIN, MOST_BINS = 1.1, 300
# What in a beat is no part of steps.
APART = ("compile", "checkpoint", "evaluation", "restore")
# A share of its time by which a process has to stand out, how much of each step that has to be, and over how long.
LEAST_SHARE, LEAST_STEP_SECONDS, LEAST_SECONDS = 0.1, 0.005, 5.0
# How much longer than usual the same arithmetic has to take.
SLOW_DEVICE = 1.5
SHOWN = 3
# A beat that is so much older than the newest one is that of a process which is gone or stuck: the watchdog's business.
STALE_SECONDS = 30.0


@dataclass(frozen=True)
class Pace:
    """What one process did in some steps.

    Attributes:
        host: its number, and `node` its machine where that is known.
        steps: how many, in `seconds`, without saves and evaluations.
        data, devices: seconds of these in which it waited for data, and for its devices and thereby for the others.
        histogram: how many steps took between `BIN**n` and `BIN**(n + 1)` seconds, by n; empty where that is not known.
        longest: the seconds of the longest step.
    """

    host: int
    node: str | None
    steps: int
    seconds: float
    data: float
    devices: float
    histogram: Mapping[int, int] = field(default_factory=dict)
    longest: float = 0.0

    @property
    def name(self) -> str:
        """What people call it."""
        return _name(self.host, self.node)

    @property
    def waits(self) -> float:
        """The share of its time in which it waits for data."""
        return min(1.0, self.data / self.seconds)

    @property
    def idles(self) -> float:
        """The share of its time in which it waits for its devices, and thereby for the others."""
        return min(1.0 - self.waits, self.devices / self.seconds)

    @property
    def works(self) -> float:
        """The share of its time in which it waits for nothing."""
        return max(0.0, 1 - self.waits - self.idles)

    def quantile(self, q: float) -> float:
        """Return a quantile of its step times in seconds, to within a bin of the histogram."""
        left = q * sum(self.histogram.values())
        for n, count in sorted(self.histogram.items()):
            left -= count
            if left <= 0:
                return min(BIN ** (n + 0.5), self.longest)
        return self.longest


def recent_paces(beats: Mapping[int, Mapping[str, Any]], nodes: Sequence[str]) -> list[Pace]:
    """Return what processes did in the last minute, by their beats; those that have not said yet are left out."""
    newest = max((_number(beat, "time") for beat in beats.values()), default=0.0)
    paces = []
    for host, beat in sorted(beats.items()):
        recent = beat.get("recent")
        if not isinstance(recent, dict) or newest - _number(beat, "time") > STALE_SECONDS:
            continue
        if beat.get("doing") not in ("stepping", "fetching data"):
            continue  # how long it has been at that is not told yet
        seconds = _number(recent, "seconds") - sum(_number(recent, it) for it in APART)
        steps = int(_number(recent, "steps"))
        if steps > 0 and seconds >= LEAST_SECONDS:
            waited = _number(recent, "data"), _number(recent, "devices")
            paces.append(Pace(host, _node(nodes, host), steps, seconds, *waited))
    return paces


def attempt_paces(run: RunDir, attempt: Attempt) -> list[Pace]:
    """Return what the processes of an attempt did in all of its steps, by the summaries that they have left."""
    directory = run.attempt(attempt.number)
    hosts = range(attempt.processes)
    found = in_parallel(lambda host: read_json_lines(directory / f"host-{host}.steps.jsonl"), hosts, of=run.root)
    return [
        Pace(
            host,
            _node(attempt.nodes, host),
            int(sum(_number(line, "steps") for line in lines)),
            math.fsum(_number(line, "seconds") for line in lines),
            math.fsum(_number(line, "data") for line in lines),
            math.fsum(_number(line, "devices") for line in lines),
            _histogram(lines),
            max(_number(line, "longest") for line in lines),
        )
        for host, lines in zip(hosts, found, strict=True)
        if sum(_number(line, "steps") for line in lines) > 0 and sum(_number(line, "seconds") for line in lines) > 0
    ]


def findings(paces: Sequence[Pace]) -> list[str]:
    """Return a line for each process that stands out, or for all if all of them starve; nothing where all is well."""
    said = []
    for pace in paces:
        others = [other for other in paces if other is not pace]
        least = LEAST_STEP_SECONDS * pace.steps / pace.seconds
        waits = statistics.median(other.waits for other in others) if others else pace.waits
        works = statistics.median(other.works for other in others) if others else pace.works
        idles = statistics.median(other.idles for other in others) if others else pace.idles
        if pace.waits - waits >= max(LEAST_SHARE, least):
            said.append(
                (pace.waits - waits, f"{pace.name} waits for data {pace.waits:.0%} of its time; others {waits:.0%}")
            )
        elif min(pace.works - works, idles - pace.idles) >= max(LEAST_SHARE, least):
            text = f"{pace.name} is slow: busy itself {pace.works:.0%} of its time; others {works:.0%}, and wait for it"
            said.append((pace.works - works, text))
    said.sort(key=lambda one: -one[0])
    lines = [text for _, text in said[:SHOWN]]
    if len(said) > SHOWN:
        lines.append(f"and {len(said) - SHOWN} more hosts like these")
    usual = statistics.median(pace.waits for pace in paces) if paces else 0.0
    if usual >= LEAST_SHARE and not lines:
        who = f"all {len(paces)} hosts wait" if len(paces) > 1 else f"{paces[0].name} waits"
        lines.append(f"{who} for data {usual:.0%} of the time")
    return lines


def slow_devices(events: Sequence[Mapping[str, Any]], attempt: Attempt) -> list[str]:
    """Return a line for each process whose device took longer than most for the same arithmetic in an attempt's preflight."""
    passed = next((e for e in events if e.get("event") == "preflight" and e.get("attempt") == attempt.number), {})
    compute = passed.get("compute_seconds")
    times = [float(one) if is_number(one) else 0.0 for one in compute] if isinstance(compute, list) else []
    usual = statistics.median(times) if len(times) > 1 else 0.0
    return [
        f"{_name(host, _node(attempt.nodes, host))} computes {seconds / usual:.1f} times slower than most"
        for host, seconds in enumerate(times)
        if usual > 0 and seconds >= SLOW_DEVICE * usual
    ]


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    return float(value) if is_number(value) else 0.0


def _name(host: int, node: str | None) -> str:
    return f"host {host}" + (f" ({node})" if node else "")


def _node(nodes: Sequence[str], host: int) -> str | None:
    return nodes[host] if host < len(nodes) else None


def _histogram(lines: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for line in lines:
        bins = line.get("histogram")
        for n, count in bins.items() if isinstance(bins, dict) else ():
            if n.removeprefix("-").isdecimal() and abs(int(n)) <= MOST_BINS and is_count(count):
                total[int(n)] += count
    return dict(total)
