"""When a job hangs, and who is to blame; time is told, not waited for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import supervision
from launch.record import Attempt
from launch.run_dir import RunDir
from launch.watchdog import Hang, Silence, Watchdog


def beats(
    steps: list[int], now: float, doing: str = "stepping", silent: int | None = None
) -> dict[int, dict[str, object]]:
    return {
        host: {"time": 0 if host == silent else now, "step": step, "doing": doing} for host, step in enumerate(steps)
    }


def test_steps_are_progress_and_nothing_else_is() -> None:
    dog = Watchdog("auto")
    for second in range(0, 600, 10):
        assert dog.look(beats([second, second], second), second, [1.0]) is None
    assert dog.look(beats([590, 590], 700), 700, [1.0]) is None, "120 seconds at least"
    assert dog.look(beats([590, 590], 711), 711, [1.0]) == Hang(
        None, "no progress for 121 s at step 590 (stepping); no process stands out"
    )
    assert dog.look(beats([590, 590], 711), 711, [30.0]) is None, "ten steps of half a minute are not over"


def test_the_process_that_is_behind_or_silent_is_named() -> None:
    for at, silent, host in (([7, 7, 5, 7], None, 2), ([7, 7, 7, 7], 3, 3), ([7, 7, 5, 7], 2, 2)):
        dog = Watchdog(20)
        assert dog.look(beats(at, 0), 0, []) is None
        found = dog.look(beats(at, 21, silent=silent), 21, [])
        assert found is not None
        assert found.host == host


def test_a_short_timeout_waits_until_it_can_tell_who_is_silent() -> None:
    still = "no progress for {} s at step 7 (stepping); {}"
    stopped = Hang(1, still.format(12, "process 1 is stopped, or its machine is"))
    nobody = Hang(None, still.format(16, "no process stands out"))
    for silent, second, hang in ((1, 12, stopped), (None, 16, nobody)):
        dog = Watchdog(4)
        for earlier in range(0, second, 2):
            assert dog.look(beats([7, 7], earlier, silent=silent), earlier, []) is None
        assert dog.look(beats([7, 7], second, silent=silent), second, []) == hang


def test_a_clock_that_is_wrong_makes_nobody_silent() -> None:
    dog = Watchdog(20)
    for second in range(0, 30, 2):
        late = {"time": second - 60, "step": 7, "doing": "stepping"}
        found = dog.look({**beats([7, 7], second), 2: late}, second, [])
    assert found == Hang(None, "no progress for 28 s at step 7 (stepping); no process stands out")


def test_what_takes_long_by_nature_has_longer() -> None:
    dog = Watchdog(20)
    dog.look(beats([3, 3], 0, "compiling"), 0, [])
    assert dog.look(beats([3, 3], 199, "compiling"), 199, []) is None
    assert dog.look(beats([3, 3], 201, "compiling"), 201, []) is not None


def test_a_job_that_tells_nothing_is_left_alone() -> None:
    dog = Watchdog(1)
    assert dog.look({}, 0, []) is None
    assert dog.look({}, 10_000, []) is None


def test_a_process_that_never_says_a_word_is_found_where_it_should() -> None:
    for tells in (False, True):
        dog = Watchdog(20, tells=tells)
        found = [dog.look({}, second, [], [0]) for second in (0, 199, 201)]
        assert found[:2] == [None, None]
        assert (found[2] is not None) == tells
    dog = Watchdog(20, tells=True)
    for second in (0, 100, 201):
        found_stuck = dog.look(beats([0, 0], second, "joining"), second, [], [0, 1, 2])
    assert found_stuck is not None
    assert found_stuck.host == 2


def test_who_could_not_look_for_a_while_calls_nobody_silent() -> None:
    clock = SimpleNamespace(now=0.0)
    silence = Silence(lambda: clock.now)
    for now, sign, seconds in ((1, "a", 0), (20, "a", 19), (40, "a", 39), (90, "a", 0), (110, "a", 20), (120, "b", 0)):
        clock.now = now
        assert silence.seconds(sign) == seconds


def test_storage_that_was_away_makes_no_job_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "r")
    run.begin_attempt(1)
    attempt = Attempt(number=1, processes=1, devices_per_process=1, devices="CPU", code="x", nodes=[], started=0.0)
    dog = Watchdog(60)

    def hang(second: int, step: int) -> Hang | None:
        (run.attempt(1) / "host-0.beat.json").write_text(json.dumps(beats([step], second)[0]))
        monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: float(second)))
        return supervision.find_hang(run, attempt, [0], dog)

    assert [hang(second, 7) for second in range(0, 60, 2)] == [None] * 30
    assert hang(200, 7) is None, "whoever asks could not look for two minutes, nor could the job write"
    assert [hang(second, 7) for second in range(202, 260, 2)] == [None] * 29
    found = hang(262, 7)
    assert found is not None
    assert found.reason.startswith("no progress for 62 s at step 7")
