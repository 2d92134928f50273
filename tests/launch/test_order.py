"""Runs on this machine that follow one another: elements of a sweep, `--after`, and pipelines."""

import itertools
import os
import signal

import pytest

from launch.record import RunRecord, read_record
from tests.launch.checkouts import Checkout, wait_until

LONG = ["train_lam", "--num_steps", "2000"]
SHORT = ["train_lam", "--num_steps", "2"]


def _record(checkout: Checkout, name: str) -> RunRecord:
    record = read_record(checkout.directory(name))
    assert record is not None
    return record


def _waits(checkout: Checkout, name: str, what: str) -> None:
    wait_until(lambda: _record(checkout, name).reason == f"waiting for {what}")


@pytest.mark.slow
def test_elements_of_a_sweep_take_turns_and_one_that_fails_stops_no_other(checkout: Checkout) -> None:
    sweep = ["--sweep", "crash_at=0,-1", "--sweep", "num_steps=200,2"]
    told = checkout.submit(*sweep, "train_lam", "--crash_code", "2").stdout
    assert "r: 4 runs submitted on local" in told
    assert "  r.1  --crash_at=0 --num_steps 2\n" in told
    _waits(checkout, "r.3", "r.2 to end")
    assert "r.3: submitted (waiting for r.2 to end)" in checkout.jobs("status", "r.3").stdout
    assert "It is in the queue, waiting for r.2 to end." in checkout.jobs("explain", "r.3").stdout
    records = [checkout.end(f"r.{index}") for index in range(4)]
    assert [record.state for record in records] == ["failed", "failed", "finished", "finished"]
    assert [record.reason for record in records[2:]] == [None, None]
    lives = [(record.attempts[0].started, record.attempts[-1].ended) for record in records]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(lives))  # type: ignore[operator]
    assert len(checkout.directory("r.3").metrics.read_text().splitlines()) == 2
    assert checkout.jobs("cancel", "r").returncode == 2


def test_cancelling_a_sweep_starts_none_of_it(checkout: Checkout) -> None:
    checkout.submit("--sweep", "num_steps=2000,2001,2002", "train_lam")
    checkout.at_step(1, "r.0")
    done = checkout.jobs("cancel", "r")
    assert done.returncode == 0, done.stderr
    assert [checkout.end(f"r.{index}").state for index in range(3)] == ["cancelled"] * 3
    assert [len(_record(checkout, f"r.{index}").attempts) for index in range(3)] == [1, 0, 0]


def test_an_element_that_is_cancelled_lets_no_other_pass(checkout: Checkout) -> None:
    checkout.submit("--sweep", "num_steps=2000,2001,2", "train_lam")
    checkout.at_step(1, "r.0")
    assert checkout.jobs("cancel", "r.1").returncode == 0
    _waits(checkout, "r.2", "r.0 to end")
    assert not checkout.directory("r.2").attempts()
    assert checkout.jobs("cancel", "r.0").returncode == 0
    assert checkout.end("r.2").state == "finished"


@pytest.mark.slow
def test_a_run_waits_for_another_and_does_not_start_when_that_fails(checkout: Checkout) -> None:
    checkout.submit(*LONG, name="a")
    checkout.submit("--after", "a", *SHORT, name="b")
    checkout.submit("--after", "b", *SHORT, name="c")
    checkout.at_step(1, "a")
    _waits(checkout, "c", "b to finish")
    assert checkout.jobs("cancel", "a").returncode == 0
    assert [checkout.end(name).state for name in "bc"] == ["cancelled", "cancelled"]
    assert not checkout.directory("b").attempts()
    why = "not started: a, which it was to follow, is cancelled"
    assert why in checkout.jobs("status", "b").stdout
    assert f"It was cancelled before it had started ({why}). To go on: " in checkout.jobs("explain", "b").stdout
    refused = checkout.run("submit", "--cluster", "local", "--after", "a", *SHORT)
    assert (refused.returncode, "it is cancelled and will not finish by itself" in refused.stderr) == (2, True)

    # Resumed in order, they wait for one another again.
    assert checkout.jobs("resume", "a", "--num_steps", "60").returncode == 0
    assert checkout.jobs("resume", "b").returncode == 0
    assert checkout.end("b").state == "finished"
    first = _record(checkout, "a")
    assert first.state == "finished"
    assert first.attempts[-1].ended <= _record(checkout, "b").attempts[0].started  # type: ignore[operator]
    waited = checkout.run("submit", "--cluster", "local", "--name", "d", "--after", "b", "--wait", *SHORT)
    assert (waited.returncode, "step 2" in waited.stdout) == (0, True)


def test_a_run_that_waits_leaves_with_its_machine(checkout: Checkout) -> None:
    checkout.submit(*LONG, name="a")
    checkout.submit("--after", "a", *SHORT, name="b")
    _waits(checkout, "b", "a to finish")
    supervisor = _record(checkout, "b").supervisor
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGTERM)
    record = checkout.end("b")
    assert (record.state, record.exit_code, record.attempts) == ("preempted", 75, [])


@pytest.mark.slow
def test_a_pipeline_is_submitted_at_once_and_its_stages_follow_one_another(checkout: Checkout) -> None:
    (checkout.home / "see.py").write_text("import os, sys; print(sys.argv[2], os.listdir(sys.argv[2]))\n")
    (checkout.home / "p.yaml").write_text(
        "name: p\n"
        "stages:\n"
        "  first: {job: train_lam, args: --num_steps 200}\n"
        "  second: {job: see.py, args: [--made_by, '{first}']}\n"
        "  third: {job: train_lam, args: --num_steps 1, after: [second]}\n"
    )
    pipeline = ["submit", "--cluster", "local", "--pipeline", "p.yaml"]
    done = checkout.run(*pipeline)
    assert done.returncode == 0, done.stderr
    assert _record(checkout, "p-first").state != "finished", "the command waited"
    assert checkout.end("p-third").state == "finished"
    first, second = (_record(checkout, f"p-{stage}") for stage in ("first", "second"))
    assert first.attempts[0].ended <= second.attempts[0].started  # type: ignore[operator]
    place, *there = checkout.directory("p-second").log(1, 0).read_text().split(" ['")
    assert place == str(checkout.directory("p-first").root)
    assert "metrics.jsonl" in there[0]
    assert checkout.run(*pipeline).stdout == "all of its stages have finished: p-first, p-second, p-third\n"
