"""The run directory: where its files are, and the only code of `launch` that touches them.

    <storage>/<run>/
        run.json                     what was submitted and how it went (`launch.record`)
        code/<hash>/                 the code that each submission runs; in Cloud Storage code/<hash>.tar.gz
        attempts/<k>/host-<i>.log    all that process i printed in attempt k
        attempts/<k>/host-<i>.exit.json, host-<i>.pid
        attempts/<k>/host-<i>.beat.json, host-<i>.stacks    written by the job: how far it is, where it hangs
        attempts/<k>/host-<i>.steps.jsonl                   likewise: what its steps were like, a line for some of them
        attempts/<k>/blame.json      written by the job: what its preflight failed for, and where
        attempts/<k>/ask-<what>      present: every worker of the attempt is asked to do that (`ASKS`)
        events.jsonl                 one JSON object a line, appended by launcher and job (`launch.events`)
        supervisor.log, watcher.log  the launcher's own output
        attempt                      the number of the newest attempt: processes of earlier ones are fenced off by it
        slurm/                       what was submitted to Slurm: the script, and the job's id in `job`
        .lock                        held while anything of the run lives (in Cloud Storage `.lease`, see `launch.lease`)
        cancel                       present: the supervisor is asked to stop the run
        config.json, metrics.jsonl, checkpoints/    written by the job

The layout is the same on a disk and in Cloud Storage (`launch.objects`).

Invariants: `run.json` and exit files are replaced whole, never half written; an event is one `write` to a file opened
for appending, so that lines of several processes do not mix; whoever changes a run holds `.lock`. The lock belongs to
an open file that supervisor and workers inherit: it is free exactly when the last of them is gone, however it died.
Standard library only for runs on a disk, because the worker imports it on every host.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from launch import lease
from launch.errors import UserError
from launch.objects import LONG_PATIENCE, is_object, is_patient, place

# What workers do when they find `ask-<what>`: pass on SIGTERM (save and leave), have the job write the stacks of its
# threads, or kill it.
ASKS = ("leave", "stacks", "kill")
# What is wrong with a disk for a while only.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class RunDir:
    """Paths and file access of one run; `root` is its directory, which need not exist."""

    root: Path

    @classmethod
    def at(cls, path: str) -> "RunDir":
        """Return the run at a path or a `gs://` URL."""
        return cls(place(path))

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
    def config(self) -> Path:
        """The job's `config.json`: its options as it uses them; absent until it has begun."""
        return self.root / "config.json"

    @property
    def checkpoints(self) -> Path:
        """The job's folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def supervisor_log(self) -> Path:
        """What the supervisor itself printed."""
        return self.root / "supervisor.log"

    @property
    def watcher_log(self) -> Path:
        """What printed who watches over the run from outside of its machines."""
        return self.root / "watcher.log"

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
        return read_json(self.attempt(attempt) / f"host-{host}.beat.json")

    def blame(self, attempt: int) -> dict[str, Any] | None:
        """The `reason` for which an attempt's preflight failed, and the `host` and `node` at fault, None where all were."""
        return read_json(self.attempt(attempt) / "blame.json")

    @property
    def slurm_job(self) -> Path:
        """The id of the run's job in Slurm, once there is one."""
        return self.root / "slurm" / "job"

    @property
    def tpu_resource(self) -> Path:
        """The newest queued resource of the run in the Cloud TPU API, as JSON, once there is one."""
        return self.root / "cloud_tpu" / "resource.json"

    def tpu_vm(self, resource: str, vm: int) -> Path:
        """The sign of life of one VM of a queued resource, as JSON."""
        return self.root / "cloud_tpu" / resource / f"vm-{vm}.json"

    def tpu_over(self, resource: str) -> Path:
        """A file whose presence tells the VMs of a queued resource that nothing more is to come, and others why."""
        return self.root / "cloud_tpu" / resource / "over.json"

    @property
    def watcher(self) -> Path:
        """Who watches over the run from outside of its machines, as JSON."""
        return self.root / "watcher.json"

    def go_file(self, attempt: int) -> Path:
        """What tells each VM to start its process of an attempt, as JSON."""
        return self.attempt(attempt) / "go.json"

    @property
    def fence(self) -> Path:
        """The number of the newest attempt."""
        return self.root / "attempt"

    def begin_attempt(self, number: int) -> None:
        """Make the directory of an attempt, and fence off the processes of those before it.

        Raises:
            FileExistsError: the attempt has begun already.
        """
        _outlast(lambda: self.attempt(number).mkdir(parents=True))
        write_atomically(self.fence, f"{number}\n")
        for folder in (self.root / ".pieces", self.root / "attempts"):
            if is_object(folder) and is_object(fence := self.fence):
                with contextlib.suppress(OSError):
                    folder.remove_stale_pieces(now=fence.updated() or 0.0)

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

    def log_sizes(self, attempt: int) -> dict[int, int]:
        """The hosts that have a log in an attempt, and how long it is."""
        directory = self.attempt(attempt)
        if is_object(directory):
            sizes = directory.sizes()
        else:
            sizes = {path.name: path.stat().st_size for path in directory.glob("host-*.log")}
        names = {name: name.removeprefix("host-").removesuffix(".log") for name in sizes if name.endswith(".log")}
        return {int(host): sizes[name] for name, host in names.items() if host.isdecimal()}

    def logged_hosts(self, attempt: int) -> list[int]:
        """The hosts that have a log in an attempt, ascending."""
        return sorted(self.log_sizes(attempt))

    def metrics_size(self) -> int:
        """How long `metrics.jsonl` is, in bytes; 0 where there is none."""
        if is_object(self.metrics):
            return self.metrics.size()
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def append_event(self, event: str, attempt: int, **fields: Any) -> None:
        """Append an event of this moment to `events.jsonl`; `launch.events` says which there are."""
        common = {"time": time.time(), "event": event, "attempt": attempt, "hostname": socket.gethostname()}
        append(self.root / "events.jsonl", json.dumps({**common, **fields}) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """Return all events, in the order in which they were written; a kind that is not known may be among them."""
        return read_json_lines(self.root / "events.jsonl")

    def lock(self) -> int:
        """Take the run, and return a file descriptor that holds it until its last copy is given to `release`, or closed.

        Raises:
            UserError: something of the run lives.
        """
        if is_object(self.root):
            try:
                return lease.take(self.root)
            except BlockingIOError:
                raise in_use(self) from None
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

    def keep(self, lock: int) -> None:
        """Hold the run from this process on, which has inherited the descriptor from the one that took it."""
        if is_object(self.root):
            lease.keep(self.root, lock)

    def release(self, lock: int) -> None:
        """Let go of the run, as far as this process is concerned."""
        if is_object(self.root):
            lease.release(self.root, lock)
        else:
            os.close(lock)

    def is_live(self) -> bool:
        """Return whether anything of the run lives: a submission in progress, a supervisor or a worker."""
        if is_object(self.root):
            return lease.is_held(self.root)
        try:
            descriptor = os.open(self.root / ".lock", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return lease.is_locked(descriptor)


def in_use(run: RunDir) -> UserError:
    """Return the error for a run that cannot be taken because it is live."""
    return UserError(
        f"run {run.name!r} is in use by a job that is alive: watch it with `jobs.py status {run.name}`, end it with "
        f"`jobs.py cancel {run.name}`, or choose another --name"
    )


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`; a reader, or a crash, sees the old or the new contents, whole."""
    if is_object(path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def replace() -> None:
        try:
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    _outlast(replace)


def append(path: Path, text: str) -> None:
    """Add to the end of a file, which is made if there is none; texts of several processes do not mix, and one that a crash
    or a full disk has torn does not spoil the next."""
    if is_object(path):
        path.append(text.encode())
        return

    def add() -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = ("\n" * torn + text).encode()
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)

    _outlast(add)


def _outlast(write: Callable[[], None]) -> None:
    """Carry out a write to a disk; where this process is patient, again and again while the disk is full or away."""
    deadline = time.monotonic() + LONG_PATIENCE
    while True:
        try:
            return write()
        except OSError as error:
            if not is_patient() or error.errno not in _PASSING or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def written(path: Path) -> float | None:
    """Return when a file was written, in Unix seconds by the clock of its storage, which is one for all machines; None where
    there is no such file."""
    if is_object(path):
        return path.updated()
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is none, or none that is whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


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
        lines = read_tail(path, 2048 * count).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [value for value in map(_parsed, lines) if isinstance(value, dict)][-count:]


def read_tail(path: Path, size: int) -> bytes:
    """Return up to `size` last bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_object(path):
        return path.read_bytes(-size)
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read()


def open_at(path: Path, offset: int) -> BinaryIO:
    """Return a file opened for reading, from `offset` on.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_object(path):
        return io.BytesIO(path.read_bytes(offset))
    file = path.open("rb")
    file.seek(offset)
    return file


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether what stands in a JSON file is a number that one can reckon with: finite, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether it is a number of steps or of other things that happen one by one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15


def remove_directory(path: Path) -> None:
    """Delete a directory with all that is in it, as far as that is possible."""
    if is_object(path):
        with contextlib.suppress(OSError):
            path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
