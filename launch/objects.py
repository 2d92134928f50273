"""Paths in Google Cloud Storage, with the methods of `pathlib.Path` that this package uses, and what objects need besides.

An object is replaced whole, is there for every reader once it is written, and has a generation on which the next write can be
made conditional; that is what atomic replacing, creating once and appending rest on. There are no directories: one is there
while something lies below it. `google-cloud-storage` is loaded with the first access, so that whoever keeps runs on a disk
does not wait for it.

Every failure is an `OSError` with one line in `strerror`, after up to `PATIENCE` seconds of retries.
"""

import contextlib
import errno
import functools
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Bucket

SCHEME = "gs://"
# For a person who waits, and for whoever sees to a run, who outlasts what storage goes through (`be_patient`): meanwhile the
# job trains on, and a supervisor that gave up would end it. A bucket that is gone, or refuses, fails at once.
PATIENCE, LONG_PATIENCE = 20.0, 12 * 3600.0
# A piece that has waited for so long to be appended (see `append`) has lost its writer.
STALE_PIECE_SECONDS = 2 * 86400.0
# One request: to connect, and between two bytes.
TIMEOUT = (5.0, 30.0)

_patience = PATIENCE
_T = TypeVar("_T")
_R = TypeVar("_R")


def place(text: str | Path) -> Path:
    """Return the path that a text names: an `ObjectPath` if it begins with `gs://`, which for callers is a `Path` as well."""
    if isinstance(text, str) and text.startswith(SCHEME):
        return cast(Path, ObjectPath("/" + text.removeprefix(SCHEME)))
    return Path(text)


def is_object(path: PurePath) -> "TypeGuard[ObjectPath]":
    """Return whether a path is one in Cloud Storage."""
    return isinstance(path, ObjectPath)


def be_patient() -> None:
    """Let this process outlast storage that does not answer, or a disk that is full, for a while, instead of failing within
    seconds."""
    global _patience
    _patience = LONG_PATIENCE


def is_patient() -> bool:
    """Return whether this process is to outlast such things."""
    return _patience == LONG_PATIENCE


@functools.cache
def unreachable(root: Path) -> str | None:
    """Return why a place in Cloud Storage cannot be asked, None where it can; it is asked once."""
    try:
        if is_object(root):
            root.is_dir()
    except OSError as error:
        return str(error.strerror)
    return None


def cache_dir() -> Path:
    """Return where this machine keeps what belongs to runs whose directories are not on its disks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jasmine"


def in_parallel(function: Callable[[_T], _R], items: Iterable[_T], *, of: Path) -> list[_R]:
    """Return `function` of each item; at the same time where `of` is in Cloud Storage, whose answers take long."""
    if not is_object(of):
        return [function(item) for item in items]
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(function, items))


def soft_delete(path: Path) -> str | None:
    """Return what to warn of where the bucket of `path` keeps what is deleted or overwritten, as new buckets do for a week: a
    run appends to files and deletes checkpoints all the time. None where it does not, or may not be asked; one request."""
    if not is_object(path):
        return None
    try:
        bucket = path._bucket()
        bucket.reload(retry=None, timeout=5)
        seconds = bucket.soft_delete_policy.retention_duration_seconds or 0
    except Exception:  # whatever it is: who submits has been told of what matters
        return None
    if seconds <= 0:
        return None
    return (
        f"gs://{path.bucket} keeps, and bills, all that is deleted or overwritten for {seconds / 86400:.3g} days (soft "
        f"delete), and a run does both all the time: gcloud storage buckets update gs://{path.bucket} --clear-soft-delete"
    )


class ObjectPath(PurePosixPath):
    """`gs://bucket/key`. As a pure path it is `/bucket/key`."""

    __slots__ = ()

    def __str__(self) -> str:
        return "gs:/" + super().__str__()

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no file of this machine")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.parts[1]

    @property
    def key(self) -> str:
        """The object's name in its bucket."""
        return "/".join(self.parts[2:])

    # --- what is there -----------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return whether there is an object; a directory is none."""
        return self._state() is not None

    is_file = exists

    def is_dir(self) -> bool:
        """Return whether anything lies below."""
        return next(self._below(most=1), None) is not None

    def size(self) -> int:
        """Return the object's size in bytes, 0 where there is none."""
        state = self._state()
        return state[1] if state else 0

    def updated(self) -> float | None:
        """Return when the object was written, in Unix seconds by the service's clock; None where there is none."""
        with _errors(self):
            blob = self._bucket().get_blob(self.key, retry=_retry(), timeout=TIMEOUT)
        return blob.updated.timestamp() if blob is not None and blob.updated is not None else None

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield what lies in this directory."""
        for blob in self._below(delimiter="/"):
            if blob.name.strip("/") != self.key:
                yield self / blob.name.rstrip("/").rpartition("/")[2]

    def sizes(self) -> dict[str, int]:
        """Return names and sizes of the objects in this directory."""
        return {blob.name.rpartition("/")[2]: blob.size for blob in self._below(delimiter="/") if blob.size is not None}

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Yield what in this directory matches a pattern without slashes."""
        assert "/" not in pattern
        return (path for path in self.iterdir() if path.match(pattern))

    # --- reading -----------------------------------------------------------------------------------------------

    def read_bytes(self, start: int | None = None, length: int | None = None) -> bytes:
        """Return the contents, or a part of them, shorter at their end; a negative `start` counts from there.

        Raises:
            FileNotFoundError: there is no such object.
        """
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        end = start + length - 1 if start is not None and length is not None else None
        with _errors(self):
            try:
                return self._blob().download_as_bytes(start=start, end=end, retry=_retry(), timeout=TIMEOUT)
            except RequestRangeNotSatisfiable:
                return b""

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the contents as text.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self.read_bytes().decode(encoding, errors)

    # --- writing -----------------------------------------------------------------------------------------------

    def write_bytes(self, data: bytes) -> None:
        """Replace the contents; readers see the old or the new ones, whole."""
        with _errors(self):
            self._upload(data)

    def write_text(self, text: str) -> None:
        """Replace the contents by a text."""
        self.write_bytes(text.encode())

    def touch(self) -> None:
        """Make an empty object."""
        self.write_bytes(b"")

    def create(self, data: bytes) -> None:
        """Make an object that is not there yet; of several that try, one succeeds. `data` has to be the writer's own.

        Raises:
            FileExistsError: it is there, and not because an answer to this call was lost.
        """
        if not self.replace_if(0, data) and self.read_bytes() != data:
            raise FileExistsError(errno.EEXIST, "it exists already", str(self))

    def replace_if(self, generation: int, data: bytes) -> bool:
        """Replace the contents if the object is of a generation (0: is not there), and return whether it was."""
        from google.api_core.exceptions import PreconditionFailed

        with _errors(self):
            try:
                self._upload(data, generation)
                return True
            except PreconditionFailed:
                return False

    def read_with_generation(self) -> tuple[bytes, int] | None:
        """Return contents and generation, None where there is no object."""
        with _errors(self):
            blob = self._bucket().get_blob(self.key, retry=_retry(), timeout=TIMEOUT)
        if blob is None:
            return None
        with _errors(self):
            try:
                return blob.download_as_bytes(retry=_retry(), timeout=TIMEOUT), int(blob.generation)
            except _not_found():
                return self.read_with_generation()  # replaced or deleted in between

    def append(self, data: bytes, tried: set[int] | None = None) -> None:
        """Add to the end, in a fixed number of requests however large the object is; several may do so at once.

        The new piece becomes an object of its own, which is then composed behind this one, provided that this one has not
        changed meanwhile. A request whose answer was lost is not repeated: what it was to write stands where it was to.

        Args:
            tried: what an earlier call with the same data, which failed, may have left behind; filled in by this call.

        Raises:
            OSError: it is not known whether the data was written; call again with the same `tried` to make sure of it.
        """
        from google.api_core.exceptions import PreconditionFailed

        tried = set() if tried is None else tried
        piece: ObjectPath | None = None
        pause = 0.05
        try:
            while True:
                if any(self._stands_at(offset, data) for offset in tried):
                    return
                generation, size = self._state() or (0, 0)
                with _errors(self):
                    try:
                        if generation == 0:
                            tried.add(0)
                            self._upload(data, 0)
                            return
                        if piece is None:
                            piece = self.parent / ".pieces" / uuid.uuid4().hex
                            piece.write_bytes(data)
                        tried.add(size)
                        whole = self._blob()
                        whole.compose(
                            [whole, piece._blob()], if_generation_match=generation, retry=_retry(), timeout=TIMEOUT
                        )
                        return
                    except PreconditionFailed:
                        time.sleep(random.uniform(0, pause))
                        pause = min(2 * pause, 1.0)
        finally:
            if piece is not None:
                with contextlib.suppress(OSError):
                    piece.unlink()

    def remove_stale_pieces(self, now: float) -> None:
        """Delete what writers that were killed have left below this directory; `now` is by the service's clock."""
        for blob in self._below():
            if (
                "/.pieces/" in blob.name
                and blob.updated is not None
                and now - blob.updated.timestamp() > STALE_PIECE_SECONDS
            ):
                ObjectPath("/", self.parts[1], blob.name).unlink(missing_ok=True)

    def unlink(self, missing_ok: bool = False, generation: int | None = None) -> None:
        """Delete the object, with `generation` only if it is of that one.

        Raises:
            FileNotFoundError: there is none, and `missing_ok` is False.
        """
        from google.api_core.exceptions import PreconditionFailed

        with _errors(self):
            try:
                self._blob().delete(if_generation_match=generation, retry=_retry(), timeout=TIMEOUT)
            except _not_found():
                if not missing_ok:
                    raise
            except PreconditionFailed:
                return

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing, for a directory needs not be made; with `exist_ok` False be the only one to make it.

        Raises:
            FileExistsError: it was made before.
        """
        if not exist_ok:
            (self / ".directory").create(uuid.uuid4().hex.encode())

    def rmtree(self) -> None:
        """Delete all that lies below."""
        paths = [ObjectPath("/", self.parts[1], blob.name) for blob in self._below()]
        in_parallel(lambda path: path.unlink(missing_ok=True), paths, of=cast(Path, self))

    # --- requests ----------------------------------------------------------------------------------------------

    def _bucket(self) -> "Bucket":
        if len(self.parts) < 2:
            raise FileNotFoundError(errno.ENOENT, "it names no bucket", str(self))
        if "$" in self.parts[1]:
            raise FileNotFoundError(errno.ENOENT, f"{self.parts[1]} is not set", str(self))
        return _client(os.environ.get("STORAGE_EMULATOR_HOST")).bucket(self.parts[1])

    def _blob(self) -> "Blob":
        return self._bucket().blob(self.key)

    def _state(self) -> tuple[int, int] | None:
        """Return generation and size of the object, None where there is none."""
        with _errors(self):
            blob = self._bucket().get_blob(self.key, retry=_retry(), timeout=TIMEOUT)
        return None if blob is None else (int(blob.generation), int(blob.size))

    def _stands_at(self, offset: int, data: bytes) -> bool:
        try:
            return self.read_bytes(offset, len(data)) == data
        except FileNotFoundError:
            return False

    def _upload(self, data: bytes, generation: int | None = None) -> None:
        self._blob().upload_from_string(
            data, "application/octet-stream", if_generation_match=generation, retry=_retry(), timeout=TIMEOUT
        )

    def _below(self, delimiter: str | None = None, most: int | None = None) -> Iterator[Any]:
        """Yield the objects below, and with a delimiter what stands for those further down."""
        prefix = f"{self.key}/" if self.key else None
        with _errors(self):
            found = self._bucket().list_blobs(
                prefix=prefix, delimiter=delimiter, max_results=most, retry=_retry(), timeout=TIMEOUT
            )
            yield from found
        yield from map(_Directory, found.prefixes)


class _Directory:
    """What a listing has in the place of a directory."""

    size = None

    def __init__(self, name: str) -> None:
        self.name = name


def _not_found() -> type[Exception]:
    from google.api_core.exceptions import NotFound

    return NotFound


@functools.cache
def _client(emulator: str | None) -> Any:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client(project=None)
    except DefaultCredentialsError as error:
        raise PermissionError(
            errno.EACCES, "no Google credentials here: `gcloud auth application-default login`"
        ) from error


def _retry() -> Any:
    from google.cloud.storage import retry  # not of `….retry`: that fails where another thread is importing the package

    return retry.DEFAULT_RETRY.with_delay(initial=0.2, maximum=10.0, multiplier=2.0).with_timeout(_patience)


@contextlib.contextmanager
def _errors(path: ObjectPath) -> Iterator[None]:
    """Turn what the client library raises into OSErrors."""
    import requests
    import urllib3
    from google.api_core import exceptions as api
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage import exceptions  # as in `_retry`

    try:
        yield
    except api.NotFound as error:
        raise FileNotFoundError(errno.ENOENT, _message(error), str(path)) from error
    except (api.Forbidden, api.Unauthorized) as error:
        raise PermissionError(errno.EACCES, _message(error), str(path)) from error
    except GoogleAuthError as error:
        raise PermissionError(errno.EACCES, f"Google credentials do not work: {_message(error)}", str(path)) from error
    except api.PreconditionFailed:
        raise
    except (
        api.GoogleAPIError,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        exceptions.DataCorruption,
        exceptions.InvalidResponse,
    ) as error:
        raise OSError(errno.EIO, f"Cloud Storage does not answer: {_message(error)}", str(path)) from error


def _message(error: Exception) -> str:
    """Return what an error says, as one line."""
    details = getattr(error, "errors", None)
    if details and isinstance(details[0], dict) and details[0].get("message"):
        return str(details[0]["message"])
    text = str(error)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text[text.index("{") : text.rindex("}") + 1])["error"]["message"]
    return " ".join(text.split())[:300] or type(error).__name__
