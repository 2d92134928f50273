"""What `jobs.py` shows."""

import os
import signal
import subprocess

import pytest

from tests.launch.checkouts import Checkout, wait_until


def test_list_and_status_say_how_runs_stand(checkout: Checkout) -> None:
    assert "no runs in" in checkout.jobs("list").stdout
    checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "4", name="done")
    checkout.end("done")
    checkout.submit("train_lam", "--num_steps", "2000", name="busy")
    checkout.at_step(2, "busy")
    header, first, second = checkout.jobs("list").stdout.splitlines()
    assert header.split() == ["run", "job", "cluster", "state", "attempt", "step", "loss", "age"]
    assert first.split()[:7] == ["done", "train_tokenizer_vqvae", "local", "finished", "1", "4", "0.25"]
    assert second.split()[:5] == ["busy", "train_lam", "local", "running", "1"]

    shown = checkout.jobs("status", "done")
    assert shown.returncode == 0
    assert "done: finished" in shown.stdout
    assert "2×1 finished" in shown.stdout
    assert "host-0:0 host-1:0" in shown.stdout
    assert "step 4 of 4, loss 0.25, 1,234 frames/s" in shown.stdout
    shown = checkout.jobs("status", "busy")
    assert "s to go" in shown.stdout
    assert "supervisor process" in shown.stdout
    by_path = checkout.run("jobs", "status", str(checkout.directory("busy").root), cwd=checkout.root)
    assert "busy: running" in by_path.stdout


@pytest.mark.slow
def test_logs_of_a_host_and_of_an_attempt(checkout: Checkout) -> None:
    checkout.submit("--set", "processes=2", "train_lam", "--num_steps", "6", "--crash_at", "3", "--crash_host", "1")
    checkout.end()
    all_hosts = checkout.jobs("logs", "r").stdout
    assert "[host-0] version one, attempt 2" in all_hosts
    assert "[host-1] step 6" in all_hosts
    one = checkout.jobs("logs", "r", "--host", "1", "--attempt", "1").stdout.splitlines()
    assert one[0].startswith("version one, attempt 1")
    assert one[-1] == "ValueError: no more at step 3"
    for wrong in (["--host", "5"], ["--attempt", "7"]):
        refused = checkout.jobs("logs", "r", *wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_following_logs_goes_through_restarts_to_the_end(checkout: Checkout) -> None:
    checkout.submit("train_lam", "--num_steps", "200", "--step_seconds", "0.02")
    following = subprocess.Popen(
        checkout.argv("jobs", "logs", "r", "-f"),
        cwd=checkout.home,
        env=checkout.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    assert "attempt 1" in following.stdout.readline()
    os.kill(checkout.job_pid(), signal.SIGTERM)
    stdout, stderr = following.stdout.read(), following.communicate(timeout=30)[1]  # to the end of both
    steps = [int(line.split()[-1]) for line in stdout.splitlines() if line.startswith("[host-0] step")]
    assert steps == list(range(1, 201))
    assert "attempt 2 has started" in stderr
    assert stderr.splitlines()[-1] == "r: finished"


def test_explain_says_what_went_wrong(checkout: Checkout) -> None:
    checkout.submit("--set", "max_failures=0", "train_lam", "--crash_at", "1")
    checkout.end()
    explained = checkout.jobs("explain", "r").stdout
    assert explained.count("\n") == 1
    for part in ("host 0 of 1", "ValueError: no more at step 1", "max_failures: 0", "resume r"):
        assert part in explained


def test_a_script_that_is_gone_can_be_resumed_from_its_snapshot(checkout: Checkout) -> None:
    script = checkout.home / "mine.py"
    script.write_text("print('mine')\n")
    checkout.submit("mine.py")
    checkout.end()
    script.unlink()
    done = checkout.jobs("resume", "r", "--wait")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "mine")


def test_explain_tells_to_mend_what_was_refused(checkout: Checkout) -> None:
    checkout.submit("train_lam", "--crash_at", "0", "--crash_code", "2")
    checkout.end()
    explained = checkout.jobs("explain", "r").stdout
    assert "resume r --OPTION VALUE" in explained
    assert "checkpoint" not in explained
    (checkout.directory().root / "checkpoints" / "3").mkdir(parents=True)
    assert "Mend what that names; the last checkpoint stands. To go on: " in checkout.jobs("explain", "r").stdout


@pytest.mark.slow
def test_a_job_whose_working_directory_is_gone_says_so(checkout: Checkout) -> None:
    gone = checkout.home / "gone"
    gone.mkdir()
    checkout.submit("train_lam", "--num_steps", "3")
    checkout.end()
    done = checkout.run(
        "submit", "--cluster", "local", "--name", "g", "--set", f"storage={checkout.home}/runs", "train_lam", cwd=gone
    )
    assert done.returncode == 0
    checkout.end("g")
    gone.rmdir()
    assert checkout.jobs("resume", "g", "--num_steps", "20", "--wait").returncode == 2
    wait_until(lambda: "cannot start" in checkout.jobs("logs", "g").stdout)
