"""The run directory: where its files are, and the only code of `launch` that touches them.

    <storage>/<run>/
        run.json                     what was submitted and how it went (`launch.record`)
        code/<hash>/                 the code that each submission runs
        attempts/<k>/host-<i>.log    all that process i printed in attempt k
        attempts/<k>/host-<i>.exit.json, host-<i>.pid
        attempts/<k>/host-<i>.beat.json, host-<i>.stacks    written by the job: how far it is, where it hangs
        attempts/<k>/blame.json      written by the job: the process at which its preflight failed
        attempts/<k>/ask-<what>      present: every worker of the attempt is asked to do that (`ASKS`)
        events.jsonl                 one JSON object a line, appended by launcher and job
        supervisor.log               the launcher's own output
        attempt                      the number of the newest attempt: processes of earlier ones are fenced off by it
        slurm/                       what was submitted to Slurm: the script, and the job's id in `job`
        .lock                        held while anything of the run lives
        cancel                       present: the supervisor is asked to stop the run
        metrics.jsonl, checkpoints/  written by the job

Invariants: `run.json` and exit files are replaced whole, never half written; an event is one `write` to a file opened
for appending, so that lines of several processes do not mix; whoever changes a run holds `.lock`. The lock belongs to
an open file that supervisor and workers inherit: it is free exactly when the last of them is gone, however it died.
Standard library only, because the worker imports it on every host.
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import UserError

# What workers do when they find `ask-<what>`: pass on SIGTERM (save and leave), have the job write the stacks of its
# threads, or kill it.
ASKS = ("leave", "stacks", "kill")


@dataclass(frozen=True)
class RunDir:
    """Paths and file access of one run; `root` is its directory, which need not exist."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def record(self) -> Path:
        """`run.json`."""
        return self.root / "run.json"

    @property
    def code(self) -> Path:
        """The directory of code snapshots."""
        return self.root / "code"

    @property
    def metrics(self) -> Path:
        """The job's `metrics.jsonl`."""
        return self.root / "metrics.jsonl"

    @property
    def supervisor_log(self) -> Path:
        """What the supervisor itself printed."""
        return self.root / "supervisor.log"

    @property
    def cancel_request(self) -> Path:
        """A file whose presence asks the supervisor to stop the run."""
        return self.root / "cancel"

    def attempt(self, number: int) -> Path:
        """The directory of one attempt."""
        return self.root / "attempts" / str(number)

    def log(self, attempt: int, host: int) -> Path:
        """All that one process printed in one attempt."""
        return self.attempt(attempt) / f"host-{host}.log"

    def exit_file(self, attempt: int, host: int) -> Path:
        """How one process ended; absent while it runs, or if its worker was killed."""
        return self.attempt(attempt) / f"host-{host}.exit.json"

    def pid_file(self, attempt: int, host: int) -> Path:
        """The process id of one job process on its host; it leads a process group of its own."""
        return self.attempt(attempt) / f"host-{host}.pid"

    def stacks(self, attempt: int, host: int) -> Path:
        """Where one process writes the stacks of its threads; it exists from when it can."""
        return self.attempt(attempt) / f"host-{host}.stacks"

    def beat(self, attempt: int, host: int) -> dict[str, Any] | None:
        """How far one process is: `time`, `step` and what it is `doing`; None while it has not said."""
        try:
            beat = json.loads((self.attempt(attempt) / f"host-{host}.beat.json").read_text())
        except (OSError, ValueError):
            return None
        return beat if isinstance(beat, dict) else None

    def blame(self, attempt: int) -> dict[str, Any] | None:
        """The `host`, its `node` and the `reason` for which an attempt's preflight failed."""
        try:
            return json.loads((self.attempt(attempt) / "blame.json").read_text())
        except (OSError, ValueError):
            return None

    @property
    def slurm_job(self) -> Path:
        """The id of the run's job in Slurm, once there is one."""
        return self.root / "slurm" / "job"

    @property
    def fence(self) -> Path:
        """The number of the newest attempt."""
        return self.root / "attempt"

    def begin_attempt(self, number: int) -> None:
        """Make the directory of an attempt, and fence off the processes of those before it.

        Raises:
            FileExistsError: the attempt has begun already.
        """
        self.attempt(number).mkdir(parents=True)
        write_atomically(self.fence, f"{number}\n")

    def fence_off_earlier_attempts(self) -> None:
        """Fence off every process there has been so far, before the next attempt begins."""
        write_atomically(self.fence, f"{max(self.attempts(), default=0) + 1}\n")

    def newest_attempt(self) -> int:
        """The number in `fence`; 0 without one."""
        try:
            return int(self.fence.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def ask_file(self, attempt: int, what: str) -> Path:
        """A file whose presence asks the workers of an attempt for one of `ASKS`."""
        assert what in ASKS
        return self.attempt(attempt) / f"ask-{what}"

    def attempts(self) -> list[int]:
        """The numbers of the attempts made so far, ascending."""
        directory = self.root / "attempts"
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal()) if directory.is_dir() else []

    def logged_hosts(self, attempt: int) -> list[int]:
        """The hosts that have a log in an attempt, ascending."""
        names = [path.stem.removeprefix("host-") for path in self.attempt(attempt).glob("host-*.log")]
        return sorted(int(name) for name in names if name.isdecimal())

    def append_event(self, event: str, **fields: Any) -> None:
        """Append `{"time": now, "event": event, **fields}` to `events.jsonl`; `time` is in Unix seconds."""
        line = json.dumps({"time": time.time(), "event": event, **fields}) + "\n"
        descriptor = os.open(self.root / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def events(self) -> list[dict[str, Any]]:
        """Return all events, in the order in which they were written."""
        return read_json_lines(self.root / "events.jsonl")

    def lock(self) -> int:
        """Take the run, and return a file descriptor that holds it until its last copy is closed.

        Raises:
            UserError: something of the run lives.
        """
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + 0.3  # outlast an `is_live` that is looking at this very moment
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise in_use(self) from None
                time.sleep(0.02)

    def is_live(self) -> bool:
        """Return whether anything of the run lives: a submission in progress, a supervisor or a worker."""
        try:
            descriptor = os.open(self.root / ".lock", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def in_use(run: RunDir) -> UserError:
    """Return the error for a run that cannot be taken because it is live."""
    return UserError(
        f"run {run.name!r} is in use by a job that is alive: watch it with `jobs.py status {run.name}`, end it with "
        f"`jobs.py cancel {run.name}`, or choose another --name"
    )


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`; a reader, or a crash, sees the old or the new contents, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, without lines that are not whole yet; `[]` when there is no file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [value for value in map(_parsed, lines) if isinstance(value, dict)]


def last_json_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """Return up to `count` last objects of a JSON-lines file, reading only its end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2048 * count))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [value for value in map(_parsed, lines) if isinstance(value, dict)][-count:]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
