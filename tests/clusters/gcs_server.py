"""What the fake Cloud Storage's own process runs: the JSON API of objects, and an admin URL by which a test makes the
storage misbehave. Not there: hierarchical namespaces, versioning, permissions, encryption keys, gRPC.
"""

import base64
import contextlib
import email
import email.policy
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.clusters.gcs_buckets import PIECE, Buckets, Refusal, Stored, check

_API = re.compile(r"(/upload|/download|/resumable/upload)?/storage/v1(/.*)")
_OBJECT = re.compile(r"/b/([^/]+)/o/([^/]+)(?:/(compose|copyTo|rewriteTo|moveTo)(?:/b/([^/]+))?(?:/o/([^/]+))?)?")


@dataclass
class Fault:
    """What happens to the next `count` requests of a method (any if None) whose path has `contains` in it."""

    kind: str
    count: int
    value: float = 0.0
    method: str | None = None
    contains: str = ""


@dataclass
class Faults:
    """What is to go wrong, and all requests there have been."""

    pending: list[Fault] = field(default_factory=list)
    latency: float = 0.0
    write_seconds: float = 0.0
    # Of every bucket; the real service gives a new one a week.
    soft_delete_seconds: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    written: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, kinds: tuple[str, ...], method: str, path: str) -> Fault | None:
        """Return the fault that this request meets, and count it."""
        with self.lock:
            for fault in self.pending:
                if fault.kind in kinds and fault.method in (None, method) and fault.contains in path:
                    fault.count -= 1
                    if fault.count <= 0:
                        self.pending.remove(fault)
                    return fault
        return None

    def limit_writes(self, place: str) -> None:
        """Refuse an object's second write within `write_seconds`, as the service does with sustained ones."""
        now = time.monotonic()
        with self.lock:
            if now - self.written.get(place, -self.write_seconds) < self.write_seconds:
                raise Refusal(429, f"The object {place} exceeded the rate limit for object mutation operations.")
            self.written[place] = now


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    buckets: Buckets
    faults: Faults
    sessions: dict[str, "Session"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; any other error is one of this server."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


@dataclass
class Session:
    """A resumable upload."""

    bucket: str
    name: str
    query: dict[str, str]
    fields: dict[str, Any]
    file: Path
    size: int = 0
    done: Stored | None = None


@dataclass(frozen=True)
class Answer:
    """What a request is answered with: JSON, or a part of a file."""

    body: Any = None
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    file: Path | None = None
    first: int = 0
    length: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, headers first, waits 40 ms for the client to acknowledge them
    server: Server
    body: Path
    size: int
    md5: str

    def _serve(self) -> None:
        url = urlsplit(self.path)
        if url.path.startswith("/admin/"):
            return self._admin(url.path.removeprefix("/admin/"))
        faults = self.server.faults
        time.sleep(faults.latency)
        self.body = self.server.buckets.folder / f"{uuid.uuid4().hex}.partial"
        try:
            self._read_body()
            entry = {
                "method": self.command,
                "path": unquote(url.path),
                "query": dict(parse_qsl(url.query)),
                "status": 0,
            }
            faults.requests.append(entry)
            if fault := faults.take(("status",), self.command, unquote(self.path)):
                answer = _refused(Refusal(int(fault.value), "injected"))
            else:
                answer = self._answer(self.command, url.path, dict(parse_qsl(url.query, keep_blank_values=True)))
            entry["status"] = answer.status
            if faults.take(("lose",), self.command, unquote(self.path)):
                return self._hang_up()
            self._send(answer)
        finally:
            self.body.unlink(missing_ok=True)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _answer(self, method: str, path: str, query: dict[str, str]) -> Answer:
        try:
            if path == "/batch/storage/v1":
                return self._batch()
            if not (match := _API.fullmatch(path)):
                raise Refusal(404, f"no such method: {method} {path}")
            kind, rest = match[1] or "", match[2]
            if kind in ("/upload", "/resumable/upload"):
                return self._upload(method, rest, query)
            return self._json_api(method, rest, query)
        except Refusal as refusal:
            return _refused(refusal)
        except Exception:  # no client tries again after a 501
            traceback.print_exc()
            return _refused(Refusal(501, traceback.format_exc(limit=-1)))

    def _json_api(self, method: str, path: str, query: dict[str, str]) -> Answer:
        buckets = self.server.buckets
        with buckets.lock:
            if found := _OBJECT.fullmatch(path):
                bucket, name, verb = unquote(found[1]), unquote(found[2]), found[3]
                if verb is not None:
                    to = (unquote(found[4]) if found[4] else bucket, unquote(found[5]) if found[5] else "")
                    return self._make_from_others(verb, bucket, name, to, query)
                return self._object(method, bucket, name, query)
            parts = path.strip("/").split("/")
            if parts == ["b"] and method == "POST":
                name = self._json()["name"]
                if name in buckets.objects:
                    raise Refusal(409, "You already own this bucket.", "conflict")
                buckets.objects[name] = {}
                return Answer(_bucket(name))
            if parts == ["b"] and method == "GET":
                return Answer({"kind": "storage#buckets", "items": [_bucket(name) for name in buckets.objects]})
            name = unquote(parts[1]) if len(parts) > 1 else ""
            there = buckets.bucket(name)
            if len(parts) == 2 and method == "GET":
                policy = {"retentionDurationSeconds": str(self.server.faults.soft_delete_seconds)}
                return Answer({**_bucket(name), "softDeletePolicy": policy})
            if parts[2:] == ["storageLayout"] and method == "GET":
                return Answer({"kind": "storage#storageLayout", "bucket": name, "location": "US"})
            if parts[2:] == ["o"] and method == "GET":
                return Answer(_listing(there, query))
        raise Refusal(404, f"no such method: {method} {path}")

    def _object(self, method: str, bucket: str, name: str, query: dict[str, str]) -> Answer:
        buckets = self.server.buckets
        stored = buckets.find(bucket, name, query)
        check(stored, query, reading=method == "GET")
        if method == "GET" and query.get("alt") == "media":
            return self._media(stored)
        if method == "GET":
            return Answer(stored.meta)
        self.server.faults.limit_writes(f"{bucket}/{name}")
        if method == "DELETE":
            buckets.delete(stored)
            return Answer(None, 204)
        if method in ("PATCH", "PUT"):
            return Answer(buckets.change(stored, self._json()).meta)
        raise Refusal(405, f"no such method: {method}")

    def _media(self, stored: Stored) -> Answer:
        first, last = 0, stored.size - 1
        headers = [
            ("Content-Type", stored.meta["contentType"]),
            ("ETag", stored.meta["etag"]),
            ("Accept-Ranges", "bytes"),
            ("x-goog-generation", stored.meta["generation"]),
            ("x-goog-metageneration", stored.meta["metageneration"]),
            ("x-goog-stored-content-encoding", "identity"),
            ("x-goog-stored-content-length", stored.meta["size"]),
            ("x-goog-hash", f"crc32c={stored.meta['crc32c']}"),
            ("x-goog-storage-class", "STANDARD"),
        ]
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not (asked[1] or asked[2]):
            # Opened while the lock is held: a new generation must not take the file away.
            return Answer(None, 200, tuple(headers), _linked(stored.data), 0, stored.size)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2]) if asked[2] else last, last)
        else:
            first = max(0, stored.size - int(asked[2]))
        if first >= stored.size or first > last:
            raise Refusal(416, "The requested range cannot be satisfied.", "requestedRangeNotSatisfiable")
        headers.append(("Content-Range", f"bytes {first}-{last}/{stored.size}"))
        return Answer(None, 206, tuple(headers), _linked(stored.data), first, last - first + 1)

    def _make_from_others(
        self, verb: str, bucket: str, name: str, to: tuple[str, str], query: dict[str, str]
    ) -> Answer:
        buckets, asked = self.server.buckets, self._json() if self.size else {}
        if verb == "compose":
            to, sources = (bucket, name), []
            if not 1 <= len(asked.get("sourceObjects", [])) <= 32:
                raise Refusal(400, "The number of source components provided must be between 1 and 32.", "invalid")
            for one in asked["sourceObjects"]:
                source = buckets.find(bucket, one["name"], {k: v for k, v in one.items() if k == "generation" and v})
                check(source, {k: str(v) for k, v in one.get("objectPreconditions", {}).items()})
                sources.append(source)
            fields = asked.get("destination", {})
            fields["componentCount"] = sum(int(source.meta.get("componentCount", 1)) for source in sources)
        else:
            source = buckets.find(bucket, name, {k: v for k, v in query.items() if k == "sourceGeneration"})
            check(source, query, "ifSource")
            sources, fields = [source], {**source.meta, **asked}
        target = buckets.bucket(to[0]).get(to[1])
        check(target, {key: value for key, value in query.items() if not key.startswith("ifSource")})
        self.server.faults.limit_writes("/".join(to))
        copy = buckets.folder / f"{uuid.uuid4().hex}.partial"
        with copy.open("wb") as out:
            for source in sources:
                with source.data.open("rb") as file:
                    while piece := file.read(PIECE):
                        out.write(piece)
        fields = {key: value for key, value in fields.items() if key not in ("md5Hash", "crc32c")}
        md5 = None if verb == "compose" else sources[0].meta.get("md5Hash")
        made = buckets.put(*to, copy, copy.stat().st_size, fields, md5)
        if verb == "moveTo" and to != (bucket, name):
            buckets.delete(sources[0])
        if verb != "rewriteTo":
            return Answer(made.meta)
        size = made.meta["size"]
        done = {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True}
        return Answer({**done, "resource": made.meta})

    # --- uploads -----------------------------------------------------------------------------------------------

    def _upload(self, method: str, path: str, query: dict[str, str]) -> Answer:
        if "upload_id" in query:
            return self._resume(method, query["upload_id"])
        match = re.fullmatch(r"/b/([^/]+)/o", path)
        if match is None or method != "POST":
            raise Refusal(404, f"no such method: {method} {path}")
        bucket, kind = unquote(match[1]), query.get("uploadType")
        self.server.buckets.bucket(bucket)
        if kind == "media":
            fields = {"contentType": self.headers.get("Content-Type"), "name": query.get("name", "")}
            return Answer(self._store(bucket, query, fields, self.body, self.size, self.md5).meta)
        if kind == "multipart":
            fields, contents, content_type = self._parts()
            fields = {"contentType": content_type, **fields}
            self.body.write_bytes(contents)
            md5 = base64.b64encode(hashlib.md5(contents).digest()).decode()
            return Answer(self._store(bucket, query, fields, self.body, len(contents), md5).meta)
        if kind != "resumable":
            raise Refusal(400, f"Bad upload type: {kind}", "invalid")
        fields = {"contentType": self.headers.get("X-Upload-Content-Type"), **(self._json() if self.size else {})}
        upload = uuid.uuid4().hex
        name = fields.get("name") or query.get("name", "")
        file = self.server.buckets.folder / f"{upload}.upload.partial"
        file.touch()
        check(self.server.buckets.bucket(bucket).get(name), query)
        self.server.sessions[upload] = Session(bucket, name, query, fields, file)
        host = self.headers.get("Host")
        where = f"http://{host}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={upload}"
        return Answer(None, 200, (("Location", where), ("X-GUploader-UploadID", upload)))

    def _resume(self, method: str, upload: str) -> Answer:
        session = self.server.sessions.get(upload)
        if session is None:
            raise Refusal(404, "The upload is not known.", "notFound")
        if method == "DELETE":
            del self.server.sessions[upload]
            session.file.unlink(missing_ok=True)
            return Answer(None, 499)
        if session.done is not None:
            return Answer(session.done.meta)
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/*"))
        if asked is None:
            raise Refusal(400, "Bad Content-Range", "invalid")
        if "Content-Range" not in self.headers:  # all of it in one request
            first, total = 0, str(self.size)
        else:
            first, total = int(asked[1]) if asked[1] else session.size, asked[3]
        if first > session.size:
            raise Refusal(503, "There is a gap in the upload.")
        if asked[1] or "Content-Range" not in self.headers:
            with session.file.open("r+b") as file, self.body.open("rb") as new:
                file.seek(first)
                while piece := new.read(PIECE):
                    file.write(piece)
            session.size = max(session.size, first + self.size)
        if total != "*" and session.size >= int(total):
            digest = hashlib.md5(session.file.read_bytes()).digest()
            md5 = base64.b64encode(digest).decode()
            fields = {**session.fields, "name": session.name}
            session.done = self._store(session.bucket, session.query, fields, session.file, session.size, md5)
            return Answer(session.done.meta)
        reached = (("Range", f"bytes=0-{session.size - 1}"),) if session.size else ()
        return Answer(None, 308, reached)

    def _store(
        self, bucket: str, query: dict[str, str], fields: dict[str, Any], file: Path, size: int, md5: str
    ) -> Stored:
        buckets, name = self.server.buckets, fields.get("name") or query.get("name", "")
        with buckets.lock:
            check(buckets.bucket(bucket).get(name), query)
            self.server.faults.limit_writes(f"{bucket}/{name}")
            return buckets.put(bucket, name, file, size, fields, md5)

    def _parts(self) -> tuple[dict[str, Any], bytes, str]:
        """Return metadata, contents and their type of a multipart upload."""
        boundary = re.search(r'boundary="?([^";]+)"?', self.headers.get("Content-Type", ""))
        if boundary is None:
            raise Refusal(400, "No boundary", "invalid")
        parts = _split(self.body.read_bytes(), boundary[1].encode())
        if len(parts) != 2:
            raise Refusal(400, f"A multipart upload has two parts, not {len(parts)}", "invalid")
        return json.loads(parts[0][1]), parts[1][1], parts[1][0].get("content-type", "application/octet-stream")

    def _batch(self) -> Answer:
        """Carry out requests that are sent as one; gcsfs deletes that way."""
        boundary = re.search(r'boundary="?([^";]+)"?', self.headers.get("Content-Type", ""))
        if boundary is None:
            raise Refusal(400, "No boundary", "invalid")
        mark = f"batch_{uuid.uuid4().hex}"
        answers = []
        for headers, contents in _split(self.body.read_bytes(), boundary[1].encode()):
            head = contents.decode().lstrip().splitlines()[0].split()
            url = urlsplit(head[1])
            self.server.faults.requests.append(
                {"method": head[0], "path": unquote(url.path), "query": dict(parse_qsl(url.query)), "status": 0}
            )
            answer = self._answer(head[0], url.path, dict(parse_qsl(url.query)))
            body = "" if answer.body is None else json.dumps(answer.body)
            id = headers.get("content-id", "<x>").strip("<>")
            answers.append(
                f"--{mark}\r\nContent-Type: application/http\r\nContent-ID: <response-{id}>\r\n\r\n"
                f"HTTP/1.1 {answer.status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            )
        text = "\r\n".join([*answers, f"--{mark}--", ""])
        return Answer(text.encode(), 200, (("Content-Type", f"multipart/mixed; boundary={mark}"),))

    # --- the connection ----------------------------------------------------------------------------------------

    def _read_body(self) -> None:
        digest = hashlib.md5()
        self.size = 0
        with self.body.open("wb") as out:
            for piece in self._body_pieces():
                out.write(piece)
                digest.update(piece)
                self.size += len(piece)
        self.md5 = base64.b64encode(digest.digest()).decode()

    def _body_pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionError("the request ends early")
            left -= len(piece)
            yield piece

    def _json(self) -> dict[str, Any]:
        try:
            return json.loads(self.body.read_bytes() or b"{}")
        except ValueError:
            raise Refusal(400, "Parse Error", "parseError") from None

    def _send(self, answer: Answer) -> None:
        kind = None
        if isinstance(answer.body, bytes):
            body = answer.body
        elif answer.body is not None:
            body, kind = json.dumps(answer.body).encode(), "application/json; charset=UTF-8"
        else:
            body = b""
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(answer.length if answer.file else len(body)))
        self.end_headers()
        if answer.file is None:
            self.wfile.write(body)
            return
        path = unquote(self.path)
        broken = self.server.faults.take(("break",), self.command, path)
        slow = self.server.faults.take(("slow",), self.command, path)
        try:
            with answer.file.open("rb") as file:
                file.seek(answer.first)
                left = answer.length // 2 if broken else answer.length
                while left:
                    piece = file.read(min(left, int(slow.value) // 10 + 1 if slow else PIECE))
                    left -= len(piece)
                    self.wfile.write(piece)
                    if slow:
                        self.wfile.flush()
                        time.sleep(0.1)
        finally:
            answer.file.unlink()
        if broken:
            self._hang_up()

    def _hang_up(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _admin(self, verb: str) -> None:
        arguments = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"{}")
        faults = self.server.faults
        result: Any = None
        if verb == "fault":
            with faults.lock:
                faults.pending.append(Fault(**arguments))
        elif verb == "latency":
            faults.latency = arguments["seconds"]
        elif verb == "write_seconds":
            faults.write_seconds = arguments["seconds"]
        elif verb == "soft_delete":
            faults.soft_delete_seconds = arguments["seconds"]
        elif verb == "heal":
            faults.pending.clear()
            faults.latency = faults.write_seconds = 0.0
        elif verb == "requests":
            result = list(faults.requests)
        elif verb == "objects":
            with self.server.buckets.lock:
                result = {
                    f"{bucket}/{name}": one.size
                    for bucket, there in self.server.buckets.objects.items()
                    for name, one in there.items()
                }
        self._send(Answer({"result": result}))

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _linked(data: Path) -> Path:
    """Return another name of a file, which keeps it when the object is replaced while it is being sent."""
    link = data.with_name(f"{uuid.uuid4().hex}.partial")
    os.link(data, link)
    return link


def _refused(refusal: Refusal) -> Answer:
    if refusal.status == 304:
        return Answer(None, 304)
    text, reason = str(refusal), refusal.reason or "backendError"
    errors = [{"message": text, "domain": "global", "reason": reason}]
    return Answer({"error": {"code": refusal.status, "message": text, "errors": errors}}, refusal.status)


def _bucket(name: str) -> dict[str, Any]:
    more = {"location": "US", "locationType": "multi-region", "storageClass": "STANDARD", "metageneration": "1"}
    return {"kind": "storage#bucket", "id": name, "name": name, "projectNumber": "1", "etag": "CAE=", **more}


def _listing(there: dict[str, Stored], query: dict[str, str]) -> dict[str, Any]:
    """Return a page of objects and, with a delimiter, of the prefixes that stand for what lies below them."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start, end, token = query.get("startOffset", ""), query.get("endOffset"), query.get("pageToken", "")
    most = min(int(query.get("maxResults") or 1000), 1000)
    entries: dict[str, Stored | None] = {}
    for name in sorted(there, key=str.encode):
        if not name.startswith(prefix) or name < start or (end and name >= end):
            continue
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0:
            entries.setdefault(name[: cut + len(delimiter)], None)
            if query.get("includeTrailingDelimiter") != "true" or name != name[: cut + len(delimiter)]:
                continue
        entries[name] = there[name]
    after = base64.urlsafe_b64decode(token).decode() if token else ""
    left = [(name, one) for name, one in entries.items() if name.encode() > after.encode()]
    page: dict[str, Any] = {"kind": "storage#objects"}
    if items := [one.meta for _, one in left[:most] if one is not None]:
        page["items"] = items
    if prefixes := [name for name, one in left[:most] if one is None]:
        page["prefixes"] = prefixes
    if len(left) > most:
        page["nextPageToken"] = base64.urlsafe_b64encode(left[most - 1][0].encode()).decode()
    return page


def _split(body: bytes, boundary: bytes) -> list[tuple[dict[str, str], bytes]]:
    """Return headers and contents of the parts of a multipart body."""
    parts = []
    for part in re.split(rb"\r?\n--" + re.escape(boundary), b"\n" + body)[1:]:
        if part.startswith(b"--"):
            break
        text = part.removeprefix(b"\r").removeprefix(b"\n")
        head, _, contents = text.partition(b"\r\n\r\n") if b"\r\n\r\n" in text else text.partition(b"\n\n")
        message = email.message_from_bytes(head + b"\n\n", policy=email.policy.HTTP)
        parts.append(({name.lower(): str(value) for name, value in message.items()}, contents))
    return parts


@contextlib.contextmanager
def serving(folder: Path, port: int, buckets: list[str]) -> Iterator[str]:
    """Serve the objects in a folder at a port of the loopback (0: any free one); yields the URL."""
    server = Server(("127.0.0.1", port), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.buckets, server.faults, server.sessions = Buckets(folder, buckets, url), Faults(), {}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
