"""What there is to tell about a run, live or over, gathered from its directory: for `jobs.py report`.

A run may be empty, or have a million steps and a hundred attempts, so what is read and kept is bounded: lines of metrics are
thinned out beyond `MOST_LINES`, and figures of single processes are read for the newest attempts only. What the run has
written is taken as it is found: files that are missing, torn or strange leave a part of the report empty.
"""

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.describe import progress_line
from launch.goodput import BUCKETS, Account, Sign, account
from launch.objects import in_parallel, is_object
from launch.record import ACTIVE, Attempt, RunRecord
from launch.run_dir import RunDir, is_count, is_number
from launch.standing import Standing
from launch.stragglers import Pace, attempt_paces, findings, slow_devices

# Lines of metrics that are looked at, besides those of evaluations.
MOST_LINES = 20_000
# Attempts whose processes are looked at one by one.
ATTEMPTS_IN_DETAIL = 8
MOST_PICTURES, MOST_PICTURE_BYTES = 6, 1_500_000
MOST_TIME = 1e11  # in Unix seconds: what clocks can show
PICTURE_TYPES = {".png": "image/png", ".gif": "image/gif"}
FAULTS = ("failed", "preempted", "hang", "vm_lost", "preflight_failed", "nonfinite")


@dataclass(frozen=True)
class Curve:
    """Losses by step.

    Attributes:
        kept: step and loss, of each step that of the newest attempt which made it; ascending.
        lost: likewise, of steps that were made again.
        validation: step and loss of evaluations.
        not_finite: steps whose loss is NaN or infinite.
        thinned: of how many logged steps one is looked at.
    """

    kept: Sequence[tuple[int, float]] = ()
    lost: Sequence[tuple[int, float]] = ()
    validation: Sequence[tuple[int, float]] = ()
    not_finite: Sequence[int] = ()
    thinned: int = 1


@dataclass(frozen=True)
class AttemptView:
    """One attempt for people; `lost_steps` were made again later, `begun` and `at` are steps, None where none is known."""

    attempt: Attempt
    cluster: str
    topology: str
    outcome: str
    cause: str
    begun: int | None
    at: int | None
    lost_steps: int


@dataclass(frozen=True)
class Fault:
    """What went wrong, when (Unix seconds), in which attempt; one line."""

    time: float
    attempt: int
    text: str


@dataclass(frozen=True)
class Picture:
    """An encoded picture of type `mime`."""

    caption: str
    mime: str
    data: bytes


@dataclass(frozen=True)
class Report:
    """What is told about a run.

    Attributes:
        now: when it was gathered, in Unix seconds.
        progress: one line.
        queued: seconds between the first submission and the first start; None before that.
        hosts: what the processes of attempt `hosts_of` did in their steps; none where they have not said.
        findings: a line for each host that stands out, with its attempt.
        notes: what a reader must know besides.
    """

    record: RunRecord
    cluster: str
    command: str
    now: float
    progress: str
    account: Account
    queued: float | None
    attempts: Sequence[AttemptView]
    faults: Sequence[Fault]
    curve: Curve
    hosts: Sequence[Pace]
    hosts_of: int
    findings: Sequence[str]
    pictures: Sequence[Picture]
    notes: Sequence[str]


def gather(run: RunDir, standing: Standing) -> Report:
    """Return what there is to tell about a run."""
    record, now = standing.record, time.time()
    plan = record.submissions[-1].plan if record.submissions else None
    events = run.events()
    numbers = [one.number for one in record.attempts]
    detailed = record.attempts[-ATTEMPTS_IN_DETAIL:]
    paces = {one.number: attempt_paces(run, one) for one in detailed}
    metrics = _read_metrics(run)
    signs = _signs(run, numbers, [*metrics.lost, *metrics.kept])
    live = standing.live and record.state in ACTIVE
    went = account(
        record.attempts,
        events,
        signs,
        now=now if live else None,
        waiting=live and record.state == "submitted",
        starved={number: _waits_longer(found) for number, found in paces.items()},
    )
    shown = next((number for number in reversed(numbers) if paces.get(number)), 0)
    said = [
        f"attempt {one.number}: {line}"
        for one in detailed
        for line in [*findings(paces[one.number]), *slow_devices(events, one)]
    ]
    pictures, left_out = _pictures(run)
    submitted = next((e["time"] for e in events if e.get("event") == "submitted" and is_number(e.get("time"))), None)
    started = record.attempts[0].started if record.attempts else None
    return Report(
        record=record,
        cluster=plan.cluster if plan else "-",
        command=f"{record.job} {' '.join(plan.arguments)}".rstrip() if plan else record.job,
        now=now,
        progress=progress_line(run, record, plan) if plan else "never submitted",
        account=went,
        queued=max(0.0, started - submitted) if started is not None and submitted is not None else None,
        attempts=[_view(one, record, events, signs, went, live=live) for one in record.attempts],
        faults=_faults(events, record, live=live),
        curve=_curve(metrics),
        hosts=paces.get(shown, []),
        hosts_of=shown,
        findings=said,
        pictures=pictures,
        notes=[*_notes(went, standing, metrics.thinned, len(numbers)), *left_out],
    )


def summary(report: Report) -> list[str]:
    """Return the report for a terminal, line by line."""
    record, went = report.record, report.account
    attempts = f"{len(record.attempts)} attempt{'s' * (len(record.attempts) != 1)}"
    lines = [f"{record.name}: {record.state}, {report.progress}; {precise(went.wall)} in {attempts}"]
    if went.goodput is None:
        return [*lines, "  no attempt has started: there is nothing to account for"]
    lines.append(f"  goodput          {went.goodput:.1%} of the time went into steps that count")
    seconds = went.seconds()
    for bucket in BUCKETS.values():
        if seconds[bucket.key] >= 0.05:
            share = seconds[bucket.key] / went.wall
            meaning = f"{bucket.meaning} [{bucket.other_name}]"
            lines.append(f"  {bucket.label:<16} {share:>6.1%}  {precise(seconds[bucket.key]):>12}  {meaning}")
    if lost := sum(went.lost_steps.values()):
        lines.append(f"  lost             {lost} steps, made again or not saved, in {len(went.lost_steps)} attempts")
    lines += [f"  fault            attempt {fault.attempt}: {fault.text}" for fault in report.faults[-5:]]
    if len(report.faults) > 5:
        lines.append(f"  faults           {len(report.faults) - 5} more before these")
    lines += [f"  hosts            {line}" for line in report.findings]
    return lines


def precise(seconds: float) -> str:
    """Return a time for people, to about three digits."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 200 * 3600 else f"{seconds / 86400:.1f} d"


# --- metrics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metrics:
    """Lines of metrics: those of steps that count, of steps that were taken back, and how many there are for each here."""

    kept: Sequence[Mapping[str, Any]]
    lost: Sequence[Mapping[str, Any]]
    thinned: int


def _read_metrics(run: RunDir) -> _Metrics:
    texts = []
    for name in ("metrics.jsonl", "metrics.superseded.jsonl"):
        text = b""
        with contextlib.suppress(OSError):
            text = (run.root / name).read_bytes()
        texts.append(text.split(b"\n"))
    every = max(1, math.ceil(sum(map(len, texts)) / MOST_LINES))
    kept, lost = (_some_lines(text, every) for text in texts)
    return _Metrics(kept, lost, every)


def _some_lines(text: Sequence[bytes], every: int) -> list[dict[str, Any]]:
    """Return one in so many lines, the last ones, and those of evaluations."""
    validated = [number for number, line in enumerate(text) if b'"val_loss"' in line]
    chosen = {*range(0, len(text), every), *range(max(0, len(text) - 3), len(text))}
    chosen |= set(validated[:: max(1, math.ceil(len(validated) / MOST_LINES))])
    found = []
    for number in sorted(chosen):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text[number])
            if isinstance(value, dict) and is_count(value.get("step")):
                found.append(value)
    return found


def _curve(metrics: _Metrics) -> Curve:
    newest: dict[int, Mapping[str, Any]] = {}
    for line in sorted(metrics.kept, key=_attempt):
        newest[line["step"]] = line
    kept = sorted(newest.items())
    return Curve(
        kept=[(step, float(line["loss"])) for step, line in kept if is_number(line.get("loss"))],
        lost=sorted((line["step"], float(line["loss"])) for line in metrics.lost if is_number(line.get("loss"))),
        validation=[(step, float(line["val_loss"])) for step, line in kept if is_number(line.get("val_loss"))],
        not_finite=[
            step for step, line in kept if isinstance(line.get("loss"), float) and not math.isfinite(line["loss"])
        ],
        thinned=metrics.thinned,
    )


def _signs(run: RunDir, numbers: Sequence[int], lines: Sequence[Mapping[str, Any]]) -> dict[int, list[Sign]]:
    """Return what was heard last of each attempt, besides events."""
    signs: dict[int, list[Sign]] = {number: [] for number in numbers}
    dated = [line for line in lines if is_number(line.get("time"))]
    newest = {_attempt(line): line for line in sorted(dated, key=lambda line: line["time"])}
    for number, line in newest.items():
        if number in signs:
            signs[number].append(Sign(float(line["time"]), line["step"]))
    for number, beat in zip(
        numbers, in_parallel(lambda number: run.beat(number, 0), numbers, of=run.root), strict=True
    ):
        if beat is not None and is_number(beat.get("time")) and is_count(beat.get("step")):
            spent = beat.get("spent")
            known = {what: float(s) for what, s in spent.items() if is_number(s)} if isinstance(spent, dict) else None
            signs[number].append(Sign(float(beat["time"]), beat["step"], str(beat.get("doing")), known))
    return signs


# --- attempts ---------------------------------------------------------------------------------------------------


def _view(
    attempt: Attempt,
    record: RunRecord,
    events: Sequence[Mapping[str, Any]],
    signs: Mapping[int, Sequence[Sign]],
    went: Account,
    *,
    live: bool,
) -> AttemptView:
    mine = [event for event in events if event.get("attempt") == attempt.number]
    begin = next((event for event in mine if event.get("event") in ("started", "resumed")), {})
    seen = next((event for event in mine if event.get("event") == "init"), {})
    plans = [one.plan for one in record.submissions if one.plan.first_attempt <= attempt.number]
    running = live and record.state == "running" and attempt is record.attempts[-1]
    steps = [event["step"] for event in mine if "spent" in event and is_count(event.get("step"))]
    steps += [sign.step for sign in signs.get(attempt.number, ())]
    causes = [event.get("cause") for event in mine if event.get("event") in ("failed", "preempted", "hang")]
    return AttemptView(
        attempt,
        plans[-1].cluster if plans else "-",
        _topology(attempt, begin, seen),
        attempt.outcome or ("running" if running else "lost"),
        attempt.cause or next((str(cause) for cause in causes if cause), ""),
        begin["step"] if is_count(begin.get("step")) else None,
        max(steps, default=None),
        went.lost_steps.get(attempt.number, 0),
    )


def _topology(attempt: Attempt, begin: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    """Return processes, devices and mesh, as far as they are known."""
    devices = begin.get("devices", seen.get("devices"))
    kind = seen.get("device_kind")
    if is_count(devices):
        each = devices // attempt.processes if attempt.processes else devices
        text = f"{attempt.processes}×{each}{f' {kind}' if isinstance(kind, str) else ''}"
    else:
        text = f"{attempt.processes}×{attempt.devices or attempt.devices_per_process}"
    mesh = begin.get("mesh")
    if isinstance(mesh, dict) and (axes := [f"{axis} {size}" for axis, size in mesh.items() if size != 1]):
        text += f", {' × '.join(axes)}"
    return text


def _faults(events: Sequence[Mapping[str, Any]], record: RunRecord, *, live: bool) -> list[Fault]:
    found = []
    told = set()
    failed = [event.get("attempt") for event in events if event.get("event") == "failed"]
    for event in events:
        name, when, number = event.get("event"), event.get("time"), event.get("attempt")
        if name not in FAULTS or not is_number(when) or not is_count(number):
            continue
        if not 0 <= when < MOST_TIME or (name == "hang" and number in failed):
            continue  # a hang's failure says where it was, too
        text = event.get("cause") or event.get("reason") or ("VMs are gone" if name == "vm_lost" else name)
        if name == "preempted" and event.get("cause"):
            text = f"preempted: {text}"
        if name == "nonfinite":
            text = f"{text}: {event.get('action')}"
        if (number, text) not in told:
            told.add((number, text))
            found.append(Fault(float(when), number, str(text)))
    for attempt in record.attempts:
        if attempt.outcome is None and not (live and attempt is record.attempts[-1]):
            found.append(Fault(attempt.ended or attempt.started, attempt.number, "lost: nobody saw it end"))
    return sorted(found, key=lambda fault: fault.time)


def _waits_longer(paces: Sequence[Pace]) -> float:
    """Return for how many seconds longer than the first process another one waited for data."""
    first = next((pace.data for pace in paces if pace.host == 0), None)
    return max((pace.data for pace in paces), default=0.0) - first if first is not None else 0.0


# --- the rest ---------------------------------------------------------------------------------------------------


def _pictures(run: RunDir) -> tuple[list[Picture], list[str]]:
    """Return the newest pictures that evaluations and samplers have left, and a note about those that are too large."""
    newest: dict[str, tuple[int, Path]] = {}
    media = run.root / "media"
    for path in media.iterdir() if media.is_dir() else []:
        name, _, step = path.stem.rpartition("_")
        if path.suffix in PICTURE_TYPES and step.isdecimal() and int(step) >= newest.get(name, (-1, path))[0]:
            newest[name] = (int(step), path)
    samples = run.root / "samples"
    steps = [int(path.name) for path in samples.iterdir() if path.name.isdecimal()] if samples.is_dir() else []
    if steps and (sample := samples / str(max(steps)) / "sample.gif").is_file():
        newest["sample"] = (max(steps), sample)
    pictures, notes = [], []
    for name, (made_at, path) in sorted(newest.items())[:MOST_PICTURES]:
        with contextlib.suppress(OSError):
            size = path.size() if is_object(path) else path.stat().st_size
            if size > MOST_PICTURE_BYTES:
                notes.append(f"The picture {path} is too large for this page.")
            else:
                pictures.append(Picture(f"{name}, step {made_at:,}", PICTURE_TYPES[path.suffix], path.read_bytes()))
    return pictures, notes


def _notes(went: Account, standing: Standing, thinned: int, attempts: int) -> list[str]:
    notes = []
    if went.apart > 0:
        notes.append(
            f"Between its submissions, {precise(went.apart)} are not counted: the run had ended, as it was to."
        )
    if thinned > 1:
        notes.append(f"The curve is drawn from one in {thinned} logged steps.")
    if attempts > ATTEMPTS_IN_DETAIL:
        notes.append(f"Processes were looked at in the newest {ATTEMPTS_IN_DETAIL} attempts only.")
    if standing.seen.detail:
        notes.append(f"{standing.seen.detail[0].upper()}{standing.seen.detail[1:]}.")
    return notes


def _attempt(line: Mapping[str, Any]) -> int:
    number = line.get("attempt")
    return number if is_count(number) else 0
