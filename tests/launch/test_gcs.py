"""Runs whose directories are in Cloud Storage: what holds for a disk holds there."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.backends.cloud_tpu import read_resource, watched_by
from launch.objects import LONG_PATIENCE, place
from launch.run_dir import RunDir, last_json_lines
from launch.standing import Watch
from tests.clusters.cloud_tpu import CloudTpu, running_cloud_tpu
from tests.clusters.gcs import Gcs
from tests.launch.checkouts import Checkout, is_alive, wait_until
from tests.launch.conftest import REPOSITORY


@pytest.fixture
def here(checkout: Checkout, gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A laptop whose runs are in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkout.env |= {**gcs.env, "JASMINE_STORAGE": f"{gcs.root}/runs", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return checkout


def test_submission_warns_of_a_bucket_that_keeps_what_is_deleted(here: Checkout, gcs: Gcs) -> None:
    def told() -> str:
        done = here.run(
            "submit", "--cluster", "local", "--name", "r", "--wait", "train_tokenizer_vqvae", "--num_steps", "1"
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "warning" not in told()
    gcs.soft_delete(7 * 86400)
    (warning,) = [line for line in told().splitlines() if line.startswith("warning: ")]
    assert "gs://bucket keeps, and bills, all that is deleted or overwritten for 7 days" in warning
    assert warning.endswith(": gcloud storage buckets update gs://bucket --clear-soft-delete")
    gcs.fail_next(403, count=10**6, method="GET", contains="/b/bucket?")  # may not read the bucket, only what is in it
    assert "warning" not in told()


def steps(run: RunDir) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_lives_in_a_bucket_and_jobs_sees_all_of_it(here: Checkout) -> None:
    told = here.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "5").stdout
    run = here.directory()
    assert str(run.root) == "gs://bucket/runs/r"
    assert str(run.root) in told
    record = here.end()
    assert (record.state, record.exit_code) == ("finished", 0), run.supervisor_log.read_text()
    assert steps(run) == [1, 2, 3, 4, 5]
    for host in range(2):
        assert "step 5" in run.log(1, host).read_text()
    assert [event["event"] for event in run.events()][-1] == "finished"
    assert " finished " in here.jobs("list").stdout
    status = here.jobs("status", "r").stdout
    assert "step 5 of 5" in status
    assert "gs://bucket/runs/r" in status
    assert "[host-1] step 5" in here.jobs("logs", "r").stdout
    assert "finished" in here.jobs("explain", "gs://bucket/runs/r").stdout
    assert not run.is_live()


@pytest.mark.slow
def test_cancelled_and_resumed_it_goes_on_where_it_was(here: Checkout) -> None:
    here.submit("train_tokenizer_vqvae", "--num_steps", "600", "--step_seconds", "0.1")
    wait_until(lambda: here.directory().log(1, 0).exists() and "step 3" in here.directory().log(1, 0).read_text())
    again = here.run("submit", "--cluster", "local", "--name", "r", "train_tokenizer_vqvae", "--num_steps", "600")
    assert again.returncode == 2
    assert "in use by a job that is alive" in again.stderr
    done = here.jobs("cancel", "r")
    assert done.returncode == 0, done.stderr
    assert "r: cancelled" in done.stdout
    saved = steps(here.directory())[-1]
    (here.root / "jasmine/training/config.py").write_text("broken")  # it goes on with its own code
    assert here.jobs("resume", "r", "--num_steps", str(saved + 3)).returncode == 0
    assert here.end().state == "finished"
    assert steps(here.directory()) == list(range(1, saved + 4))


@pytest.mark.slow
def test_followed_logs_come_through_restarts(here: Checkout) -> None:
    here.submit("train_tokenizer_vqvae", "--num_steps", "10", "--crash_at", "5")
    followed = here.jobs("logs", "r", "-f").stdout
    assert "no more at step 5" in followed
    assert "attempt 2, from step 0" in followed
    assert followed.count("step 10\n") == 1


@pytest.mark.slow
def test_of_two_submissions_at_once_one_goes_through(here: Checkout) -> None:
    results: list[int] = []

    def submit() -> None:
        arguments = ("--cluster", "local", "--name", "r", "train_tokenizer_vqvae", "--num_steps", "150")
        results.append(here.run("submit", *arguments).returncode)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 2, 2, 2]
    assert here.end().state == "finished"
    assert len(here.directory().attempts()) == 1


@pytest.mark.slow
def test_a_killed_supervisor_leaves_the_run_lost_and_free(here: Checkout) -> None:
    here.submit("train_tokenizer_vqvae", "--num_steps", "600")
    here.at_step(2)
    from launch.record import read_record

    record = read_record(here.directory())
    assert record is not None
    assert record.supervisor is not None
    job = here.job_pid()
    os.kill(record.supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(job))
    assert here.end().state == "lost"
    assert here.jobs("resume", "r", "--num_steps", "10").returncode == 0
    assert here.end().state == "finished"


@pytest.mark.slow
def test_a_bucket_that_is_not_there_or_not_ours_is_one_line(here: Checkout, gcs: Gcs) -> None:
    def refused(storage: str) -> str:
        done = here.run("submit", "--cluster", "local", "--set", f"storage={storage}", "--name", "x")
        assert done.returncode == 2, done.stdout
        (line,) = done.stderr.splitlines()
        return line

    here.env.pop("JASMINE_STORAGE")
    assert "gs://nobody/runs: cannot be read: The specified bucket does not exist." in refused("gs://nobody/runs")
    assert "expected gs://BUCKET/FOLDER" in refused("gs://")
    assert "s3://x: expected a directory" in refused("s3://x")
    assert "$NOT_SET is not set" in refused("gs://$NOT_SET/runs")
    here.env["JASMINE_STORAGE"] = "gs://bucket/runs"
    slurm = here.run("submit", "--cluster", "slurm-a100", "--name", "x", "--dry-run")
    assert slurm.returncode == 2
    assert "on Slurm runs are in a directory that all nodes see, not in a bucket" in slurm.stderr
    here.env.pop("JASMINE_STORAGE")
    dry = here.run("submit", "--cluster", "local", "--set", "storage=gs://$NOT_SET/runs", "--name", "x", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "run_dir: gs://$NOT_SET/runs/x" in dry.stdout
    gcs.fail_next(403, count=100, method="POST")
    assert "cannot make the run directory there: injected" in refused("gs://bucket/runs")
    gcs.heal()
    gcs.kill()
    assert "Cloud Storage does not answer" in refused("gs://bucket/runs")
    gcs.start()
    assert gcs.objects() == {}


def test_events_of_many_writers_all_arrive_once(gcs: Gcs) -> None:
    run = RunDir(place("gs://bucket/r"))
    gcs.lose_next(count=3, method="POST", contains="/compose")
    gcs.lose_next(count=2, method="POST", contains="/upload/")
    gcs.fail_next(503, count=5, method="POST")

    def write(writer: int) -> None:
        for number in range(5):
            run.append_event("x", number, writer=writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(event["writer"], event["attempt"]) for event in run.events()]
    assert sorted(found) == [(writer, number) for writer in range(4) for number in range(5)]
    for writer in range(4):
        assert [number for who, number in found if who == writer] == list(range(5))
    assert list(gcs.objects()) == ["r/events.jsonl"]


def test_appending_costs_the_same_however_long_the_log_is(gcs: Gcs) -> None:
    log = place("gs://bucket/r/metrics.jsonl")
    log.write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(200_000)))
    before = len(gcs.requests)
    log.append(b'{"step": -1}\n')  # type: ignore[attr-defined]
    assert len(gcs.requests) - before <= 5
    assert last_json_lines(log, 1) == [{"step": -1}]
    assert LONG_PATIENCE > 60


def test_locks_of_dead_holders_are_free_and_of_others_only_when_stale(
    gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import lease

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    run = RunDir(place("gs://bucket/r"))
    lock = run.lock()
    assert run.is_live()
    run.release(lock)
    assert not run.is_live()
    assert gcs.objects() == {}

    lock = run.lock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))  # as another machine
    assert run.is_live()
    with pytest.raises(Exception, match="in use by a job that is alive"):
        run.lock()
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.0)
    assert not run.is_live()
    run.release(run.lock())
    os.close(lock)


@pytest.mark.parametrize("ahead", [600.0, -600.0])
def test_a_clock_that_is_wrong_takes_no_run_from_a_live_holder(
    ahead: float, gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import lease

    now = time.time
    monkeypatch.setattr(lease, "_boot_time", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    run = RunDir(place("gs://bucket/r"))
    lock = run.lock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))  # as another machine
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    assert run.is_live()
    with pytest.raises(Exception, match="in use by a job that is alive"):
        run.lock()
    assert list(gcs.objects()) == ["r/.lease"]
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.0)
    assert not run.is_live(), "nor does it keep a run for a holder that is gone"
    os.close(lock)


TPU = f"""\
backend: cloud_tpu
accelerator_type: v5litepod-16
zone: us-west4-a
project: lab
storage: gs://$JASMINE_BUCKET/runs
vm_dir: ~/jasmine
python: {sys.executable}
grace_seconds: 20
boot_timeout: 90
silent_timeout: 20
"""


@pytest.fixture
def pod(here: Checkout, gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudTpu]:
    """A cloud whose VMs share nothing with the laptop but the bucket."""
    with running_cloud_tpu(tmp_path / "cloud", vm_env=gcs.env) as cloud:
        (here.home / "tpu.yaml").write_text(TPU)
        del here.env["JASMINE_STORAGE"]
        for name, value in (cloud.env | {"JASMINE_WATCH_SECONDS": "0.5", "JASMINE_BUCKET": "bucket"}).items():
            here.env[name] = value
            monkeypatch.setenv(name, value)
        yield cloud
        run = RunDir(place("gs://bucket/runs/r"))
        if run.record.exists():  # a failed test must leave nothing running
            run.cancel_request.touch()
            wait_until(lambda: watched_by(run) is None, 240)


@pytest.mark.slow
def test_a_pod_with_its_run_in_a_bucket_is_preempted_goes_on_and_is_cancelled(here: Checkout, pod: CloudTpu) -> None:
    run = RunDir(place("gs://bucket/runs/r"))

    def until(condition: Callable[[], object], seconds: float = 240) -> None:
        try:
            wait_until(condition, seconds)
        except AssertionError:
            consoles = [path.read_text()[-3000:] for path in pod.folder.glob("vms/*/disk/jasmine/startup.log")]
            raise AssertionError("\n---\n".join([*consoles, here.jobs("status", "r").stdout])) from None

    def resource() -> str:
        rented = read_resource(run)
        assert rented is not None
        return rented.id

    told = here.submit("train_tokenizer_vqvae", "--num_steps", "100000", cluster="tpu.yaml").stdout
    assert "gs://bucket/runs/r" in told

    def has(host: int, step: int) -> bool:
        log = run.log(1, host)
        return log.exists() and f"step {step}\n" in log.read_text()

    until(lambda: has(3, 5) and has(2, 3))
    assert "[host-2] step 3" in here.jobs("logs", str(run.root)).stdout
    pod.preempt(resource(), grace=10)
    until(lambda: run.log(2, 0).exists() and "\nstep " in run.log(2, 0).read_text())
    assert "from step 0," not in run.log(2, 0).read_text()  # saved when it was warned
    done = here.jobs("cancel", str(run.root))
    assert done.returncode == 0, done.stderr
    pod.wait(resource(), None, seconds=240)
    wait_until(lambda: watched_by(run) is None, 240)
    saved = steps(run)
    assert saved == list(range(1, saved[-1] + 1))
    assert "cancelled" in done.stdout

    again = here.jobs(
        "resume", str(run.root), "--cluster", "local", "--set", "processes=4", "--num_steps", str(saved[-1] + 3)
    )
    assert again.returncode == 0, again.stderr
    lives = Watch(run, seconds=0.5)
    wait_until(lambda: not lives(), 240)
    assert steps(run) == list(range(1, saved[-1] + 4))


def test_a_dry_run_needs_no_bucket_and_a_submission_does(here: Checkout) -> None:
    (here.home / "tpu.yaml").write_text(TPU)
    del here.env["JASMINE_STORAGE"]
    dry = here.run("submit", "--cluster", "tpu.yaml", "--name", "r", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "gs://$JASMINE_BUCKET/runs/r" in dry.stdout
    done = here.run("submit", "--cluster", "tpu.yaml", "--name", "r")
    assert done.returncode == 2
    assert done.stderr.startswith("error: storage: gs://$JASMINE_BUCKET/runs: $JASMINE_BUCKET is not set: export it")
    assert len(done.stderr.splitlines()) == 1


def without_credentials(checkout: Checkout) -> None:
    """Make its shell one that knows a bucket, but has nothing to show there."""
    checkout.env |= {"JASMINE_BUCKET": "nobody-s", "NO_GCE_CHECK": "true", "HOME": str(checkout.home)}
    checkout.env.pop("GOOGLE_APPLICATION_CREDENTIALS", None)


def test_a_dry_run_needs_no_credentials_and_a_submission_does(checkout: Checkout) -> None:
    without_credentials(checkout)
    checkout.env["GOOGLE_CLOUD_PROJECT"] = "lab"
    problem = "storage gs://nobody-s/runs: cannot be read: no Google credentials here"
    for name in ([], ["--name", "r"], ["--name", "r", "--sweep", "num_steps=3,4"]):
        dry = checkout.run("submit", "--cluster", "tpu-v5-256", *name, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "queuedResourceId=j-" in dry.stdout
        (warning,) = dry.stderr.splitlines()
        assert warning.startswith(f"warning: {problem}")
    for name in ([], ["--name", "r"]):
        refused = checkout.run("submit", "--cluster", "tpu-v5-256", *name)
        assert refused.returncode == 2
        (error,) = refused.stderr.splitlines()
        assert error.startswith(f"error: {problem}")
    checkout.env["JASMINE_BUCKET"] = "No_Bucket"
    bad = checkout.run("submit", "--cluster", "tpu-v5-256", "--dry-run")
    assert "storage: gs://No_Bucket/runs (from gs://$JASMINE_BUCKET/runs): not a place in Cloud Storage" in bad.stderr


def test_a_bucket_that_cannot_be_asked_is_told_once_and_hides_nothing(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--num_steps", "2")
    assert checkout.end().state == "finished"
    without_credentials(checkout)
    listed = checkout.jobs("list")
    assert "finished" in listed.stdout
    assert listed.stderr == (
        "warning: gs://nobody-s/runs: no Google credentials here: `gcloud auth application-default login`\n"
    )
    found = checkout.jobs("status", "r")  # on a disk, which is asked first
    assert (found.returncode, found.stderr) == (0, "")
    unknown = checkout.jobs("status", "nope")
    assert unknown.returncode == 2
    assert unknown.stderr.count("warning:") == 1
    given = checkout.jobs("list", "--storage", "gs://nobody-s/runs")
    assert given.returncode == 2
    assert given.stderr.startswith("error: storage gs://nobody-s/runs: no Google credentials here")


def test_threads_that_ask_storage_first_at_the_same_moment_do_not_disturb_each_other() -> None:
    """Of a package that one thread is importing, another one imports a part."""
    code = """
        import sys, threading
        from launch import objects

        def ask():
            with objects._errors(None):
                pass

        def retry():
            while "google.cloud.storage" not in sys.modules:
                pass
            objects._retry()

        failed = []
        threading.excepthook = lambda args: failed.append(args.exc_value)
        threads = [threading.Thread(target=one) for one in (ask, retry)]
        [one.start() for one in threads]
        [one.join() for one in threads]
        sys.exit(str(failed) if failed else 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
