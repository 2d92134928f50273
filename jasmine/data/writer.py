"""Writes a split, in a way that survives being killed: whoever runs the same command again goes on after what is finished.

Invariants: one process writes a split at a time; a shard gets its name when it is whole and on the disk, and stands in the
index after that; what was begun with other settings is never gone on with.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jasmine.data.index import (
    ACTION_DTYPE,
    IMAGE_MODES,
    INDEX_NAME,
    LOSSLESS,
    LOSSY,
    Encoding,
    Index,
    Shard,
    read_index,
    sync,
    write_index,
)
from jasmine.data.payload import encode
from jasmine.data.published import published_files
from jasmine.errors import UserError

DEFAULT_FRAMES_PER_RECORD = 8  # measured: docs/lab-notes.md, "record layout"
DEFAULT_QUALITY = 95


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
        if encoding not in ("raw", "zstd") and frame_shape[2] not in IMAGE_MODES:
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
            payload = encode(index, frames[part], None if actions is None else actions[part])
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
                sync(path + ".tmp")
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
