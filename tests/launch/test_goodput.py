"""Where the time of a run went: events of runs that were made up, with the answer known."""

import math
import random
from typing import Any

import pytest

from launch.goodput import BUCKETS, Account, Sign, account
from launch.record import Attempt

SPENT = {"data": 0.0, "devices": 0.0, "compile": 0.0, "checkpoint": 0.0, "evaluation": 0.0}


def attempt(number: int, started: float, ended: float | None) -> Attempt:
    return Attempt(number=number, processes=2, devices_per_process=1, code="c", started=started, ended=ended)


def said(time: float, event: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": event, "attempt": number, "hostname": "a", "process": 0, **fields}


def mark(time: float, event: str, step: int, number: int = 1, **spent: float) -> dict[str, Any]:
    return said(time, event, number, step=step, spent=SPENT | spent)


def launcher(time: float, event: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": event, "attempt": number, "hostname": "a", **fields}


def beginning(number: int, start: float, step: int) -> list[dict[str, Any]]:
    """Ten seconds to meet, five of preparations, two to restore, and twenty to compile and make a first step."""
    restored = {"restore_seconds": 2.0} if step else {}
    return [
        said(start + 10, "init", number),
        said(start + 17, "resumed" if step else "started", number, step=step, **restored),
        mark(start + 37, "first_step", step + 1, number, compile=15, data=3),
    ]


def seconds(found: Account) -> dict[str, float]:
    """The buckets that anything is in. All must add up, without gaps but those that do not count."""
    total = found.seconds()
    assert sum(total.values()) == pytest.approx(found.wall, abs=1e-6)
    for before, after in zip(found.spans, found.spans[1:], strict=False):
        assert after.start >= before.end - 1e-9
    covered = found.spans[-1].end - found.spans[0].start if found.spans else 0.0
    assert found.wall == pytest.approx(covered - found.apart, abs=1e-6)
    return {key: pytest.approx(value) for key, value in total.items() if value > 1e-6}


def test_a_run_that_was_never_disturbed() -> None:
    events = [
        launcher(0, "submitted"),
        *beginning(1, 5, 0),
        mark(142, "checkpoint", 101, compile=15, data=13, checkpoint=4),
        mark(202, "evaluated", 151, compile=15, data=13, checkpoint=4, evaluation=20),
        mark(262, "finished", 200, compile=15, data=13, checkpoint=9, evaluation=20),
        launcher(265, "finished", state="finished"),
    ]
    found = account([attempt(1, 5, 265)], events, {}, now=None)
    assert seconds(found) == {
        "init": 10, "prep": 7, "compile": 17, "data": 13, "checkpoint": 9, "evaluation": 20, "steps": 181, "other": 3,
    }  # fmt: skip
    assert found.goodput == pytest.approx(181 / 260)
    assert found.lost_steps == {}


def test_steps_after_the_checkpoint_are_wasted_and_until_the_next_start_is_down_time() -> None:
    events = [
        *beginning(1, 0, 0),
        mark(100, "checkpoint", 100, compile=15, data=3),
        mark(160, "step_mark", 160, compile=15, data=3),
        launcher(200, "failed", cause="killed"),
        *beginning(2, 300, 100),
        mark(400, "finished", 200, 2, compile=15, data=3),
    ]
    signs = {1: [Sign(180, 180, spent=SPENT | {"compile": 15, "data": 3})]}
    found = account([attempt(1, 0, 200), attempt(2, 300, 400)], events, signs, now=None)
    assert seconds(found) == {
        "init": 20, "prep": 17 - 10 + 5, "restore": 2, "compile": 34, "data": 6, "steps": 63 + 63,
        "wasted": 80, "down": 20 + 100,
    }  # fmt: skip
    assert found.lost_steps == {1: 80}


def test_part_of_what_lies_between_two_marks_is_wasted() -> None:
    events = [*beginning(1, 0, 0), mark(137, "step_mark", 101, compile=15, data=3), *beginning(2, 137, 51)]
    found = account([attempt(1, 0, 137), attempt(2, 137, 174)], events, {}, now=None)
    assert seconds(found)["wasted"] == pytest.approx(50)
    assert found.lost_steps[1] == 50


def test_what_failed_for_good_has_wasted_what_it_did_not_save() -> None:
    events = [
        *beginning(1, 0, 0),
        mark(67, "checkpoint", 31, compile=15, data=3),
        said(70, "checkpoint_committed", step=31),
        mark(77, "checkpoint", 41, compile=15, data=3),  # never complete
        mark(87, "step_mark", 51, compile=15, data=3),
    ]
    found = account([attempt(1, 0, 90)], events, {}, now=None)
    assert seconds(found)["wasted"] == pytest.approx(20)
    assert seconds(found)["down"] == pytest.approx(3)


def test_what_a_rollback_takes_back_is_wasted() -> None:
    events = [
        *beginning(1, 0, 0),
        mark(87, "checkpoint", 51, compile=15, data=3),
        mark(117, "step_mark", 81, compile=15, data=3),
        mark(147, "rolled_back", 51, compile=15, data=3, restore=10) | {"back_from": 101},
        mark(207, "finished", 111, compile=15, data=3, restore=10),
    ]
    found = account([attempt(1, 0, 207)], events, {}, now=None)
    assert (seconds(found)["wasted"], seconds(found)["restore"]) == (pytest.approx(50), pytest.approx(10))
    assert seconds(found)["steps"] == pytest.approx(50 + 60)
    assert found.lost_steps == {1: 50}


def test_a_hang_is_down_time_and_not_steps() -> None:
    events = [
        *beginning(1, 0, 0),
        mark(97, "checkpoint", 61, compile=15, data=3),
        launcher(297, "hang", reason="no progress"),
    ]
    signs = {1: [Sign(98, 62), Sign(299, 62, spent=SPENT | {"compile": 15, "data": 3})]}
    found = account([attempt(1, 0, 300), attempt(2, 301, None)], [*events, *beginning(2, 301, 61)], signs, now=338)
    assert seconds(found)["wasted"] == pytest.approx(1)
    assert seconds(found)["down"] == pytest.approx(201 + 1 + 1)


def test_a_run_that_ended_as_it_was_to_and_goes_on_later_was_not_down() -> None:
    events = [
        *beginning(1, 0, 0),
        mark(100, "finished", 50, compile=15, data=3),
        launcher(101, "finished", state="finished"),
        *beginning(2, 5000, 50),
    ]
    found = account([attempt(1, 0, 101), attempt(2, 5000, 5100)], events, {}, now=None)
    assert found.apart == 4899
    assert found.wall == 201


def test_a_live_run_is_accounted_for_until_now() -> None:
    events = [*beginning(1, 0, 0), mark(137, "step_mark", 101, compile=15, data=3)]
    signs = {1: [Sign(160, 124, spent=SPENT | {"compile": 15, "data": 10})]}
    running = account([attempt(1, 0, None)], events, signs, now=161)
    assert running.wall == 161
    assert seconds(running)["data"] == pytest.approx(10)
    assert "wasted" not in {key for key, value in running.seconds().items() if value}
    waiting = account([attempt(1, 0, 150)], events, {}, now=200, waiting=True)
    assert seconds(waiting)["down"] == pytest.approx(13 + 50)


def test_another_host_that_starves_costs_steps_too() -> None:
    events = [*beginning(1, 0, 0), mark(137, "finished", 101, compile=15, data=3)]
    found = account([attempt(1, 0, 137)], events, {}, now=None, starved={1: 40.0})
    assert (seconds(found)["data"], seconds(found)["steps"]) == (pytest.approx(43), pytest.approx(60))
    assert seconds(account([attempt(1, 0, 137)], events, {}, now=None, starved={1: 1e9}))["data"] == pytest.approx(103)


def test_jobs_that_say_nothing_and_runs_that_never_began() -> None:
    assert seconds(account([attempt(1, 0, 50)], [launcher(1, "failed", cause="x")], {}, now=None)) == {"other": 50}
    empty = account([], [launcher(1, "submitted")], {}, now=60.0, waiting=True)
    assert (empty.wall, empty.goodput) == (0, None)
    lost = account([attempt(1, 0, None)], [], {1: [Sign(30, 5)]}, now=None)
    assert seconds(lost) == {"other": 30}
    before_it_spoke = account([attempt(1, 0, 20), attempt(2, 21, 80)], beginning(2, 21, 0), {}, now=None)
    assert seconds(before_it_spoke)["init"] == pytest.approx(30)


def test_whatever_the_events_say_the_buckets_add_up() -> None:
    """Clocks that jump, events that are doubled, out of order, in the wrong attempt, or with strange numbers."""
    rng = random.Random(1)
    names = ["init", "started", "resumed", "first_step", "step_mark", "checkpoint", "checkpoint_committed", "saved",
             "finished", "signalled", "hang", "failed", "cancelled", "rolled_back", "nonsense"]  # fmt: skip
    for _ in range(300):
        attempts, at = [], 0.0
        for number in range(1, rng.randint(1, 5)):
            start = at + rng.uniform(-5, 30)
            at = start + rng.uniform(-3, 100)
            attempts.append(attempt(number, start, at if rng.random() < 0.8 else None))
        events = [
            said(rng.uniform(-50, 500), rng.choice(names), rng.randint(0, 5), step=rng.randint(-3, 90),
                 spent={key: rng.uniform(-10, 200) for key in SPENT}, restore_seconds=rng.uniform(-5, 50),
                 back_from=rng.randint(-3, 90))
            for _ in range(rng.randint(0, 40))
        ]  # fmt: skip
        for event in events:
            if rng.random() < 0.3:
                event[rng.choice(list(event))] = rng.choice([None, "x", math.nan, math.inf, -1, [], {}, True, 10**400])
        signs = {one.number: [Sign(rng.uniform(-50, 500), rng.randint(0, 99))] for one in attempts}
        starved = {one.number: rng.uniform(-5, 50) for one in attempts}
        found = account(attempts, events, signs, now=rng.choice([None, 300.0]), waiting=True, starved=starved)
        assert set(seconds(found)) <= BUCKETS.keys()
        assert all(value >= 0 for value in found.seconds().values())
