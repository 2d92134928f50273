"""Reads data sets out of Cloud Storage: what lies in a folder of a bucket, and the bytes of one generation of an object.

A folder is listed once, when a data set is opened; whatever is read later names the generation that was listed. So a run
reads the data that it began with or none: an object that was replaced or deleted meanwhile is a `ChangedDataError`.

Invariants: whatever the client library raises leaves here as `UserError`, which is final, or as `ClusterError` or
`UnreachableError`, after which another try may help.
"""

import functools
import http.client
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jasmine.errors import ChangedDataError, ClusterError, UserError

SCHEME = "gs://"
# How long opening a data set waits for storage that does not answer, and every request for its next bytes.
OPEN_SECONDS = 60.0
_TIMEOUTS = (5.0, 30.0)


class UnreachableError(Exception):
    """Storage did not answer, answered that it cannot now, or broke off. The message is its reason, one line."""


class Sink(Protocol):
    """Takes the bytes of an object in order. What `write` raises leaves `fetch` as it is."""

    def write(self, data: bytes, /) -> int: ...


@dataclass(frozen=True)
class BucketObject:
    """One generation of an object: its size in bytes, and its CRC-32C as Cloud Storage writes it (base64)."""

    bucket: str
    name: str
    generation: int
    size: int
    crc32c: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.name}"


@dataclass(frozen=True)
class BucketFolder:
    """What lies directly in a folder: objects and folders, by their names in it."""

    url: str
    objects: Mapping[str, BucketObject]
    folders: tuple[str, ...]


def is_bucket_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in Cloud Storage."""
    return os.fspath(path).startswith(SCHEME)


def list_folder(url: str) -> BucketFolder:
    """What lies in `gs://BUCKET/FOLDER` now; empty where there is no such folder.

    Raises:
        UserError: no such bucket, no permission or no credentials to read it.
        ClusterError: it does not answer within a minute.
    """
    bucket, _, folder = url.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise UserError(f"{url} names no bucket: write gs://BUCKET/FOLDER")
    prefix = f"{folder.strip('/')}/" if folder else ""
    try:
        client, retry = _client(os.environ.get("STORAGE_EMULATOR_HOST")), _retry(OPEN_SECONDS)
        listing = client.list_blobs(bucket, prefix=prefix, delimiter="/", retry=retry, timeout=_TIMEOUTS)
        objects = {
            blob.name.removeprefix(prefix): BucketObject(bucket, blob.name, blob.generation, blob.size, blob.crc32c)
            for blob in listing
        }
        folders = tuple(sorted(name.removeprefix(prefix).rstrip("/") for name in listing.prefixes))
    except Exception as error:
        raise _refusal(url, error) or ClusterError(f"{url} cannot be listed: {_reason(error)}; try again") from error
    return BucketFolder(f"{SCHEME}{bucket}/{prefix}".rstrip("/"), objects, folders)


def read(item: BucketObject) -> bytes:
    """All of a small object.

    Raises:
        UserError: as `fetch`.
        ClusterError: it does not answer within a minute.
    """
    try:
        return bytes(_blob(item).download_as_bytes(retry=_retry(OPEN_SECONDS), timeout=_TIMEOUTS, raw_download=True))
    except Exception as error:
        raise _refusal(item, error) or ClusterError(f"{item} cannot be read: {_reason(error)}; try again") from error


def fetch(item: BucketObject, start: int, sink: Sink) -> None:
    """Streams an object into a sink, from byte `start` on, in one request.

    Raises:
        ChangedDataError: it was replaced or deleted since it was listed.
        UserError: no permission or no credentials to read it.
        UnreachableError: anything that may be over later. The sink has what came before.
    """
    guarded = _Guarded(sink)
    try:
        _blob(item).download_to_file(
            guarded, start=start or None, raw_download=True, checksum=None, retry=None, timeout=_TIMEOUTS
        )
    except Exception as error:
        if guarded.raised is not None:
            raise guarded.raised from error
        raise _refusal(item, error) or UnreachableError(_reason(error)) from error


class _Guarded:
    """Tells what a sink raised from what the client library did: both may be OSErrors."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.raised: Exception | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._sink.write(data)
        except Exception as error:
            self.raised = error
            raise


def _refusal(what: object, error: Exception) -> UserError | None:
    """What no other try would change, as the user should read it."""
    from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound, Unauthorized
    from google.auth.exceptions import DefaultCredentialsError

    match error:
        case DefaultCredentialsError():
            return UserError(f"{what} cannot be read: no credentials; run `gcloud auth application-default login`")
        case Unauthorized() | Forbidden():
            return UserError(f"{what} cannot be read: no permission ({_reason(error)}); grant storage.objectViewer")
        case NotFound() if isinstance(what, BucketObject):
            return ChangedDataError(
                f"{what} is no longer what it was when this data set was opened (generation {what.generation}): data "
                "must not change under a run; begin another run, or go on with what is there now by resuming this one"
            )
        case NotFound():
            return UserError(f"no data at {what}: no such bucket; correct its name")
        case GoogleAPICallError() if error.code is not None and error.code < 500 and error.code not in (408, 429):
            return UserError(f"{what} cannot be read: {_reason(error)}")
    return None


def _reason(error: Exception) -> str:
    """What went wrong, without the URLs and answers that libraries wrap it in."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError

    if isinstance(error, RetryError) and isinstance(error.cause, Exception):
        return _reason(error.cause)
    if isinstance(error, GoogleAPICallError) and error.code is not None:
        return f"{int(error.code)} {http.client.responses.get(int(error.code), '')}".strip()
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    lines = str(getattr(inner, "reason", None) or inner).strip().splitlines()
    return lines[0].rpartition("): ")[2][:200] if lines else type(error).__name__


def _retry(seconds: float) -> Any:
    from google.cloud.storage import retry  # not of `….retry`: that fails where another thread is importing the package

    return retry.DEFAULT_RETRY.with_timeout(seconds)


def _blob(item: BucketObject) -> Any:
    client = _client(os.environ.get("STORAGE_EMULATOR_HOST"))
    return client.bucket(item.bucket).blob(item.name, generation=item.generation)


@functools.cache
def _client(emulator: str | None) -> Any:
    from google.cloud import storage

    return storage.Client(project=None)
