"""Supervises one attempt of a run on Slurm: the batch script's only command, on the first node of the job.

It takes the next attempt's number (which fences off every process of earlier attempts), starts a worker for each
process by one `srun`, sees them to their end, and decides by `launch.outcome` what follows: the run has ended, or Slurm is
asked to put the same job back into the queue. Invariants:

- It believes the workers' exit files, not srun's exit code; what a worker could not write is told from srun's output.
- Where Slurm itself ends the job (scancel, requeue by hand), what becomes of it is Slurm's to say: it is not put back
  into the queue from here, and the record says no more than that the attempt is over.
- It leaves with a code other than 0 unless the run has finished, so that jobs that depend on it (afterok) wait or die.
- The record is complete before Slurm is asked to requeue: from then on this process may be killed at any time.
- A job that is not the newest submission of its run does nothing, and a supervisor whose attempt is not the newest any more
  (its node was cut off, and Slurm started the next one elsewhere) leaves without writing anything.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # As a script, Python puts this file's directory first; what it imports starts two levels up.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.backends import slurm
from launch.backends.local import FAILURE_GRACE_SECONDS, free_port
from launch.backends.slurm import NoAnswerError
from launch.config import ENVIRONMENT, SlurmCluster
from launch.errors import UserError
from launch.objects import be_patient
from launch.outcome import Ask, exit_code, kind, nodes_to_exclude, outcome
from launch.outcome import ending as ending_after
from launch.plan import Plan, identity, scrubbed
from launch.record import Attempt, Blame, HostExit, RunRecord, State, Supervisor, read_record, write_record
from launch.run_dir import RunDir, write_atomically
from launch.supervision import collect_exits, find_hang, has_progressed, missed_by_others, note_exit, watchdog_of
from launch.watchdog import Hang
from launch.worker import EXIT_SAVED, LEAVE_SIGNALS

POLL_SECONDS = 0.5
LOCK_SECONDS = 30.0
# Nobody waits for this process, and a controller of a large cluster may take its time.
PATIENCE_SECONDS = 30.0
# For as long as the controller is away, for example restarted, a requeue is asked for again and again.
REQUEUE_SECONDS = 3600.0
# How often the beats are looked at, and how long stacks are waited for.
LOOK_SECONDS = 2.0
# jax misses a process before Slurm misses its node, which it looks at every third of SlurmdTimeout.
LOST_SECONDS = 30.0
STACKS_SECONDS = 4.0
# A node that was cut off comes back with the job's old processes. While its slurmd ends them, a minute or two, it kills
# every ten seconds whatever else it is given of a job of that number, and is not done as long as there is something. So the
# next attempts stay away from it for a while, where there are other nodes; one that dies there so soon is put down to that,
# and the one after it waits.
AVOID_SECONDS = 600.0
RETURNED_SECONDS = 3600.0
KILLED_SOON_SECONDS = 60.0
PAUSE_SECONDS = 60
# Slurm starts a job again in the moment in which it takes the lost node for down. If that is also the second of the requeue,
# the nodes that are left take the new attempt for the old one ("job credential revoked"), and the job has failed for good.
LOST_PAUSE_SECONDS = 5


def main() -> int:
    """Run the next attempt of the run; return an exit code for Slurm."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS | {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument(
        "--interactive", action="store_true", help="in an allocation that is not ours: never requeue it"
    )
    parser.add_argument("--lock", type=int, metavar="FD", help="a descriptor that holds the run's lock")
    options = parser.parse_args()
    be_patient()
    run = RunDir(options.run_dir)
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and not options.interactive and _is_newest_submission(run):
        run.fence_off_earlier_attempts()  # a supervisor that was cut off with its node would hold the lock for ever
    lock = options.lock if options.lock is not None and _is_open(options.lock) else _lock(run)
    try:
        record = read_record(run)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 1
    if record is None or not record.submissions:
        print(f"{run.root}: no submission is recorded here any more", flush=True)
        return 1
    plan = record.submissions[-1].plan
    if options.interactive:
        run.slurm_job.parent.mkdir(exist_ok=True)
        write_atomically(run.slurm_job, f"{_own_id()}\n")
    if plan.settings["backend"] != "slurm" or not _is_newest_submission(run):
        print(f"{run.name}: submitted again since; this job has nothing to do", flush=True)
        return 0
    if record.state == "finished":
        print(f"{run.name}: has finished; this job has nothing to do", flush=True)
        return 0
    try:
        return _Supervisor(plan, run, record, interactive=options.interactive).run_attempt()
    finally:
        os.close(lock)


def ask(*command: str, text: str | None = None) -> str:
    """Return what one of Slurm's commands prints that reads `text`; raises `NoAnswerError`."""
    return slurm.ask(*command, patience=PATIENCE_SECONDS, text=text)


def _is_newest_submission(run: RunDir) -> bool:
    """Return whether this job is the one that the run was last submitted as."""
    deadline = time.monotonic() + LOCK_SECONDS
    while not run.slurm_job.exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # without locks this job can start before the command that submitted it has noted its id
    return run.slurm_job.exists() and run.slurm_job.read_text().strip() == _own_id()


def _own_id() -> str:
    """Return what this job is called. The last element of an array to start has the id of the whole array for its own: by
    that alone, all elements would be put back into the queue."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else os.environ["SLURM_JOB_ID"]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _lock(run: RunDir) -> int:
    """Take the run's lock if that is possible; without it Slurm itself sees to it that a job runs once."""
    descriptor = os.open(run.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # whoever submits is still writing, or a zombie of an earlier attempt holds it
            time.sleep(0.1)
        except OSError:
            break  # a file system without locks
    return descriptor


class _Supervisor:
    def __init__(self, plan: Plan, run: RunDir, record: RunRecord, *, interactive: bool) -> None:
        self.plan, self.run, self.record, self.interactive = plan, run, record, interactive
        self.settings = SlurmCluster.model_validate(plan.settings)
        self.job_id = _own_id()
        self.node = os.environ.get("SLURMD_NODENAME", "")
        self.hosts = [host.index for host in plan.hosts]
        self.asked: Ask | None = None
        self.terminated = False  # Slurm is ending this job, for a reason that only it knows
        self.number: int | None = None  # of the attempt, once it has begun
        self.silent: set[int] = set()  # processes of it whose workers did not say how they ended
        self.missed: list[int] | None = None  # processes of it for whose sake jax ended the others
        self.pause = 0  # seconds until the next attempt may start
        self.ends_at = self._end_time()

    def run_attempt(self) -> int:
        """Run one attempt; return the batch job's exit code."""
        self._settle_earlier_attempt()
        try:
            secrets = self._secrets()
        except OSError as error:
            return self._end("failed", 2, f"secrets: {error.filename}: {error.strerror} on {self.node}")
        if self.run.cancel_request.exists():
            return self._end("cancelled", EXIT_SAVED, None)
        nodes = ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        self.record.supervisor = Supervisor(host=self.node, pid=os.getpid())
        number = max([self.plan.first_attempt - 1, *self.run.attempts()]) + 1
        on_a_node = self.settings.processes_on_a_node
        attempt = Attempt(
            number=number,
            processes=len(self.plan.hosts),
            devices_per_process="auto",
            devices=f"{self.settings.gpus_per_node // on_a_node} GPU" if self.settings.gpus_per_node else "CPU",
            code=self.plan.code.hash,
            nodes=[node for node in nodes for _ in range(on_a_node)],
            started=time.time(),
        )
        self.record.attempts.append(attempt)
        self.run.begin_attempt(number)
        self.number = number
        self._write("running")
        self.run.append_event("scheduled", attempt=number, job=self.job_id, nodes=nodes)
        self.run.append_event(
            "attempt_started", attempt=number, processes=len(self.plan.hosts), job=self.job_id, nodes=nodes
        )
        size = self.run.metrics_size()
        self._see_to_the_end(attempt, self._start(attempt, nodes, secrets))
        attempt.ended = time.time()
        attempt.outcome = attempt.outcome or outcome(attempt.exits)  # a hang is a failure, however its processes ended
        if attempt.outcome == "failed" and (lost := self._lost_meanwhile(attempt)):
            attempt.outcome, attempt.cause = "preempted", lost  # no failure of the job: it does not count as one
            self.pause = LOST_PAUSE_SECONDS
        if attempt.outcome != "finished" and (back := self._killed_by_returned(attempt)):
            attempt.outcome, self.pause = "preempted", PAUSE_SECONDS
            attempt.cause = f"{back}, which it had lost, still ends what it ran of this job"
        if attempt.outcome == "preempted":
            attempt.cause = attempt.cause or self._why_warned()
            self.run.append_event("preempted", attempt=number, cause=attempt.cause)
        self._blame(attempt)
        return self._follow(attempt, progress=has_progressed(self.run, attempt, size))

    # --- an attempt --------------------------------------------------------------------------------------------

    def _start(self, attempt: Attempt, nodes: list[str], secrets: dict[str, str]) -> "subprocess.Popen[bytes]":
        directory = self.run.attempt(attempt.number)
        port = free_port()  # on the first node, where process 0 will run, and this is, but for an interactive run
        identities = [identity(host, port, nodes[0]) for host in self.plan.hosts]
        write_atomically(directory / "identities.json", json.dumps(identities))
        per_node = self.settings.processes_on_a_node
        command = [
            "srun", f"--jobid={os.environ['SLURM_JOB_ID']}", f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * per_node}",
            f"--ntasks-per-node={per_node}", "--distribution=block", "--export=ALL", "--kill-on-bad-exit=1",
            "--unbuffered", "--mpi=none",
        ]  # fmt: skip
        if self.interactive:
            command.append("--overlap")  # the shell in the allocation may be a step itself
        if self.settings.gpus_per_node:
            command.append(f"--gpus-per-node={self.settings.gpus_per_node}")
        if self.settings.cpus_per_node:
            command.append(f"--cpus-per-task={max(1, self.settings.cpus_per_node // per_node)}")
        command += slurm.in_container(self.plan)
        worker = str(self.plan.code_dir / "launch" / "worker.py")
        command += [self.plan.argv[0], worker, "--identities", str(directory / "identities.json")]
        command += ["--saved_is_success", "--cwd", self.plan.cwd, "--grace_seconds", str(self.settings.grace_seconds)]
        environment = {
            **scrubbed(os.environ),
            **self.plan.env,
            **secrets,
            "JASMINE_ATTEMPT": str(attempt.number),
        }
        with (directory / "srun.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--", *self.plan.argv],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _secrets(self) -> dict[str, str]:
        """Return the values of secrets that are files; those of the environment are in it."""
        files = {name: source for name, source in self.settings.secrets.items() if source != ENVIRONMENT}
        return {name: Path(os.path.expanduser(source)).read_text().strip() for name, source in files.items()}

    def _see_to_the_end(self, attempt: Attempt, srun: "subprocess.Popen[bytes]") -> None:
        """Collect exits until srun is gone; end what does not end by itself."""
        waiting = set(self.hosts)
        watchdog = watchdog_of(self.run, self.plan, attempt.number)
        look_at = 0.0
        kill_at: float | None = None
        told = ending = False
        while srun.poll() is None:
            self._wait_for_a_signal()
            ended = collect_exits(self.run, attempt, waiting)
            now = time.monotonic()
            if now > look_at:
                look_at = now + LOOK_SECONDS * (1 + len(self.plan.hosts) // 64)  # a file for each process
                if self._is_replaced():
                    srun.kill()
                    self._leave()
                if kill_at is None and (hang := find_hang(self.run, attempt, self.hosts, watchdog)):
                    self._give_up(attempt, hang, waiting)
                    break
            if self.terminated and not ending:
                ending = True
                if _down(attempt.nodes):
                    kill_at = now  # without that node nobody can save, and Slurm leaves little time to write this down
            if self.asked and not told:
                told, kill_at = True, now + self.settings.grace_seconds
                self.run.append_event("signalled", attempt=attempt.number, signal="SIGTERM", why=self.asked)
                self.run.ask_file(attempt.number, "leave").touch()
            if ended and waiting:
                broken = any(kind(one) in ("failed", "stopped") for one in attempt.exits)
                limit = now + (FAILURE_GRACE_SECONDS if broken else self.settings.grace_seconds)
                kill_at = limit if kill_at is None else min(kill_at, limit)
            if not waiting and kill_at is None:
                kill_at = now + FAILURE_GRACE_SECONDS
            if kill_at is not None and now > kill_at:
                self.run.append_event("killed", attempt=attempt.number, hosts=sorted(waiting))
                self.run.ask_file(attempt.number, "kill").touch()
                while srun.poll() is None and time.monotonic() < now + (2 if self.terminated else 10):
                    self._wait_for_a_signal()
                break
        if srun.poll() is None:
            srun.kill()  # waits for a node that is gone
            srun.wait()
        collect_exits(self.run, attempt, waiting)
        self.missed = missed_by_others(self.run, attempt)
        self._missing(attempt, waiting)

    def _give_up(self, attempt: Attempt, hang: Hang, waiting: set[int]) -> None:
        """End an attempt that hangs, after its processes have written where they are."""
        node = attempt.nodes[hang.host] if hang.host is not None else None
        attempt.outcome, attempt.cause = "failed", hang.reason + (f", on {node}" if node else "")
        attempt.first_failed = hang.host if hang.host is not None else min(waiting)
        self.run.append_event("hang", attempt=attempt.number, host=hang.host, node=node, reason=hang.reason)
        self.run.append_event("failed", attempt=attempt.number, host=hang.host, node=node, cause=attempt.cause)
        if node is not None:
            self._put_down_to(node, hang.reason)
        self.run.ask_file(attempt.number, "stacks").touch()
        time.sleep(STACKS_SECONDS)
        self.run.ask_file(attempt.number, "kill").touch()
        deadline = time.monotonic() + 10
        while collect_exits(self.run, attempt, waiting) or (waiting and time.monotonic() < deadline):
            time.sleep(0.1)

    def _missing(self, attempt: Attempt, missing: set[int]) -> None:
        """Say what can be said of processes whose workers did not: the first that srun complained of was not killed for the
        sake of another one."""
        if not missing:
            return
        self.silent = set(missing)
        if self.missed is not None:
            attempt.first_failed = None
        first = attempt.first_failed
        if first is None and not self.terminated:
            complaint = _first_complaint(self.run.attempt(attempt.number) / "srun.log")
            on_node = [host for host in sorted(missing) if complaint and attempt.nodes[host] == complaint[0]]
            named = complaint is not None and complaint[1] in missing
            first = complaint[1] if complaint and named else (on_node or sorted(missing))[0]
            attempt.cause = (
                f"process {first} on {attempt.nodes[first]} ended without a word (killed, or its node is gone)"
            )
        # Killed because another one had failed, or by Slurm: a stop, not a failure of its own.
        for host in sorted(missing, key=lambda host: (host != first, host)):
            stopped = [] if host == first else ["SIGKILL"]
            one = HostExit(host=host, code=137, signal="SIGKILL", forwarded=stopped, ended=time.time())
            note_exit(self.run, attempt, one)

    def _wait_for_a_signal(self) -> None:
        received = signal.sigtimedwait(LEAVE_SIGNALS | {signal.SIGCHLD}, POLL_SECONDS)
        if received is not None and received.si_signo != signal.SIGCHLD:
            self.terminated = True
        if self.asked is None and self.run.cancel_request.exists():
            self.asked = "cancel"

    # --- what follows ------------------------------------------------------------------------------------------

    def _follow(self, attempt: Attempt, *, progress: bool) -> int:
        assert attempt.outcome is not None
        budget = {
            "failed": ("max_failures", self.settings.max_failures),
            "preempted": ("max_preemptions", self.settings.max_preemptions),
            "finished": ("", None),
        }
        before = [one for one in self.record.attempts[:-1] if one.number >= self.plan.first_attempt]
        spent = sum(one.outcome == attempt.outcome for one in before)
        own_job = not self.interactive
        if own_job and self.asked is None and attempt.outcome != "finished" and self._ended_by_slurm():
            if attempt.outcome == "failed" and (lost := self._blame_lost_nodes(attempt)):
                attempt.outcome, attempt.cause = "preempted", lost  # no failure of the job: it does not count as one
                self.run.append_event("preempted", attempt=attempt.number, cause=lost)
            self.record.reason = f"Slurm ended attempt {attempt.number}"
            self._write("submitted")
            # Slurm has put it back into the queue by itself, or may have: while a job ends, it does not say what follows.
            if self._job_state() in ("PENDING", "COMPLETING"):
                self._exclude(self._nodes_to_exclude())
            return exit_code(attempt)
        end = ending_after(attempt, asked=self.asked, progress=progress, spent=spent, budget=budget[attempt.outcome])
        if end is not None:
            return self._end(end.state, end.code, end.reason)
        if self.interactive:
            return self._end(attempt.outcome, exit_code(attempt), "an interactive run is not started again")
        self.record.reason = (
            f"attempt {attempt.number} {attempt.outcome}: {attempt.cause or 'goes on from its last checkpoint'}"
        )
        self._write("submitted")
        self.run.append_event("restarted", attempt=attempt.number + 1, after=attempt.outcome, used=spent + 1)
        return self._requeue(exit_code(attempt))

    def _requeue(self, code: int) -> int:
        """Have Slurm run this job again, and stay until it ends this run of it."""
        deadline = time.monotonic() + REQUEUE_SECONDS
        excluded = self._nodes_to_exclude()
        while True:
            try:
                ask("scontrol", "requeue", self.job_id)
                break
            except NoAnswerError as error:
                if "disabled" in str(error).lower() or time.monotonic() > deadline:
                    return self._end("failed", code, f"Slurm did not put the job back into the queue: {error}")
                if self._job_state() == "PENDING":
                    break  # Slurm has done so by itself, as after a preemption
                print(f"requeue: {error}; trying again", flush=True)
                time.sleep(5)
        self._exclude(excluded)
        return code

    def _exclude(self, nodes: Sequence[str]) -> None:
        """Keep the job, which is in the queue again, away from nodes."""
        if not self.record.blames:
            return
        excluded = self._with_given(nodes)
        changes = [f"ExcNodeList={excluded}"]  # none: all may be used again
        if self.pause:
            changes.append(f"StartTime=now+{self.pause}")
        try:
            # Slurm takes this only for a job that waits: now, while it gives this process the time to end.
            ask("scontrol", "update", f"JobId={self.job_id}", *changes)
            if nodes:
                self.run.append_event("excluded", self.record.attempts[-1].number + 1, nodes=nodes)
        except NoAnswerError as error:
            print(f"could not exclude {excluded}: {error}", flush=True)

    def _nodes_to_exclude(self) -> list[str]:
        """Return the nodes that were blamed, and those lost of late if there are enough without them."""
        blamed = nodes_to_exclude(self.record.blames, time.time(), self.settings.exclude_hours)
        lost = sorted(self._lost_nodes(AVOID_SECONDS).difference(blamed))
        return [*blamed, *lost] if lost and self._has_room_without([*blamed, *lost]) else blamed

    def _has_room_without(self, nodes: Sequence[str]) -> bool:
        """Return whether Slurm could ever start the job on others of the nodes that are up now."""
        with contextlib.suppress(NoAnswerError):
            script = ask("scontrol", "write", "batch_script", self.job_id, "-")
            ask("sbatch", "--test-only", "--dependency=", f"--exclude={self._with_given(nodes)}", text=script)
            return True
        return False

    def _with_given(self, nodes: Sequence[str]) -> str:
        """Return nodes to stay away from, with those of the settings, as Slurm takes them."""
        return ",".join([*nodes, *filter(None, [self.settings.exclude])])

    def _blame(self, attempt: Attempt) -> None:
        """Note the node at which a failure began, if it is one that a machine can be guilty of: a program that ends itself
        with an exception is not."""
        if blamed := self.run.blame(attempt.number):
            host = blamed.get("host")
            silent = attempt.nodes[host] if isinstance(host, int) and host < len(attempt.nodes) else None
            node, attempt.cause = blamed.get("node") or silent, str(blamed.get("reason"))
            if node in attempt.nodes:
                self._put_down_to(node, attempt.cause, certain=True)
            return
        if self.pause or any(blame.time >= attempt.started for blame in self.record.blames):
            return  # as for a hang or a lost node: it is known who is to blame
        if self.missed is not None:
            for host in self.missed[:1]:
                attempt.first_failed, node = host, attempt.nodes[host]
                never = self.run.beat(attempt.number, host) is None
                what = "has not joined the others" if never else "sent no heartbeats any more"
                attempt.cause = f"process {host} on {node} {what}"
                self._put_down_to(node, attempt.cause)
            return
        first = next((one for one in attempt.exits if one.host == attempt.first_failed), None)
        if first is None or first.node is None or first.signal is None or first.signal in first.forwarded:
            return
        self._put_down_to(first.node, attempt.cause or f"process {first.host} died of {first.signal}")

    def _put_down_to(self, node: str, reason: str, *, certain: bool = False) -> None:
        assert self.number is not None
        self.record.blames.append(Blame(node=node, reason=reason, time=time.time(), certain=certain))
        self.run.append_event("blamed", attempt=self.number, node=node, reason=reason)

    def _settle_earlier_attempt(self) -> None:
        """Give an attempt whose supervisor was killed an outcome: Slurm ran the job again by itself."""
        for attempt in self.record.attempts:
            if attempt.outcome is None:
                attempt.ended = time.time()
                attempt.outcome = "preempted"
                attempt.cause = self._blame_lost_nodes(attempt) or "Slurm took it from its nodes"
                self.run.append_event("preempted", attempt=attempt.number, cause=attempt.cause)

    def _lost_meanwhile(self, attempt: Attempt) -> str | None:
        """Note the nodes of processes that were missed, if Slurm finds them gone as well; return a line about them."""
        gone = {attempt.nodes[host] for host in [*self.silent, *(self.missed or [])]}
        deadline = time.monotonic() + (LOST_SECONDS if self.missed else 0.0)
        while True:
            last_look = self.terminated or time.monotonic() >= deadline
            if (lost := self._blame_lost_nodes(attempt, gone)) or last_look:
                return lost
            self._wait_for_a_signal()

    def _killed_by_returned(self, attempt: Attempt) -> str | None:
        """Return the node that the job had lost and that, now that it is back, has killed this attempt, if one has."""
        if time.time() - attempt.started > KILLED_SOON_SECONDS:
            return None
        lost = self._lost_nodes(RETURNED_SECONDS, before=attempt.started)
        return next((node for host in sorted(self.silent) if (node := attempt.nodes[host]) in lost), None)

    def _lost_nodes(self, seconds: float, before: float = math.inf) -> set[str]:
        """Return the nodes that this job, not an earlier one of the run, has lost in the last `seconds`."""
        own = (one.started for one in self.record.attempts if one.number >= self.plan.first_attempt)
        since = max(min(own, default=0.0), time.time() - seconds)
        return {blame.node for blame in self.record.blames if blame.lost and since < blame.time < before}

    def _blame_lost_nodes(self, attempt: Attempt, among: set[str] | None = None) -> str | None:
        """Note the nodes of an attempt, or those `among` them, that are down; return a line about them, None where there are
        none."""
        known = {blame.node for blame in self.record.blames if blame.time >= attempt.started}
        nodes = [node for node in dict.fromkeys(attempt.nodes) if among is None or node in among]
        down = _down(nodes)
        for node in down:
            if node not in known:
                self.record.blames.append(Blame(node=node, reason="it went down", time=time.time(), lost=True))
                self.run.append_event("blamed", attempt=attempt.number, node=node, reason="it went down")
        return f"lost its node {', '.join(down)}" if down else None

    def _why_warned(self) -> str:
        """Return why Slurm asked the processes to leave, as far as it can be told."""
        if self.asked:
            return "asked to leave"
        if lost := self._blame_lost_nodes(self.record.attempts[-1]):
            return lost
        if self._ended_by_slurm():
            return "ended by Slurm: cancelled, requeued by hand or out of time to save"
        # The warning may come up to a minute early.
        if self.ends_at is not None and time.time() > self.ends_at - self.settings.grace_seconds - 60:
            return "time limit"
        return "preempted by Slurm"

    def _end_time(self) -> float | None:
        """Return when the time limit will be reached, in Unix seconds."""
        with contextlib.suppress(NoAnswerError, ValueError):
            found = re.search(r" EndTime=(\S+)", ask("scontrol", "-o", "show", "job", self.job_id))
            return time.mktime(time.strptime(found.group(1), "%Y-%m-%dT%H:%M:%S")) if found else None
        return None

    def _ended_by_slurm(self) -> bool:
        """Return whether Slurm is ending this job by its own decision, other than that the time limit is reached."""
        state = self._job_state()
        timed_out = self.ends_at is not None and time.time() > self.ends_at - 2
        return state not in ("RUNNING", "") and not timed_out

    def _job_state(self) -> str:
        with contextlib.suppress(NoAnswerError):
            text = ask("scontrol", "-o", "show", "job", self.job_id)
            found = re.search(r"JobState=(\w+)", text)
            return found.group(1) if found else ""
        return ""

    def _is_replaced(self) -> bool:
        return self.number is not None and self.run.newest_attempt() > self.number

    def _leave(self) -> NoReturn:
        print(
            f"attempt {self.run.newest_attempt()} has begun; the supervisor of attempt {self.number} leaves", flush=True
        )
        sys.exit(1)

    def _write(self, state: State) -> None:
        if self._is_replaced():
            self._leave()
        self.record.state, self.record.changed = state, time.time()
        write_record(self.run, self.record)

    def _end(self, state: State, code: int, reason: str | None = None) -> int:
        self.record.exit_code, self.record.reason = code, reason
        number = self.record.attempts[-1].number if self.record.attempts else self.plan.first_attempt
        event = state if state in ("finished", "cancelled") else "ended"
        self.run.append_event(event, attempt=number, state=state, code=code, reason=reason)
        self._write(state)
        return code


def _first_complaint(log: Path) -> tuple[str, int] | None:
    """Return the node and the task of the first failure that srun reports."""
    try:
        found = re.search(r"srun: error: (\S+): tasks? (\d+)", log.read_text(errors="replace"))
    except FileNotFoundError:
        return None
    return (found.group(1), int(found.group(2))) if found else None


def _down(nodes: Sequence[str]) -> list[str]:
    """Return those of some nodes that Slurm takes for gone, or has had no answer from."""
    if not nodes:
        return []
    try:
        text = ask("scontrol", "-o", "show", "node", ",".join(nodes))
    except NoAnswerError:
        return []
    states = dict(re.findall(r"^NodeName=(\S+) .*?\bState=(\S+)", text, re.MULTILINE))
    return [node for node in nodes if any(word in states.get(node, "") for word in ("DOWN", "NOT_RESPONDING", "*"))]


if __name__ == "__main__":
    sys.exit(main())
