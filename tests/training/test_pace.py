"""The account that each process keeps of its time, with a clock of the test's."""

import pytest

from jasmine.training.pace import BIN, Pace, Recent


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def spend(pace, clock, what, seconds):
    with pace.spending(what):
        clock.now += seconds


def test_a_summary_holds_the_steps_without_what_stands_between_them(clock):
    records = []
    pace = Pace(records.append, clock)
    spend(pace, clock, "compile", 7)
    pace.step(1)
    for step in range(2, 12):
        spend(pace, clock, "data", 0.5)
        spend(pace, clock, "devices", 0.4)
        clock.now += 0.1
        if step == 5:
            spend(pace, clock, "checkpoint", 3)
        pace.step(step)
    pace.summarise(11)
    pace.summarise(11)  # nothing new: nothing to say
    assert [record["step"] for record in records] == [8, 11]
    assert sum(record["steps"] for record in records) == 10
    assert sum(record["seconds"] for record in records) == pytest.approx(10)
    assert sum(record["data"] for record in records) == pytest.approx(5)
    assert sum(record["devices"] for record in records) == pytest.approx(4)
    bins = {int(n): count for record in records for n, count in record["histogram"].items()}
    assert all(BIN**n <= 1.0 + 1e-6 and BIN ** (n + 1) >= 1.0 - 1e-6 for n in bins)
    assert max(record["longest"] for record in records) == pytest.approx(1)


def test_summaries_become_rarer_as_an_attempt_lasts(clock):
    records = []
    pace = Pace(records.append, clock)
    for step in range(10 * 8640):
        clock.now += 10
        pace.step(step)
    assert 600 < len(records) < 900


def test_the_last_minute_is_of_steps_alone(clock):
    pace = Pace(lambda record: None, clock)
    recent = Recent(pace, clock)
    clock.now += 500  # restoring
    spend(pace, clock, "compile", 60)
    recent.look()
    pace.step(1)
    looks = []
    for step in range(2, 200):
        spend(pace, clock, "data", 0.25)
        clock.now += 0.75
        pace.step(step)
        looks.append(recent.look())
    assert looks[0]["seconds"] == 1
    assert looks[-1]["seconds"] == pytest.approx(61, abs=1.5)
    assert looks[-1]["steps"] == looks[-1]["seconds"]
    assert looks[-1]["data"] == pytest.approx(looks[-1]["seconds"] / 4)
    assert looks[-1]["compile"] == 0


def test_a_wait_that_goes_on_is_counted_already(clock):
    pace = Pace(lambda record: None, clock)
    recent = Recent(pace, clock)
    pace.step(1)
    recent.look()
    with pace.spending("devices"):
        clock.now += 20
        assert recent.look()["devices"] == 20
    assert recent.look()["devices"] == 20
