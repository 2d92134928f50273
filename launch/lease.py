"""Holds a run whose directory is in Cloud Storage, where there are no locks.

Two things together stand for the lock of a directory on a disk. On the machine that holds the run it is the lock of a local
file, with the same life: processes inherit it, and it is free exactly when the last of them is gone. For all other machines
it is the object `.lease` in the run directory, which one of those processes writes again every `RENEW_SECONDS`.

A lease's age is told by the service's clock alone: those of two machines may be apart by more than it is to be stale.

What that guarantees: of several who take a run at once, anywhere, one gets it, for the object is made or replaced on
condition of its generation. What it does not: a holder that is cut off from storage, or stopped, for longer than
`STALE_SECONDS` may be replaced while it still lives; it is the attempt's fence that then keeps its processes from writing.
And a holder that was killed keeps its run, for other machines, until the lease is stale.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from launch.objects import ObjectPath, cache_dir

RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0

_renewals: dict[int, "_Renewal"] = {}
# When this machine booted, in Unix seconds by the service's clock; None until somebody asks what that shows.
_boot_time: float | None = None


def take(root: ObjectPath, seconds: float = 0.3) -> int:
    """Take a run, and return a file descriptor that holds it until it is given to `release`, or its last copy is closed.

    Raises:
        BlockingIOError: somebody has it.
        OSError: storage cannot be reached or written.
    """
    descriptor = os.open(_local_lock(root), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, seconds)
        lease = root / ".lease"
        mine = _lease(uuid.uuid4().hex)
        there = lease.read_with_generation()
        if there is not None and _is_valid(lease, there[0], locked=True):
            raise BlockingIOError
        generation = there[1] if there else 0
        if not lease.replace_if(generation, mine) and lease.read_bytes() != mine:
            raise BlockingIOError  # somebody else was faster
        _renewals[descriptor] = _Renewal(lease, json.loads(mine)["id"])
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def keep(root: ObjectPath, descriptor: int) -> None:
    """Renew the lease from this process on, which has inherited the descriptor from the one that took it."""
    there = (root / ".lease").read_with_generation()
    if there is not None:
        _renewals[descriptor] = _Renewal(root / ".lease", json.loads(there[0])["id"])


def release(root: ObjectPath, descriptor: int) -> None:
    """Let go of a run. If another process has inherited it, that one has it from now on; else it is free."""
    renewal = _renewals.pop(descriptor, None)
    if renewal is not None:
        renewal.stop()
    os.close(descriptor)
    if renewal is not None and not _is_locked(root):
        with contextlib.suppress(OSError):  # it becomes stale
            renewal.end()


def is_held(root: ObjectPath) -> bool:
    """Return whether somebody has the run."""
    there = (root / ".lease").read_with_generation()
    return there is not None and _is_valid(root / ".lease", there[0])


def _is_valid(lease: ObjectPath, text: bytes, *, locked: bool = False) -> bool:
    """Return whether a lease stands; `locked` is set where its local lock is this process's, so that its holder is dead."""
    try:
        machine = json.loads(text)["machine"]
    except (ValueError, KeyError, TypeError):
        return False
    if machine == _machine():
        return not locked and _is_locked(lease.parent)
    updated = lease.updated()
    return updated is not None and now(lease.parent) - updated < STALE_SECONDS


def now(root: ObjectPath) -> float:
    """Return the time by the service's clock, in Unix seconds; by this machine's for somebody who may only read."""
    global _boot_time
    if _boot_time is None:
        try:
            _boot_time = _find_boot_time(root)
        except PermissionError:
            return time.time()
    return _boot_time + time.clock_gettime(time.CLOCK_BOOTTIME)


def _find_boot_time(root: ObjectPath) -> float:
    """Return when this machine booted, by the service's clock, which shows in what has just been written."""
    probe = root / ".pieces" / uuid.uuid4().hex  # one that cannot be deleted goes with the others there
    probe.write_bytes(b"")
    running = time.clock_gettime(time.CLOCK_BOOTTIME)  # nobody sets it, and it goes on in a machine that sleeps
    written = probe.updated()
    with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
    if written is None:
        raise FileNotFoundError(errno.ENOENT, "it was deleted at once", str(probe))
    return written - running


def _lease(id: str) -> bytes:
    holder = {"id": id, "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps(holder).encode()


def _machine() -> str:
    """Return what tells this machine and its cache from all others."""
    file = cache_dir() / "machine"
    with contextlib.suppress(FileExistsError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x") as made:
            made.write(uuid.uuid4().hex)
    return file.read_text() + Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _local_lock(root: ObjectPath) -> Path:
    path = cache_dir() / "locks" / hashlib.sha256(str(root).encode()).hexdigest()[:24]
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _lock(descriptor: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _is_locked(root: ObjectPath) -> bool:
    return is_locked(os.open(_local_lock(root), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def is_locked(descriptor: int) -> bool:
    """Return whether somebody else holds the lock of an open file, which is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class _Renewal:
    """Writes a lease again and again, as long as it is this one."""

    def __init__(self, lease: ObjectPath, id: str) -> None:
        self.lease, self.id = lease, id
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                there = self._mine()
                if there is None:
                    return
                self.lease.replace_if(there, _lease(self.id))

    def _mine(self) -> int | None:
        """Return the generation of the lease, None where it is not this one any more."""
        there: tuple[bytes, int] | None = self.lease.read_with_generation()
        if there is None:
            return None
        found: dict[str, Any] = json.loads(there[0])
        return there[1] if found["id"] == self.id else None

    def stop(self) -> None:
        """Renew no more. Who is writing right now does so on condition of the generation, and may."""
        self._stopped.set()

    def end(self) -> None:
        """Delete the lease."""
        generation = self._mine()
        if generation is not None:
            self.lease.unlink(missing_ok=True, generation=generation)
