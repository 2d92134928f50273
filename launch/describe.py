"""What people are told about a run, in lines of text: its progress, its attempts, what it failed of."""

import math
import re
import statistics
import sys
import time
from typing import Any

from launch.logs import last_words
from launch.objects import in_parallel
from launch.outcome import nodes_to_exclude
from launch.plan import Plan
from launch.record import Attempt, RunRecord
from launch.run_dir import RunDir, is_count, last_json_lines, read_json
from launch.stragglers import findings, recent_paces, slow_devices
from launch.text import printable


def last_metrics(run: RunDir) -> dict[str, Any]:
    """Return the newest value of every metric among the last lines; not each line has each of them."""
    newest: dict[str, Any] = {}
    for line in last_json_lines(run.metrics, 20):
        newest |= line
    return newest


def progress_line(run: RunDir, record: RunRecord, plan: Plan) -> str:
    """Return how far a run is, and how fast, as far as its metrics tell."""
    metrics = last_metrics(run)
    step = number(metrics.get("step"), finite=True)
    if step is None:
        return "no step logged yet"
    words = [f"step {step:.0f}"]
    total = number_of_steps(run, plan)
    if total is not None:
        words[0] += f" of {total}"
    if (loss := number(metrics.get("loss"))) is not None:
        words.append(f"loss {loss:.4g}")
    if (speed := number(metrics.get("frames_per_second"))) is not None:
        words.append(f"{speed:,.0f} frames/s")
    found = [number(line.get("step_time"), finite=True) for line in last_json_lines(run.metrics, 20)]
    times = [one for one in found if one is not None and one > 0]
    if record.state == "running" and times:
        words.append(f"{1 / statistics.median(times):.3g} steps/s")
    if record.state == "running" and total is not None and times:
        words.append(f"about {duration((total - step) * statistics.median(times))} to go")
    return ", ".join(words)


def number(value: Any, *, finite: bool = False) -> float | None:
    """Return a number that was logged, None for what is none; with `finite` NaN and infinity are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        logged = float(value)
    except OverflowError:
        return None
    return logged if math.isfinite(logged) or not finite else None


def host_lines(run: RunDir, record: RunRecord) -> list[str]:
    """Return a line for each host that holds up a running job, has a slow device, or waits for its data; nothing where all is
    well."""
    if record.state != "running" or not record.attempts:
        return []
    attempt = record.attempts[-1]
    hosts = range(attempt.processes)
    found = in_parallel(lambda host: run.beat(attempt.number, host), hosts, of=run.root)
    beats = {host: beat for host, beat in zip(hosts, found, strict=True) if beat is not None}
    paces = recent_paces(beats, attempt.nodes)
    late = findings(paces) if 2 * len(paces) > attempt.processes else []  # of a few, nobody can stand out
    return [*late, *(slow_devices(run.events(), attempt) if attempt.processes > 1 else [])]


def number_of_steps(run: RunDir, plan: Plan) -> int | None:
    """Return at which step the job finishes: the last `--num_steps` among its arguments, cut by `--stop_at_step`; where none
    was typed, as the job itself has noted. None when neither says it."""
    text = "\0".join(plan.arguments).replace("=", "\0")
    total, stop = (
        next((int(n) for n in reversed(re.findall(rf"(?:^|\0)--{name}\0(\d{{1,15}})(?=\0|$)", text))), None)
        for name in ("num[_-]steps", "stop[_-]at[_-]step")
    )
    if total is None:  # looked up only then: in a bucket it is another request
        noted = (read_json(run.config) or {}).get("config")
        options = noted if isinstance(noted, dict) else {}
        total = steps if is_count(steps := options.get("num_steps")) else None
        stop = steps if stop is None and is_count(steps := options.get("stop_at_step")) else stop
    return min((number for number in (total, stop) if number), default=None)  # 0 means none


def attempt_line(attempt: Attempt, *, otherwise: str) -> str:
    """Describe an attempt; `otherwise` stands for an outcome that was not written down."""
    shape = f"{attempt.processes}×{attempt.devices or attempt.devices_per_process}"
    ended = attempt.ended if attempt.ended is not None else time.time()
    exits = sorted(attempt.exits, key=lambda one: one.host)
    codes = " ".join(f"host-{one.host}:{one.signal or one.code}" for one in exits)
    failed = (
        f", host-{attempt.first_failed} first" if attempt.first_failed is not None and attempt.processes > 1 else ""
    )
    outcome = attempt.outcome or otherwise
    lasted = duration(ended - attempt.started)
    cause = f" ({attempt.cause})" if attempt.cause else ""
    return f"attempt {attempt.number:<2} {shape} {outcome}{failed}{cause} after {lasted}  {codes}".rstrip()


def duration(seconds: float) -> str:
    """Return a time for people, to about two digits."""
    whole = max(0, round(seconds)) if math.isfinite(seconds) else 0
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * length:
            return f"{whole // length} {unit}"
    return f"{whole} s"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table: with colours on a terminal, as plain aligned lines elsewhere."""
    rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*map(Text, row))  # a bare text would be read as markup
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def blamed(record: RunRecord) -> str:
    """Return a sentence about nodes at which attempts failed, `""` when there are none."""
    nodes = {blame.node: blame for blame in record.blames}
    counts = {node: sum(blame.node == node for blame in record.blames) for node in nodes}
    told = [f"{node} ({counts[node]}×, last: {blame.reason})" for node, blame in nodes.items()]
    settings = record.submissions[-1].plan.settings if record.submissions else {}
    hours = number(settings.get("exclude_hours"), finite=True) or 0.0
    excluded = nodes_to_exclude(record.blames, time.time(), hours)
    note = f"; left out of the next attempts, for {hours:g} h: {', '.join(excluded)}" if excluded else ""
    return f" Attempts failed at {', '.join(told)}{note}." if told else ""


def failure(run: RunDir, record: RunRecord) -> str:
    """Return a sentence on the process that failed first."""
    attempt = next((a for a in reversed(record.attempts) if a.first_failed is not None), None)
    if attempt is None:
        return "It has failed"
    node = next((one.node for one in attempt.exits if one.host == attempt.first_failed), None)
    place = f" on {node}" if node else ""
    first = next((one for one in attempt.exits if one.host == attempt.first_failed), None)
    if first is None:  # it hung, and its worker did not live to write how it ended
        return f"In attempt {attempt.number}, host {attempt.first_failed} of {attempt.processes}{place} failed first"
    how = f"died of {first.signal}" if first.signal else f"exited with code {first.code}"
    log = run.log(attempt.number, first.host)
    said = last_words(log)
    words = f"its last words are: {said}" if said else "it printed nothing"
    where = f"In attempt {attempt.number}, host {first.host} of {attempt.processes}{place}"
    return f"{where} failed first: it {how}; {words} (all of them: {log})"
