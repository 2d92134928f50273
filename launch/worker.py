"""Runs on every host of every backend, around one process of the job.

It gives the job its log and its working directory, passes on the signals that mean *save and leave*, and writes down how
the job ended. Invariants:

- The job never outlives its worker (the kernel kills it), and the worker asks the job to save when its own supervisor
  dies, then ends it after the grace period: no orphans, whatever is killed.
- A worker whose attempt is not the newest any more kills its job at once: after a network partition the processes of the
  old attempt live on beside the new one, and must not write where it writes.
- Signals are blocked and waited for, never handled asynchronously: one that arrives before the job has started, or even
  before this file has been read, is passed on afterwards.
- The job writes to its log file directly, so nothing it printed is lost with the worker. Where the run is in Cloud Storage
  that is a file of this machine, which the worker sends there.
- Storage is only waited for in threads, and at the very end: while it does not answer, signals are passed on all the same.

Standard library only for runs on a disk.
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this file's directory first; what it imports starts one level up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.objects import be_patient, is_object
from launch.run_dir import RunDir, append, write_atomically
from launch.shipping import Shipper, log_here

EXIT_SAVED = 75
LEAVE_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
# How often the run directory is looked at, which may be on a network file system with many hosts.
LOOK_SECONDS = 1.0
# In Cloud Storage, where each look is four requests that are paid for.
OBJECT_LOOK_SECONDS = 3.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the command and return its exit code (128 + n for death by signal n)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS | {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent's `ignore` would be inherited, and lose exit codes
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=int, help="this process's index in the job; in a Slurm step that of the task")
    parser.add_argument("--identities", type=Path, help="a JSON list: for each host the variables that only it gets")
    parser.add_argument("--saved_is_success", action="store_true", help="return 0 for a job that has saved its state")
    parser.add_argument("--cwd", required=True, help="where the job runs")
    parser.add_argument("--grace_seconds", type=float, required=True, help="what an orphaned job gets to save")
    parser.add_argument("--parent_pid", type=int, help="the supervisor, if it must not be outlived")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if options.host is None:
        options.host = int(os.environ["SLURM_PROCID"])
    if options.identities is not None:
        os.environ.update(json.loads(options.identities.read_text())[options.host])
    run, attempt = RunDir.at(os.environ["JASMINE_RUN_DIR"]), int(os.environ["JASMINE_ATTEMPT"])
    if options.parent_pid is not None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != options.parent_pid:
            return EXIT_SAVED  # orphaned before the job began: nothing to save, nothing to end
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    started = time.time()
    forwarded: list[str] = []
    be_patient()
    shipper = None
    with log_here(run.log(attempt, options.host)).open("ab", buffering=0) as log:
        try:
            job = subprocess.Popen(
                options.command,
                cwd=options.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_Child(os.getpid()),
            )
        except (OSError, subprocess.SubprocessError) as error:
            log.write(f"error: cannot start {options.command[0]} in {options.cwd}: {error}\n".encode())
            code = 2  # as for any other mistake of the user: a restart would not mend it
        else:
            shipper = Shipper(run.log(attempt, options.host))  # its thread must not be there when the job is forked
            look = _Look(run, attempt, options.host, job.pid, forwarded)
            code = _watch(job, look, options.parent_pid, options.grace_seconds, forwarded)
    # Not later: what follows takes as long as storage likes, and of several that fail the first one is to blame.
    ended = time.time()
    (shipper or Shipper(run.log(attempt, options.host))).close()  # who sees how the job ended finds all that it said
    died_of = signal.Signals(-code).name if code < 0 else None
    code = 128 - code if code < 0 else code
    ending = {"host": options.host, "code": code, "signal": died_of, "forwarded": forwarded}
    more = {"node": os.environ.get("SLURMD_NODENAME"), "started": started, "ended": ended}
    write_atomically(run.exit_file(attempt, options.host), json.dumps(ending | more))
    # To srun any other code is a failure, for which it would end the tasks that are still saving.
    return 0 if code == EXIT_SAVED and options.saved_is_success else code


class _Look:
    """Looks once in a while, in a thread, for what the run directory says that a worker must do, and does it.

    `asked_to_leave` is set once the job shall save and leave, which is the worker's to tell it.
    """

    def __init__(self, run: RunDir, attempt: int, host: int, job: int, forwarded: list[str]) -> None:
        self.run, self.attempt, self.host, self.job = run, attempt, host, job
        self.forwarded = forwarded
        self.asked_to_leave = False
        self.asked_for_stacks = False
        self.over = threading.Event()
        self.seconds = OBJECT_LOOK_SECONDS if is_object(run.root) else LOOK_SECONDS
        # Two threads: one can wait for hours, for room on a disk that can be read all the same.
        threading.Thread(target=self._note_job, name="note", daemon=True).start()
        threading.Thread(target=self._run, name="look", daemon=True).start()

    def _note_job(self) -> None:
        with contextlib.suppress(OSError):
            write_atomically(self.run.pid_file(self.attempt, self.host), f"{self.job}\n")

    def _run(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError):  # storage that is away for a moment says nothing
                self._look()
            self.over.wait(self.seconds)

    def _get_stacks(self) -> None:
        """Have the job write where its threads are, if it has said that it can; SIGQUIT would end it otherwise."""
        stacks = self.run.stacks(self.attempt, self.host)
        if not stacks.exists():
            return
        state = Path(f"/proc/{self.job}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":  # it cannot answer
            append(stacks, f"process {self.job} is stopped (SIGSTOP)\n")
        os.kill(self.job, signal.SIGQUIT)

    def _look(self) -> None:
        kill = self.run.newest_attempt() > self.attempt or self.run.ask_file(self.attempt, "kill").exists()
        if self.over.is_set():
            return  # the job has ended while storage was asked, and its number may be another's now
        if kill:
            self.forwarded.append(signal.SIGKILL.name)
            end_group(self.job)
        elif not self.asked_for_stacks and self.run.ask_file(self.attempt, "stacks").exists():
            self.asked_for_stacks = True
            self._get_stacks()
        elif not self.asked_to_leave and self.run.ask_file(self.attempt, "leave").exists():
            self.asked_to_leave = True


def _watch(
    job: subprocess.Popen[bytes], look: _Look, parent: int | None, grace_seconds: float, forwarded: list[str]
) -> int:
    """Pass signals on until the job has ended; append their names to `forwarded`; return Popen's return code."""
    kill_at: float | None = None
    told_to_leave = False
    while (code := job.poll()) is None:
        received = signal.sigtimedwait(LEAVE_SIGNALS | {signal.SIGCHLD}, 1.0)
        if received is not None and received.si_signo != signal.SIGCHLD:
            job.send_signal(received.si_signo)
            forwarded.append(signal.Signals(received.si_signo).name)
        if look.asked_to_leave and not told_to_leave:
            told_to_leave = True
            job.send_signal(signal.SIGTERM)
            forwarded.append(signal.SIGTERM.name)
        if parent is not None and os.getppid() != parent and kill_at is None:
            kill_at = time.monotonic() + grace_seconds
        if kill_at is not None and time.monotonic() > kill_at:
            end_group(job.pid)
    look.over.set()
    end_group(job.pid)  # what the job left behind, data-loading processes for example
    return code


def end_group(leader: int) -> None:
    """Kill the process group of a job process, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def die_with_parent(signum: int) -> None:
    """Have the kernel send this process a signal when the one that started it has ended."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


class _Child:
    """What happens in the job's process before its program starts."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self) -> None:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != self.parent:
            os._exit(EXIT_SAVED)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])


if __name__ == "__main__":
    sys.exit(main())
