"""What the fake Cloud Storage holds.

Objects lie in files, so that a server that is killed comes back with all that it had acknowledged. As on the real service
every write, copy, composition and deletion of an object is atomic, makes a new generation, and can be made conditional on
the present one; reads after writes and listings are consistent.
"""

import base64
import itertools
import json
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c

PIECE = 1 << 20


class Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


def _not_found(what: str) -> Refusal:
    return Refusal(404, f"No such object: {what}", "notFound")


@dataclass(frozen=True)
class Stored:
    """An object: its metadata as the API shows it, and the file that holds its contents."""

    meta: dict[str, Any]
    data: Path

    @property
    def generation(self) -> int:
        return int(self.meta["generation"])

    @property
    def size(self) -> int:
        return int(self.meta["size"])


class Buckets:
    """All objects of all buckets. Callers hold `lock` over whatever must be atomic."""

    def __init__(self, folder: Path, names: list[str], url: str) -> None:
        self.folder, self.url, self.lock = folder, url, threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)
        self.objects: dict[str, dict[str, Stored]] = {name: {} for name in names}
        newest = time.time_ns() // 1000
        for partial in folder.glob("*.partial"):
            partial.unlink()
        for path in sorted(folder.glob("*.json")):
            stored = Stored(json.loads(path.read_text()), path.with_suffix(".data"))
            there = self.objects.setdefault(stored.meta["bucket"], {})
            before = there.get(stored.meta["name"])
            older = before if before and before.generation < stored.generation else None
            if older is not None:  # the server was killed after a write, before it had removed what was there
                self._remove_files(older)
            there[stored.meta["name"]] = stored
            newest = max(newest, stored.generation + 1)
        self._generations = itertools.count(newest)

    def bucket(self, name: str) -> dict[str, Stored]:
        if name not in self.objects:
            raise Refusal(404, "The specified bucket does not exist.", "notFound")
        return self.objects[name]

    def find(self, bucket: str, name: str, query: dict[str, str]) -> Stored:
        """Return an object if it is of the generation asked for."""
        found = self.bucket(bucket).get(name)
        if found is None or ("generation" in query and int(query["generation"]) != found.generation):
            raise _not_found(f"{bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, source: Path, size: int, fields: dict[str, Any], md5: str | None) -> Stored:
        """Make an object of a file, which it takes over."""
        if not name or len(name.encode()) > 1024 or name in (".", "..") or re.search(r"[\r\n]", name):
            raise Refusal(400, f"Invalid object name: {name!r}", "invalid")
        before = self.bucket(bucket).get(name)
        generation = next(self._generations)
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 10**6 % 1000:03d}Z"
        place = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        meta = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "selfLink": f"{self.url}{place}",
            "mediaLink": f"{self.url}/download{place}?generation={generation}&alt=media",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "contentType": fields.get("contentType") or "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(size),
            "crc32c": _crc32c(source),
            "etag": base64.b64encode(str(generation).encode()).decode(),
            "timeCreated": now,
            "updated": now,
            **{key: fields[key] for key in ("metadata", "cacheControl", "componentCount") if fields.get(key)},
            **({"md5Hash": md5} if md5 else {}),
        }
        for key in ("md5Hash", "crc32c"):
            if fields.get(key) and meta.get(key) and fields[key] != meta[key]:
                raise Refusal(400, f"Provided {key} does not match the contents", "invalid")
        data = self.folder / f"{generation:020d}.data"
        source.rename(data)
        stored = Stored(meta, data)
        self._write(stored)
        self.objects[bucket][name] = stored
        if before is not None:
            self._remove_files(before)
        return stored

    def change(self, stored: Stored, fields: dict[str, Any]) -> Stored:
        """Change an object's metadata; a null removes a key."""
        meta = {**stored.meta, "metageneration": str(int(stored.meta["metageneration"]) + 1)}
        if "metadata" in fields:
            merged = {**meta.get("metadata", {}), **(fields["metadata"] or {})} if fields["metadata"] else {}
            meta["metadata"] = {key: value for key, value in merged.items() if value is not None}
        meta |= {key: fields[key] for key in ("contentType", "cacheControl") if key in fields}
        changed = Stored(meta, stored.data)
        self._write(changed)
        self.objects[meta["bucket"]][meta["name"]] = changed
        return changed

    def delete(self, stored: Stored) -> None:
        del self.objects[stored.meta["bucket"]][stored.meta["name"]]
        self._remove_files(stored)

    def _write(self, stored: Stored) -> None:
        partial = stored.data.with_suffix(".partial")
        partial.write_text(json.dumps(stored.meta))
        partial.rename(stored.data.with_suffix(".json"))

    def _remove_files(self, stored: Stored) -> None:
        stored.data.with_suffix(".json").unlink()
        stored.data.unlink()  # who is reading it has it open


def _crc32c(path: Path) -> str:
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            checksum.update(piece)
    return base64.b64encode(checksum.digest()).decode()


def check(stored: Stored | None, query: dict[str, str], prefix: str = "if", *, reading: bool = False) -> None:
    """Refuse a request whose preconditions an object, or its absence, does not meet."""
    generation = stored.generation if stored else 0
    metageneration = int(stored.meta["metageneration"]) if stored else 0
    given = {key[len(prefix) :].lower(): int(value) for key, value in query.items() if key.startswith(prefix)}
    for what, have in (("generation", generation), ("metageneration", metageneration)):
        if given.get(f"{what}match", have) != have:
            raise Refusal(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")
        if given.get(f"{what}notmatch") == have:
            raise Refusal(304 if reading else 412, "The object is as it was.", "conditionNotMet")
