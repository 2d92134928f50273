"""What happens to a run on Slurm, from submission to its end: a real cluster, real processes, a stand-in for the baseline."""

import getpass
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.record import read_record
from tests import jobs
from tests.clusters.slurm import SlurmCluster
from tests.launch.checkouts import Checkout, is_alive, wait_until
from tests.launch.slurm_login import at_step, end_all_jobs, events, job_id, login, steps, submit


def test_two_nodes_with_two_processes_each_run_to_the_end(here: Checkout, slurm: SlurmCluster) -> None:
    begin = time.monotonic()
    told = submit(here, "train_tokenizer_vqvae", "--num_steps", "5")
    print(f"submitted in {time.monotonic() - begin:.2f} s")
    assert "8 GPUs on 2 nodes, 4 processes" in told
    assert f"Slurm job {job_id(here)}" in told
    assert str(here.directory().root) in told
    record = here.end()
    assert (record.state, record.exit_code) == ("finished", 0), here.directory().supervisor_log.read_text()
    (attempt,) = record.attempts
    assert attempt.nodes == ["127.0.0.11", "127.0.0.11", "127.0.0.12", "127.0.0.12"]
    assert [(one.host, one.code, one.node) for one in sorted(attempt.exits, key=lambda one: one.host)] == [
        (host, 0, node) for host, node in enumerate(attempt.nodes)
    ]
    assert events(here)[:3] == ["submitted", "scheduled", "attempt_started"]
    wait_until(lambda: slurm.job_state(job_id(here)) == "COMPLETED")
    assert "4×2 GPU finished" in here.jobs("status", "r").stdout
    assert "[host-3] step 5" in here.jobs("logs", "r").stdout
    assert "finished" in here.jobs("list").stdout


def test_the_processes_are_told_who_they_are(here: Checkout) -> None:
    (here.home / "show.py").write_text(
        "import json, os, resource\n"
        "print(json.dumps(dict(os.environ, cwd=os.getcwd(), core=resource.getrlimit(resource.RLIMIT_CORE)[0])))\n"
    )
    (here.home / "key").write_text("from a file\n")
    outer = {
        "SLURM_NTASKS": "77",
        "SLURM_PROCID": "77",
        "SLURM_JOB_ID": "77",
        "SLURM_MEM_PER_NODE": "1",
        "SBATCH_PARTITION": "no",
    }
    here.env |= outer | {"API_TOKEN": "from the shell", "MINE": "kept"}
    secrets = ["--set", "secrets.API_TOKEN=environment", "--set", f"secrets.WANDB_API_KEY={here.home}/key"]
    submit(here, *secrets, "--set", "heartbeat_timeout=17", "--set", "env.EXTRA=5", "show.py")
    run = here.directory()
    assert here.end().state == "finished"
    seen = [json.loads(run.log(1, host).read_text()) for host in range(4)]
    assert [one["JAX_PROCESS_ID"] for one in seen] == ["0", "1", "2", "3"]
    assert [one["JAX_LOCAL_DEVICE_IDS"] for one in seen] == ["0,1", "2,3", "0,1", "2,3"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["0,1,2,3"] * 4
    assert {one["JAX_NUM_PROCESSES"] for one in seen} == {"4"}
    (coordinator,) = {one["JAX_COORDINATOR_ADDRESS"] for one in seen}
    assert coordinator.startswith("127.0.0.11:")
    assert {(one["JASMINE_HEARTBEAT_TIMEOUT"], one["EXTRA"], one["MINE"], one["core"]) for one in seen} == {
        ("17", "5", "kept", 0)
    }
    assert {(one["API_TOKEN"], one["WANDB_API_KEY"], one["cwd"]) for one in seen} == {
        ("from the shell", "from a file", str(here.home))
    }
    assert {one["SLURM_JOB_ID"] for one in seen} == {job_id(here)}
    assert "SLURM_MEM_PER_NODE" not in seen[0]
    kept = [path for path in run.root.rglob("*") if path.is_file() and not path.name.startswith("host-")]
    assert not [path for path in kept if b"from a file" in path.read_bytes() or b"from the shell" in path.read_bytes()]


def test_the_dry_run_is_what_is_submitted_and_needs_no_slurm(here: Checkout) -> None:
    arguments = ["--cluster", "slurm.yaml", "--set", "extra=['--exclusive']", "--set", "setup=['export A=1']"]
    arguments += ["--name", "r", "train_lam", "--num_steps", "1"]
    without = dict(here.env, PATH="/nowhere")
    dry = subprocess.run(
        here.argv("submit", *arguments[:4], "--dry-run", *arguments[4:]),
        cwd=here.home,
        env=without,
        capture_output=True,
    )
    assert dry.returncode == 0, dry.stderr
    assert not here.directory().root.exists()
    refused = subprocess.run(
        here.argv("submit", *arguments), cwd=here.home, env=without, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "no Slurm here" in refused.stderr
    assert not here.directory().root.exists(), "a refused submission left something behind"
    shown = here.run("submit", *arguments[:4], "--wait", *arguments[4:])
    assert (shown.returncode, "[host-3] step 1" in shown.stdout) == (0, True), shown.stderr
    (script,) = here.directory().root.glob("slurm/*submission.sh")
    assert script.read_bytes() == dry.stdout
    assert here.end().state == "finished"


def test_a_refusal_of_sbatch_is_one_line_and_leaves_nothing(here: Checkout) -> None:
    done = here.run("submit", "--cluster", "slurm.yaml", "--set", "partition=mian", "--name", "r", "train_lam")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "invalid partition specified: mian" in done.stderr
    assert not here.directory().root.exists()


@pytest.mark.slow
def test_a_higher_partition_preempts_and_the_run_goes_on(here: Checkout, slurm: SlurmCluster, tmp_path: Path) -> None:
    submit(here, "--set", "nodes=4", "--set", "processes_per_node=1", "train_lam", "--num_steps", "300")
    for host in range(4):
        at_step(here, 1, host=host)
    blocker = slurm.command(
        "sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2"
    ).strip()
    record = here.end(seconds=120)
    assert slurm.job_state(blocker) == "COMPLETED"
    assert record.state == "finished", here.directory().supervisor_log.read_text()
    assert [attempt.outcome for attempt in record.attempts] == ["preempted", "finished"]
    assert record.attempts[0].cause == "preempted by Slurm"
    # Slurm signals every process of a step, and the worker passes it on: the second one may find the job at its exit.
    assert {one.code for one in record.attempts[0].exits} <= {75, 143}
    assert steps(here) == list(range(1, 301))


@pytest.mark.slow
def test_cancel_saves_and_stops_a_run_and_takes_a_waiting_one_from_the_queue(
    here: Checkout, slurm: SlurmCluster
) -> None:
    submit(here, "train_lam", "--num_steps", "2000")
    submit(here, "--set", "nodes=4", "--set", "extra=['--exclusive']", "train_lam", name="waits")
    for host in range(4):
        at_step(here, 2, host=host)
    # Slurm gives its reason when it has looked at the queue.
    wait_until(lambda: "Resources" in slurm.command("squeue", "-h", "-t", "PD", "-o", "%r"))
    shown = here.jobs("status", "waits").stdout
    assert "waits: submitted" in shown
    assert "waiting: as many nodes as it asks for are not free yet (Resources)" in shown
    assert "It is in the queue, waiting: as many" in here.jobs("explain", "waits").stdout
    assert "in use" in here.run("submit", "--cluster", "local", "--name", "waits", "train_lam").stderr
    done = here.jobs("cancel", "waits")
    assert (done.returncode, "cancelled" in done.stdout) == (0, True)
    assert read_record(here.directory("waits")).state == "cancelled"  # type: ignore[union-attr]
    done = here.jobs("cancel", "r")
    assert (done.returncode, "r: cancelled" in done.stdout) == (0, True)
    assert "saved at step" in here.directory().log(1, 3).read_text()
    wait_until(lambda: not slurm.command("squeue", "-h").strip())

    resumed = here.jobs("resume", "r", "--cluster", "local", "--wait", "--num_steps", "40")
    assert resumed.returncode == 0, resumed.stderr
    assert read_record(here.directory()).attempts[1].processes == 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_time_limit_is_warned_of_and_survived(here: Checkout, slurm: SlurmCluster) -> None:
    # Slurm warns up to a minute early, and this limit is one minute.
    submit(
        here,
        "--set",
        "partition=short",
        "--set",
        "time_limit=1:00",
        "--set",
        "nodes=1",
        "train_lam",
        "--num_steps",
        "9000",
    )
    wait_until(lambda: here.directory().attempts() == [1, 2], 90)
    record = read_record(here.directory())
    assert record is not None
    assert (record.attempts[0].outcome, record.attempts[0].cause) == ("preempted", "time limit")
    assert here.jobs("cancel", "r").returncode == 0


@pytest.mark.slow
def test_scontrol_requeue_is_not_an_end_and_scancel_is(here: Checkout, slurm: SlurmCluster) -> None:
    submit(here, "train_lam", "--num_steps", "2000")
    for host in range(4):
        at_step(here, 1, host=host)
    slurm.command("scontrol", "requeue", job_id(here))
    wait_until(lambda: here.directory().attempts() == [1, 2], 60)
    before = steps(here)[-1]
    at_step(here, before + 20, attempt=2)
    first = read_record(here.directory()).attempts[0]  # type: ignore[union-attr]
    assert first.outcome == "preempted"
    assert steps(here)[: before + 20] == list(range(1, before + 21))
    slurm.command("scancel", job_id(here))
    record = here.end()
    assert (record.state, len(record.attempts)) == ("cancelled", 2)
    assert "cancelled in Slurm" in here.jobs("explain", "r").stdout or "cancelled" in here.jobs("status", "r").stdout


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 3])
def test_a_killed_process_costs_one_restart(here: Checkout, host: int) -> None:
    submit(here, "train_lam", "--num_steps", "60")
    at_step(here, 2)
    os.kill(here.job_pid(host=host), signal.SIGKILL)
    record = here.end(seconds=90)
    assert record.state == "finished", here.directory().supervisor_log.read_text()
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]
    failed = record.attempts[0]
    assert failed.first_failed == host
    assert [(blame.node, blame.reason) for blame in record.blames] == [
        (failed.nodes[host], f"process {host} died of SIGKILL")
    ]


@pytest.mark.slow
def test_an_exception_on_one_process_ends_the_job_quickly_and_a_mistake_for_good(here: Checkout) -> None:
    submit(
        here,
        "--set",
        "max_failures=0",
        "train_lam",
        "--num_steps",
        "2000",
        "--crash_at",
        "3",
        "--crash_host",
        "2",
        "--crash_attempts",
        "9",
    )
    submit(here, "--after", "r", "train_lam", name="next")
    log = here.directory().log(1, 2)
    wait_until(lambda: log.exists() and "ValueError" in log.read_text())
    begin = time.monotonic()
    record = here.end()
    assert time.monotonic() - begin < 20
    assert (record.state, record.exit_code, record.attempts[0].first_failed) == ("failed", 1, 2)
    assert record.blames == [], "an exception is not the node's fault"
    explained = here.jobs("explain", "r").stdout
    for part in ("host 2 of 4 on 127.0.0.12 failed first", "ValueError: no more at step 3", "max_failures: 0"):
        assert part in explained
    assert here.end("next").state == "cancelled"
    assert "(not started: a run that it was to follow did not finish)" in here.jobs("explain", "next").stdout

    submit(here, "train_lam", "--crash_at", "0", "--crash_code", "2", name="mistake")
    record = here.end("mistake")
    assert (record.state, record.exit_code, len(record.attempts)) == ("failed", 2, 1)


@pytest.mark.slow
def test_a_node_that_failed_twice_is_left_out(here: Checkout) -> None:
    submit(here, "--set", "max_failures=9", "train_lam", "--num_steps", "80")
    for attempt in (1, 2):
        log = here.directory().log(attempt, 3)
        wait_until(lambda log=log: log.exists() and "step" in log.read_text(), 60)  # type: ignore[misc]
        os.kill(here.job_pid(host=3, attempt=attempt), signal.SIGKILL)
    record = here.end(seconds=90)
    assert record.state == "finished", here.directory().supervisor_log.read_text()
    assert [blame.node for blame in record.blames] == ["127.0.0.12"] * 2
    assert set(record.attempts[1].nodes) == {"127.0.0.11", "127.0.0.12"}
    assert "127.0.0.12" not in record.attempts[2].nodes
    assert "excluded" in events(here)


@pytest.mark.slow
def test_a_stuck_process_is_named_and_outlived(here: Checkout) -> None:
    hang = ["--hang_at", "5", "--hang_host", "2", "--hang_attempts", "1", "--num_steps", "9"]
    submit(here, "--set", "hang_timeout=4", "train_lam", *hang)
    record = here.end(seconds=90)
    assert record.state == "finished", here.directory().supervisor_log.read_text()
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]
    assert record.attempts[0].first_failed == 2
    assert "process 2 is still at step 5, on 127.0.0.12" in (record.attempts[0].cause or "")
    assert "hang" in events(here)
    assert "in main" in here.directory().stacks(1, 2).read_text()
    assert [blame.node for blame in record.blames] == ["127.0.0.12"]


@pytest.mark.slow
def test_killed_daemons_of_nodes_cost_nothing_and_a_node_that_stays_down_one_restart(
    here: Checkout, slurm: SlurmCluster
) -> None:
    submit(here, "--set", "processes_per_node=1", "train_lam", "--num_steps", "9000")
    for host in range(2):
        at_step(here, 2, host=host)
    first, second = slurm.nodes[:2]
    zombie = here.job_pid(host=1)
    try:
        for node in (first, second):
            slurm.kill_node(node)
        at_step(here, steps(here)[-1] + 5)
        slurm.start_node(first)
        wait_until(lambda: "*" not in slurm.command("sinfo", "-h", "-n", first, "-o", "%t"))  # it answers
        assert here.directory().attempts() == [1]
        assert "r: running" in here.jobs("status", "r").stdout
        slurm.command("scontrol", "update", f"nodename={second}", "state=down", "reason=test")
        wait_until(lambda: here.directory().attempts() == [1, 2], 180)
        wait_until(lambda: not is_alive(zombie), 5)  # nobody on its node could end it
        at_step(here, steps(here)[-1] + 2, attempt=2)
        assert here.jobs("cancel", "r").returncode == 0
    finally:
        slurm.start_node(second)
        end_all_jobs(slurm)
        wait_until(lambda: slurm.states() == ["idle"] * len(slurm.nodes))
    record = here.end()
    assert [attempt.outcome for attempt in record.attempts] == ["preempted", "preempted"]
    assert record.attempts[0].cause == f"lost its node {second}"
    assert second not in record.attempts[1].nodes
    assert [blame.node for blame in record.blames] == [second]


@pytest.mark.slow
def test_mail_and_reservation_reach_slurm(here: Checkout, slurm: SlurmCluster) -> None:
    node = slurm.nodes[-1]
    slurm.command(
        "scontrol", "create", "reservation", "reservationname=mine", "starttime=now", "duration=10",
        f"nodes={node}", f"users={getpass.getuser()}",
    )  # fmt: skip
    try:
        keys = ["nodes=1", "processes_per_node=1", "mail=me@example.org", "reservation=mine"]
        sets = [part for key in keys for part in ("--set", key)]
        submit(here, *sets, "train_lam", "--num_steps", "1")
        assert here.end().attempts[0].nodes == [node]
        told = f"Job_id={job_id(here)} Name=r Ended"
        wait_until(lambda: slurm.mails.exists() and told in slurm.mails.read_text())
        assert slurm.mails.read_text().rstrip().endswith("me@example.org")
        refused = here.run("submit", "--cluster", "slurm.yaml", *sets, "--set", "reservation=yours", "train_lam")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "Requested reservation is invalid" in refused.stderr
    finally:
        end_all_jobs(slurm)
        slurm.command("scontrol", "delete", "reservationname=mine")


@pytest.mark.slow
def test_a_scheduler_that_is_away_loses_nothing(here: Checkout, slurm: SlurmCluster) -> None:
    submit(here, "train_lam", "--num_steps", "9000")
    submit(here, "--set", "nodes=4", "--set", "extra=['--exclusive']", "train_lam", name="waits")
    at_step(here, 2)
    slurm.stop_controller()
    try:
        before = here.directory("waits").record.read_bytes()
        commands = {
            ("jobs", "status", "r"): (0, "r: running"),
            ("jobs", "status", "waits"): (0, "waits: submitted"),
            ("jobs", "list"): (0, "waits"),
            ("jobs", "cancel", "waits"): (2, "Slurm does not answer"),
            ("submit", "--cluster", "local", "--name", "waits", "train_lam"): (2, "in use"),
        }
        with ThreadPoolExecutor() as pool:  # each of them waits for an answer for seconds
            done = dict(zip(commands, pool.map(lambda command: here.run(*command), commands), strict=True))
        for command, (code, words) in commands.items():
            assert done[command].returncode == code, (command, done[command])
            assert words in done[command].stdout + done[command].stderr
        assert "Slurm does not answer" in done["jobs", "status", "r"].stdout
        begin = time.monotonic()
        assert here.jobs("--help").returncode == 0
        start = time.monotonic() - begin
        assert here.jobs("list").stderr.count("Slurm does not answer") == 1
        assert time.monotonic() - begin < 9 + 2 * start, "it waited for more than one answer"
        assert here.directory("waits").record.read_bytes() == before
        at_step(here, steps(here)[-1] + 2)
    finally:
        slurm.start_controller()
    here.directory("waits").cancel_request.unlink(missing_ok=True)
    assert "waits: submitted" in here.jobs("status", "waits").stdout
    assert here.jobs("cancel", "waits").returncode == 0
    assert here.jobs("cancel", "r").returncode == 0


@pytest.mark.slow
def test_what_the_controller_has_forgotten_is_in_the_accounts(
    checkout: Checkout, slurm_with_accounts: SlurmCluster
) -> None:
    slurm = slurm_with_accounts
    login(checkout, slurm)
    charged = ["--set", "account=lab", "--set", "qos=hurry"]
    refused = checkout.run("submit", "--cluster", "slurm.yaml", "--name", "no", "--set", "qos=late", "train_lam")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "Invalid qos specification" in refused.stderr
    submit(checkout, *charged, "--set", "extra=['--exclusive']", "train_lam", "--num_steps", "3000", name="busy")
    known = slurm.command("scontrol", "-o", "show", "job", job_id(checkout, "busy"))
    assert " Account=lab QOS=hurry " in known
    submit(checkout, "--set", "extra=['--exclusive']", "train_lam", name="waits")
    at_step(checkout, 2, name="busy")
    slurm.command("scancel", job_id(checkout, "waits"))
    wait_until(lambda: not slurm.job_state(job_id(checkout, "waits")), 60)
    assert "waits: cancelled" in checkout.jobs("status", "waits").stdout
    assert "its job was cancelled in Slurm" in checkout.jobs("explain", "waits").stdout
    assert checkout.jobs("cancel", "busy").returncode == 0
    resumed = checkout.jobs("resume", "waits", "--num_steps", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert checkout.end("waits").state == "finished"


@pytest.mark.slow
def test_lost_nodes_are_outlived_and_their_processes_fenced_off(
    checkout: Checkout, slurm_with_cables: SlurmCluster
) -> None:
    slurm = slurm_with_cables
    one, two, three, four = slurm.nodes
    login(checkout, slurm)
    settings = ["--set", "processes_per_node=1", "--set", "grace_seconds=2"]
    lost = {"supervised": (one, 0), "other": (three, 1)}  # the first has the run's supervisor, the second has not
    submit(checkout, *settings, "train_lam", "--num_steps", "9000", "--deaf", "1", name="supervised")
    submit(
        checkout, *settings, "--set", f"exclude={one}", "train_lam", "--num_steps", "9000", "--deaf", "1", name="other"
    )
    zombies = []
    for name, (_, index) in lost.items():
        at_step(checkout, 2, host=index, name=name)
        zombies.append(checkout.job_pid(host=index, name=name))
    for node, _ in lost.values():
        slurm.pull_cable(node)
    for name in lost:
        wait_until(lambda name=name: checkout.directory(name).attempts() == [1, 2], 120)  # type: ignore[misc]
    wait_until(lambda: not any(map(is_alive, zombies)), 5)  # they would go on beside attempt 2
    for name, (node, _) in lost.items():
        at_step(checkout, 2, attempt=2, host=1, name=name)
        assert node in checkout.jobs("status", name).stdout
        assert checkout.jobs("cancel", name).returncode == 0
        record = checkout.end(name)
        assert [attempt.number for attempt in record.attempts] == [1, 2], "the zombie's supervisor wrote the record"
        assert record.attempts[1].nodes == [two, four]
        assert record.attempts[0].cause == f"lost its node {node}"
        assert [blame.node for blame in record.blames] == [node]


@pytest.mark.slow
def test_a_node_that_comes_back_is_used_again_only_where_there_is_no_other(
    checkout: Checkout, slurm_with_cables: SlurmCluster
) -> None:
    """Its slurmd kills what it still has of the job, and what is started there meanwhile."""
    slurm = slurm_with_cables
    login(checkout, slurm)
    keys = ["--set", "processes_per_node=1", "--set", "grace_seconds=2", "--set", "max_failures=0"]
    submit(checkout, *keys, "train_lam", "--num_steps", "9000", "--deaf", "1")
    run = checkout.directory()
    lost: list[str] = []
    for attempt in (1, 2, 3):
        at_step(checkout, 2, host=1, attempt=attempt)
        nodes = jobs.events(run.root, "scheduled")[-1]["nodes"]
        assert not set(lost) & set(nodes)
        if attempt == 2:
            slurm.bring_back(lost)
        if attempt == 3:  # the only other one left is one that has only just come back
            slurm.pull_cable(lost[0])
            slurm.plug_cable(lost[1])
        lost.append(nodes[1])
        slurm.pull_cable(nodes[1])
    wait_until(lambda: run.newest_attempt() > 3, 180)
    # Longer than its slurmd waits from one kill to the next.
    wait_until(lambda: (run.beat(run.newest_attempt(), 1) or {"step": 0})["step"] >= 400, 240)
    assert checkout.jobs("cancel", "r").returncode == 0
    attempts = checkout.end().attempts
    assert {tuple(attempt.nodes) for attempt in attempts[3:]} == {(nodes[0], lost[1])}
    assert {attempt.outcome for attempt in attempts} == {"preempted"}, "one counts as a failure"
    killed = f"{lost[1]}, which it had lost, still ends what it ran of this job"
    assert [attempt.cause for attempt in attempts[3:-1]] == [killed] * (len(attempts) - 4)
