"""Brings shards from Cloud Storage to the local disk, before they are read and once for all processes of a host.

ArrayRecord reads single records out of a bucket a thousand times slower than off a disk, so whole shards are copied
into a folder that all processes of the host share, whatever job they are of. It may be deleted at any time.

    <digest>-<generation>-<size>.array_record   a whole, verified shard; the digest is of bucket and object
    <digest>-<generation>-<size>.part           one that is being fetched, or that a killed process left behind

Who reads a shard holds a shared lock on its file while it reads, and for at most a second more (flock, which the kernel
gives back however a process ends); who fetches one holds an exclusive lock on its part.

Invariants: a shard stands under its name whole or not at all; what is there and what is being fetched, as its full
size, is never more than the cache's limit; only files that nobody has locked are removed, the longest unused first; a
removed shard takes no disk space, even where readers have it open: they find it gone before their next read. Nobody
waits for room while reading a shard, so all processes get on, however small the cache.
"""

import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from jasmine.data import bucket
from jasmine.data.bucket import BucketObject, UnreachableError
from jasmine.data.fetching import POLL_SECONDS, Attempt, Busy, Sink
from jasmine.data.staged_file import StagedFile, checksum_of, encoded, mark_used, open_locked
from jasmine.errors import UserError

FOLDER_VARIABLE = "JASMINE_DATA_CACHE_DIR"
LIMIT_OPTION = "--data_cache_gib"
# Of the disk space that is free or already the cache's, where no limit is given.
DEFAULT_SHARE = 0.8
# What a killed process left behind is kept for whoever goes on with it, but not for ever.
_PART_SECONDS = 24 * 3600.0
_REMOVE_SECONDS = 10.0
_MISMATCHES = 3
_ENTRY = re.compile(r"[0-9a-f]{32}-\d+-(\d+)\.(array_record|part)")


@dataclass(frozen=True)
class _Entry:
    """A file of the cache: `size` in bytes when it is whole, `used` in Unix seconds."""

    path: str
    size: int
    used: float


@dataclass(frozen=True)
class DataCache:
    """The folder of staged shards, and how this process uses it.

    Attributes:
        folder: made when the first shard is fetched.
        limit: bytes of all shards in it.
        patience: seconds without a byte after which a shard cannot be had.
        slow: seconds; a connection that brings less than 1 MiB in so long is given up for another.
    """

    folder: str
    limit: int
    patience: float = 300.0
    slow: float = 15.0

    @classmethod
    def of_host(cls, gib: float | None = None) -> Self:
        """The cache of this user and host: `JASMINE_DATA_CACHE_DIR`, or `~/.cache/jasmine/data`.

        Args:
            gib: the limit in GiB; None for four fifths of the disk space that is free or already taken by the cache.

        Raises:
            UserError: the folder cannot be made.
        """
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(home, "jasmine", "data")
        folder = os.path.abspath(os.path.expanduser(folder))
        try:
            os.makedirs(folder, exist_ok=True)
            if gib is not None:
                return cls(folder, int(gib * 2**30))
            there = sum(entry.size for entry in _entries(folder))
            return cls(folder, int(DEFAULT_SHARE * (shutil.disk_usage(folder).free + there)))
        except OSError as error:
            raise _unusable(folder, error) from error

    def check_fits(self, item: BucketObject) -> None:
        """Raises UserError if an object is larger than the cache may be."""
        if item.size > self.limit:
            raise UserError(
                f"{item} has {_readable(item.size)}, and the data cache {self.folder} may have {_readable(self.limit)}: "
                f"give it more with {LIMIT_OPTION}, name a larger disk with {FOLDER_VARIABLE}, or make smaller shards"
            )

    def path(self, item: BucketObject) -> str:
        """Where an object is, when it is there."""
        return self._stem(item) + ".array_record"

    def has(self, item: BucketObject) -> bool:
        """Whether an object is there."""
        return os.path.exists(self.path(item))

    def stage(self, item: BucketObject, *, keep: bool = False, stop: threading.Event | None = None) -> StagedFile:
        """An object on the local disk, locked for reading; fetched first if it is not there, by this process or another.

        Args:
            item: a shard that `check_fits`.
            keep: see `StagedFile`.
            stop: set to have an `AbandonedError` instead.

        Raises:
            UserError: the disk has no room for it, it is no longer what was listed, or it arrives damaged again and
                again.
            ClusterError: nothing of it arrives for `patience` seconds.
        """
        attempt = Attempt(item, self.patience, stop)
        while True:
            attempt.check()
            found = open_locked(self.path(item), item.size, keep=keep)
            if found is not None:
                return found
            try:
                claim = self._claim(item)
            except OSError as error:
                raise _unusable(self.folder, error) from error
            if isinstance(claim, int):
                try:
                    self._fetch(item, claim, attempt)
                finally:
                    os.close(claim)
            else:
                attempt.wait_for_others(claim)

    def drop_if_damaged(self, item: BucketObject) -> bool:
        """Removes a staged object that is not what Cloud Storage has (a disk that errs, a crash of the machine). Returns
        whether it was."""
        found = open_locked(self.path(item), item.size)
        if found is None:
            return True
        try:
            if encoded(found.checksum()) == item.crc32c:
                return False
        finally:
            found.close()
        deadline = time.monotonic() + _REMOVE_SECONDS
        while not self._remove(found.path):  # others read it
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    # --- room --------------------------------------------------------------------------------------------------

    def _stem(self, item: BucketObject) -> str:
        digest = hashlib.sha256(f"{item.bucket}/{item.name}".encode()).hexdigest()[:32]
        return os.path.join(self.folder, f"{digest}-{item.generation}-{item.size}")

    def _claim(self, item: BucketObject) -> int | Busy:
        """The descriptor of the part to fetch an object into, locked, with room for all of it; or why not now."""
        part = self._stem(item) + ".part"
        with self._lock():
            if self._is_whole(item) or not self._remove(self.path(item)):
                return Busy("it is just being removed", 0)
            fd = None
            if os.path.exists(part):  # its room is taken
                fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            elif self._make_room(item.size):
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if fd is None:
                return Busy("all that is in it is in use", 0)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                size = os.fstat(fd).st_size
                os.close(fd)
                return Busy("another process fetches it, and gets nothing", size)

    def _is_whole(self, item: BucketObject) -> bool:
        try:
            return os.path.getsize(self.path(item)) == item.size
        except FileNotFoundError:
            return False

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Over what decides on room. Held for milliseconds."""
        os.makedirs(self.folder, exist_ok=True)
        fd = os.open(os.path.join(self.folder, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes are within the limit, once what was unused for longest is removed."""
        entries = sorted(_entries(self.folder), key=lambda entry: entry.used)
        excess = sum(entry.size for entry in entries) + size - self.limit
        for entry in entries:
            forgotten = entry.path.endswith(".part") and time.time() - entry.used > _PART_SECONDS
            if (excess > 0 or forgotten) and self._remove(entry.path):
                excess -= entry.size
        return excess <= 0

    def _free_disk(self, size: int) -> bool:
        """Removes what was unused for longest until the disk has `size` bytes free; False if that is not enough."""
        with self._lock():
            for entry in sorted(_entries(self.folder), key=lambda entry: entry.used):
                if shutil.disk_usage(self.folder).free >= size:
                    break
                self._remove(entry.path)
        return shutil.disk_usage(self.folder).free >= size

    def _remove(self, path: str) -> bool:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return not os.path.exists(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                os.unlink(path)
                os.ftruncate(fd, 0)  # readers that are idle keep it open; see `StagedFile.acquire`
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(fd)

    # --- fetching ----------------------------------------------------------------------------------------------

    def _fetch(self, item: BucketObject, fd: int, attempt: Attempt) -> None:
        """Completes a part and gives it its name; goes on where whoever began it left off."""
        if os.fstat(fd).st_size > item.size:
            os.ftruncate(fd, 0)
        mismatches = 0
        while True:
            arrived = os.lseek(fd, 0, os.SEEK_END)
            try:
                sink = Sink(fd, checksum_of(fd, arrived), attempt, self.slow)
                try:
                    if arrived < item.size:
                        bucket.fetch(item, arrived, sink)
                finally:
                    sink.flush()
                arrived = os.fstat(fd).st_size
                if arrived != item.size:
                    raise UnreachableError(f"it ended after {arrived} of {item.size} bytes")
                if sink.digest() == item.crc32c:
                    mark_used(fd)
                    # Under the lock, or who makes room would take the part that is gone for room made. It may be gone because
                    # somebody deleted the folder: then it is fetched again.
                    with self._lock(), suppress(FileNotFoundError):
                        os.rename(self._stem(item) + ".part", self.path(item))
                    return
                mismatches += 1
                os.ftruncate(fd, 0)
                if mismatches == _MISMATCHES:
                    raise UserError(f"{item} arrives damaged again and again (CRC-32C): upload it again")
            except UnreachableError as error:
                attempt.wait_for_storage(str(error))
            except OSError as error:  # of the disk
                if error.errno != errno.ENOSPC or not self._free_disk(item.size - os.fstat(fd).st_size):
                    raise _unusable(self.folder, error) from error
                attempt.wait_for_storage("the disk is full")


class StagedFiles:
    """The shards of one split, by number. Thread-safe and picklable.

    Args:
        cache: where they are staged.
        items: the shards.

    Raises:
        UserError: one of them is larger than the cache may be.
    """

    def __init__(self, cache: DataCache, items: Sequence[BucketObject]) -> None:
        self.cache, self.items = cache, tuple(items)
        if items:
            cache.check_fits(max(items, key=lambda item: item.size))

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(item.size for item in self.items)

    @cached_property
    def fits(self) -> bool:
        """Whether the cache can hold all of them."""
        return self.size <= self.cache.limit

    def stage(self, shard: int) -> StagedFile:
        """See `DataCache.stage`."""
        return self.cache.stage(self.items[shard], keep=self.fits)

    def drop_if_damaged(self, shard: int) -> bool:
        """See `DataCache.drop_if_damaged`."""
        return self.cache.drop_if_damaged(self.items[shard])

    def reading_order(self, shards: np.ndarray) -> Iterator[int]:
        """In which order to read rows that lie in `shards`, int64 (B,): all of a shard at once, and whatever is there first.

        Threads that read in a small cache so make use of what the others fetch; each fetches another shard, at random.
        """
        rows: dict[int, list[int]] = {}
        for row in np.argsort(shards, kind="stable").tolist():
            rows.setdefault(int(shards[row]), []).append(row)
        while rows:
            there = iter(rows) if self.fits else (shard for shard in rows if self.cache.has(self.items[shard]))
            shard = next(there, None)
            yield from rows.pop(random.choice(list(rows)) if shard is None else shard)

    def __str__(self) -> str:
        text = f"{_readable(self.size)} in {len(self.items)} shards, staged in {self.cache.folder}"
        if self.fits:
            return text
        limit = _readable(self.cache.limit)
        return f"{text}, which may have {limit} ({LIMIT_OPTION}): shards will be fetched again and again"


def _entries(folder: str) -> Iterator[_Entry]:
    with os.scandir(folder) as listing:
        for entry in listing:
            if match := _ENTRY.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    yield _Entry(entry.path, int(match[1]), entry.stat().st_mtime)


def _readable(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _unusable(folder: str, error: OSError) -> UserError:
    return UserError(
        f"the data cache {folder} cannot be written ({error.strerror or error}): make room there, or name another "
        f"folder with {FOLDER_VARIABLE}"
    )
