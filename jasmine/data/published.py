"""Reads the format in which datasets of the Jasmine and Jafar family are published, in place.

A split is a folder of `*.array_record` files without an index; a record is a pickled dict `{raw_video: bytes,
sequence_length: int, actions?: integers}` of one episode (in practice, a chunk of 160 frames). The frame shape is not
stored, and a window costs reading its whole record: `python -m jasmine.data.convert` makes the split fast.

A pickle is a program, and these files come from strangers. Here nothing of it is executed: the names it may look up
are those numpy's arrays and integers need, and even these resolve to inert stand-ins that only remember their
arguments; arrays are then built from checked bytes. Any other name is a `UserError` that says which.

Invariants: no code named by a record ever runs; nothing is written into the data's folder (episode lengths are
cached under `$XDG_CACHE_HOME/jasmine`, keyed by each file's path, size and modification time).
"""

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jasmine.data.records import ShardReaders, WindowId, corrupt
from jasmine.errors import UserError

logger = logging.getLogger(__name__)

SHAPE_OPTIONS = "--image_height, --image_width and --image_channels"
_COMMON_SHAPE = (64, 64, 3)
_SCAN_RECORDS = 8  # records held in memory at a time by one scanning thread
_SAVE_EVERY_FILES = 64


@dataclass(frozen=True)
class Record:
    """One unpickled record: `length` frames as bytes, and integers (length, …) or None."""

    video: bytes | bytearray
    length: int
    actions: np.ndarray | None


class BadRecordError(Exception):
    """Why a record's bytes are not what this format allows."""


def parse_record(payload: bytes) -> Record:
    """Unpickles one record without executing anything of it.

    Raises:
        BadRecordError: it is not such a record, or asks for a name that plain data does not need.
    """
    try:
        return _record(_PlainUnpickler(io.BytesIO(payload)).load())
    except BadRecordError:
        raise
    except Exception as error:  # whatever a malformed program makes the unpickler or a stand-in raise
        raise BadRecordError(f"not a pickled record: {error}") from error


def published_files(folder: str) -> list[str]:
    """The `*.array_record` files of a folder, sorted by name; [] where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".array_record"))


class PublishedDataset:
    """An opened split of the published format; reads as `jasmine.data.episodes.Episodes` says. Thread-safe, picklable.

    Opening needs every episode's length: the first time it reads all records once (with a progress bar on a
    terminal) and remembers the lengths in the user's cache.

    Args:
        folder: the folder of the `*.array_record` files.
        frame_shape: (height, width, channels); None is enough where frames have the 12288 bytes of 64×64×3.

    Raises:
        UserError: no files, or a damaged or malicious record (names file and record), or a frame shape that is
            missing or does not fit.
    """

    def __init__(self, folder: str, frame_shape: tuple[int, int, int] | None = None) -> None:
        self.path = folder
        paths = published_files(folder)
        if not paths:
            raise UserError(f"no *.array_record files in {folder}: is this the folder of a split?")
        scans = _scan_cached(folder, paths)
        for path, scan in zip(paths, scans, strict=True):
            _check_alike(paths[0], scans[0], path, scan)
        self.frame_shape = _fitting_shape(folder, frame_shape, scans[0].frame_bytes)
        self.fps: float | None = None
        self.action_shape = scans[0].action_shape or ()
        self.num_actions: int | None = None
        if scans[0].action_shape is not None:
            self.num_actions = max(_stored_num_actions(folder), *(scan.max_action + 1 for scan in scans))
        self._lengths = np.array([length for scan in scans for length in scan.lengths], np.int64)
        counts = [len(scan.lengths) for scan in scans]
        self._shard_of = np.repeat(np.arange(len(paths)), counts)
        self._first_episode = np.cumsum([0, *counts])[:-1]
        self._readers = ShardReaders(paths, counts)

    @property
    def lengths(self) -> np.ndarray:
        """Episode lengths in frames, int64 (E,)."""
        return self._lengths

    @property
    def num_frames(self) -> int:
        """Frames of all episodes."""
        return int(self._lengths.sum())

    def read_window(self, episode: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Episodes.read_window`."""
        frames, actions = self.read_windows([episode], [start], length)
        return frames[0], None if actions is None else actions[0]

    def read_episode(self, episode: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Episodes.read_episode`."""
        return self.read_window(episode, 0, int(self._lengths[episode]))

    def read_windows(
        self, episodes: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Episodes.read_windows`."""
        frames = np.empty((len(episodes), length, *self.frame_shape), np.uint8)
        actions = None
        if self.num_actions is not None:
            actions = np.empty((len(episodes), length, *self.action_shape), np.int32)
        frame_bytes = math.prod(self.frame_shape)
        for row, (episode, start) in enumerate(zip(episodes, starts, strict=True)):
            if not 0 <= start <= self._lengths[episode] - length:
                raise IndexError(f"no frames {start} to {start + length} in episode {episode}")
            window = self.locate(int(episode), int(start))
            shard = int(self._shard_of[episode])
            [payload] = self._readers.read(shard, window.record)
            record = _parse_at(self._readers.paths[shard], window.record, payload)
            if record.length != self._lengths[episode] or len(record.video) != record.length * frame_bytes:
                raise corrupt(self._readers.paths[shard], window.record, "it changed since its length was read")
            pixels = np.frombuffer(record.video, np.uint8, length * frame_bytes, int(start) * frame_bytes)
            frames[row] = pixels.reshape(frames.shape[1:])
            if actions is not None and record.actions is not None:
                actions[row] = record.actions[start : start + length]
        return frames, actions

    def locate(self, episode: int, start: int) -> WindowId:
        """See `Episodes.locate`."""
        shard = int(self._shard_of[episode])
        file = os.path.basename(self._readers.paths[shard])
        return WindowId(file, int(episode - self._first_episode[shard]), episode, start)


def _record(fields: Any) -> Record:
    if not isinstance(fields, dict) or not {"raw_video", "sequence_length"} <= fields.keys():
        raise BadRecordError("not a dict with raw_video and sequence_length")
    video, length, actions = fields["raw_video"], fields["sequence_length"], fields.get("actions")
    if isinstance(length, _Stand):
        length = length.value()[()]
    if not isinstance(video, bytes | bytearray) or not isinstance(length, int | np.integer) or length < 0:
        raise BadRecordError("raw_video is not bytes, or sequence_length is not a count")
    if actions is not None:
        actions = _integers(actions)
        if actions.ndim == 0 or len(actions) != length:
            raise BadRecordError(f"actions of shape {actions.shape} for {length} frames")
    return Record(video, int(length), actions)


class _Stand:
    """What a record's numpy names resolve to: remembers its arguments and does nothing."""

    __slots__ = ("args", "state")

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> np.ndarray:
        """The array this stands for; a numpy integer is an array of no dimensions."""
        raise BadRecordError("a numpy object where an array or an integer belongs")


class _Dtype(_Stand):
    __slots__ = ()

    def dtype(self) -> np.dtype:
        code = self.args[0] if self.args else None
        if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
            raise BadRecordError(f"an array of dtype {code!r}; only integers, floats and bool are read")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        if order not in ("<", ">", "|", "="):
            raise BadRecordError(f"byte order {order!r}")
        return np.dtype(order + code)


class _Ndarray(_Stand):
    __slots__ = ()


class _Reconstructed(_Stand):
    __slots__ = ()

    def value(self) -> np.ndarray:
        _version, shape, dtype, fortran, data = self.state
        return _array(data, dtype, shape, "F" if fortran else "C")


class _FromBuffer(_Stand):
    __slots__ = ()

    def value(self) -> np.ndarray:
        data, dtype, shape, order = self.args
        return _array(data, dtype, shape, order)


class _Scalar(_Stand):
    __slots__ = ()

    def value(self) -> np.ndarray:
        dtype, data = self.args
        return _array(data, dtype, (), "C")


_NAMES = {("numpy", "ndarray"): _Ndarray, ("numpy", "dtype"): _Dtype} | {
    (f"numpy.{core}.{module}", name): stand
    for core in ("core", "_core")
    for module, name, stand in (
        ("multiarray", "_reconstruct", _Reconstructed),
        ("multiarray", "scalar", _Scalar),
        ("numeric", "_frombuffer", _FromBuffer),
    )
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand = _NAMES.get((module, name))
        if stand is None:
            raise BadRecordError(f"it asks for {module}.{name}, which plain data never needs; nothing was executed")
        return stand


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise BadRecordError("an array that is not plain numbers")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise BadRecordError("an array of no valid shape")
    element = dtype.dtype()
    if math.prod(shape) * element.itemsize != len(data):
        raise BadRecordError(f"an array of {len(data)} bytes, not of the {math.prod(shape)} elements it says")
    return np.frombuffer(data, element).reshape(shape, order=order)


def _integers(value: Any) -> np.ndarray:
    if isinstance(value, list | tuple):
        value = [item.value()[()] if isinstance(item, _Stand) else item for item in value]
        if not all(isinstance(item, int | np.integer) for item in value):
            raise BadRecordError("actions are not integers")
        value = np.array(value, np.int64)
    elif isinstance(value, _Stand):
        value = value.value()
    else:
        raise BadRecordError(f"actions are a {type(value).__name__}, not integers")
    if value.dtype.kind not in "biu" or (value.size and not 0 <= value.min() <= value.max() < 2**31):
        raise BadRecordError("actions are not integers from 0 to 2^31 - 1")
    return value.astype(np.int32)


def _parse_at(path: str, record: int, payload: bytes) -> Record:
    try:
        return parse_record(payload)
    except BadRecordError as error:
        raise UserError(f"{path}: record {record} cannot be read: {error}: do not use the file") from error


@dataclass(frozen=True)
class _Scan:
    """What one pass over a file finds out; `size` and `mtime_ns` say for which version of the file it holds."""

    size: int
    mtime_ns: int
    lengths: tuple[int, ...]
    frame_bytes: int
    action_shape: tuple[int, ...] | None
    max_action: int


def _scan_file(path: str) -> _Scan:
    stat = os.stat(path)
    readers = ShardReaders([path])
    lengths: list[int] = []
    shapes: set[tuple[int, tuple[int, ...] | None]] = set()
    max_action = 0
    count = readers.num_records(0)
    for first in range(0, count, _SCAN_RECORDS):
        for number, payload in enumerate(readers.read(0, first, min(_SCAN_RECORDS, count - first)), first):
            record = _parse_at(path, number, payload)
            lengths.append(record.length)
            if record.length == 0:
                continue
            frame_bytes, rest = divmod(len(record.video), record.length)
            if rest or not frame_bytes:
                raise corrupt(path, number, f"{len(record.video)} bytes of pixels for {record.length} frames")
            shapes.add((frame_bytes, None if record.actions is None else record.actions.shape[1:]))
            if len(shapes) > 1:
                raise corrupt(path, number, "frames or actions of another shape than in the records before")
            if record.actions is not None:
                max_action = max(max_action, int(record.actions.max(initial=0)))
    if not shapes:
        raise UserError(f"{path} holds no frames: remove the file, or copy it again")
    [(frame_bytes, action_shape)] = shapes
    readers.close()
    return _Scan(stat.st_size, stat.st_mtime_ns, tuple(lengths), frame_bytes, action_shape, max_action)


def _scan_cached(folder: str, paths: Sequence[str]) -> list[_Scan]:
    """Scans of all files, from the cache where a file is unchanged. Other processes wait for the one that scans."""
    root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jasmine", "published")
    cache = os.path.join(root, hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:32] + ".json")
    try:
        os.makedirs(root, exist_ok=True)
        lock = open(cache + ".lock", "w")  # noqa: SIM115 (closed by the with statement below)
    except OSError as error:
        logger.warning("%s cannot be written (%s): episode lengths are read anew each time", root, error.strerror)
        return _scan_files(paths, {}, None)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _scan_files(paths, _load_cache(cache), cache)


def _scan_files(paths: Sequence[str], known: dict[str, _Scan], cache: str | None) -> list[_Scan]:
    scans: dict[str, _Scan] = {}
    for path in paths:
        scan, stat = known.get(os.path.basename(path)), os.stat(path)
        if scan is not None and (scan.size, scan.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            scans[path] = scan
    missing = [path for path in paths if path not in scans]
    if missing:
        columns = (
            TextColumn("Reading episode lengths, once"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with (
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            futures = {pool.submit(_scan_file, path): path for path in missing}
            task = progress.add_task("", total=len(missing))
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    scans[futures[future]] = future.result()
                    progress.advance(task)
                    if cache and (done % _SAVE_EVERY_FILES == 0 or done == len(missing)):
                        _save_cache(cache, scans)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [scans[path] for path in paths]


def _load_cache(cache: str) -> dict[str, _Scan]:
    try:
        with open(cache) as file:
            stored = json.load(file)
        return {
            name: _Scan(
                size=scan["size"],
                mtime_ns=scan["mtime_ns"],
                lengths=tuple(scan["lengths"]),
                frame_bytes=scan["frame_bytes"],
                action_shape=None if scan["action_shape"] is None else tuple(scan["action_shape"]),
                max_action=scan["max_action"],
            )
            for name, scan in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a cache: none, or not one of ours, means scanning


def _save_cache(cache: str, scans: dict[str, _Scan]) -> None:
    try:
        with open(cache + ".tmp", "w") as file:
            json.dump({os.path.basename(path): vars(scan) for path, scan in scans.items()}, file)
        os.replace(cache + ".tmp", cache)
    except OSError as error:
        logger.warning("%s cannot be written (%s): episode lengths are read anew next time", cache, error.strerror)


def _check_alike(first_path: str, first: _Scan, path: str, scan: _Scan) -> None:
    if scan.frame_bytes != first.frame_bytes:
        raise UserError(
            f"{path} holds frames of {scan.frame_bytes} bytes, {first_path} of {first.frame_bytes}: "
            "a split has frames of one shape; keep them in separate folders"
        )
    if scan.action_shape != first.action_shape:
        raise UserError(
            f"{path} holds actions of shape {scan.action_shape} per frame, {first_path} of {first.action_shape}: "
            "a split has actions everywhere or nowhere; keep them in separate folders"
        )


def _fitting_shape(folder: str, given: tuple[int, int, int] | None, frame_bytes: int) -> tuple[int, int, int]:
    shape = given or _COMMON_SHAPE
    if math.prod(shape) == frame_bytes:
        return shape
    if given is None:
        raise UserError(f"{folder} does not say the shape of its frames of {frame_bytes} bytes: give {SHAPE_OPTIONS}")
    raise UserError(f"frames in {folder} have {frame_bytes} bytes, not those of {given}: correct {SHAPE_OPTIONS}")


def _stored_num_actions(folder: str) -> int:
    """What `metadata.json` beside the splits says, or 0: actions need not all occur in the data."""
    try:
        with open(os.path.join(os.path.dirname(os.path.abspath(folder)), "metadata.json")) as file:
            stored = json.load(file).get("num_actions")
    except (OSError, ValueError, AttributeError):
        return 0
    return stored if isinstance(stored, int) else 0
