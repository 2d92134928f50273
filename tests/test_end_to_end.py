"""The launcher and the real tokenizer together, as a user runs them: submitted, signalled, failed, continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.run_dir import RunDir
from tests import jobs
from tests.jobs import REPO, TINY
from tests.launch.reports import read_report

pytestmark = pytest.mark.slow


@pytest.fixture
def storage(tmp_path):
    """A storage root; whatever still runs in it is cancelled at the end."""
    root = tmp_path / "runs"
    yield root
    for run_dir in root.iterdir() if root.exists() else []:
        launch("jobs.py", "cancel", run_dir.name, "--storage", root, check=False)


def launch(script, *args, check=True):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, str(REPO / "launch" / script), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def submit(storage, name, *job, processes=2, settings=()):
    sets = [f"storage={storage}", f"processes={processes}", *settings]
    return launch("submit.py", "--cluster", "local", "--name", name, *(x for s in sets for x in ("--set", s)), *job)


def record(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def test_sigterm_to_one_process_saves_all_and_the_launcher_goes_on(storage, tiny_data):
    run_dir = storage / "signalled"
    begin = time.monotonic()
    submit(storage, "signalled", "train_tokenizer_vqvae", *TINY, "--num_steps", "300", "--data_dir", tiny_data)
    assert time.monotonic() - begin < 20
    metrics = run_dir / "metrics.jsonl"
    jobs.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, what="five steps")
    os.kill(int((run_dir / "attempts" / "1" / "host-1.pid").read_text()), signal.SIGTERM)
    jobs.wait_until(lambda: record(run_dir)["state"] == "finished", 240, "the run to finish")
    first, second = record(run_dir)["attempts"]
    assert [host["code"] for host in first["exits"]] == [75, 75]
    assert [host["code"] for host in second["exits"]] == [0, 0]
    (saved,) = jobs.events(run_dir, "saved")
    (resumed,) = jobs.events(run_dir, "resumed")
    assert saved["step"] == resumed["step"]
    assert list(jobs.metrics(run_dir, "loss")) == list(range(1, 301))
    assert not (run_dir / "metrics.superseded.jsonl").exists()
    found, _, _ = read_report(RunDir(run_dir))
    went = found.account.seconds()
    assert all(went[key] > 0 for key in ("steps", "init", "prep", "restore", "compile", "checkpoint", "down"))
    assert (went["wasted"], found.account.lost_steps) == (0, {})
    assert [(view.begun, view.at) for view in found.attempts] == [(0, saved["step"]), (saved["step"], 300)]
    assert [pace.host for pace in found.hosts] == [0, 1]
    assert sum(pace.steps for pace in found.hosts) == 2 * (300 - saved["step"] - 1)


def test_exception_on_one_process_ends_the_job_and_is_shown_first(storage, tiny_data):
    run_dir = storage / "raised"
    settings = ("max_failures=0", "env.FAULT=raise@5@1")
    submit(storage, "raised", jobs.FAULTY, *TINY, "--data_dir", tiny_data, settings=settings)
    log = run_dir / "attempts" / "1" / "host-1.log"
    jobs.wait_until(lambda: log.exists() and "injected failure" in log.read_text(), what="the exception")
    jobs.wait_until(lambda: record(run_dir)["state"] == "failed", 20, "the job to end within 20 s")
    shown = launch("jobs.py", "logs", "raised", "--storage", storage).stdout.splitlines()
    tracebacks = [line for line in shown if "RuntimeError: injected failure of one process" in line]
    assert tracebacks
    assert shown[0].startswith("[host-1]")
    explained = launch("jobs.py", "explain", "raised", "--storage", storage).stdout
    assert "host-1" in explained
    assert "injected failure of one process" in explained


def test_same_name_again_goes_on_with_another_topology(storage, tiny_data):
    run_dir = storage / "moved"
    job = ["train_tokenizer_vqvae", *TINY, "--data_dir", tiny_data]
    submit(storage, "moved", *job, "--stop_at_step", "10", processes=2)
    jobs.wait_until(lambda: record(run_dir)["state"] == "finished", what="step 10")
    submit(storage, "moved", *job, "--stop_at_step", "20", processes=1, settings=("devices_per_process=2",))
    jobs.wait_until(lambda: record(run_dir)["state"] == "finished", what="step 20")
    assert list(jobs.metrics(run_dir, "batch_checksum")) == list(range(1, 21))
    status = launch("jobs.py", "status", "moved", "--storage", storage).stdout
    assert re.search(r"step 20\b", status)
    found, _, _ = read_report(RunDir(run_dir))
    assert [view.topology for view in found.attempts] == ["2×1 cpu, data 2", "1×2 cpu, data 2"]
    assert found.account.apart > 0, "nobody wanted it to go on in between"


def test_a_mistake_in_the_data_is_not_retried(storage, tmp_path):
    run_dir = storage / "wrong"
    done = launch(
        "submit.py", "--cluster", "local", "--name", "wrong", "--set", f"storage={storage}", "--wait",
        "train_tokenizer_vqvae", *TINY, "--data_dir", tmp_path / "nothing", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{tmp_path / 'nothing'}" in done.stdout
    assert len(record(run_dir)["attempts"]) == 1
