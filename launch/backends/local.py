"""The `local` backend: this machine as a cluster of processes, under a supervisor that is detached from the terminal.

The supervisor starts one worker per host, and attempt after attempt decides by `launch.outcome` what follows from how they
ended. When one fails, the others, who may hang in a collective with it, are ended within seconds.

There is no queue here, but an order: a supervisor first waits until the runs before its own have ended. Those of `--after`
must have finished; the elements of a sweep merely take turns.

SIGTERM to the supervisor (its machine goes down) and a cancel request make every host save and leave, and end the run.
The supervisor runs from the run's own code snapshot and reads its plan, which holds secrets, from standard input.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # As a script, Python puts this file's directory first; what it imports starts two levels up.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from pydantic import TypeAdapter

from launch.backends import Sighting
from launch.errors import UserError
from launch.objects import be_patient, is_object
from launch.outcome import Ask, Ending, exit_code, kind, outcome
from launch.outcome import ending as ending_after
from launch.plan import Host, Plan, host_environment, scrubbed, show
from launch.record import ACTIVE, Attempt, HostExit, RunRecord, State, Supervisor, read_record, write_record
from launch.run_dir import RunDir
from launch.shipping import Shipper, log_here
from launch.snapshot import fetch_code
from launch.standing import Watch, read_standing
from launch.supervision import find_hang, has_progressed, note_exit, wait_for_neighbours, watchdog_of
from launch.watchdog import Hang
from launch.worker import EXIT_SAVED, LEAVE_SIGNALS, end_group

# Between the first failure and the end of the other processes.
FAILURE_GRACE_SECONDS = 10.0
# So that a job which fails at once does not spin. Doubled with each failure in a row that comes before any step: a disk that
# is full may have room by then.
RESTART_DELAY_SECONDS = 1.0
MOST_RESTART_DELAY_SECONDS = 60.0
# How often a cancel request is looked for; it is a file, because who asks may sit on another machine.
POLL_SECONDS = 0.25
# How often the beats are looked at, and how long stacks are waited for.
LOOK_SECONDS = 2.0
STACKS_SECONDS = 4.0
# How often a scheduler is asked about a run on another cluster that this one waits for.
ASK_SECONDS = 30.0


def preview(plans: Sequence[Plan]) -> str:
    """Return the plans as YAML."""
    return "---\n".join(map(show, plans))


def submit(plans: Sequence[Plan], locks: Sequence[int]) -> str:
    """Start a supervisor for each run."""
    pids: list[int] = []
    try:
        for plan, lock in zip(plans, locks, strict=True):
            pids.append(start_supervisor(plan, lock))
    except OSError:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    several = len(pids) > 1
    told = f"supervisor process{'es' * several} {', '.join(map(str, pids))} on this machine"
    return f"{told}, one run after the other" if several else told


def shape(plan: Plan) -> str:
    """Return the processes and devices of a run, for people."""
    processes, devices = len(plan.hosts), plan.settings["devices_per_process"]
    return f"{processes} process{'es' * (processes > 1)} × {devices} device{'s' * (devices != 1)}"


def look(runs: Sequence[tuple[RunDir, RunRecord]]) -> list[Sighting]:
    """Return how runs stand whose locks nobody holds: an unfinished record then has lost its supervisor."""
    return [Sighting(live=False, state="lost" if record.state in ACTIVE else None) for _, record in runs]


def cancel(run: RunDir, record: RunRecord) -> None:
    """Leave the request that the supervisor looks for."""
    run.cancel_request.touch()


def stop_seconds(record: RunRecord) -> float:
    """Return the time that processes have to save, and some for whoever sees to them."""
    return float(record.submissions[-1].plan.settings["grace_seconds"]) + 30


def release(run: RunDir, record: RunRecord) -> None:
    """Return at once: nothing outlives a run here."""


def start_supervisor(plan: Plan, lock: int) -> int:
    """Start the supervisor of a run, in a session of its own, and return its process id.

    Args:
        plan: what to run; its code snapshot must have been written.
        lock: the descriptor that holds the run's lock; the supervisor inherits it.
    """
    run, here = RunDir.at(plan.run_dir), fetch_code(plan.code_dir)
    script = here / "launch" / "backends" / "local.py"
    with log_here(run.supervisor_log).open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, str(script), "--run_dir", str(run.root), "--lock_fd", str(lock)],
            cwd=here if is_object(run.root) else run.root,
            env=scrubbed(os.environ),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock],
        )
    assert supervisor.stdin is not None
    with contextlib.suppress(BrokenPipeError), supervisor.stdin:  # if it died at once, its log says why
        supervisor.stdin.write(json.dumps(dataclasses.asdict(plan.with_code_in(here))).encode())
    supervisor.returncode = 0  # it is meant to outlive us: no warning about a child that still runs
    return supervisor.pid


def main() -> int:
    """Supervise the run whose plan is on standard input; return the run's exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS | {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent's `ignore` would be inherited, and lose exit codes
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=RunDir.at, required=True)
    parser.add_argument("--lock_fd", type=int, required=True, help="an inherited descriptor that holds the run's lock")
    options = parser.parse_args()
    plan = TypeAdapter(Plan).validate_json(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    run: RunDir = options.run_dir
    be_patient()
    log = Shipper(run.supervisor_log)
    run.keep(options.lock_fd)
    record = read_record(run)
    assert record is not None, f"{run.record} is missing"
    try:
        return _Supervisor(plan, run, record, options.lock_fd).run_to_the_end()
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        log.close()
        run.release(options.lock_fd)


class _Supervisor:
    """The life of one submission: attempts, budgets, and the states they lead to."""

    def __init__(self, plan: Plan, run: RunDir, record: RunRecord, lock: int) -> None:
        self.plan = plan
        self.run = run
        self.record = record
        self.lock = lock
        self.asked: Ask | None = None  # why the hosts should leave, once they should
        self.number = plan.first_attempt  # of the attempt

    def run_to_the_end(self) -> int:
        """Make attempts until the run needs no other, or may have no other."""
        self.record.supervisor = Supervisor(host=socket.gethostname(), pid=os.getpid())
        if (not_started := self._wait_for_its_turn()) is not None:
            return self._end(not_started.state, not_started.code, not_started.reason)
        self.run.append_event("scheduled", self.plan.first_attempt)
        budget = {
            "failed": ("max_failures", self.plan.settings["max_failures"]),
            "preempted": ("max_preemptions", self.plan.settings["max_preemptions"]),
        }
        spent = {"failed": 0, "preempted": 0}
        number, fruitless = self.plan.first_attempt, 0
        while True:
            size = self.run.metrics_size()
            attempt = self._attempt(number)
            assert attempt.outcome is not None
            done = attempt.outcome == "finished"
            progress = has_progressed(self.run, attempt, size)
            end = ending_after(
                attempt,
                asked=self.asked,
                progress=progress,
                spent=0 if done else spent[attempt.outcome],
                budget=("", None) if done else budget[attempt.outcome],
            )
            if end is not None:
                return self._end(end.state, end.code, end.reason)
            code, limit = exit_code(attempt), budget[attempt.outcome][1]
            spent[attempt.outcome] += 1
            number += 1
            self.run.append_event(
                "restarted", attempt=number, after=attempt.outcome, used=spent[attempt.outcome], of=limit
            )
            fruitless = 0 if progress else fruitless + 1
            if attempt.outcome == "failed" and self._pause(restart_delay(fruitless)):
                state: State = "cancelled" if self.asked == "cancel" else "failed"
                return self._end(state, code, "stopped while waiting to start again after a failure")

    def _wait_for_its_turn(self) -> Ending | None:
        """Wait until the runs before this one have ended; return how this one ends where it does not start."""
        before = [(name, "finish") for name in self.plan.after]
        if self.plan.sweep is not None:
            stem, _, index = self.plan.run.rpartition(".")
            before += [(f"{stem}.{earlier}", "end") for earlier in range(int(index))]
        for name, what in before:
            run = RunDir(self.run.root.parent / name)
            lives = Watch(run, seconds=ASK_SECONDS)
            try:
                while lives():
                    reason = f"waiting for {name} to {what}"
                    if self.record.reason != reason:
                        self.record.reason = reason
                        self._write("submitted")
                    if self._wait_for_a_signal(POLL_SECONDS):
                        state: State = "cancelled" if self.asked == "cancel" else "preempted"
                        return Ending(state, EXIT_SAVED, f"not started: told to stop while {reason}")
                if what == "finish" and (state := read_standing(run).record.state) != "finished":
                    return Ending("cancelled", 1, f"not started: {name}, which it was to follow, is {state}")
            except UserError as error:
                return Ending("cancelled", 1, f"not started: {error}")
        self.record.reason = None
        return None

    def _attempt(self, number: int) -> Attempt:
        """Start all hosts, see them to their end, and return how it went."""
        settings = self.plan.settings
        attempt = Attempt(
            number=number,
            processes=settings["processes"],
            devices_per_process=settings["devices_per_process"],
            code=self.plan.code.hash,
            started=time.time(),
        )
        self._leave_if_replaced()
        try:
            self.run.begin_attempt(number)
        except FileExistsError:
            self._leave()
        self.number = number
        self.record.attempts.append(attempt)
        self._write("running")
        self.run.append_event("attempt_started", attempt=number, processes=settings["processes"])
        port = free_port()
        workers = {host.index: self._start_worker(host, number, port) for host in self.plan.hosts}
        asked_before = False
        kill_at: float | None = None  # when whoever is left will be killed
        killed_before = False
        watchdog, look_at = watchdog_of(self.run, self.plan, number), 0.0
        while workers:
            self._wait_for_a_signal(POLL_SECONDS)
            some_ended = self._collect_exits(attempt, workers)
            now = time.monotonic()
            grace = float(settings["grace_seconds"])
            if self.asked and not asked_before:
                asked_before = True
                self.run.append_event("signalled", attempt=number, signal="SIGTERM", why=self.asked)
                kill_at = now + grace
                self._tell(workers.values(), signal.SIGTERM)
            if now > look_at and kill_at is None:
                look_at = now + LOOK_SECONDS
                self._leave_if_replaced()
                if hang := find_hang(self.run, attempt, sorted(workers), watchdog):
                    self._note_hang(attempt, hang, min(workers))
                    kill_at = now + STACKS_SECONDS
            if some_ended and workers:
                broken = any(kind(one) in ("failed", "stopped") for one in attempt.exits)
                limit = now + (FAILURE_GRACE_SECONDS if broken else grace)
                if broken and (kill_at is None or kill_at > limit):
                    self._tell(workers.values(), signal.SIGTERM)
                kill_at = limit if kill_at is None else min(kill_at, limit)
            if kill_at is not None and now > kill_at:
                self.run.append_event("killed", attempt=number, hosts=sorted(workers))
                for host, worker in workers.items():
                    self._kill(number, host, worker, worker_too=killed_before)
                killed_before, kill_at = True, now + 5.0
        self._leave_if_replaced()
        attempt.ended = time.time()
        attempt.outcome = attempt.outcome or outcome(attempt.exits)  # a hang is a failure, however its processes ended
        if attempt.outcome == "preempted":
            attempt.cause = "asked to leave" if self.asked else "its processes were told to leave"
            self.run.append_event("preempted", attempt=number, cause=attempt.cause)
        self._write("running")
        return attempt

    def _note_hang(self, attempt: Attempt, hang: Hang, first: int) -> None:
        """Have the processes of an attempt that hangs write where they are, and write down at which of them it does."""
        attempt.outcome, attempt.cause = "failed", hang.reason
        attempt.first_failed = hang.host if hang.host is not None else first
        self.run.append_event("hang", attempt=attempt.number, host=hang.host, reason=hang.reason)
        self.run.append_event("failed", attempt=attempt.number, host=hang.host, cause=hang.reason)
        self.run.ask_file(attempt.number, "stacks").touch()

    def _collect_exits(self, attempt: Attempt, workers: dict[int, subprocess.Popen[bytes]]) -> bool:
        """Move hosts that have ended from `workers` to the attempt, in the order of their ends; return if there were any."""
        ended = [host for host, worker in workers.items() if worker.poll() is not None]
        failed = any(workers[host].returncode not in (0, EXIT_SAVED) for host in ended)
        if failed and len(ended) < len(workers):
            wait_for_neighbours(self.run)
            ended = [host for host, worker in workers.items() if worker.poll() is not None]
        exits = [self._exit_of(attempt.number, host, workers.pop(host).returncode) for host in ended]
        for one in sorted(exits, key=lambda one: one.ended):
            note_exit(self.run, attempt, one)
        return bool(exits)

    def _start_worker(self, host: Host, attempt: int, port: int) -> subprocess.Popen[bytes]:
        python, *_ = self.plan.argv
        options = ["--host", str(host.index), "--cwd", self.plan.cwd, "--parent_pid", str(os.getpid())]
        options += ["--grace_seconds", str(self.plan.settings["grace_seconds"])]
        worker = str(Path(__file__).resolve().parents[1] / "worker.py")
        return subprocess.Popen(
            [python, worker, *options, "--", *self.plan.argv],
            env={**scrubbed(os.environ), **host_environment(self.plan, host, attempt, port)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[self.lock],
        )

    def _wait_for_a_signal(self, seconds: float) -> bool:
        """Wait for a child's end, a request to leave or the time limit; return whether the run has been asked to end."""
        received = signal.sigtimedwait(LEAVE_SIGNALS | {signal.SIGCHLD}, seconds)
        if received is not None and received.si_signo != signal.SIGCHLD and self.asked is None:
            self.asked = "signal"
        if self.run.cancel_request.exists():
            self.asked = "cancel"
        return self.asked is not None

    def _pause(self, seconds: float) -> bool:
        """Wait for so long, or until the run has been asked to end; return whether it has."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._wait_for_a_signal(POLL_SECONDS):
                return True
        return False

    def _tell(self, workers: Iterable[subprocess.Popen[bytes]], signum: signal.Signals) -> None:
        for worker in workers:
            worker.send_signal(signum)

    def _kill(self, attempt: int, host: int, worker: subprocess.Popen[bytes], *, worker_too: bool) -> None:
        """Kill the job under a worker, which then reports it and ends; or the worker, if that is what does not end."""
        try:
            end_group(int(self.run.pid_file(attempt, host).read_text()))
        except FileNotFoundError:
            worker_too = True
        if worker_too:
            worker.kill()

    def _exit_of(self, attempt: int, host: int, returncode: int) -> HostExit:
        """Return what a worker wrote about its job's end, or what can be said of a worker that was killed."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return HostExit.model_validate_json(self.run.exit_file(attempt, host).read_text())
        with contextlib.suppress(FileNotFoundError):  # the kernel killed the job; end what it had started, too
            end_group(int(self.run.pid_file(attempt, host).read_text()))
        name = signal.Signals(-returncode).name if returncode < 0 else None
        code = 128 - returncode if returncode < 0 else returncode
        return HostExit(host=host, code=code, signal=name, ended=time.time())

    def _leave_if_replaced(self) -> None:
        """Leave without writing anything if somebody else goes on with the run: storage was away for too long to hold it."""
        if self.run.newest_attempt() > self.number:
            self._leave()

    def _leave(self) -> NoReturn:
        print(f"attempt {self.run.newest_attempt()} was begun by another supervisor; this one leaves", flush=True)
        sys.exit(1)

    def _write(self, state: State) -> None:
        self._leave_if_replaced()
        self.record.state = state
        self.record.changed = time.time()
        write_record(self.run, self.record)

    def _end(self, state: State, code: int, reason: str | None = None) -> int:
        self._leave_if_replaced()
        self.record.exit_code = code
        self.record.reason = reason
        event = state if state in ("finished", "cancelled") else "ended"
        number = self.record.attempts[-1].number if self.record.attempts else self.plan.first_attempt
        self.run.append_event(event, attempt=number, state=state, code=code, reason=reason)
        self._write(state)
        return code


def restart_delay(fruitless: int) -> float:
    """Return the seconds between a failure and the next attempt; `fruitless`: attempts in a row that came to no step."""
    return min(MOST_RESTART_DELAY_SECONDS, RESTART_DELAY_SECONDS * 2.0 ** min(max(1, fruitless) - 1, 10))


def free_port() -> int:
    """Return a port nothing listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    sys.exit(main())
