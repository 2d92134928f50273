"""How long a shard is waited for, and how its bytes get to the disk.

Storage may err, crawl and be away for as long as something arrives now and then: only after a long time without a byte,
whoever fetches the shard, is it given up. Whatever waits here notices within a fraction of a second that nobody wants the
shard any more, for a program that ends waits for its threads.
"""

import concurrent.futures.thread  # noqa: F401  (see _leaving)
import os
import random
import threading
import time
from dataclasses import dataclass

import google_crc32c

from jasmine.data.bucket import BucketObject, UnreachableError
from jasmine.data.staged_file import BLOCK, encoded
from jasmine.errors import ClusterError

POLL_SECONDS = 0.05

# Set when the interpreter begins to end. It then waits for the threads of executors, such as those that read batches,
# before it runs any hook that has a public name; last registered is first called, so theirs must be registered already.
_leaving = threading.Event()
threading._register_atexit(_leaving.set)  # type: ignore[attr-defined]


class AbandonedError(Exception):
    """Nobody wants the shard any more: the feed was closed, or the program ends."""


@dataclass(frozen=True)
class Busy:
    """Why a shard has to wait; and how many bytes another process has of it."""

    reason: str
    arrived: int


class Attempt:
    """How long a shard has been waited for: `patience` counts from its last byte, whoever fetches it."""

    def __init__(self, item: BucketObject, patience: float, stop: threading.Event | None) -> None:
        self._item, self._patience, self._stop = item, patience, stop
        self._moved, self._seen, self._failures = time.monotonic(), 0, 0

    def progress(self) -> None:
        """Bytes have come: patience begins anew."""
        self._moved, self._failures = time.monotonic(), 0

    def check(self) -> None:
        """Raises AbandonedError if nobody waits any more."""
        if (self._stop is not None and self._stop.is_set()) or _leaving.is_set():
            raise AbandonedError

    def wait_for_others(self, busy: Busy) -> None:
        """Waits a moment, in which another process may get on. ClusterError if none has for too long."""
        if busy.arrived != self._seen:
            self._seen = busy.arrived
            self.progress()
        self._give_up(busy.reason)
        self._sleep(POLL_SECONDS)

    def wait_for_storage(self, reason: str) -> None:
        """Waits before the next try, longer after each that brought nothing. ClusterError after too many."""
        self._give_up(reason)
        self._failures += 1
        self._sleep(random.uniform(0.5, 1.0) * min(10.0, 0.1 * 2**self._failures))

    def _give_up(self, reason: str) -> None:
        waited = time.monotonic() - self._moved
        if waited > self._patience:
            raise ClusterError(
                f"{self._item} cannot be read: nothing for {waited:.0f} s ({reason}); run the same command again"
            )

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.2))


class Sink:
    """Writes what arrives to a part, a MiB or a second's worth at a time: what was written in small pieces is slower to
    read ever after. Raises UnreachableError when it arrives too slowly."""

    def __init__(self, fd: int, checksum: google_crc32c.Checksum, attempt: Attempt, slow: float) -> None:
        self._fd, self._checksum, self._attempt, self._slow = fd, checksum, attempt, slow
        self._buffer = bytearray()
        self._flushed = self._since = time.monotonic()

    def write(self, data: bytes) -> int:
        """Takes the next bytes; see `bucket.Sink`."""
        self._attempt.check()
        self._attempt.progress()
        self._buffer += data
        now = time.monotonic()
        if len(self._buffer) >= BLOCK:
            self._since = now
            self.flush()
        elif now - self._since > self._slow:
            raise UnreachableError(f"less than 1 MiB in {self._slow:.0f} s")
        elif now - self._flushed > 1.0:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Writes what it holds back."""
        while self._buffer:
            written = os.write(self._fd, self._buffer)
            self._checksum.update(bytes(self._buffer[:written]))
            del self._buffer[:written]
        self._flushed = time.monotonic()

    def digest(self) -> str:
        """The CRC-32C of the whole part, as Cloud Storage writes it."""
        return encoded(self._checksum)
