"""Where a run's time went: each moment of its wall time is in one bucket, so the buckets add up to it.

The wall time goes from the start of the first attempt to the end of the last one. What does not belong to it is the time in
which nobody wanted the run to go on: after it had finished or was cancelled, until somebody submitted it again. Goodput is
the share of the wall time that went into steps which still count.

Everything follows from the events (`launch.events`) and the last signs of life of attempts that ended without a word. Events
with `spent` are marks: they say at which step the job was, and for how long it has stood still for what so far. Between two
marks the times of that are known, and the rest is steps. Steps after the one that a later attempt goes on from were done
for nothing. Clocks of several machines may disagree: an attempt's events are taken to lie within it, in order.

The names under which `ml-goodput-measurement` keeps such times stand beside ours, for those who compare.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.record import Attempt
from launch.run_dir import is_count, is_number


@dataclass(frozen=True)
class Bucket:
    """One use of time: its key, its label for people, its name in `ml-goodput-measurement`, and what it is."""

    key: str
    label: str
    other_name: str
    meaning: str


BUCKETS = {
    bucket.key: bucket
    for bucket in (
        Bucket("steps", "steps", "GOODPUT", "training steps that still count"),
        Bucket("init", "init", "TPU_INITIALIZATION", "until all processes have started, met and seen their devices"),
        Bucket("prep", "preparation", "TRAINING_PREP", "checks of the machines, data and model before training"),
        Bucket("restore", "restore", "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME", "reading the checkpoint"),
        Bucket("compile", "compile", "PROGRAM_STARTUP", "compiling the step, and the first step of an attempt"),
        Bucket("data", "data wait", "DATA_LOADING_SYNC", "waiting for data, on the host that waits longest"),
        Bucket("checkpoint", "checkpoint", "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME", "standing still for a save"),
        Bucket("evaluation", "evaluation", "CUSTOM_BADPUT_EVENTS", "evaluations"),
        Bucket("wasted", "wasted progress", "WASTED_PROGRESS_FROM_DISRUPTION", "steps lost, as they were not saved"),
        Bucket("down", "down time", "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION", "from the last sign of life to a new start"),
        Bucket("other", "other", "OTHER", "the end of processes, and jobs that do not say what they do"),
    )
}  # fmt: skip

# What is not told yet of a process that was last heard of in the middle of it.
_DOING = {"saving": "checkpoint", "evaluating": "evaluation", "restoring": "restore"}
# What a mark tells the seconds of.
_TOLD = ("data", "compile", "evaluation", "checkpoint", "restore")


@dataclass(frozen=True)
class Sign:
    """The last that was heard of an attempt which is not an event: a line of metrics, a beat of its first process."""

    time: float
    step: int
    doing: str = "stepping"
    spent: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Span:
    """A time of one use, in Unix seconds; `attempt` is None between attempts."""

    start: float
    end: float
    bucket: str
    attempt: int | None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


@dataclass(frozen=True)
class Account:
    """All of a run's wall time.

    Attributes:
        spans: without overlaps, in order of time.
        apart: seconds between attempts in which nobody wanted the run to go on.
        lost_steps: by attempt, how many of its steps were done for nothing.
    """

    spans: tuple[Span, ...]
    apart: float
    lost_steps: Mapping[int, int]

    @property
    def wall(self) -> float:
        """The wall time in seconds."""
        return math.fsum(span.seconds for span in self.spans)

    def seconds(self) -> dict[str, float]:
        """The seconds of every bucket; their sum is the wall time."""
        return {key: math.fsum(span.seconds for span in self.spans if span.bucket == key) for key in BUCKETS}

    @property
    def goodput(self) -> float | None:
        """The share of steps that count; None where no time has passed."""
        return self.seconds()["steps"] / self.wall if self.wall > 0 else None


def account(
    attempts: Sequence[Attempt],
    events: Iterable[Mapping[str, Any]],
    signs: Mapping[int, Sequence[Sign]],
    *,
    now: float | None,
    waiting: bool = False,
    starved: Mapping[int, float] | None = None,
) -> Account:
    """Return where the time of a run went.

    Args:
        attempts: as the record has them.
        events: of any kind and in any order; those without a time, a name and an attempt are passed over.
        signs: by attempt, what was heard of it besides.
        now: the moment, in Unix seconds, if anything of the run lives; None if nothing does.
        waiting: whether it waits for its next attempt.
        starved: by attempt, for how many seconds longer another process than the first waited for data.
    """
    told = sorted(filter(_is_told, events), key=lambda event: event["time"])
    by_attempt: dict[int, list[Mapping[str, Any]]] = {one.number: [] for one in attempts}
    for event in told:
        if event["attempt"] in by_attempt:
            by_attempt[event["attempt"]].append(event)
    begins = {number: _begin(events_of) for number, events_of in by_attempt.items()}
    newest = _newest_checkpoint(told)
    speaks = any("process" in event for event in told)
    spans: list[Span] = []
    lost: dict[int, int] = {}
    apart = 0.0
    end = -math.inf
    for index, one in enumerate(attempts):
        mine, heard = by_attempt[one.number], sorted(signs.get(one.number, ()), key=lambda sign: sign.time)
        last = index == len(attempts) - 1
        start = max(end, one.started)
        if spans and start > end:
            if _ended_by_intent(by_attempt[attempts[index - 1].number]):
                apart += start - end
            else:
                spans.append(Span(end, start, "down", None))
        live = last and now is not None and one.ended is None
        if one.ended is not None:
            end = one.ended
        elif live and now is not None:
            end = now
        else:
            end = max([start, *(event["time"] for event in mine), *(sign.time for sign in heard)])
        if not last:
            end = min(end, max(start, attempts[index + 1].started))
        end = max(start, end)
        later = [begin["step"] for other in attempts[index + 1 :] if (begin := begins[other.number]) is not None]
        whole = live or any(event["event"] in ("finished", "saved") and "process" in event for event in mine)
        kept = min(later) if later else math.inf if whole else newest
        found, lost_steps = _attempt_spans(
            one.number, start, end, mine, heard, kept=kept, over=not live, whole=whole, speaks=speaks or live
        )
        spans += _with_data_wait(found, (starved or {}).get(one.number, 0.0))
        if lost_steps:
            lost[one.number] = lost_steps
    if waiting and now is not None and spans and now > end:
        spans.append(Span(end, now, "down", None))
    return Account(tuple(span for span in spans if span.end > span.start), apart, lost)


def _is_told(event: Mapping[str, Any]) -> bool:
    return is_number(event.get("time")) and isinstance(event.get("event"), str) and is_count(event.get("attempt"))


def _step(event: Mapping[str, Any]) -> int | None:
    step = event.get("step")
    return step if is_count(step) else None


def _back_from(event: Mapping[str, Any]) -> int | None:
    step = event.get("back_from") if event["event"] == "rolled_back" else None
    return step if is_count(step) else None


def _seconds(value: Any) -> float:
    return max(0.0, float(value)) if is_number(value) else 0.0


def _begin(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the event with which training began in an attempt."""
    return next((e for e in events if e["event"] in ("started", "resumed") and _step(e) is not None), None)


def _newest_checkpoint(events: Sequence[Mapping[str, Any]]) -> float:
    kinds = ("checkpoint_committed", "saved")
    if not any(event["event"] in kinds for event in events):
        kinds = ("checkpoint", "saved")
    return max((step for event in events if event["event"] in kinds and (step := _step(event)) is not None), default=0)


def _ended_by_intent(events: Iterable[Mapping[str, Any]]) -> bool:
    return any(event["event"] in ("finished", "cancelled") and "state" in event for event in events)


@dataclass(frozen=True)
class _Mark:
    time: float
    step: int
    spent: Mapping[str, float] | None
    doing: str = "stepping"
    back_from: int | None = None


class _Line:
    """The time of one attempt, which is filled with spans from its start to its end."""

    def __init__(self, attempt: int, start: float, end: float) -> None:
        self.attempt, self.at, self.end = attempt, start, end
        self.spans: list[Span] = []

    def take(self, until: float, bucket: str) -> None:
        """Give what is left until a moment to a bucket; a moment that has passed takes nothing."""
        until = min(max(until, self.at), self.end)
        self.spans.append(Span(self.at, until, bucket, self.attempt))
        self.at = until


def _attempt_spans(
    number: int,
    start: float,
    end: float,
    events: Sequence[Mapping[str, Any]],
    signs: Sequence[Sign],
    *,
    kept: float,
    over: bool,
    whole: bool,
    speaks: bool,
) -> tuple[list[Span], int]:
    """Return the spans of one attempt, which fill it, and how many of its steps were for nothing.

    Args:
        kept: the last step that counts.
        over: whether it has ended; `whole`: whether nothing of it can have been lost.
        speaks: whether the job is one that writes events.
    """
    line = _Line(number, start, end)
    by_job = [event for event in events if "process" in event]
    init = next((event for event in by_job if event["event"] == "init"), None)
    begin = _begin(by_job)
    if init is not None:
        line.take(init["time"], "init")
    before_training = "prep" if init is not None else "init" if speaks else "other"
    if begin is None:
        heard = [event["time"] for event in by_job] + [sign.time for sign in signs]
        line.take(max(heard, default=end), before_training)
        line.take(end, "down" if over else "other")
        return line.spans, 0
    line.take(begin["time"] - _seconds(begin.get("restore_seconds")), before_training)
    line.take(begin["time"], "restore")

    marks = [
        _Mark(event["time"], event["step"], event["spent"], back_from=_back_from(event))
        for event in by_job
        if isinstance(event.get("spent"), dict) and _step(event) is not None
    ]
    after = marks[-1].time if marks else begin["time"]
    marks += [_Mark(sign.time, sign.step, sign.spent, sign.doing) for sign in signs if sign.time > after]
    first_step = next((event["time"] for event in by_job if event["event"] == "first_step"), math.inf)
    hangs = any(event["event"] == "hang" for event in events)
    # To a checkpoint in the same attempt: it makes worthless what was done since.
    returns = [(index, mark.step) for index, mark in enumerate(marks) if mark.back_from is not None]
    step, spent, lost = begin["step"], dict.fromkeys(_TOLD, 0.0), 0
    for index, mark in enumerate(marks):
        counts = min([kept, *(to for when, to in returns if when >= index)])
        reached = mark.step if mark.back_from is None else mark.back_from
        length = min(max(mark.time, line.at), end) - line.at
        now_spent = spent if mark.spent is None else {what: _seconds(mark.spent.get(what)) for what in _TOLD}
        parts = {what: max(0.0, now_spent[what] - spent[what]) for what in _TOLD}
        if (told := sum(parts.values())) > length:
            parts = {what: seconds * length / told for what, seconds in parts.items()}
        rest = max(0.0, length - sum(parts.values()))
        if mark.time <= first_step:  # which is a part of starting
            parts["compile"] += rest
            rest = 0.0
        useful = rest
        if reached > step:
            good = int(min(max(counts, step), reached)) - step
            useful = rest * good / (reached - step)
            lost += reached - step - good
        elif step > counts or (mark is marks[-1] and over and not whole):
            useful = 0.0  # a step that was begun and lost
        untold = _DOING.get(mark.doing)
        line.take(line.at + parts["data"], "data")
        line.take(line.at + parts["compile"], "compile")
        line.take(line.at + useful, untold or "steps")
        line.take(line.at + rest - useful, untold or ("down" if hangs and reached <= step else "wasted"))
        for what in ("evaluation", "checkpoint", "restore"):
            line.take(line.at + parts[what], what)
        step, spent = mark.step if mark.back_from is not None else max(step, mark.step), now_spent
    line.take(end, "other" if whole or not over else "down")
    return line.spans, lost


def _with_data_wait(spans: Sequence[Span], seconds: float) -> list[Span]:
    """Return spans in which so much of the steps is waiting for data: the first process waits for the others in its steps."""
    stepping = math.fsum(span.seconds for span in spans if span.bucket in ("steps", "wasted"))
    share = min(1.0, seconds / stepping) if stepping > 0 else 0.0
    if share <= 0:
        return list(spans)
    found = []
    for span in spans:
        middle = span.start + share * span.seconds
        if span.bucket in ("steps", "wasted"):
            found += [Span(span.start, middle, "data", span.attempt), Span(middle, span.end, span.bucket, span.attempt)]
        else:
            found.append(span)
    return found
