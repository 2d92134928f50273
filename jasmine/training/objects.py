"""What files in Cloud Storage need that epath does not have: appending, in the background. And what storage of any kind
means by an error: whether it may pass, in which case another attempt may succeed, or is the user's to mend.

Files are read, replaced and listed by epath. An object cannot be appended to: what is new becomes an object of its own,
which is composed behind the old one on condition that nobody else has done so meanwhile. That costs the same however long
the file has become, and loses and doubles nothing when several append or an answer is lost. The launcher, which appends to
the same `events.jsonl`, does it by the same rules in its own `launch.objects`; those rules are all that the two share.

Training must not wait for it, and the service takes one write a second to an object. So lines are collected and sent by a
thread; `flush` waits for them, before a checkpoint is begun and at the end.
"""

import contextlib
import errno
import functools
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from jasmine.errors import ClusterError, UserError

SECONDS = 2.0
# For how long the library itself tries one request again.
PATIENCE = 60.0

# A disk that is full, a device that fails, a server that does not answer: later, or on another machine, it may.
_PASSING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
    | {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
)
# Where the user has to do something. Both kinds are looked for in the texts of libraries that keep no numbers.
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOTDIR)
# What tensorstore and jax's coordination service call what may pass.
_PASSING_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")


def is_object(path: epath.Path) -> bool:
    """Whether a path is in Cloud Storage."""
    return str(path).startswith("gs://")


def errors(path: epath.Path) -> tuple[type[Exception], ...]:
    """What goes wrong with files at a path: on a disk OSErrors, in Cloud Storage whatever its clients raise."""
    return (Exception,) if is_object(path) else (OSError,)


def reason(error: BaseException) -> str:
    """What a storage error says, as one line: of a chain of causes what the operating system says, else the first line."""
    for link in _chain(error):
        if isinstance(link, UserError | ClusterError):
            return str(link)
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        if number := _number_in(str(link)):
            return os.strerror(number)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later though nobody corrects anything: a disk that is full, input and output
    that fail, a server that does not answer, is overloaded (408, 429) or broken (5xx).

    Not so where permission, a bucket or a folder is missing, a file system is read-only, or contents are not what was
    written: nothing of that changes by itself. In a chain of causes, the first that says anything decides.
    """
    from gcsfs.retry import RETRIABLE_EXCEPTIONS
    from google.auth.exceptions import TransportError

    unreachable = (ConnectionError, TimeoutError, TransportError, *RETRIABLE_EXCEPTIONS)
    for link in _chain(error):
        if isinstance(link, UserError | ClusterError):
            return isinstance(link, ClusterError)
        status = _status(link)
        if status is not None:
            return status in (408, 429) or status >= 500
        if isinstance(link, unreachable):
            return True
        number = link.errno if isinstance(link, OSError) else _number_in(str(link))
        if number is not None:
            return number in _PASSING
        if any(word in str(link) for word in _PASSING_WORDS):
            return True
    return False


def storage_error(text: str, error: BaseException) -> UserError | ClusterError:
    """What to raise where storage refuses something: `ClusterError`, so that the launcher tries again, if it may pass."""
    kind = ClusterError if may_pass(error) else UserError
    return kind(f"{text}: {reason(error)}")


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of Google's libraries or of gcsfs, which has it as text at times, stands for."""
    try:
        return int(getattr(error, "code", None))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _number_in(text: str) -> int | None:
    return next((number for number in (*_PASSING, *_LASTING) if os.strerror(number) in text), None)


class _Lines:
    """Lines on their way to one object. `sending` may have arrived already, at one of the offsets `tried`."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        self.waiting: list[bytes] = []
        self.sending = b""
        self.tried: set[int] = set()


class _Outbox:
    """The process's lines that are not in Cloud Storage yet."""

    def __init__(self) -> None:
        self._lines: dict[str, _Lines] = {}
        self._changed = threading.Condition()
        self._hurry = 0
        self._thread: threading.Thread | None = None
        self.problem: Exception | None = None

    def put(self, path: str, line: bytes, check: Callable[[], None]) -> None:
        with self._changed:
            self._lines.setdefault(path, _Lines(check)).waiting.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with self._changed:
            self._hurry += 1
            self._changed.notify_all()
            try:
                while self._lines:
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                        return False
                return True
            finally:
                self._hurry -= 1

    def unsent(self, path: str) -> bytes:
        with self._changed:
            some = self._lines.get(path)
            return some.sending + b"".join(some.waiting) if some is not None else b""

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                self._changed.wait_for(lambda: self._hurry, timeout=SECONDS)
                lines = dict(self._lines)
            problem = None
            for path, some in lines.items():
                try:
                    some.check()
                    self._send(path, some)
                except Exception as error:  # whatever the client raises: it is tried again, after the others' turn
                    problem = error
            self.problem = problem
            if problem is not None:
                time.sleep(SECONDS)

    def _send(self, path: str, some: _Lines) -> None:
        if not some.sending:
            with self._changed:
                some.sending, some.waiting = b"".join(some.waiting), []
        append(epath.Path(path), some.sending, some.tried)
        with self._changed:
            some.sending = b""
            some.tried.clear()
            if not some.waiting:
                del self._lines[path]
            self._changed.notify_all()


_outbox = _Outbox()


def append_later(path: epath.Path, line: bytes, check: Callable[[], None]) -> None:
    """Has a line appended within seconds; `check` is called before each sending to this path, in its thread."""
    _outbox.put(str(path), line, check)


def unsent(path: epath.Path) -> bytes:
    """The lines of a file that are not known to be in Cloud Storage yet."""
    return _outbox.unsent(str(path))


def flush(seconds: float) -> Exception | None:
    """Waits until all lines are in Cloud Storage; returns what keeps them from it, None when they are there."""
    if _outbox.flush(seconds):
        return None
    return _outbox.problem or TimeoutError(f"it does not answer within {seconds:.0f} s")


def append(path: epath.Path, data: bytes, tried: set[int]) -> None:
    """Adds to the end of an object, which is made if there is none.

    Args:
        tried: offsets at which earlier calls with the same data, which failed, may have put it; this call adds its own.
    """
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage import retry  # not of `….retry`: that fails where another thread is importing the package

    bucket_name, _, name = str(path).removeprefix("gs://").partition("/")
    bucket = _bucket(bucket_name, os.environ.get("STORAGE_EMULATOR_HOST"))
    options: dict[str, Any] = {"retry": retry.DEFAULT_RETRY.with_timeout(PATIENCE), "timeout": (5.0, 30.0)}
    piece = bucket.blob(f"{name.rpartition('/')[0]}/.pieces/{uuid.uuid4().hex}")
    uploaded = False
    try:
        while True:
            there = bucket.get_blob(name, **options)
            if there is not None and any(_stands_at(bucket.blob(name), offset, data, options) for offset in tried):
                return
            try:
                if there is None:
                    tried.add(0)
                    bucket.blob(name).upload_from_string(data, if_generation_match=0, **options)
                    return
                if not uploaded:
                    piece.upload_from_string(data, **options)
                    uploaded = True
                tried.add(there.size)
                bucket.blob(name).compose([there, piece], if_generation_match=there.generation, **options)
                return
            except PreconditionFailed:  # somebody else was faster, or it is done and the answer was lost
                time.sleep(random.uniform(0, 0.5))
    finally:
        if uploaded:
            with contextlib.suppress(Exception):
                piece.delete(**options)


def _stands_at(blob: Any, offset: int, data: bytes, options: dict[str, Any]) -> bool:
    from google.api_core.exceptions import RequestRangeNotSatisfiable

    try:
        return bool(blob.download_as_bytes(start=offset, end=offset + len(data) - 1, **options) == data)
    except RequestRangeNotSatisfiable:
        return False


@functools.cache
def _bucket(name: str, emulator: str | None) -> Any:
    from google.cloud import storage

    return storage.Client(project=None).bucket(name)
