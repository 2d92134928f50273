"""`jobs.py report` of runs that were made up, on a disk and in Cloud Storage. Tests that make real ones report on those."""

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.goodput import BUCKETS
from launch.objects import place
from launch.plan import Plan
from launch.record import Attempt, RunRecord, Submission, write_record
from launch.report import gather, summary
from launch.run_dir import RunDir, append, write_atomically
from launch.snapshot import Code
from launch.standing import read_standing
from tests.clusters.gcs import Gcs
from tests.jobs import REPO
from tests.launch.reports import read_report

HOSTILE = """</title><script>alert(1)</script>'"&<img src=x onerror=y>"""
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
NOW = 1_790_000_000.0


def plan(run: RunDir, first_attempt: int = 1) -> Plan:
    return Plan(
        run.name, str(run.root), "train_tokenizer_vqvae", ("python", "s.py", "--num_steps", "100"), "/", "local",
        {"backend": "local", "env": {}}, Code("abc", 1, 2, None, None), first_attempt, {}, (),
    )  # fmt: skip


def make(run: RunDir, state: str, attempts: list[Attempt], events: list[dict[str, Any]], **fields: Any) -> RunDir:
    run.root.mkdir(parents=True, exist_ok=True)
    submissions = [Submission(time=NOW - 5, plan=plan(run))]
    record = RunRecord(name=run.name, job="train_tokenizer_vqvae", state=state, changed=NOW, **fields)  # type: ignore[arg-type]
    write_record(run, record.model_copy(update={"submissions": submissions, "attempts": attempts}))
    write_atomically(run.root / "events.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    return run


def job(after: float, event: str, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    return {"time": NOW + after, "event": event, "attempt": attempt, "process": 0, "hostname": "n", **fields}


def two_attempts(run: RunDir) -> RunDir:
    """A run that was killed at step 60, went on from 40 with another topology and finished at 100; host 1 starves."""
    mesh = {"data": 2, "fsdp": 1, "tensor": 1}
    shape = {"processes": 2, "devices": 2}
    spent = {"data": 1.0, "devices": 0.0, "compile": 4.0, "checkpoint": 0.0, "evaluation": 0.0}
    events = [
        {"time": NOW - 5, "event": "submitted", "attempt": 1, "hostname": "n"},
        job(5, "init", device_kind="H100", **shape),
        job(10, "started", step=0, mesh=mesh, **shape),
        job(20, "first_step", step=1, spent=spent),
        job(59, "checkpoint", step=40, spent=spent),
        {"time": NOW + 82, "event": "failed", "attempt": 1, "hostname": "n", "host": 1, "cause": HOSTILE},
        job(95, "init", 2, device_kind="H100", **shape),
        job(100, "resumed", 2, step=40, mesh={"data": 1, "fsdp": 2, "tensor": 1}, restore_seconds=2.0, **shape),
        job(110, "first_step", 2, step=41, spent=spent),
        job(169, "finished", 2, step=100, spent=spent),
    ]
    attempts = [
        Attempt(number=1, processes=2, devices_per_process=1, nodes=["node-a", "node-b"], code="c", started=NOW,
                ended=NOW + 82, outcome="failed", first_failed=1),
        Attempt(number=2, processes=2, devices_per_process=1, nodes=["node-a", "<b>node-b"], code="c", started=NOW + 90,
                ended=NOW + 170, outcome="finished"),
    ]  # fmt: skip
    make(run, "finished", attempts, events)
    lines = [
        {"step": step, "loss": 1 / step, "val_loss": 2 / step, "attempt": 1 if step <= 40 else 2, "time": NOW + step}
        for step in range(1, 101)
    ]
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    lost = [{"step": step, "loss": 5.0, "attempt": 1, "time": NOW + 20 + step} for step in range(41, 61)]
    write_atomically(run.root / "metrics.superseded.jsonl", "".join(json.dumps(line) + "\n" for line in lost))
    for number in (1, 2):
        run.attempt(number).mkdir(parents=True)
    for host, data, devices in ((0, 0.5, 56.0), (1, 25.0, 20.0)):
        steps = {
            "time": NOW,
            "step": 100,
            "steps": 59,
            "seconds": 59.0,
            "longest": 1.1,
            "data": data,
            "devices": devices,
        }
        append(
            run.attempt(2) / f"host-{host}.steps.jsonl", json.dumps({**steps, "histogram": {"0": 50, "1": 9}}) + "\n"
        )
    (run.root / "media").mkdir()
    for step in (10, 100):
        (run.root / "media" / f"reconstruction_{step:07d}.png").write_bytes(PNG)
    (run.root / "media" / "no_number.png").write_bytes(PNG)
    return run


def test_a_run_with_a_fault(tmp_path: Path) -> None:
    found, _, read = read_report(two_attempts(RunDir(tmp_path / "r")))
    assert found.account.wall == 170
    assert found.account.lost_steps == {1: 20}
    seconds = found.account.seconds()
    assert seconds["wasted"] == pytest.approx(20 + 1)  # and a second after step 60 of which nobody knows better
    assert seconds["data"] == pytest.approx(2 + 24.5)
    assert [view.topology for view in found.attempts] == ["2×1 H100, data 2", "2×1 H100, fsdp 2"]
    assert [(view.begun, view.at, view.lost_steps) for view in found.attempts] == [(0, 60, 20), (40, 100, 0)]
    assert found.findings == ["attempt 2: host 1 (<b>node-b) waits for data 42% of its time; others 1%"]
    assert [step for step, _ in found.curve.kept] == list(range(1, 101))
    assert [step for step, _ in found.curve.lost] == list(range(41, 61))
    assert [picture.caption for picture in found.pictures] == ["reconstruction, step 100"]
    words = " ".join(read.words)
    assert HOSTILE in words, "the cause is shown as it is"
    for bucket in BUCKETS.values():
        if seconds[bucket.key]:
            assert bucket.other_name in words
    told = "\n".join(summary(found))
    assert f"{found.account.goodput:.1%}" in told
    assert "training steps that still count [GOODPUT]" in told
    assert "waits for data 42%" in told


@pytest.mark.parametrize("state", ["submitted", "cancelled"])
def test_a_run_that_never_started(tmp_path: Path, state: str) -> None:
    found, _, _ = read_report(make(RunDir(tmp_path / "r"), state, [], []))
    assert found.account.goodput is None
    assert "no attempt has started" in "\n".join(summary(found))


def test_a_run_of_one_step_and_one_that_failed_at_once(tmp_path: Path) -> None:
    one = Attempt(
        number=1, processes=1, devices_per_process=1, code="c", started=NOW, ended=NOW + 3, outcome="finished"
    )
    run = make(RunDir(tmp_path / "one"), "finished", [one], [job(1, "init"), job(2, "started", step=0)])
    write_atomically(run.metrics, '{"step": 1, "loss": 0.5, "attempt": 1, "time": 1}\n')
    assert read_report(run)[0].curve.kept == [(1, 0.5)]
    write_atomically(run.metrics, '{"step": 1, "loss": NaN, "attempt": 1, "time": 1}\n')
    assert read_report(run)[0].curve.not_finite == [1]
    failed = one.model_copy(update={"outcome": "failed", "ended": NOW})
    assert read_report(make(RunDir(tmp_path / "failed"), "failed", [failed], []))[0].account.wall == 0


@pytest.mark.parametrize("node", [None, "node-b"])
def test_a_hang_is_one_fault(tmp_path: Path, node: str | None) -> None:
    hung = Attempt(number=1, processes=2, devices_per_process=1, code="c", started=NOW, ended=NOW + 9, outcome="failed")
    reason = "no progress for 120 s at step 5"
    cause = f"{reason}, on {node}" if node else reason
    events = [job(8, "hang", host=1, node=node, reason=reason), job(8, "failed", host=1, node=node, cause=cause)]
    found, _, _ = read_report(make(RunDir(tmp_path / "r"), "failed", [hung], events))
    assert [fault.text for fault in found.faults] == [cause]


def test_strange_files_leave_a_part_empty(tmp_path: Path) -> None:
    run = two_attempts(RunDir(tmp_path / "r"))
    strange = ['{"event": "failed", "time": 1e300, "attempt": 1}', '{"event": "failed", "time": NaN, "attempt": 1}', "[]",
               '{"event": ["init"], "time": "x", "attempt": {}}', '{"event": "init", "attempt": 1}', "\x00\xff", "3",
               "[" * 10000, '{"event": "hang", "time": 1%s, "attempt": 1}' % ("0" * 400),
               '{"event": "started", "time": 1790000011, "attempt": 1, "process": 0, "step": "a", "mesh": [1]}',
               '{"event": "preflight", "attempt": 2, "compute_seconds": ["a", null, 1e999]}']  # fmt: skip
    with (run.root / "events.jsonl").open("a") as file:
        file.write("\n".join(strange))
    run.metrics.write_text(
        '{"step": -1, "loss": 1}\n{"step": 1e400, "loss": []}\n{"step": 5, "loss": "a", "attempt": []}\n5\n'
    )
    (run.attempt(2) / "host-0.steps.jsonl").write_text('{"steps": "a", "histogram": []}\n{"steps": 3, "seconds": -1}\n')
    (run.attempt(2) / "host-1.steps.jsonl").write_text(
        '{"steps": 3, "seconds": 1, "histogram": {"99999999": 2, "x": 1}}\n'
    )
    (run.attempt(2) / "host-0.beat.json").write_text('{"time": "a", "step": [], "spent": {"data": "x"}}')
    read_report(run)


@pytest.mark.slow
def test_a_million_steps_and_a_hundred_attempts_take_seconds_and_stay_small(tmp_path: Path) -> None:
    run, every, spent = RunDir(tmp_path / "r"), 10_000, {"data": 0.0, "compile": 1.0}
    attempts, events = [], []
    for number in range(1, 101):
        start = NOW + (number - 1) * every
        attempts.append(
            Attempt(number=number, processes=1, devices_per_process=8, code="c", started=start, ended=start + every - 1,
                    outcome="failed" if number < 100 else "finished")
        )  # fmt: skip
        first = (number - 1) * every
        events += [job(first + 1, "init", number), job(first + 2, "started", number, step=first)]
        events += [
            job(first + second, "step_mark", number, step=first + second, spent=spent)
            for second in range(60, every - 60, 60)
        ]
        events.append(
            {"time": start + every - 1, "event": "failed", "attempt": number, "hostname": "n", "cause": "x" * 200}
        )
    make(run, "finished", attempts, events)
    with run.metrics.open("w") as file:
        rest = '"lr": 0.0001, "step_time": 1.0, "frames_per_second": 64.0, "data_wait": 0.0, "grad_norm": 0.1'
        for step in range(1, 1_000_001):
            when = f'"attempt": {(step - 1) // every + 1}, "time": {NOW + step}'
            file.write(f'{{"step": {step}, "loss": {1 + 1 / step}, {rest}, {when}}}\n')
    begin = time.process_time()
    found, text, _ = read_report(run)
    assert len(text) < 2_000_000
    assert (found.curve.kept[0][0], found.curve.kept[-1][0]) == (1, 1_000_000)
    assert any("one in 51 logged steps" in note for note in found.notes)
    print(f"{time.process_time() - begin:.1f} s, {len(text) / 1e3:.0f} kB")


def test_a_run_in_cloud_storage(gcs: Gcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = two_attempts(RunDir(place("gs://bucket/runs/r")))
    found, text, _ = read_report(run)
    here = gather(two_attempts(RunDir(tmp_path / "r")), read_standing(RunDir(tmp_path / "r")))
    assert dataclasses.replace(found, record=here.record, now=here.now, command=here.command) == here
    assert "reconstruction, step 100" in text


def test_the_command_writes_a_page_and_overwrites_nothing_else(tmp_path: Path) -> None:
    two_attempts(RunDir(tmp_path / "runs" / "r"))

    def report(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(REPO / "launch" / "jobs.py"), "report", "r", *arguments]
        env = {**os.environ, "JASMINE_STORAGE": str(tmp_path / "runs")}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = report()
    assert done.returncode == 0, done.stderr
    assert re.search(r"goodput +\d+\.\d% of the time", done.stdout)
    assert "r-report.html" in done.stdout
    first = (tmp_path / "r-report.html").read_text()
    assert first.startswith("<!doctype html>")
    assert report().returncode == 0, "an earlier report is replaced"
    (tmp_path / "thesis.html").write_text("precious")
    for wrong in ("thesis.html", str(tmp_path), "nowhere/page.html"):
        refused = report("--out", wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert (tmp_path / "thesis.html").read_text() == "precious"
    before = set(tmp_path.iterdir())
    assert report("--no-html").returncode == 0
    assert set(tmp_path.iterdir()) == before
