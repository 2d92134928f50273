"""What happens to a run on Cloud TPU, from submission to its end: the real client, real startup scripts, VMs that are
processes, and a stand-in for the baseline."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from google.auth.exceptions import RefreshError

from launch.backends import cloud_tpu as backend
from launch.backends import cloud_tpu_vm
from launch.backends.cloud_tpu import Leaving, Rented, read_resource, watched_by, write_resource
from launch.backends.cloud_tpu_api import NoAnswerError, Resource, Tpus
from launch.backends.cloud_tpu_watch import _Claim, _Watcher
from launch.config import CloudTpuCluster
from launch.record import read_record
from launch.run_dir import RunDir
from launch.standing import read_standing
from tests.clusters.cloud_tpu import CloudTpu, running_cloud_tpu
from tests.launch.checkouts import Checkout, wait_until
from tests.launch.conftest import REPOSITORY
from tests.launch.tpu_laptop import at_step, creations, end_watcher, events, laptop, resource, steps, steps_in, submit
from tests.launch.tpus import CLUSTER


@pytest.fixture
def here(checkout: Checkout, cloud_tpu: CloudTpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    with laptop(checkout, cloud_tpu, monkeypatch):
        yield checkout


def test_a_watcher_that_died_unnoticed_by_its_parent_watches_no_more(here: Checkout) -> None:
    run = here.directory()
    run.root.mkdir(parents=True)
    watcher = subprocess.Popen(["sleep", "600"])
    claim = {"host": socket.gethostname(), "pid": watcher.pid}
    stat = Path(f"/proc/{watcher.pid}/stat")
    claim["started"] = int(stat.read_text().rpartition(")")[2].split()[19])
    run.watcher.parent.mkdir(parents=True, exist_ok=True)
    run.watcher.write_text(json.dumps(claim))
    assert watched_by(run) == claim
    watcher.kill()
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
    assert watched_by(run) is None
    watcher.wait()
    assert watched_by(run) is None


def test_a_watcher_elsewhere_watches_as_long_as_it_renews_its_claim(here: Checkout) -> None:
    run = here.directory()
    run.watcher.parent.mkdir(parents=True)
    claim = {"host": "elsewhere", "pid": 1, "started": 1}
    run.watcher.write_text(json.dumps(claim))
    assert watched_by(run) == claim
    os.utime(run.watcher, (time.time() - 1000,) * 2)
    assert watched_by(run) is None


def test_a_pod_runs_to_the_end_and_deletes_itself(here: Checkout, cloud_tpu: CloudTpu) -> None:
    begin = time.monotonic()
    told = submit(here, "train_tokenizer_vqvae", "--num_steps", "5")
    print(f"submitted in {time.monotonic() - begin:.2f} s\n{told}")
    assert "v5litepod-16: 16 v5e chips on 4 VMs" in told
    assert "16 chips billed on demand" in told
    assert str(here.directory().root) in told
    record = here.end()
    assert (record.state, record.exit_code) == ("finished", 0), here.directory().supervisor_log.read_text()
    (attempt,) = record.attempts
    assert sorted((one.host, one.code) for one in attempt.exits) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert steps(here) == [1, 2, 3, 4, 5]
    for host in range(4):
        assert "step 5" in here.directory().log(1, host).read_text()
    assert here.jobs("logs", "r", "--host", "2").stdout.splitlines()[-1] == "step 5"
    assert {line.split()[0] for line in here.jobs("logs", "r").stdout.splitlines()} == {f"[host-{i}]" for i in range(4)}
    cloud_tpu.wait(resource(here), None)
    wait_until(lambda: watched_by(here.directory()) is None, 30)

    over = here.directory().tpu_over(resource(here))
    over.unlink()  # as if the supervisor had been killed between its last two writes; another one takes its place
    script = REPOSITORY / "launch" / "backends" / "cloud_tpu_supervisor.py"
    command = [sys.executable, str(script), "--run_dir", str(here.directory().root), "--resource", resource(here)]
    assert subprocess.run(command, env=here.env, timeout=20).returncode == 0
    assert json.loads(over.read_text())["why"] == "finished"
    assert read_record(here.directory()) == record
    assert events(here) == ["submitted", "tpu_requested", "scheduled", "attempt_started", "finished"]


@pytest.mark.slow
def test_two_slices_are_one_job(here: Checkout, cloud_tpu: CloudTpu) -> None:
    told = here.submit(
        "--set",
        "slices=2",
        "--set",
        "accelerator_type=v5litepod-8",
        "train_tokenizer_vqvae",
        "--num_steps",
        "3",
        cluster="tpu.yaml",
    ).stdout
    assert "2 slices, each v5litepod-8: 8 v5e chips on 1 VM" in told
    record = here.end()
    assert record.state == "finished", here.directory().supervisor_log.read_text()
    assert sorted(one.host for one in record.attempts[0].exits) == [0, 1]
    cloud_tpu.wait(resource(here), None)


@pytest.mark.slow
def test_preempted_twice_it_goes_on_on_another_tpu_each_time(here: Checkout, cloud_tpu: CloudTpu) -> None:
    submit(here, "train_tokenizer_vqvae", "--num_steps", "120")
    for attempt in (1, 2):
        log = here.directory().log(attempt, 2)
        wait_until(lambda log=log: log.exists() and log.read_text().count("\nstep ") >= 5, 180)  # type: ignore[misc]
        cloud_tpu.preempt(resource(here), grace=6)
        wait_until(lambda attempt=attempt: here.directory().go_file(attempt + 1).exists(), 180)  # type: ignore[misc]
    record = here.end(seconds=180)
    assert record.state == "finished", (here.directory().root / "watcher.log").read_text()
    assert [one.outcome for one in record.attempts] == ["preempted", "preempted", "finished"]
    assert steps(here) == list(range(1, 121))  # saved when it was warned, and went on from there
    assert creations(cloud_tpu) == [f"{resource(here)[:-1]}{number}" for number in (1, 2, 3)]
    cloud_tpu.wait(resource(here), None)
    # The supervisor would go on on the same TPU, and sometimes has time to say so.
    found = [event for event in events(here) if event != "restarted"]
    lost = ["scheduled", "attempt_started", "preempted", "tpu_gone", "tpu_requested", "replaced"]
    assert found == ["submitted", "tpu_requested", *lost, *lost, "scheduled", "attempt_started", "finished"]


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_on_the_same_tpu(here: Checkout, cloud_tpu: CloudTpu) -> None:
    submit(
        here, "train_tokenizer_vqvae", "--num_steps", "40", "--crash_at", "10", "--crash_host", "2", "--crash_code", "9"
    )
    record = here.end(seconds=180)
    assert record.state == "finished"
    first, second = record.attempts
    assert (first.outcome, first.first_failed, second.outcome) == ("failed", 2, "finished")
    assert creations(cloud_tpu) == [resource(here)]


@pytest.mark.slow
def test_a_job_that_keeps_failing_ends_and_gives_the_tpu_back(here: Checkout, cloud_tpu: CloudTpu) -> None:
    here.submit(
        "--set", "max_failures=1", "train_tokenizer_vqvae", "--num_steps", "40", "--crash_at", "3", "--crash_host", "1",
        "--crash_attempts", "9", cluster="tpu.yaml",
    )  # fmt: skip
    record = here.end(seconds=180)
    assert (record.state, record.exit_code) == ("failed", 1)
    assert "max_failures: 1" in (record.reason or "")
    explained = here.jobs("explain", "r").stdout
    assert "host 1 of 4" in explained
    assert "ValueError: no more at step 3" in explained
    cloud_tpu.wait(resource(here), None)


@pytest.mark.slow
def test_a_vm_that_is_rebooted_joins_again(here: Checkout, cloud_tpu: CloudTpu) -> None:
    submit(here, "train_tokenizer_vqvae", "--num_steps", "100000")
    at_step(here, 5, host=3)
    cloud_tpu.reboot(resource(here), 3)
    steps_in(here, 2, host=3)
    cloud_tpu.reboot(resource(here), 0)  # that of the supervisor
    steps_in(here, 3)
    record = read_record(here.directory())
    assert record is not None
    assert record.supervisor is not None
    os.kill(record.supervisor.pid, signal.SIGKILL)  # that alone
    steps_in(here, 4)
    assert here.jobs("cancel", "r").returncode == 0
    record = read_record(here.directory())
    assert record is not None
    assert [one.outcome for one in record.attempts] == ["preempted"] * 4
    causes = [
        f"VM 3 ({socket.gethostname()}) was rebooted or is gone",
        "VM 0 was rebooted",
        "its supervisor was killed",
    ]
    assert [one.cause for one in record.attempts[:3]] == causes
    assert creations(cloud_tpu) == [resource(here)]
    lost = ["failed", "vm_lost", "preempted", "restarted", "attempt_started"]
    settled = ["preempted", "scheduled", "attempt_started"]
    begun = ["submitted", "tpu_requested", "scheduled", "attempt_started"]
    assert events(here) == [*begun, *lost, *settled, *settled, "signalled", "preempted", "cancelled"]
    failed = next(event for event in here.directory().events() if event["event"] == "failed")
    assert (failed["host"], failed["cause"]) == (3, causes[0])


@pytest.mark.slow
def test_a_vm_that_is_gone_for_good_costs_a_new_tpu(here: Checkout, cloud_tpu: CloudTpu) -> None:
    here.submit("--set", "boot_timeout=15", "train_tokenizer_vqvae", "--num_steps", "100", cluster="tpu.yaml")
    at_step(here, 5, host=1)
    first = resource(here)
    cloud_tpu.kill_vm(first, 1)
    record = here.end(seconds=240)
    assert record.state == "finished"
    assert resource(here) != first
    assert cloud_tpu.state(first) is None
    assert record.attempts[0].cause is not None
    assert "VM 1" in record.attempts[0].cause
    begun = ["tpu_requested", "scheduled", "attempt_started"]
    gone = ["failed", "vm_lost", "preempted", "restarted", "vm_missing", "tpu_gone"]
    again = ["tpu_requested", "replaced", "scheduled", "attempt_started", "finished"]
    assert events(here) == ["submitted", *begun, *gone, *again]


@pytest.mark.slow
def test_what_cannot_be_provided_is_tried_elsewhere_or_told(here: Checkout, cloud_tpu: CloudTpu) -> None:
    cloud_tpu.fail_provisioning("There is no more capacity in the zone", count=1)
    here.submit(
        "--set", "zone=[us-west4-a, us-central1-a]", "train_tokenizer_vqvae", "--num_steps", "3", cluster="tpu.yaml"
    )
    record = here.end(seconds=180)
    assert record.state == "finished"
    rented = read_resource(here.directory())
    assert rented is not None
    assert (rented.zone, rented.number) == ("us-central1-a", 2)

    cloud_tpu.fail_provisioning("Permission denied on the network", code=7, count=2)
    here.submit("--set", "max_failures=1", "train_tokenizer_vqvae", name="denied", cluster="tpu.yaml")
    record = here.end("denied", seconds=180)
    assert record.state == "failed"
    assert "Permission denied on the network" in (record.reason or "")
    assert "max_failures: 1" in (record.reason or "")
    assert list(cloud_tpu.resources().values()).count("ACTIVE") == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
def test_cancel_deletes_the_tpu_in_every_state(here: Checkout, cloud_tpu: CloudTpu, state: str) -> None:
    if state != "ACTIVE":
        cloud_tpu.hold(state)
    submit(here, "train_tokenizer_vqvae", "--num_steps", "100000")
    if state == "ACTIVE":
        at_step(here, 5)
    else:
        cloud_tpu.wait(resource(here), state)
        told = here.jobs("explain", "r").stdout
        assert "waiting since" in told
        assert state in told
    done = here.jobs("cancel", "r")
    assert done.returncode == 0, done.stderr
    assert "cancelled" in done.stdout, done.stdout
    assert cloud_tpu.state(resource(here)) is None
    record = read_record(here.directory())
    assert record is not None
    assert record.state == "cancelled"
    if state == "ACTIVE":
        assert "saved at step" in here.directory().log(1, 3).read_text()


@pytest.mark.slow
def test_a_closed_laptop_leaks_nothing_and_another_shell_goes_on(here: Checkout, cloud_tpu: CloudTpu) -> None:
    submit(here, "train_tokenizer_vqvae", "--num_steps", "30")
    end_watcher(here)
    record = here.end(seconds=180)  # without any launcher
    assert record.state == "finished"
    cloud_tpu.wait(resource(here), None)

    submit(here, "train_tokenizer_vqvae", "--num_steps", "2000", name="again")
    at_step(here, 5, name="again")
    end_watcher(here, "again")
    cloud_tpu.preempt(resource(here, "again"))
    cloud_tpu.wait(resource(here, "again"), "SUSPENDED")
    told = here.jobs("status", "again").stdout
    assert "jobs.py watch again" in told
    noted = here.directory("again").tpu_resource
    sound = noted.read_text()
    for damaged in ("{}", sound[:9]):  # not taken for a run without a TPU
        noted.write_text(damaged)
        assert f"{noted}: damaged: " in here.jobs("status", "again").stdout
        assert {"r", "again"} <= {line.split()[0] for line in here.jobs("list").stdout.splitlines() if line}
    noted.write_text(sound)
    leaked = here.jobs("gc", "--cluster", str(here.home / "tpu.yaml"))
    assert f"{resource(here, 'again')} in us-west4-a: SUSPENDED, it is SUSPENDED, and nothing watches" in leaked.stdout
    with subprocess.Popen(here.argv("jobs", "watch", "again"), cwd=here.home, env=here.env) as watcher:
        wait_until(lambda: here.directory("again").go_file(2).exists(), 180)
        other = here.jobs("watch", "again")
        assert other.returncode == 2
        assert "is watched already, by process" in other.stderr
        assert here.jobs("cancel", "again").returncode == 0
        assert watcher.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("accident", "type"), [("reboot", "v5litepod-8"), ("kill_vm", "v5litepod-16")])
def test_a_run_that_is_over_gives_its_tpu_back_whatever_becomes_of_vm_0(
    here: Checkout, cloud_tpu: CloudTpu, accident: str, type: str
) -> None:
    options = ["--set", f"accelerator_type={type}", "--set", "silent_timeout=1"]
    here.submit(*options, "train_tokenizer_vqvae", "--num_steps", "20", cluster="tpu.yaml")
    end_watcher(here)
    at_step(here, 5)
    cloud_tpu.latency(300)  # so that VM 0 is still asking when it happens
    wait_until(here.directory().tpu_over(resource(here)).exists)
    wait_until(lambda: any(one["status"] == 0 for one in cloud_tpu.requests))
    getattr(cloud_tpu, accident)(resource(here), 0)
    cloud_tpu.latency(0)
    cloud_tpu.wait(resource(here), None)


def test_a_watcher_outlasts_what_it_cannot_read(here: Checkout, cloud_tpu: CloudTpu) -> None:
    cloud_tpu.hold("WAITING_FOR_RESOURCES")
    submit(here, "train_tokenizer_vqvae", "--num_steps", "3")
    run = here.directory()
    away = run.record.rename(run.record.with_name("away"))
    run.record.mkdir()
    wait_until(lambda: "run.json: cannot be read" in run.watcher_log.read_text())
    run.record.rmdir()
    away.rename(run.record)
    run.cancel_request.touch()
    wait_until(lambda: watched_by(run) is None)
    assert read_standing(run).record.state == "cancelled"
    assert run.watcher_log.read_text().endswith(" r: cancelled\n")
    assert not cloud_tpu.resources()


def test_clocks_that_differ_neither_delete_a_tpu_unsaved_nor_charge_its_loss_to_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = RunDir(tmp_path / "r"), yaml.safe_load(CLUSTER)
    rented = Rented("j-r-1", "us-west4-a", 1, created=time.time() + 1000)  # by the clock of whoever asked for it
    for path in (run.tpu_vm("j-r-1", 0), run.go_file(1)):
        path.parent.mkdir(parents=True)
    write_resource(run, rented)
    run.go_file(1).write_text(json.dumps({"resource": "j-r-1"}))

    deleted = []
    tpus = SimpleNamespace(get=lambda zone, id: Resource(id, zone, "ACTIVE"), delete=lambda *what: deleted.append(what))
    monkeypatch.setattr(backend, "Tpus", lambda _: tpus)
    record = SimpleNamespace(submissions=[SimpleNamespace(plan=SimpleNamespace(settings=settings))])
    run.tpu_vm("j-r-1", 0).write_text(json.dumps({"time": time.time() - 1000}))
    backend.cancel(run, record)  # type: ignore[arg-type]
    assert not deleted
    silent = time.time() - 60
    os.utime(run.tpu_vm("j-r-1", 0), (silent, silent))
    backend.cancel(run, record)  # type: ignore[arg-type]
    assert deleted == [("us-west4-a", "j-r-1")]

    watcher = _Watcher(run, _Claim(run, "me"))
    for id, counts in (("j-r-1", "preempted"), ("j-r-2", "failed")):
        run.tpu_over(id).parent.mkdir(exist_ok=True)
        run.tpu_over(id).write_text(json.dumps({"why": "replace", "reason": "VM 1 is gone"}))
        leaving = watcher._why_leave(CloudTpuCluster.model_validate(settings), dataclasses.replace(rented, id=id), None)
        assert leaving == Leaving("VM 1 is gone", counts)  # type: ignore[arg-type]


def test_a_tpu_that_nothing_can_supervise_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_tpu_vm, "vm_number", lambda _: 0)
    monkeypatch.setattr(cloud_tpu_vm, "UNSUPERVISED_SECONDS", 3.0)
    plan = SimpleNamespace(settings=yaml.safe_load(CLUSTER))
    agent = cloud_tpu_vm._Agent(RunDir(tmp_path / "r"), plan, "j-r-1", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="no supervisor stays alive"):  # what follows is up to the startup script
        agent.serve()
    assert agent.supervisor is not None
    assert agent.supervisor.wait(20) == 1


def test_a_login_that_has_expired_is_no_answer() -> None:
    tpus = Tpus("lab")

    def refuse(**_: object) -> None:
        raise RefreshError("invalid_grant: Bad Request", {"error": "invalid_grant"})

    tpus._made = SimpleNamespace(get_queued_resource=refuse)
    with pytest.raises(NoAnswerError, match=r"login does not work: invalid_grant: Bad Request$"):
        tpus.get("us-west4-a", "j-r-1")


@pytest.mark.slow
def test_a_run_moves_from_the_tpu_to_this_machine_and_to_a_larger_tpu(here: Checkout, cloud_tpu: CloudTpu) -> None:
    submit(here, "train_tokenizer_vqvae", "--num_steps", "100000")
    at_step(here, 10)
    assert here.jobs("cancel", "r").returncode == 0
    reached = steps(here)[-1]
    done = here.jobs("resume", "r", "--cluster", "local", "--wait", "--num_steps", str(reached + 10))
    assert done.returncode == 0, done.stderr
    done = here.jobs(
        "resume", "r", "--cluster", str(here.home / "tpu.yaml"), "--set", "accelerator_type=v5litepod-32", "--wait",
        "--num_steps", str(reached + 20),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps(here) == list(range(1, reached + 21))
    record = read_record(here.directory())
    assert record is not None
    assert [one.processes for one in record.attempts] == [4, 1, 8]


@pytest.mark.slow
def test_a_vm_installs_the_locked_environment_once(checkout: Checkout, tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "requirements.lock", checkout.root)
    (checkout.home / "tpu.yaml").write_text(CLUSTER.replace(f"python: {sys.executable}\n", "").replace("-16", "-4"))
    # How this machine reaches a package index, and what it has fetched from there already.
    passed = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_")) and "VIRTUAL" not in k}
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    with running_cloud_tpu(tmp_path / "cloud", vm_env={"UV_CACHE_DIR": cache, **passed}) as cloud:
        checkout.env.update(cloud.env | {"JASMINE_WATCH_SECONDS": "0.3"})
        arguments = ["--set", "boot_timeout=600", "train_tokenizer_vqvae", "--num_steps", "100000"]
        checkout.submit(*arguments, cluster="tpu.yaml")
        log = checkout.directory().log(1, 0)
        wait_until(lambda: log.exists() and "step 5\n" in log.read_text(), 300)
        (vm,) = cloud.vms(resource(checkout))
        environment = vm.disk / "jasmine" / "environment"
        assert f"/{(environment / 'bin' / 'python').relative_to(vm.disk)}" in _command_line(checkout.job_pid())
        made = (environment / ".locked").stat().st_mtime
        cloud.reboot(resource(checkout), 0)
        begin = time.monotonic()
        again = checkout.directory().log(2, 0)
        wait_until(lambda: again.exists() and "\nstep " in again.read_text(), 180)
        print(f"a step {time.monotonic() - begin:.1f} s after a reboot")
        assert (environment / ".locked").stat().st_mtime == made
        assert checkout.jobs("cancel", "r").returncode == 0
        wait_until(lambda: watched_by(checkout.directory()) is None, 30)


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.slow
def test_a_tpu_that_somebody_deletes_is_not_rented_again(here: Checkout, cloud_tpu: CloudTpu) -> None:
    submit(here, "train_tokenizer_vqvae", "--num_steps", "100000")
    at_step(here, 5)
    Tpus("lab").delete("us-west4-a", resource(here))
    record = here.end(seconds=180)
    assert (record.state, record.reason) == ("cancelled", "its TPU was deleted, by neither its VMs nor its watcher")
    wait_until(lambda: watched_by(here.directory()) is None)
    assert creations(cloud_tpu) == [resource(here)]
    assert here.jobs("resume", "r", "--wait", "--num_steps", "3").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_vms_that_cannot_be_set_up_give_the_tpu_back_and_say_why(
    here: Checkout, cloud_tpu: CloudTpu, watched: bool
) -> None:
    here.submit(
        "--set", "setup=[\"echo here > it\", \"# a remark\", \"echo it's\", \"true\"]", "--set", "max_failures=1",
        "train_tokenizer_vqvae", cluster="tpu.yaml",
    )  # fmt: skip
    if not watched:
        end_watcher(here)
    cloud_tpu.wait(resource(here), None, seconds=180)
    if not watched:
        assert "nothing watches it" in here.jobs("status", "r").stdout
        return
    record = here.end(seconds=240)
    assert record.state == "failed"
    assert (record.reason or "").startswith("a line of setup: failed (VM ")
    assert "max_failures: 1" in (record.reason or "")
    assert len(creations(cloud_tpu)) == 2
    (log, *_) = (here.directory().root / "cloud_tpu").glob("*/startup-*.log")
    assert "unexpected EOF while looking for matching" in log.read_text()
    assert not cloud_tpu.resources()
