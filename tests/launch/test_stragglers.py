"""Who is named as slow or starved: of accounts that were made up, and of a real job in which one process reads slowly."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.describe import host_lines
from launch.record import Attempt, RunRecord
from launch.run_dir import RunDir, append
from launch.standing import Watch
from launch.stragglers import Pace, findings, recent_paces, slow_devices
from tests.jobs import REPO, TINY
from tests.launch.checkouts import check_events, wait_until


def pace(host: int, data: float, works: float, node: str | None = None, step_seconds: float = 0.1) -> Pace:
    """A process that has spent such shares of 30 seconds."""
    return Pace(host, node, int(30 / step_seconds), 30.0, 30 * data, 30 * (1 - data - works))


def test_nobody_is_named_where_all_is_well() -> None:
    assert findings([]) == []
    assert findings([pace(0, 0.02, 0.05)]) == []
    assert findings([pace(host, 0.01 * host, 0.05 + 0.01 * host) for host in range(8)]) == []


def test_the_one_that_is_starved_or_slow_is_named() -> None:
    well = [pace(host, 0.02, 0.03) for host in range(3)]
    assert findings([*well, pace(3, 0.41, 0.03, "node-b")]) == [
        "host 3 (node-b) waits for data 41% of its time; others 2%"
    ]
    assert findings([*well, pace(3, 0.02, 0.45)]) == [
        "host 3 is slow: busy itself 45% of its time; others 3%, and wait for it"
    ]
    assert findings([pace(0, 0.01, 0.03), pace(1, 0.41, 0.03)]) == ["host 1 waits for data 41% of its time; others 1%"]


def test_when_all_starve_nobody_stands_out() -> None:
    assert findings([pace(host, 0.4, 0.05) for host in range(4)]) == ["all 4 hosts wait for data 40% of the time"]
    assert findings([pace(0, 0.4, 0.05)]) == ["host 0 waits for data 40% of the time"]


def test_of_many_a_few_are_named() -> None:
    found = findings(
        [pace(host, 0.01, 0.01) for host in range(16)] + [pace(16 + n, 0.3 + 0.1 * n, 0) for n in range(5)]
    )
    assert [line.split(" waits")[0] for line in found] == [
        "host 20",
        "host 19",
        "host 18",
        "and 2 more hosts like these",
    ]


def test_steps_of_a_millisecond_are_no_reason_to_worry() -> None:
    assert findings([pace(0, 0, 0.5, step_seconds=0.002), pace(1, 0, 0.1, step_seconds=0.002)]) == []


def test_beats_of_those_that_are_gone_or_do_not_step_yet_do_not_count() -> None:
    recent = {
        "seconds": 30.0,
        "steps": 10,
        "data": 20.0,
        "devices": 5.0,
        "compile": 0.0,
        "checkpoint": 4,
        "evaluation": 1,
    }
    beats = {
        0: {"time": 1000.0, "doing": "stepping", "recent": recent},
        1: {"time": 900.0, "doing": "stepping", "recent": recent},
        2: {"time": 1000.0, "doing": "stepping", "recent": recent | {"steps": 0}},
        3: {"time": 1000.0, "doing": "stepping"},
        6: {"time": 1000.0, "doing": "saving", "recent": recent},
        4: {"time": 1000.0, "doing": "stepping", "recent": recent | {"compile": 26.0}},
        5: {"time": 1000.0, "doing": "stepping", "recent": recent | {"seconds": "x", "data": None}},
    }
    (found,) = recent_paces(beats, ["a"])
    assert (found.name, found.steps, found.seconds, found.data) == ("host 0 (a)", 10, 25.0, 20.0)


def preflight(*compute_seconds: Any) -> list[dict[str, Any]]:
    return [
        {"event": "preflight", "attempt": 1, "compute_seconds": [1.0, 9.0]},
        {"event": "preflight", "attempt": 2, "compute_seconds": list(compute_seconds)},
    ]


def test_a_device_that_is_slow_is_named_by_the_preflight() -> None:
    attempt = Attempt(number=2, processes=4, devices_per_process=1, code="c", nodes=["a", "b", "c"], started=0.0)
    assert slow_devices(preflight(0.010, 0.011, 0.016, 0.010), attempt) == [
        "host 2 (c) computes 1.5 times slower than most"
    ]
    for nothing in (preflight(0.010, 0.011), preflight(0.5), preflight(), preflight("x", None), []):
        assert slow_devices(nothing, attempt) == []


def test_status_names_a_slow_device_while_the_run_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.root.mkdir()
    attempt = Attempt(number=2, processes=3, devices_per_process=1, code="c", nodes=["a", "b", "c"], started=0.0)
    record = RunRecord(name="r", job="j", state="running", changed=0.0, attempts=[attempt])
    assert host_lines(run, record) == []
    append(run.root / "events.jsonl", "".join(json.dumps(event) + "\n" for event in preflight(0.1, 0.3, 0.1)))
    assert host_lines(run, record) == ["host 1 (b) computes 3.0 times slower than most"]


STARVED = """
import os, sys, time
from jasmine.data import pipeline
from jasmine.training import cli, data_feed
from jasmine.baselines.maskgit.train_tokenizer_vqvae import Config, main

batches = pipeline.batches


class Slow:
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        for batch in self.source:
            time.sleep(0.3)
            yield batch

    def close(self):
        self.source.close()


if os.environ.get("JAX_PROCESS_ID") == "1":
    data_feed.batches = lambda *args, **options: Slow(batches(*args, **options))

if __name__ == "__main__":
    cli.run(main, Config)
"""


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "runs"
    run = RunDir(tmp_path / "runs" / "r")
    run.cancel_request.touch()
    wait_until(lambda: not run.is_live(), 60)


@pytest.mark.slow
def test_a_process_that_reads_slowly_is_named_while_the_run_goes_on(
    tmp_path: Path, storage: Path, tiny_data: Path
) -> None:
    (tmp_path / "starved.py").write_text(STARVED)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {
        "JASMINE_STORAGE": str(storage)
    }

    def launch(name: str, *arguments: str) -> str:
        command = [sys.executable, str(REPO / "launch" / f"{name}.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    job = ["starved.py", *TINY, "--num_steps", "5000", "--num_workers", "0", "--data_dir", str(tiny_data)]
    launch("submit", "--cluster", "local", "--name", "r", "--set", "processes=2", *job)
    run = RunDir(storage / "r")
    named = re.compile(r"^  hosts      host 1 waits for data \d\d% of its time; others \d%$", re.MULTILINE)
    wait_until(lambda: named.search(launch("jobs", "status", "r")), 200)
    # Nothing is said of a moment in which it saves.
    wait_until(lambda: "It could be faster: host 1 waits for data" in launch("jobs", "explain", "r"), 60)
    launch("jobs", "cancel", "r")
    lives = Watch(run, seconds=0.5)
    wait_until(lambda: not lives(), 60)
    check_events(run)
    told = launch("jobs", "report", "r", "--out", "page.html")
    assert re.search(r"hosts +attempt 1: host 1 waits for data \d\d% of its time; others \d%", told), told
    assert "host 1 waits for data" in (tmp_path / "page.html").read_text()
    data_wait = re.search(r"data wait +(\d+\.\d)%", told)
    assert data_wait is not None
    assert float(data_wait[1]) > 1
    summaries = [json.loads(line) for line in (run.attempt(1) / "host-1.steps.jsonl").read_text().splitlines()]
    assert sum(line["steps"] for line in summaries) > 3
