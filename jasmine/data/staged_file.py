"""A shard on the local disk, and the lock under which it is read.

Whoever removes a file has to hold an exclusive lock on it; so a file that is locked here stays. Locks are flock's: the
kernel gives them back however a process ends. Between reads a file may be unlocked and then removed; whoever wants to read
it again finds that out in `StagedFile.acquire`.
"""

import base64
import fcntl
import os
import threading
import time
from contextlib import suppress

import google_crc32c

BLOCK = 1 << 20
_KEEP_SECONDS = 1.0


class StagedFile:
    """A shard on the local disk, locked while it is read; made locked. For one reading thread at a time.

    Args:
        path: of the file.
        fd: of the same file, opened, holding a shared lock; closed with this object.
        keep: keep the lock for a second after each read. Locking costs system calls, a tenth of the time of a read; but
            where the cache is too small, others wait for that second.
    """

    def __init__(self, path: str, fd: int, *, keep: bool = False) -> None:
        self.path = path
        self._fd, self._keep = fd, keep
        self._guard = threading.Lock()
        self._locked = self._reading = True
        self._used = time.monotonic()
        if keep:
            _kept.add(self)

    def acquire(self) -> bool:
        """Locks it again; False if it was removed meanwhile."""
        with self._guard:
            self._reading = True
            if self._locked:
                return True
            try:
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # it is just being removed
                return False
            if not os.fstat(self._fd).st_nlink:
                return False
            self._locked = True
        if self._keep:
            _kept.add(self)
        return True

    def release(self) -> None:
        """Lets others remove it: now, or soon."""
        with self._guard:
            self._reading = False
            self._used = time.monotonic()
            if not self._keep:
                self._unlock()

    def unlock_if_unused(self) -> bool:
        """Unlocks it unless it was read within the last second. Returns whether it is unlocked."""
        with self._guard:
            if self._locked and not self._reading and time.monotonic() - self._used > _KEEP_SECONDS:
                self._unlock()
            return not self._locked

    def close(self) -> None:
        """Releases it for good."""
        with self._guard:
            self._locked = False
            os.close(self._fd)

    def checksum(self) -> google_crc32c.Checksum:
        """Of what is on the disk now."""
        return checksum_of(self._fd, os.fstat(self._fd).st_size)

    def _unlock(self) -> None:
        mark_used(self._fd)
        self._locked = False
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class _Kept:
    """The files of this process that keep their locks, and the thread that unlocks them, which ends with the last of them.

    Its own lock is taken before that of a file, never after.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._files: set[StagedFile] = set()
        self._running = False

    def add(self, file: StagedFile) -> None:
        with self._guard:
            self._files.add(file)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="staged-files", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_KEEP_SECONDS / 4)
            with self._guard:
                files = list(self._files)
            unlocked = {file for file in files if file.unlock_if_unused()}
            with self._guard:
                # Asked again, for one may have been locked since.
                self._files -= {file for file in unlocked if file.unlock_if_unused()}
                if not self._files:
                    self._running = False
                    return


_kept = _Kept()


def open_locked(path: str, size: int, *, keep: bool = False) -> StagedFile | None:
    """A whole shard of `size` bytes, locked for reading; None if it is not there, or not whole, or just being removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        status = os.fstat(fd)
        if status.st_nlink and status.st_size == size:
            return StagedFile(path, fd, keep=keep)
    except BlockingIOError:  # it is just being removed
        pass
    os.close(fd)
    return None


def checksum_of(fd: int, size: int) -> google_crc32c.Checksum:
    """Of the first `size` bytes of a file."""
    checksum = google_crc32c.Checksum()
    for first in range(0, size, BLOCK):
        checksum.update(os.pread(fd, min(BLOCK, size - first), first))
    return checksum


def encoded(checksum: google_crc32c.Checksum) -> str:
    """As Cloud Storage writes it (base64)."""
    return base64.b64encode(checksum.digest()).decode()


def mark_used(fd: int) -> None:
    """The longest unused are removed first."""
    now = time.time_ns()
    with suppress(PermissionError):  # of another user
        os.utime(fd, ns=(now, now))
