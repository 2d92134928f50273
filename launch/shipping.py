"""Logs that processes write to a file of their machine while their run is in Cloud Storage.

Such a file is appended to the log in the run directory every few seconds, and completely at the end. What was not sent when
everything was killed stays on the machine, in the cache, under the name that it has in the bucket.
"""

import contextlib
import threading
import time
from pathlib import Path

from launch.objects import ObjectPath, cache_dir, is_object

SHIP_SECONDS = 3.0
PIECE_BYTES = 8 << 20
# For how long the last lines are sent again and again when storage does not answer.
LAST_SECONDS = 300.0


def log_here(log: Path) -> Path:
    """Return the file of this machine that a log is written to: itself, or where a `Shipper` takes it from."""
    if not is_object(log):
        return log
    here = cache_dir().joinpath("logs", *log.parts[1:])
    here.parent.mkdir(parents=True, exist_ok=True)
    return here


class Shipper:
    """Sends what is written to `log_here(log)` from now on; for a log that is on a disk it does nothing.

    Nobody else may write to that log meanwhile: how long it is tells what has arrived, whatever answers were lost.
    """

    def __init__(self, log: Path) -> None:
        self._log: ObjectPath | None = log if is_object(log) else None
        self._here = log_here(log)
        self._base: int | None = None
        self._sent: int | None = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        if self._log is not None:
            self._thread.start()

    def close(self) -> None:
        """Send what is left, and remove the file."""
        if self._log is None or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        deadline = time.monotonic() + LAST_SECONDS
        while True:
            try:
                self._ship(self._log)
                self._here.unlink(missing_ok=True)
                return
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(1)

    def _run(self) -> None:
        assert self._log is not None
        while not self._closed.wait(SHIP_SECONDS):
            with contextlib.suppress(OSError):
                self._ship(self._log)

    def _ship(self, log: ObjectPath) -> None:
        if not self._here.exists():
            return
        if self._base is None:
            self._base = log.size()
        if self._sent is None:
            self._sent = log.size() - self._base
        with self._here.open("rb") as file:
            file.seek(self._sent)
            while piece := file.read(PIECE_BYTES):
                sent, self._sent = self._sent, None  # not known until there is an answer
                log.append(piece)
                self._sent = sent + len(piece)
