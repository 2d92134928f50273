"""What happens to a local run, from submission to its end, with real processes."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from launch import supervision, worker
from launch.backends.local import restart_delay
from launch.plan import MASK
from launch.record import Attempt, HostExit, read_record, write_record
from launch.run_dir import RunDir, append
from launch.supervision import collect_exits, has_progressed
from tests.launch.checkouts import Checkout, as_on_a_terminal, is_alive, wait_until


def _events(checkout: Checkout, name: str = "r") -> list[str]:
    return [event["event"] for event in checkout.directory(name).events()]


def test_a_job_runs_detached_to_its_end(checkout: Checkout) -> None:
    started, cpu_before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "60")
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu_before
    print(f"submit.py took {time.monotonic() - started:.2f} s, {cpu_seconds:.2f} s of them computing")
    assert cpu_seconds < 2  # about 0.5; unlike the time on the clock it does not depend on what else runs here
    assert "r: submitted on local, 2 processes × 1 device" in done.stdout
    run = checkout.directory()
    supervisor_running = run.is_live()
    job = checkout.job_pid()
    assert supervisor_running, "the command waited for the job"
    assert os.getsid(job) != os.getsid(0)
    record = checkout.end()
    assert (record.state, record.exit_code, record.supervisor is not None) == ("finished", 0, True)
    assert record.supervisor is not None
    assert [one.code for one in record.attempts[0].exits] == [0, 0]
    assert json.loads(run.exit_file(1, 1).read_text())["code"] == 0
    assert run.log(1, 0).read_text().splitlines()[-1] == "step 60"
    assert _events(checkout) == [
        "submitted", "scheduled", "attempt_started", "host_exited", "host_exited", "finished"
    ]  # fmt: skip
    assert run.supervisor_log.read_text() == ""


def test_the_processes_are_told_who_they_are(checkout: Checkout) -> None:
    script = checkout.home / "show.py"
    script.write_text(
        "import json, os, resource\nimport neighbour\n"
        "print(json.dumps(dict(os.environ, cwd=os.getcwd(), core=resource.getrlimit(resource.RLIMIT_CORE)[0])))\n"
    )
    (checkout.home / "neighbour.py").touch()
    foreign = {"SLURM_PROCID": "7", "JAX_PROCESS_ID": "7", "RANK": "7", "JASMINE_RUN_DIR": "/elsewhere"}
    checkout.env |= {**foreign, "MINE": "kept"}
    checkout.submit("--set", "processes=2", "--set", "devices_per_process=3", "--set", "env.EXTRA=5", "show.py")
    assert checkout.end().state == "finished"
    run = checkout.directory()
    first, second = (json.loads(run.log(1, host).read_text()) for host in (0, 1))
    assert (first["JAX_PROCESS_ID"], second["JAX_PROCESS_ID"]) == ("0", "1")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", first["JAX_COORDINATOR_ADDRESS"])
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"]
    assert (first["JAX_NUM_PROCESSES"], first["JAX_NUM_CPU_DEVICES"], first["JAX_PLATFORMS"]) == ("2", "3", "cpu")
    assert (first["JASMINE_RUN_DIR"], first["JASMINE_ATTEMPT"]) == (str(run.root), "1")
    assert (first["MINE"], first["EXTRA"], first["cwd"], first["core"]) == ("kept", "5", str(checkout.home), 0)
    assert not {"SLURM_PROCID", "RANK"} & first.keys()
    assert first["PYTHONPATH"].startswith(str(run.code))

    checkout.submit("--set", "devices_per_process=auto", "show.py", name="alone")
    assert checkout.end("alone").state == "finished"
    alone = json.loads(checkout.directory("alone").log(1, 0).read_text())
    assert not {"JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"} & alone.keys()


@pytest.mark.slow
def test_sigterm_to_one_process_saves_all_and_the_job_goes_on(checkout: Checkout) -> None:
    checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "60")
    checkout.at_step(2, host=1)
    os.kill(checkout.job_pid(host=1), signal.SIGTERM)
    record = checkout.end()
    assert record.state == "finished"
    assert [attempt.outcome for attempt in record.attempts] == ["preempted", "finished"]
    assert [one.code for one in record.attempts[0].exits] == [75, 75]
    steps = [json.loads(line)["step"] for line in checkout.directory().metrics.read_text().splitlines()]
    assert steps == list(range(1, 61))
    assert {"preempted", "restarted"} <= set(_events(checkout))


def test_sigterm_to_the_supervisor_saves_and_ends_the_run(checkout: Checkout) -> None:
    checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "2000")
    checkout.at_step(2)
    checkout.at_step(2, host=1)
    supervisor = read_record(checkout.directory()).supervisor  # type: ignore[union-attr]
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGTERM)
    record = checkout.end()
    assert (record.state, record.exit_code, len(record.attempts)) == ("preempted", 75, 1)
    assert "saved at step" in checkout.directory().log(1, 1).read_text()


def test_a_job_stopped_before_it_can_listen_has_not_failed(checkout: Checkout) -> None:
    (checkout.home / "slow.py").write_text("import time; print('up', flush=True); time.sleep(600)\n")
    checkout.submit("slow.py")
    run = checkout.directory()
    wait_until(lambda: run.log(1, 0).exists() and run.log(1, 0).read_text())
    assert checkout.jobs("cancel", "r").returncode == 0
    record = checkout.end()
    assert (record.state, record.attempts[0].outcome) == ("cancelled", "preempted")
    assert record.attempts[0].exits[0].signal == "SIGTERM"


def test_crashes_and_preemptions_have_budgets_of_their_own(checkout: Checkout) -> None:
    job = ["train_tokenizer_vqvae", "--crash_at", "2", "--crash_attempts", "9"]
    checkout.submit("--set", "max_failures=1", "--set", "max_preemptions=0", *job, name="crash")
    checkout.submit(
        "--set",
        "max_failures=0",
        "--set",
        "max_preemptions=1",
        "train_tokenizer_vqvae",
        "--num_steps",
        "999",
        name="preempt",
    )
    for attempt in (1, 2):
        wait_until(lambda a=attempt: checkout.directory("preempt").log(a, 0).exists())  # type: ignore[misc]
        log = checkout.directory("preempt").log(attempt, 0)
        wait_until(lambda log=log: "step " in log.read_text().split("from step")[-1][5:])  # type: ignore[misc]
        os.kill(checkout.job_pid(attempt=attempt, name="preempt"), signal.SIGTERM)
    preempted = checkout.end("preempt")
    assert (preempted.state, preempted.exit_code) == ("preempted", 75)
    assert [attempt.outcome for attempt in preempted.attempts] == ["preempted", "preempted"]
    crashed = checkout.end("crash")
    assert (crashed.state, crashed.exit_code) == ("failed", 1)
    assert [attempt.outcome for attempt in crashed.attempts] == ["failed", "failed"]
    assert "max_failures: 1" in (crashed.reason or "")


def test_a_crash_is_outlived(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--crash_at", "2")
    record = checkout.end()
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]


def test_failures_without_a_step_in_between_are_given_longer_and_longer() -> None:
    assert [restart_delay(fruitless) for fruitless in (0, 1, 2, 3, 4, 6)] == [1, 1, 2, 4, 8, 32]
    assert restart_delay(7) == restart_delay(100_000) == 60


def test_a_user_mistake_in_the_job_is_not_tried_again(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--crash_at", "0", "--crash_code", "2")
    record = checkout.end()
    assert (record.state, record.exit_code, len(record.attempts)) == ("failed", 2, 1)


def test_steps_made_again_after_a_checkpoint_are_progress(tmp_path: Path) -> None:
    run, size = RunDir(tmp_path), 0
    third = Attempt(number=3, processes=1, devices_per_process=1, code="c", started=0.0)

    def logged(steps: dict[int, int]) -> bool:
        run.metrics.write_text("".join(f'{{"step": {step}, "attempt": {steps[step]}}}\n' for step in steps))
        return has_progressed(run, third, size)

    assert not has_progressed(run, third, size)
    assert not logged(dict.fromkeys(range(190), 2))
    size = run.metrics_size()
    assert not logged(dict.fromkeys(range(100), 2)), "it went back to a checkpoint, and no further"
    assert logged(dict.fromkeys(range(100), 2) | dict.fromkeys(range(100, 150), 3))
    run.metrics.write_text('{"step": 1}\n')
    assert not has_progressed(run, third, 12), "a program whose lines do not name their attempt"
    assert has_progressed(run, third, 11)


def test_a_job_that_says_it_would_fail_again_is_not_tried_again(checkout: Checkout) -> None:
    checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--crash_at", "3", "--crash_code", "65")
    record = checkout.end()
    assert (record.state, record.exit_code, len(record.attempts)) == ("failed", 65, 1)
    assert "a restart would only repeat its failure" in checkout.jobs("status", "r").stdout


@pytest.mark.slow
def test_an_exception_on_one_process_ends_a_hanging_job_quickly(checkout: Checkout) -> None:
    job = ["train_tokenizer_vqvae", "--crash_at", "5", "--crash_host", "1", "--hang_at", "5", "--deaf", "1"]
    job[3:3] = ["--crash_attempts", "9"]
    checkout.submit("--set", "processes=3", "--set", "max_failures=0", *job)
    wait_until(lambda: checkout.directory().exit_file(1, 1).exists())
    crashed = time.monotonic()
    record = checkout.end()
    assert time.monotonic() - crashed < 20
    assert (record.state, record.exit_code, record.attempts[0].first_failed) == ("failed", 1, 1)
    shown = checkout.jobs("logs", "r").stdout.splitlines()
    assert shown[0].startswith("[host-1] version one")
    traceback = shown.index("[host-1] ValueError: no more at step 5")
    others = [i for i, line in enumerate(shown) if line.startswith("[host-0]")]  # none, if it was ended before it spoke
    assert traceback < min(others, default=len(shown))
    explained = checkout.jobs("explain", "r").stdout
    assert "host 1 of 3 failed first: it exited with code 1" in explained
    assert "ValueError: no more at step 5" in explained


def test_a_job_that_does_not_save_in_time_is_killed_with_what_it_started(checkout: Checkout) -> None:
    job = ["train_tokenizer_vqvae", "--num_steps", "2000", "--deaf", "1", "--leave_child", "1"]
    checkout.submit("--set", "grace_seconds=1", *job)
    checkout.at_step(1)
    child = int((checkout.directory().root / "child.pid").read_text())
    done = checkout.jobs("cancel", "r")
    assert "cancelled (the job had not saved its state)" in done.stdout
    assert checkout.end().attempts[0].exits[0].signal == "SIGKILL"
    wait_until(lambda: not is_alive(child), 5)


def test_cancel_saves_and_a_cancelled_run_can_be_resumed_on_other_processes(checkout: Checkout) -> None:
    checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "2000")
    checkout.at_step(3)
    checkout.at_step(3, host=1)
    done = checkout.jobs("cancel", "r")
    assert (done.returncode, checkout.end().state) == (0, "cancelled")
    assert checkout.jobs("cancel", "r").returncode == 2
    last = len(checkout.directory().metrics.read_text().splitlines()) + 5
    done = checkout.jobs("resume", "r", "--set", "processes=1", "--wait", "--num_steps", str(last))
    assert done.returncode == 0, done.stderr
    record = checkout.end()
    assert [attempt.processes for attempt in record.attempts] == [2, 1]
    steps = [json.loads(line)["step"] for line in checkout.directory().metrics.read_text().splitlines()]
    assert steps == list(range(1, last + 1))


def test_a_killed_supervisor_leaves_no_orphans_and_a_lost_run(checkout: Checkout) -> None:
    checkout.submit("--set", "processes=2", "train_tokenizer_vqvae", "--num_steps", "2000")
    checkout.at_step(2)
    checkout.at_step(2, host=1)
    pids = [checkout.job_pid(host) for host in (0, 1)]
    run = checkout.directory()
    supervisor = read_record(run).supervisor  # type: ignore[union-attr]
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    record = checkout.end()
    assert record.state == "lost"
    assert not any(map(is_alive, pids))
    assert "saved at step" in run.log(1, 0).read_text(), "the job was not given the chance to save"
    assert "lost" in checkout.jobs("status", "r").stdout
    assert "resume r" in checkout.jobs("explain", "r").stdout
    assert checkout.jobs("resume", "r", "--wait", "--num_steps", "30").returncode == 0


def test_a_supervisor_that_was_replaced_leaves_the_run_to_the_other(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--num_steps", "2000")
    checkout.at_step(2)
    run, job = checkout.directory(), checkout.job_pid()
    run.begin_attempt(2)
    record = read_record(run)
    assert record is not None
    write_record(run, record.model_copy(update={"state": "submitted", "reason": "it is another's"}))
    wait_until(lambda: not run.is_live())
    assert not is_alive(job)
    record = read_record(run)
    assert record is not None
    assert (record.state, record.reason, len(record.attempts)) == ("submitted", "it is another's", 1)
    assert not {"failed", "preempted", "restarted", "ended"} & set(_events(checkout))
    assert run.newest_attempt() == 2
    assert "begun by another supervisor" in run.supervisor_log.read_text()


def test_a_killed_worker_takes_its_job_along_and_counts_as_a_failure(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--num_steps", "100", "--leave_child", "1")
    checkout.at_step(2)
    job = checkout.job_pid()
    child = int((checkout.directory().root / "child.pid").read_text())
    worker = int(Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not is_alive(job) and not is_alive(child), 5)
    record = checkout.end()
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]
    assert record.attempts[0].exits[0].signal == "SIGKILL"


@pytest.mark.slow
def test_wait_shows_the_job_and_returns_its_exit_code(checkout: Checkout) -> None:
    def wait(*arguments: str) -> subprocess.CompletedProcess[str]:
        return checkout.run("submit", "--cluster", "local", "--wait", *arguments)

    done = wait("--name", "good")
    assert done.returncode == 0
    assert "\nstep 10\n" in done.stdout
    done = wait("--name", "bad", "--set", "max_failures=0", "train_lam", "--crash_at", "1", "--crash_code", "9")
    assert done.returncode == 9
    assert "bad: failed" in done.stderr
    arguments = ["--cluster", "local", "--wait", "--name", "long", "train_lam", "--num_steps", "999"]
    with subprocess.Popen(checkout.argv("submit", *arguments), cwd=checkout.home, env=checkout.env) as waiting:
        checkout.at_step(2, "long")
        supervisor = read_record(checkout.directory("long")).supervisor  # type: ignore[union-attr]
        assert supervisor is not None
        os.kill(supervisor.pid, signal.SIGTERM)
        assert waiting.wait(20) == 75


def test_interrupting_wait_leaves_the_run_alone(checkout: Checkout) -> None:
    arguments = ["--cluster", "local", "--wait", "--name", "r", "train_lam", "--num_steps", "80"]
    waiting = subprocess.Popen(
        checkout.argv("submit", *arguments), cwd=checkout.home, env=checkout.env, stderr=subprocess.PIPE, text=True,
        preexec_fn=as_on_a_terminal,
    )  # fmt: skip
    checkout.at_step(2)
    waiting.send_signal(signal.SIGINT)
    _, stderr = waiting.communicate(timeout=10)
    assert "goes on" in stderr
    assert "cancel r" in stderr
    assert checkout.end().state == "finished"


@pytest.mark.slow
def test_a_queued_run_keeps_the_code_it_was_submitted_with(checkout: Checkout) -> None:
    config = checkout.root / "jasmine" / "training" / "config.py"
    (checkout.root / "untracked.py").write_text("ships = True\n")
    (checkout.root / "ignored").mkdir()
    (checkout.root / "ignored" / "big.bin").write_text("stays")
    index = checkout.root / ".git" / "index"
    before = (index.read_bytes(), index.stat().st_mtime_ns)
    checkout.submit("train_tokenizer_vqvae", "--num_steps", "120")
    config.write_text(config.read_text().replace('VERSION = "one"', 'VERSION = "two"'))
    checkout.at_step(2)
    os.kill(checkout.job_pid(), signal.SIGTERM)
    first = checkout.end()
    run = checkout.directory()
    assert [run.log(k, 0).read_text().split(",")[0] for k in (1, 2)] == ["version one", "version one"]
    plan = first.submissions[0].plan
    assert (plan.code_dir / "untracked.py").exists()
    assert not (plan.code_dir / "ignored").exists()
    assert plan.code.dirty is True
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout.root, capture_output=True, text=True).stdout
    assert plan.code.commit == head.strip()
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before, "the user's index was touched"

    assert checkout.jobs("resume", "r", "--wait", "--num_steps", "11").stdout.count("version one") == 1
    assert checkout.jobs("resume", "r", "--wait", "--new-code").stdout.count("version two") == 1
    assert checkout.run("submit", "--cluster", "local", "--name", "r", "--wait").stdout.count("version two") == 1
    assert len(list(run.code.iterdir())) == 2, "equal trees are stored once"


def test_what_a_dry_run_shows_is_what_runs(checkout: Checkout) -> None:
    arguments = ["--set", "processes=2", "--set", "env.MY_TOKEN=hush", "train_tokenizer_vqvae", "--num_steps", "3"]
    shown = checkout.submit("--dry-run", *arguments)
    assert not (checkout.home / "runs").exists(), "a dry run created something"
    assert "hush" not in shown.stdout
    checkout.submit(*arguments)
    record = checkout.end()
    stored = json.loads(checkout.directory().record.read_text())["submissions"][0]["plan"]
    assert yaml.safe_load(shown.stdout) == stored
    assert stored["env"]["MY_TOKEN"] == MASK
    assert stored["argv"][2:] == ["--num_steps", "3"]
    assert [host["env"]["JAX_PROCESS_ID"] for host in stored["hosts"]] == ["0", "1"]
    assert all(
        "hush" not in path.read_text() for path in checkout.directory().root.rglob("*") if path.suffix == ".json"
    )
    assert record.state == "finished"
    refused = checkout.jobs("resume", "r", "--num_steps", "4")
    assert refused.returncode == 2
    assert "export MY_TOKEN first" in refused.stderr
    assert checkout.jobs("resume", "r", "--set", "env.MY_TOKEN=hush", "--wait", "--num_steps", "4").returncode == 0


def test_of_two_submissions_of_one_name_one_wins(checkout: Checkout) -> None:
    command = checkout.argv("submit", "--cluster", "local", "--name", "r", "train_lam", "--num_steps", "2000")
    racers = [
        subprocess.Popen(command, cwd=checkout.home, env=checkout.env, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [racer.communicate()[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 2, 2]
    assert sum("in use" in error for error in errors) == 2
    checkout.jobs("cancel", "r")
    record = checkout.end()
    assert (record.state, len(record.submissions), len(record.attempts)) == ("cancelled", 1, 1)


def test_submitting_the_same_name_again_goes_on(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--num_steps", "4")
    assert checkout.end().state == "finished"
    refused = checkout.run("submit", "--cluster", "local", "--name", "r", "train_lam")
    assert refused.returncode == 2
    assert "was made with the job train_tokenizer_vqvae" in refused.stderr
    done = checkout.submit("train_tokenizer_vqvae", "--num_steps", "8")
    assert "goes on with attempt 2" in done.stdout
    record = checkout.end()
    assert (record.state, len(record.submissions)) == ("finished", 2)
    assert "from step 4" in checkout.directory().log(2, 0).read_text()


def test_a_full_disk_is_outlasted(checkout: Checkout, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        assert not os.environ.get("CI"), f"CI must run this test: {mounted.stderr.decode()}"
        pytest.skip(f"this needs the right to mount a file system: {mounted.stderr.decode()}")
    try:
        checkout.env["JASMINE_STORAGE"] = str(disk / "runs")
        checkout.submit("train_tokenizer_vqvae", "--num_steps", "60")
        checkout.at_step(3)
        run = checkout.directory()
        job = checkout.job_pid()
        with (disk / "filler").open("wb", buffering=0) as filler:
            for size in (1 << 16, 1):
                try:
                    while True:
                        filler.write(bytes(size))
                except OSError:
                    pass
        with contextlib.suppress(ProcessLookupError):  # it may have met the full disk itself
            os.kill(job, signal.SIGKILL)
        wait_until(lambda: not is_alive(job))
        with pytest.raises(AssertionError):  # nothing ends it, for as long as the disk is full
            wait_until(lambda: not run.is_live(), 3)
        (disk / "filler").unlink()
        record = checkout.end()
        assert record.state == "finished", run.supervisor_log.read_text()
        assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]
        assert [event for event in _events(checkout) if event == "failed"] == ["failed"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_worker_listens_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = threading.Event()
    monkeypatch.setattr(worker, "write_atomically", lambda path, text: room.wait(60) and path.write_text(text))
    run = RunDir(tmp_path)
    run.attempt(1).mkdir(parents=True)
    run.ask_file(1, "leave").touch()
    started = time.monotonic()
    look = worker._Look(run, attempt=1, host=0, job=123, forwarded=[])
    try:
        assert time.monotonic() - started < 10, "signals are not passed on meanwhile"
        wait_until(lambda: look.asked_to_leave, 10)
        assert not run.pid_file(1, 0).exists()
        room.set()
        wait_until(run.pid_file(1, 0).exists, 10)
    finally:
        look.over.set()


def test_a_stuck_process_is_named_and_outlived(checkout: Checkout) -> None:
    hang = ["--hang_at", "5", "--hang_host", "1", "--hang_attempts", "1", "--num_steps", "9"]
    checkout.submit("--set", "processes=2", "--set", "hang_timeout=3", "train_tokenizer_vqvae", *hang)
    record = checkout.end(seconds=60)
    assert record.state == "finished", checkout.directory().supervisor_log.read_text()
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]
    assert record.attempts[0].first_failed == 1
    assert "process 1 is still at step 5" in (record.attempts[0].cause or "")
    assert [event for event in _events(checkout) if event in ("hang", "failed")] == ["hang", "failed"]
    assert "in main" in checkout.directory().stacks(1, 1).read_text()


def test_a_torn_event_spoils_no_other(checkout: Checkout) -> None:
    checkout.submit("train_tokenizer_vqvae", "--num_steps", "40")
    checkout.at_step(3)
    append(checkout.directory().root / "events.jsonl", '{"time": 17')
    assert checkout.end().state == "finished"
    assert _events(checkout)[-2:] == ["host_exited", "finished"]


def test_of_two_that_fail_together_the_first_is_blamed_though_its_report_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.begin_attempt(1)
    attempt = Attempt(number=1, processes=2, devices_per_process=1, devices="CPU", code="x", nodes=[], started=0.0)

    def report(host: int, ended: float) -> None:
        one = HostExit(host=host, code=1, signal=None, forwarded=[], ended=ended)
        run.exit_file(1, host).write_text(one.model_dump_json())

    report(0, 2.001)
    monkeypatch.setattr(supervision, "time", SimpleNamespace(sleep=lambda seconds: report(1, 2.0)))
    waiting = {0, 1}
    assert collect_exits(run, attempt, waiting)
    assert (attempt.first_failed, waiting) == (1, set())
