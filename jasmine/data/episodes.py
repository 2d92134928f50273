"""The on-disk format: episodes of frames and actions, built for random access to windows of frames.

A dataset is a folder of splits (`train`, `val`, `test`); a split is a folder with `index.json` and ArrayRecord
files (shards). One record holds `frames_per_record` consecutive frames of one episode with their actions, so a
16-frame window costs two or three records and never a whole episode. Which records make an episode follows from the
episode lengths in the index alone. Nothing is pickled.

Record payload, n frames (n is smaller than `frames_per_record` only at an episode's end):
    raw, zstd:    uint8 pixels (n, H, W, C) · int32 little-endian actions (n, *action_shape)
    image codecs: uint32 little-endian sizes (n) · n encoded images · the same actions
"zstd" is ArrayRecord's own chunk compression (lossless); the others leave the file uncompressed.

Invariants: episodes never share a record; a shard appears under its name complete or not at all; `index.json` lists
only shards that are there; a payload whose length differs from what the index implies is an error, never garbage.
"""

import difflib
import fcntl
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from jasmine.data.published import PublishedDataset, published_files
from jasmine.data.records import ShardReaders, WindowId, corrupt
from jasmine.errors import UserError

FORMAT = "jasmine-episodes"
VERSION = 1
INDEX_NAME = "index.json"
ACTION_DTYPE = np.dtype("<i4")

Encoding = Literal["raw", "zstd", "png", "webp-lossless", "webp", "jpeg"]
LOSSLESS: tuple[Encoding, ...] = ("raw", "zstd", "png", "webp-lossless")
LOSSY: tuple[Encoding, ...] = ("webp", "jpeg")
DEFAULT_FRAMES_PER_RECORD = 8  # measured: docs/lab-notes.md, "record layout"
DEFAULT_QUALITY = 95

_IMAGE_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the split's folder, its size in bytes, the lengths (frames) of its episodes."""

    file: str
    size: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """What `<split>/index.json` holds.

    Attributes:
        frame_shape: (height, width, channels) of every frame; uint8.
        fps: frames per second of the recording; None where it is not known.
        encoding: how frames are stored, one of `Encoding`.
        frames_per_record: frames in one record.
        quality: 1-100 for "webp" and "jpeg"; None for the lossless encodings.
        num_actions: actions are integers in [0, num_actions); None where the dataset has no actions.
        action_shape: shape of one frame's action; () for a single integer.
        env: where the frames come from, as a name ("coinrun", "video" …).
        metadata: what the maker wants to remember (its name, seed, options); any JSON.
        shards: the finished shards, in order.
        complete: False while a writer has not finished the split.
    """

    frame_shape: tuple[int, int, int]
    fps: float | None
    encoding: Encoding
    frames_per_record: int
    quality: int | None = None
    num_actions: int | None = None
    action_shape: tuple[int, ...] = ()
    env: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    format: Literal["jasmine-episodes"] = FORMAT  # type: ignore[assignment]
    version: Literal[1] = VERSION  # type: ignore[assignment]

    @property
    def lengths(self) -> np.ndarray:
        """Episode lengths in frames, int64 (E,)."""
        return np.array([length for shard in self.shards for length in shard.lengths], np.int64)

    @cached_property
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame."""
        return math.prod(self.frame_shape)

    @cached_property
    def action_bytes(self) -> int:
        """Bytes of one frame's action in a record; 0 without actions."""
        return 0 if self.num_actions is None else math.prod(self.action_shape) * ACTION_DTYPE.itemsize


class Episodes(Protocol):
    """What training reads from: an opened split, in whichever format. Thread-safe and picklable."""

    path: str

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every frame."""
        ...

    @property
    def fps(self) -> float | None:
        """Frames per second of the recording; None where it is not known."""
        ...

    @property
    def num_actions(self) -> int | None:
        """Actions are integers in [0, num_actions); None without actions."""
        ...

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one frame's action; () for a single integer."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Episode lengths in frames, int64 (E,)."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames of all episodes."""
        ...

    def read_window(self, episode: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Frames uint8 (length, H, W, C) and actions int32 (length, *action_shape), None without actions."""
        ...

    def read_windows(
        self, episodes: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """B windows at once: uint8 (B, length, H, W, C) and int32 (B, length, *action_shape) or None."""
        ...

    def read_episode(self, episode: int) -> tuple[np.ndarray, np.ndarray | None]:
        """All frames and actions of one episode, as `read_window` gives them."""
        ...

    def locate(self, episode: int, start: int) -> WindowId:
        """The file and first record of the window that starts at `start` of `episode`."""
        ...


class EpisodeWriter:
    """Writes one split, episode by episode; interrupted, it goes on after the last finished shard.

    A context manager: leaving it normally writes the last shard and marks the split complete; leaving it by an
    exception discards the shard in progress and leaves the split to be resumed. One writer per split at a time.

        with EpisodeWriter("data/coinrun/train", frame_shape=(64, 64, 3), fps=15, num_actions=15) as writer:
            for k in range(writer.num_episodes, 1000):
                writer.write(*play(seed=k))

    Args:
        split_dir: the split's folder; made if it is not there.
        frame_shape: (height, width, channels); channels 1 or 3 for the image encodings.
        fps: frames per second of the recording; None where it is not known.
        encoding: one of `Encoding`.
        quality: 1-100, for the lossy encodings only (default 95).
        frames_per_record: default 8.
        num_actions: size of the action alphabet; None for a dataset without actions.
        action_shape: shape of one frame's action.
        env: where the frames come from.
        metadata: JSON that says how the split was made. Resuming with other metadata is an error.
        episodes_per_shard, shard_bytes: a shard is finished when it holds so many episodes or so many payload bytes.

    Raises:
        UserError: the folder holds a finished split, or one that was begun with other settings (which setting, both
            values), or is being written by another process, or cannot be written.
    """

    def __init__(
        self,
        split_dir: str | os.PathLike[str],
        *,
        frame_shape: tuple[int, int, int],
        fps: float | None,
        encoding: Encoding = "zstd",
        quality: int | None = None,
        frames_per_record: int | None = None,
        num_actions: int | None = None,
        action_shape: tuple[int, ...] = (),
        env: str = "",
        metadata: Mapping[str, Any] | None = None,
        episodes_per_shard: int = 1000,
        shard_bytes: int = 1 << 30,
    ) -> None:
        self.split_dir = os.fspath(split_dir)
        index = Index(
            frame_shape=frame_shape,
            fps=None if fps is None else float(fps),
            encoding=encoding,
            quality=_checked_quality(encoding, quality),
            frames_per_record=frames_per_record or DEFAULT_FRAMES_PER_RECORD,
            num_actions=num_actions,
            action_shape=action_shape,
            env=env,
            metadata=json.loads(json.dumps(dict(metadata or {}))),
        )
        if encoding not in ("raw", "zstd") and frame_shape[2] not in _IMAGE_MODES:
            raise UserError(f"encoding {encoding} stores frames of 1 or 3 channels, not {frame_shape[2]}: use zstd")
        self._episodes_per_shard = episodes_per_shard
        self._shard_bytes = shard_bytes
        self._lengths: list[int] = []  # of the shard in progress
        self._payload_bytes = 0
        self._writer: Any = None
        self._lock_fd = _lock_folder(self.split_dir)
        try:
            self.index = self._resume(index)
            for name in os.listdir(self.split_dir):
                if name.endswith(".tmp"):
                    os.unlink(os.path.join(self.split_dir, name))
            write_index(self.split_dir, self.index)
        except BaseException:
            os.close(self._lock_fd)
            raise

    @property
    def num_episodes(self) -> int:
        """Episodes written so far, those of earlier, interrupted writers included."""
        return sum(len(shard.lengths) for shard in self.index.shards) + len(self._lengths)

    def write(self, frames: np.ndarray, actions: np.ndarray | None = None) -> None:
        """Appends one episode.

        Args:
            frames: uint8 (T, H, W, C), T > 0.
            actions: integers (T, *action_shape) in [0, num_actions); None for a dataset without actions.

        Raises:
            ValueError: shapes, dtype or values do not fit what the writer was opened with.
        """
        index = self.index
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != index.frame_shape or not len(frames):
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (T, {index.frame_shape}) with T > 0")
        if (actions is None) != (index.num_actions is None):
            raise ValueError("actions must be given if, and only if, the writer was opened with num_actions")
        if actions is not None:
            actions = np.asarray(actions)
            if actions.shape != (len(frames), *index.action_shape) or actions.dtype.kind not in "iu":
                raise ValueError(f"actions are {actions.dtype} {actions.shape}, not int (T, *{index.action_shape})")
            if actions.min() < 0 or actions.max() >= (index.num_actions or 0):
                raise ValueError(f"actions reach from {actions.min()} to {actions.max()}, not 0 to num_actions - 1")
            actions = actions.astype(ACTION_DTYPE)
        if self._writer is None:
            compression = "zstd:3" if index.encoding == "zstd" else "uncompressed"
            self._writer = ArrayRecordWriter(self._shard_path() + ".tmp", f"group_size:1,{compression}")
        for first in range(0, len(frames), index.frames_per_record):
            part = slice(first, first + index.frames_per_record)
            payload = _encode(index, frames[part], None if actions is None else actions[part])
            with self._storage_errors():
                self._writer.write(payload)
            self._payload_bytes += len(payload)
        self._lengths.append(len(frames))
        if len(self._lengths) >= self._episodes_per_shard or self._payload_bytes >= self._shard_bytes:
            self._finish_shard(complete=False)

    def adopt(self, parts: Sequence[str | os.PathLike[str]]) -> None:
        """Makes the shards of other, finished splits, in their order, those of this one, which has none; moves the files.

        So parallel processes write one split: each some parts of it, and one of them adopts all. Interrupted, the same
        call goes on.

        Args:
            parts: folders on the same file system; their settings must be those of this writer.
        """
        shards: list[Shard] = []
        with self._storage_errors():
            for part in parts:
                for shard in read_index(part).shards:
                    name = _shard_name(len(shards))
                    if os.path.exists(os.path.join(part, shard.file)):  # else it was moved before an interruption
                        os.replace(os.path.join(part, shard.file), os.path.join(self.split_dir, name))
                    shards.append(replace(shard, file=name))
            index = replace(self.index, shards=tuple(shards))
            write_index(self.split_dir, index)
        self.index = index

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish_shard(complete=True)
        finally:
            self._writer = None
            with suppress(FileNotFoundError):
                os.unlink(self._shard_path() + ".tmp")
            os.close(self._lock_fd)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"{self.split_dir} cannot be written ({reason}): make room there and run the same command again; "
                f"the {len(self.index.shards)} finished shards are kept"
            ) from error

    def _shard_path(self) -> str:
        return os.path.join(self.split_dir, _shard_name(len(self.index.shards)))

    def _finish_shard(self, *, complete: bool) -> None:
        shards = self.index.shards
        with self._storage_errors():
            if self._writer is not None:
                path = self._shard_path()
                self._writer.close()
                self._writer = None
                _sync(path + ".tmp")
                os.replace(path + ".tmp", path)
                shards += (Shard(os.path.basename(path), os.path.getsize(path), tuple(self._lengths)),)
            index = replace(self.index, shards=shards, complete=complete)
            write_index(self.split_dir, index)
        self.index, self._lengths, self._payload_bytes = index, [], 0

    def _resume(self, index: Index) -> Index:
        if not os.path.exists(os.path.join(self.split_dir, INDEX_NAME)):
            if published_files(self.split_dir):
                raise UserError(f"{self.split_dir} holds ArrayRecord files of another format: choose another folder")
            return index
        found = read_index(self.split_dir)
        if found.complete:
            raise UserError(f"{self.split_dir} holds a finished split: choose another folder, or delete it first")
        for key, new in asdict(replace(index, shards=found.shards)).items():
            old = asdict(found)[key]
            if old != new:
                raise UserError(
                    f"{self.split_dir} was begun with {key} {old}, not {new}: repeat the first command to go on, "
                    "or choose another folder"
                )
        return found


class EpisodeDataset:
    """An opened split of this format; see `Episodes` for the reads. Thread-safe and picklable.

    Opening reads the index and checks that every shard is there with its size; it opens no shard.

    Args:
        split_dir: the split's folder.
        allow_unfinished: open what an interrupted writer has finished so far, instead of refusing.

    Raises:
        UserError: the index is missing or not valid, the split is unfinished or empty, or a shard is missing or
            truncated. The read methods raise it for a corrupt record. All name the file.
    """

    def __init__(self, split_dir: str | os.PathLike[str], *, allow_unfinished: bool = False) -> None:
        self.path = os.fspath(split_dir)
        self.index = index = read_index(self.path)
        if not index.complete and not allow_unfinished:
            raise UserError(f"{self.path} is unfinished: run the command that makes it again, it goes on where it was")
        self._lengths = index.lengths
        if not len(self._lengths):
            raise UserError(f"{self.path} holds no episodes: make the data again")
        records = -(-self._lengths // index.frames_per_record)
        episodes_of = [len(shard.lengths) for shard in index.shards]
        self._shard_of = np.repeat(np.arange(len(index.shards)), episodes_of)
        first_episode = np.cumsum([0, *episodes_of])[:-1]
        before = np.cumsum(records) - records
        self._first_record = before - before[first_episode][self._shard_of]
        counts = np.add.reduceat(records, first_episode).tolist()
        paths = [os.path.join(self.path, shard.file) for shard in index.shards]
        for path, shard in zip(paths, index.shards, strict=True):
            _check_size(path, shard.size)
        self._readers = ShardReaders(paths, counts)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.index.frame_shape

    @property
    def fps(self) -> float | None:
        """Frames per second of the recording; None where it is not known."""
        return self.index.fps

    @property
    def num_actions(self) -> int | None:
        """Actions are in [0, num_actions); None without actions."""
        return self.index.num_actions

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one frame's action."""
        return self.index.action_shape

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
        """See `Episodes.read_windows`. The hot path: decodes only the frames asked for, into one array."""
        index = self.index
        frames = np.empty((len(episodes), length, *index.frame_shape), np.uint8)
        actions = None
        if index.num_actions is not None:
            actions = np.empty((len(episodes), length, *index.action_shape), np.int32)
        for row, (episode, start) in enumerate(zip(episodes, starts, strict=True)):
            self._read_into(int(episode), int(start), frames[row], None if actions is None else actions[row])
        return frames, actions

    def _read_into(self, episode: int, start: int, frames: np.ndarray, actions: np.ndarray | None) -> None:
        index = self.index
        per_record = index.frames_per_record
        episode_length, length = int(self._lengths[episode]), len(frames)
        if not 0 <= start <= episode_length - length:
            raise IndexError(f"no frames {start} to {start + length} in episode {episode} of {episode_length} frames")
        shard, episode_record = int(self._shard_of[episode]), int(self._first_record[episode])
        first = start // per_record
        payloads = self._readers.read(shard, episode_record + first, (start + length - 1) // per_record - first + 1)
        done = 0
        for record, payload in enumerate(payloads, first):
            held = min(per_record, episode_length - record * per_record)
            low = max(0, start - record * per_record)
            high = min(held, start + length - record * per_record)
            part = slice(done, done + high - low)
            try:
                actions_at = _decode_frames(index, payload, held, low, frames[part])
            except _BadPayloadError as error:
                raise corrupt(self._readers.paths[shard], episode_record + record, str(error)) from error
            if actions is not None:
                stored = np.frombuffer(payload, ACTION_DTYPE, offset=actions_at)
                actions[part] = stored.reshape(held, *index.action_shape)[low:high]
            done += high - low

    def locate(self, episode: int, start: int) -> WindowId:
        """See `Episodes.locate`."""
        shard = int(self._shard_of[episode])
        record = int(self._first_record[episode]) + start // self.index.frames_per_record
        return WindowId(self.index.shards[shard].file, record, episode, start)


def open_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    frame_shape: tuple[int, int, int] | None = None,
    allow_unfinished: bool = False,
) -> EpisodeDataset | PublishedDataset:
    """Opens a split of either format.

    Args:
        path: a split's folder (`index.json`, or `*.array_record` files alone: the published format), or a dataset
            whose folder `split` is one.
        split: which split, where `path` is a dataset.
        frame_shape: (height, width, channels), for the published format, which does not store it; checked against
            what this format stores.
        allow_unfinished: see `EpisodeDataset`.

    Raises:
        UserError: nothing to open there (says what is), or what is there is damaged (names file and record).
    """
    root = os.fspath(path)
    folder = _find_split(root, split)
    if os.path.exists(os.path.join(folder, INDEX_NAME)):
        dataset = EpisodeDataset(folder, allow_unfinished=allow_unfinished)
        if frame_shape is not None and frame_shape != dataset.frame_shape:
            raise UserError(f"{folder} holds frames of {dataset.frame_shape}, not of {frame_shape}: drop the options")
        return dataset
    return PublishedDataset(folder, frame_shape=frame_shape)


def read_index(split_dir: str | os.PathLike[str]) -> Index:
    """Reads `<split_dir>/index.json`.

    Raises:
        UserError: it is missing, not JSON, or not an index of a version this code reads.
    """
    path = os.path.join(split_dir, INDEX_NAME)
    try:
        with open(path, "rb") as file:
            return _INDEX.validate_json(file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): is this the folder of a split?") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not a valid index ({key + ': ' if key else ''}{first['msg']})") from error


def write_index(split_dir: str | os.PathLike[str], index: Index) -> None:
    """Replaces `<split_dir>/index.json` in one step, durably."""
    path = os.path.join(split_dir, INDEX_NAME)
    with open(path + ".tmp", "wb") as file:
        file.write(_INDEX.dump_json(index) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    _sync(os.fspath(split_dir))


_INDEX = TypeAdapter(Index)


class _BadPayloadError(Exception):
    pass


def _encode(index: Index, frames: np.ndarray, actions: np.ndarray | None) -> bytes:
    tail = b"" if actions is None else actions.tobytes()
    if index.encoding in ("raw", "zstd"):
        return frames.tobytes() + tail
    images = [_encode_image(index, frame) for frame in frames]
    sizes = np.array([len(image) for image in images], "<u4")
    return b"".join([sizes.tobytes(), *images, tail])


def _encode_image(index: Index, frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(frame[..., 0] if index.frame_shape[2] == 1 else frame)
    match index.encoding:
        case "png":
            image.save(buffer, "PNG")
        case "webp-lossless":
            image.save(buffer, "WEBP", lossless=True)
        case "webp":
            image.save(buffer, "WEBP", quality=index.quality)
        case "jpeg":
            image.save(buffer, "JPEG", quality=index.quality)
    return buffer.getvalue()


def _decode_frames(index: Index, payload: bytes, held: int, low: int, frames: np.ndarray) -> int:
    """Decodes into `frames` those from `low` on, of a record that holds `held`; returns the offset of the actions."""
    if index.encoding in ("raw", "zstd"):
        frame_bytes = index.frame_bytes
        actions_at = held * frame_bytes
        expected = actions_at + held * index.action_bytes
        if len(payload) != expected:
            raise _BadPayloadError(f"{len(payload)} bytes, not {expected}")
        pixels = np.frombuffer(payload, np.uint8, len(frames) * frame_bytes, low * frame_bytes)
        frames[:] = pixels.reshape(frames.shape)
        return actions_at
    if len(payload) < 4 * held:
        raise _BadPayloadError(f"{len(payload)} bytes cannot hold {held} images")
    ends = 4 * held + np.cumsum(np.frombuffer(payload, "<u4", held), dtype=np.int64)
    starts = [4 * held, *ends[:-1]]
    if len(payload) != ends[-1] + held * index.action_bytes:
        raise _BadPayloadError(f"{len(payload)} bytes, not the {ends[-1] + held * index.action_bytes} of its images")
    for k, frame in enumerate(frames, low):
        _decode_image(index, payload[starts[k] : ends[k]], frame)
    return int(ends[-1])


def _decode_image(index: Index, encoded: bytes, frame: np.ndarray) -> None:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert(_IMAGE_MODES[index.frame_shape[2]]))
    except (OSError, SyntaxError, ValueError) as error:
        raise _BadPayloadError(f"image: {error}") from error
    if pixels.size != frame.size or pixels.shape[:2] != frame.shape[:2]:
        raise _BadPayloadError(f"image of {pixels.shape[:2]}, not of {frame.shape[:2]}")
    frame[:] = pixels.reshape(frame.shape)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.array_record"


def _checked_quality(encoding: Encoding, quality: int | None) -> int | None:
    if encoding not in LOSSLESS + LOSSY:
        raise UserError(f"unknown encoding {encoding}: choose one of {', '.join(LOSSLESS + LOSSY)}")
    if encoding in LOSSLESS:
        if quality is not None:
            raise UserError(f"encoding {encoding} is lossless: quality is for {' and '.join(LOSSY)}")
        return None
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"quality {quality} is not between 1 and 100")
    return quality or DEFAULT_QUALITY


def _lock_folder(path: str) -> int:
    try:
        os.makedirs(path, exist_ok=True)
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose a folder that can") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise UserError(f"{path} is being written by another process: wait for it, or choose another folder") from error
    return fd


def _check_size(path: str, size: int) -> None:
    try:
        found = os.path.getsize(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), but the index lists it: restore the file"
        ) from error
    if found != size:
        raise corrupt(path, None, f"{found} bytes where the index says {size}")


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_split(path: str) -> bool:
    return os.path.exists(os.path.join(path, INDEX_NAME)) or bool(published_files(path))


def _find_split(root: str, split: str) -> str:
    if not os.path.isdir(root):
        parent, name = os.path.split(os.path.abspath(root))
        near = difflib.get_close_matches(name, os.listdir(parent) if os.path.isdir(parent) else [], 1)
        hint = f": did you mean {os.path.join(parent, near[0])}?" if near else ": make or copy the data first"
        raise UserError(f"no data at {root} ({'a file' if os.path.exists(root) else 'no such folder'}){hint}")
    for folder in (root, os.path.join(root, split)):
        if _is_split(folder):
            return folder
    inside = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    splits = [folder for folder in inside if _is_split(folder)]
    if splits:
        raise UserError(f"no split {split} in {root}: it has {', '.join(map(os.path.basename, splits))}")
    deeper = [folder for folder in (os.path.join(path, split) for path in inside) if _is_split(folder)]
    hint = f": did you mean {os.path.dirname(deeper[0])}?" if deeper else ""
    raise UserError(f"no data in {root}: neither {INDEX_NAME} nor *.array_record files there or in {split}/{hint}")
