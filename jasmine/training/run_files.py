"""The job's own files in the run directory: config.json, metrics.jsonl, events.jsonl, pictures. Process 0 writes them.

The launcher writes `run.json`, `attempts/` and more events; nothing here depends on it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import IO, Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from jasmine.errors import EXIT_FAILED, UserError
from jasmine.training import distributed, objects
from jasmine.training.config import TrainConfig

# What a process that was replaced gets to notice it.
REPLACED_SECONDS = 60


def attempt() -> int:
    """Which attempt of the run this is, by the launcher (`JASMINE_ATTEMPT`); 1 without one."""
    return int(os.environ.get("JASMINE_ATTEMPT", "1"))


def leave_if_replaced(run_dir: epath.Path) -> None:
    """Ends this process at once if a newer attempt of the run has begun, which the launcher notes in `attempt`.

    After a network partition the processes of the old attempt live on; this keeps what they write out of the new one's
    files. Without a launcher there are no attempts, and nothing to check.
    """
    if "JASMINE_ATTEMPT" not in os.environ:
        return
    try:
        newest = int((run_dir / "attempt").read_text())
    except ValueError:
        return
    except objects.errors(run_dir):
        return
    if newest > attempt():
        print(f"error: attempt {newest} of this run has begun; attempt {attempt()} leaves", flush=True)
        os._exit(EXIT_FAILED)


def run_directory(config: TrainConfig) -> epath.Path:
    """`--ckpt_dir`, or `JASMINE_RUN_DIR`. Creates nothing.

    Raises:
        UserError: neither is set.
    """
    chosen = config.ckpt_dir or os.environ.get("JASMINE_RUN_DIR", "")
    if not chosen:
        raise UserError("--ckpt_dir is not set (nor JASMINE_RUN_DIR): name a folder for checkpoints and metrics")
    return epath.Path(chosen if "://" in chosen else os.path.abspath(os.path.expanduser(chosen)))


def prepare(run_dir: epath.Path) -> contextlib.ExitStack:
    """Makes the run directory, checks that it can be written, and takes it for this job.

    Returns:
        what holds the run directory, on a local disk, until it is closed or the process ends. In Cloud Storage nothing
        does: there the launcher's lease and the attempt's fence keep others away.

    Raises:
        UserError: it may not be written, or another job is training in it.
        ClusterError: it cannot be written now.
    """
    held = contextlib.ExitStack()
    probe = run_dir / f".write-test-{uuid.uuid4().hex}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        if jax.process_index() == 0 and not objects.is_object(run_dir):
            file = held.enter_context((run_dir / ".training.lock").open("w"))
            _lock(file)
    except BlockingIOError as error:
        raise UserError(
            f"another job is training in {run_dir}; wait for it, stop it, or name another folder"
        ) from error
    except objects.errors(run_dir) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOTSUP):  # a network file system
            return held
        raise objects.storage_error(f"cannot write to the run directory {run_dir}", error) from error
    return held


def _lock(file: IO[str]) -> None:
    # Under the launcher only a process of the attempt before can hold it, which is about to find itself replaced.
    deadline = time.monotonic() + (REPLACED_SECONDS if "JASMINE_ATTEMPT" in os.environ else 0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a whole file, or leaves what was there.

    Raises:
        UserError: it may not be written.
        ClusterError: it cannot be written now.
    """
    if objects.is_object(path):
        try:
            path.write_bytes(data)
        except Exception as error:
            raise objects.storage_error(f"cannot write {path}", error) from error
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise objects.storage_error(f"cannot write {path}", error) from error


def write_config(run_dir: epath.Path, config: TrainConfig, job: str, data: Any) -> None:
    """`config.json`: every option as it was used, and what the data was (a dataclass); what opens this run later
    (`jasmine.training.runs`) builds the model from it."""
    record = {"job": job, "config": dataclasses.asdict(config), "data": dataclasses.asdict(data)}
    write_atomically(run_dir / "config.json", (json.dumps(record, indent=2) + "\n").encode())


def read_options(run_dir: epath.Path) -> dict[str, Any]:
    """The options in `config.json`; {} where it cannot be read."""
    try:
        return dict(json.loads((run_dir / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class JsonLines:
    """Appends one JSON object a line; a line is on disk, whole, when `write` returns, in Cloud Storage when `flush` does."""

    def __init__(self, run_dir: epath.Path, name: str):
        """`name`: of the file, in the run directory; whose newest attempt is looked at before anything is written."""
        self._run_dir, self.path = run_dir, run_dir / name

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, default=_plain, allow_nan=True) + "\n"
        if objects.is_object(self.path):
            objects.append_later(self.path, line.encode(), functools.partial(leave_if_replaced, self._run_dir))
            return
        leave_if_replaced(self._run_dir)
        try:
            with open(self.path, "ab+") as file:
                torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
                file.write(("\n" * torn + line).encode())  # in one piece; what a crash or a full disk tore stays a line
        except OSError as error:
            raise objects.storage_error(f"cannot write {self.path}", error) from error


def flush(run_dir: epath.Path, seconds: float = 300) -> None:
    """Waits until all lines are where they belong.

    Raises:
        UserError: they may not be written.
        ClusterError: they cannot be written within `seconds`.
    """
    if objects.is_object(run_dir) and (problem := objects.flush(seconds)) is not None:
        raise objects.storage_error(f"cannot write metrics and events to {run_dir}", problem) from problem


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line torn by a crash is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def log_event(run_dir: epath.Path, event: str, **fields: Any) -> None:
    """Appends an event of this moment, or of `time` in Unix seconds, to `events.jsonl`.

    Which events there are and what is in them, the launcher's `launch.events` says: both write to this file, by one schema.
    """
    where = {"process": distributed.place()[0], "hostname": socket.gethostname()}
    record = {"time": time.time(), "event": event, "attempt": attempt(), **where, **fields}
    JsonLines(run_dir, "events.jsonl").write(record)


def unsent_metrics(run_dir: epath.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that storage has not taken yet."""
    return list(map(json.loads, objects.unsent(run_dir / "metrics.jsonl").splitlines()))


def rewind_metrics(run_dir: epath.Path, step: int, unsent: Iterable[Mapping[str, Any]] = ()) -> None:
    """Before going on from `step`: takes the lines of later steps, whose work was lost, out of `metrics.jsonl`.

    They move to `metrics.superseded.jsonl`, so that each step stands once in the one file and nothing is lost.

    Args:
        unsent: `unsent_metrics` when the checkpoint of `step` was saved. What has not come since is put in.
    """
    leave_if_replaced(run_dir)
    path = run_dir / "metrics.jsonl"
    before = path.read_bytes() if path.exists() else b""
    records = read_lines(path)
    steps = [record.get("step", 0) for record in records]
    later = [isinstance(one, int | float) and one > step for one in steps]
    kept = [record for record, is_later in zip(records, later, strict=True) if not is_later]
    lost = [record for record, is_later in zip(records, later, strict=True) if is_later]
    there = {one for one in steps if isinstance(one, int | float)}
    kept += [dict(record) for record in unsent if record["step"] not in there]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    if lines.encode() == before:
        return
    superseded = JsonLines(run_dir, "metrics.superseded.jsonl")
    for record in lost:
        superseded.write(record)
    flush(run_dir)  # while they are only on their way, a kill would lose those that are taken out
    write_atomically(path, lines.encode())


def write_png(path: epath.Path, image_HWC: np.ndarray) -> None:
    """An image, float in [0, 1] or uint8, as a PNG file."""
    import io

    pixels = image_HWC if image_HWC.dtype == np.uint8 else (np.clip(image_HWC, 0, 1) * 255 + 0.5).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def seconds(value: float) -> str:
    """A duration for people: 42s, 3m10s, 2h05m, 3d04h."""
    if not math.isfinite(value):
        return "?"
    whole = int(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
