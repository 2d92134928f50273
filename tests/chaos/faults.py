"""The faults, by name: what each does to a run that trains, and what may follow."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.backends.cloud_tpu import read_resource, watched_by
from launch.run_dir import append
from tests.chaos.backends import Backend
from tests.chaos.processes import Process

if TYPE_CHECKING:
    from tests.chaos.campaign import Campaign

# What training works through without stopping, or stops for by its own decision.
ANYWHERE = ("stepping", "stepping", "saving")
WITH_DELETIONS = ("stepping", "saving", "deleting")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        what: one line, for people.
        possible: whether it can be done on a backend.
        unnoticed: whether training may go on as if nothing had happened.
        ends: whether the run may end by it, and has to be resumed by hand.
        moments: when it strikes.
    """

    name: str
    what: str
    inject: "Callable[[Campaign], None]"
    possible: Callable[[Backend], bool] = lambda backend: True
    unnoticed: bool = False
    ends: bool = False
    moments: tuple[str, ...] = ANYWHERE


FAULTS: dict[str, Fault] = {}


def _fault(what: str, **options: object) -> "Callable[[Callable[[Campaign], None]], Callable[[Campaign], None]]":
    def enter(inject: "Callable[[Campaign], None]") -> "Callable[[Campaign], None]":
        name = inject.__name__
        FAULTS[name] = Fault(name, what, inject, **options)  # type: ignore[arg-type]
        return inject

    return enter


def _is(*names: str) -> Callable[[Backend], bool]:
    return lambda backend: backend.name in names


def _in_bucket(backend: Backend) -> bool:
    return backend.bucket is not None


def _one_of(chaos: "Campaign", role: str) -> Process:
    one = chaos.random.choice(chaos.wait_for_processes(role))
    chaos.note(f"{role} {one.host}")
    return one


def _send_all(chaos: "Campaign", role: str, signum: signal.Signals) -> None:
    for one in chaos.wait_for_processes(role):
        one.send(signum)


# --- processes -------------------------------------------------------------------------------------------------------


@_fault("kill -9 of one rank", moments=WITH_DELETIONS)
def kill_rank(chaos: "Campaign") -> None:
    _one_of(chaos, "rank").send(signal.SIGKILL)


@_fault("kill -9 of all ranks at once", moments=WITH_DELETIONS)
def kill_all_ranks(chaos: "Campaign") -> None:
    _send_all(chaos, "rank", signal.SIGKILL)


@_fault("kill -9 of the launcher's worker beside a rank")
def kill_worker(chaos: "Campaign") -> None:
    _one_of(chaos, "worker").send(signal.SIGKILL)


@_fault("kill -9 of the run's supervisor", ends=True)
def kill_supervisor(chaos: "Campaign") -> None:
    _send_all(chaos, "supervisor", signal.SIGKILL)


@_fault("kill -9 of everything there is of the run, as when a machine goes down", ends=True)
def kill_everything(chaos: "Campaign") -> None:
    chaos.wait_for_processes("rank", "worker", "supervisor")
    for one in chaos.processes():
        one.send(signal.SIGKILL)


@_fault("kill -9 of the command that resumes the run, while it does", ends=True)
def kill_launcher(chaos: "Campaign") -> None:
    chaos.cancel()
    backend = chaos.backend
    launcher = subprocess.Popen(
        backend.argv(*backend.resumption(chaos.topology)),
        cwd=backend.root / "home",
        env=backend.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = chaos.random.uniform(0.2, 3.0)
    chaos.note(f"after {after:.1f} s")
    try:
        launcher.wait(after)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()


@_fault("SIGTERM to one rank")
def term_rank(chaos: "Campaign") -> None:
    _one_of(chaos, "rank").send(signal.SIGTERM)


@_fault("SIGTERM to all ranks")
def term_all_ranks(chaos: "Campaign") -> None:
    _send_all(chaos, "rank", signal.SIGTERM)


@_fault("SIGTERM to the supervisor: its machine goes down", possible=_is("local"), ends=True)
def term_supervisor(chaos: "Campaign") -> None:
    _send_all(chaos, "supervisor", signal.SIGTERM)


@_fault("SIGSTOP to one rank, for good")
def stop_rank(chaos: "Campaign") -> None:
    _one_of(chaos, "rank").send(signal.SIGSTOP)


@_fault("SIGSTOP to one rank, SIGCONT after some seconds", unnoticed=True)
def pause_rank(chaos: "Campaign") -> None:
    one = chaos.random.choice(chaos.wait_for_processes("rank"))
    seconds = chaos.random.uniform(0.5, 4.0)
    chaos.note(f"rank {one.host} for {seconds:.1f} s")
    one.send(signal.SIGSTOP)
    time.sleep(seconds)
    one.send(signal.SIGCONT)


@_fault("jobs.py cancel", ends=True)
def cancel(chaos: "Campaign") -> None:
    chaos.cancel()


# --- clusters --------------------------------------------------------------------------------------------------------


@_fault("a job of a higher partition takes the nodes", possible=_is("slurm"))
def preempt_slurm(chaos: "Campaign") -> None:
    slurm = chaos.backend.slurm
    assert slurm is not None
    nodes = len(slurm.nodes)
    slurm.command("sbatch", "-p", "high", f"-N{nodes}", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")


def _job(chaos: "Campaign") -> str:
    return chaos.run.slurm_job.read_text().strip()


@_fault("scontrol requeue by an administrator", possible=_is("slurm"))
def requeue(chaos: "Campaign") -> None:
    assert chaos.backend.slurm is not None
    chaos.backend.slurm.command("scontrol", "requeue", _job(chaos), check=False)


@_fault("scancel by an administrator", possible=_is("slurm"), ends=True)
def scancel(chaos: "Campaign") -> None:
    assert chaos.backend.slurm is not None
    chaos.backend.slurm.command("scancel", _job(chaos))


@_fault("slurmctld is away for some seconds", possible=_is("slurm"), unnoticed=True)
def restart_controller(chaos: "Campaign") -> None:
    assert chaos.backend.slurm is not None
    seconds = chaos.random.uniform(1, 6)
    chaos.note(f"for {seconds:.1f} s")
    chaos.backend.slurm.stop_controller()
    time.sleep(seconds)
    chaos.backend.slurm.start_controller()


@_fault("kill -9 of a node's slurmd, which comes back", possible=_is("slurm"), unnoticed=True)
def kill_slurmd(chaos: "Campaign") -> None:
    slurm = chaos.backend.slurm
    assert slurm is not None
    node = chaos.random.choice(slurm.nodes[:2])
    slurm.kill_node(node)
    time.sleep(chaos.random.uniform(0.5, 4))
    slurm.start_node(node)


def _resource(chaos: "Campaign") -> str:
    """The run's queued resource, once it is there."""
    tpu = chaos.backend.tpu
    assert tpu is not None

    def active() -> bool:
        rented = read_resource(chaos.run)
        return rented is not None and tpu.state(rented.id) == "ACTIVE"

    chaos.until(active, 120, "an active TPU")
    rented = read_resource(chaos.run)
    assert rented is not None
    return rented.id


@_fault("the TPU is preempted, with notice", possible=_is("cloud_tpu"))
def preempt_tpu(chaos: "Campaign") -> None:
    assert chaos.backend.tpu is not None
    chaos.backend.tpu.preempt(_resource(chaos), grace=chaos.random.choice([1.0, 5.0, 15.0]))


@_fault("the TPU is preempted, without notice", possible=_is("cloud_tpu"))
def preempt_tpu_at_once(chaos: "Campaign") -> None:
    assert chaos.backend.tpu is not None
    chaos.backend.tpu.preempt(_resource(chaos), grace=0.0)


@_fault("a VM is rebooted", possible=_is("cloud_tpu"))
def reboot_vm(chaos: "Campaign") -> None:
    assert chaos.backend.tpu is not None
    name = _resource(chaos)
    worker = chaos.random.randrange(len(chaos.backend.tpu.vms(name)))
    chaos.note(f"VM {worker}")
    chaos.backend.tpu.reboot(name, worker)


@_fault("a VM goes off for good", possible=_is("cloud_tpu"))
def kill_vm(chaos: "Campaign") -> None:
    assert chaos.backend.tpu is not None
    name = _resource(chaos)
    worker = chaos.random.randrange(len(chaos.backend.tpu.vms(name)))
    chaos.note(f"VM {worker}")
    chaos.backend.tpu.kill_vm(name, worker)


@_fault("kill -9 of a VM's agent, which gives the TPU back", possible=_is("cloud_tpu"))
def kill_agent(chaos: "Campaign") -> None:
    chaos.random.choice(chaos.wait_for_processes("agent")).send(signal.SIGKILL)


@_fault("the Cloud TPU API answers 503 for a while", possible=_is("cloud_tpu"), unnoticed=True)
def tpu_api_503(chaos: "Campaign") -> None:
    assert chaos.backend.tpu is not None
    chaos.backend.tpu.fail_next(503, count=chaos.random.randrange(3, 20))


@_fault("kill -9 of the watcher; preemption; another watcher", possible=_is("cloud_tpu"))
def kill_watcher(chaos: "Campaign") -> None:
    assert chaos.backend.tpu is not None
    name = _resource(chaos)
    for one in chaos.processes("watcher"):
        one.send(signal.SIGKILL)
    chaos.until(lambda: watched_by(chaos.run) is None, 60, "the watcher to be gone")
    chaos.backend.tpu.preempt(name, grace=chaos.random.choice([0.0, 2.0]))
    time.sleep(chaos.random.uniform(0, 3))
    watch_again(chaos)
    chaos.until(lambda: watched_by(chaos.run) is not None, 60, "another watcher")


def watch_again(chaos: "Campaign") -> None:
    """Start a watcher as a user does, if there is none."""
    if watched_by(chaos.run) is not None:
        return
    backend = chaos.backend
    with (backend.root / "watch.log").open("ab") as log:
        subprocess.Popen(
            backend.argv("jobs", "watch", backend.run_name),
            cwd=backend.root / "home",
            env=backend.env | {"JASMINE_RUN_DIR": str(chaos.run.root)},  # by which it is found at the end
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


# --- storage ---------------------------------------------------------------------------------------------------------


@_fault("Cloud Storage answers 503 to some requests", possible=_in_bucket, unnoticed=True, moments=WITH_DELETIONS)
def storage_503(chaos: "Campaign") -> None:
    assert chaos.backend.bucket is not None
    method = chaos.random.choice([None, "POST", "GET"])
    count = chaos.random.randrange(5, 60)
    chaos.note(f"{count} × {method or 'any'}")
    chaos.backend.bucket.fail_next(503, count=count, method=method)


@_fault(
    "Cloud Storage does what is asked, and does not answer", possible=_in_bucket, unnoticed=True, moments=WITH_DELETIONS
)
def storage_silent(chaos: "Campaign") -> None:
    assert chaos.backend.bucket is not None
    chaos.backend.bucket.lose_next(count=chaos.random.randrange(2, 12), method="POST")


@_fault(
    "contents from Cloud Storage break off in the middle; all ranks start again",
    possible=_in_bucket,
    moments=WITH_DELETIONS,
)
def storage_breaks_off(chaos: "Campaign") -> None:
    assert chaos.backend.bucket is not None
    chaos.backend.bucket.break_bodies(count=chaos.random.randrange(2, 12))
    kill_all_ranks(chaos)


@_fault("Cloud Storage is dead for some seconds", possible=_in_bucket, unnoticed=True, moments=WITH_DELETIONS)
def storage_dies(chaos: "Campaign") -> None:
    _without_storage(chaos, chaos.random.uniform(1, 8))


@_fault(
    "Cloud Storage is dead for longer than anybody may be silent",
    possible=_in_bucket,
    unnoticed=True,
    moments=WITH_DELETIONS,
)
def storage_stays_dead(chaos: "Campaign") -> None:
    _without_storage(chaos, chaos.random.uniform(30, 80))


def _without_storage(chaos: "Campaign", seconds: float) -> None:
    assert chaos.backend.bucket is not None
    chaos.note(f"for {seconds:.1f} s")
    chaos.backend.bucket.kill()
    time.sleep(seconds)
    chaos.backend.bucket.start()


@_fault("the disk is full for some seconds", possible=lambda backend: backend.own_disk, unnoticed=True)
def disk_full(chaos: "Campaign") -> None:
    filler = chaos.backend.disk / "filler"
    seconds = chaos.random.uniform(1, 6)
    chaos.note(f"for {seconds:.1f} s")
    deadline = time.monotonic() + seconds
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < deadline:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.01)
    filler.unlink()


# --- files -----------------------------------------------------------------------------------------------------------


@_fault("the newest checkpoint is damaged while the run is stopped", ends=True)
def damage_checkpoint(chaos: "Campaign") -> None:
    chaos.cancel()
    steps = chaos.checkpoints()
    if len(steps) < 2:
        chaos.note("there was only one")
        return
    folder = chaos.run.root / "checkpoints" / str(steps[-1])
    how = chaos.random.choice([truncate, lose, overwrite, flip])
    chaos.note(f"{how.__name__} in step {steps[-1]}")
    how(folder, chaos.random)


def _files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's arrays, largest last."""
    found: list[tuple[int, Path]] = []
    rest = [folder / "state"]
    while rest:
        for path in rest.pop().iterdir():
            if path.is_dir():
                rest.append(path)
            elif path.is_file():
                found.append((len(path.read_bytes()), path))
    return [path for _, path in sorted(found, key=lambda one: (one[0], str(one[1])))]


def truncate(folder: Path, random: random.Random) -> None:
    """Cut every file in half."""
    for path in _files(folder):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])


def lose(folder: Path, random: random.Random) -> None:
    """Delete the largest file."""
    _files(folder)[-1].unlink()


def overwrite(folder: Path, random: random.Random) -> None:
    """Zero the second half of the largest file, as after a crash of the machine."""
    path = _files(folder)[-1]
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


def flip(folder: Path, random: random.Random) -> None:
    """Change one bit of the largest file."""
    path = _files(folder)[-1]
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(content))


@_fault("a line of events.jsonl is torn", possible=lambda backend: not _in_bucket(backend), unnoticed=True)
def tear_events(chaos: "Campaign") -> None:
    append(chaos.run.root / "events.jsonl", '{"time": 17000000')


@_fault("the clock of one host goes wrong by up to 25 s; all ranks start again")
def skew_clock(chaos: "Campaign") -> None:
    seconds = chaos.random.choice([-1, 1]) * chaos.random.randrange(5, 26)
    backend = chaos.backend
    if backend.tpu is not None:
        name = _resource(chaos)
        vms = backend.tpu.vms(name)
        worker = chaos.random.randrange(len(vms))
        host = vms[worker].address
    else:
        host = chaos.random.choice(list(backend.clock_hosts))
    for path in backend.chaos.glob("clock-*"):
        path.unlink()
    (backend.chaos / f"clock-{host}").write_text(f"{seconds:+}")
    chaos.note(f"{seconds:+} s on {host}")
    if backend.tpu is not None:
        backend.tpu.reboot(name, worker)  # processes of a VM take their clock from its agent
    else:
        kill_all_ranks(chaos)
