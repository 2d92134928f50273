"""The on-disk format: episodes of frames and actions, built for random access to windows of frames.

A dataset is a folder of splits (`train`, `val`, `test`); a split is a folder with `index.json` and ArrayRecord
files (shards). One record holds `frames_per_record` consecutive frames of one episode with their actions, so a
16-frame window costs two or three records and never a whole episode. Which records make an episode follows from the
episode lengths in the index alone, which this module reads and writes; the bytes of a record are `jasmine.data.payload`'s.
Nothing is pickled.

Invariants: episodes never share a record; a shard appears under its name complete or not at all; `index.json` lists
only shards that are there, and is replaced in one step; an index that no writer of ours would have written is an error.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from jasmine.data import bucket
from jasmine.data.bucket import BucketFolder
from jasmine.errors import UserError

FORMAT: Final = "jasmine-episodes"
VERSION: Final = 1
INDEX_NAME = "index.json"
ACTION_DTYPE = np.dtype("<i4")

Encoding = Literal["raw", "zstd", "png", "webp-lossless", "webp", "jpeg"]
LOSSLESS: tuple[Encoding, ...] = ("raw", "zstd", "png", "webp-lossless")
LOSSY: tuple[Encoding, ...] = ("webp", "jpeg")

IMAGE_MODES = {1: "L", 3: "RGB"}

# No split of ours comes near these; an index that does would have its readers allocate whatever it says.
_MAX_FRAME_BYTES, _MAX_RECORD_BYTES, _MAX_ACTIONS = 1 << 28, 1 << 31, 1 << 20


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
    format: Literal["jasmine-episodes"] = FORMAT
    version: Literal[1] = VERSION

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


def read_index(split_dir: str | os.PathLike[str]) -> Index:
    """Reads `<split_dir>/index.json`.

    Raises:
        UserError: it is missing, not JSON, or not an index of a version this code reads.
    """
    path = os.path.join(split_dir, INDEX_NAME)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): is this the folder of a split?") from error
    return _parsed_index(content, path)


def read_bucket_index(folder: BucketFolder) -> Index:
    """The same of a split in a bucket."""
    if INDEX_NAME not in folder.objects:
        raise UserError(f"{folder.url}/{INDEX_NAME} is not there: is this the folder of a split?")
    return _parsed_index(bucket.read(folder.objects[INDEX_NAME]), f"{folder.url}/{INDEX_NAME}")


def write_index(split_dir: str | os.PathLike[str], index: Index) -> None:
    """Replaces `<split_dir>/index.json` in one step, durably."""
    path = os.path.join(split_dir, INDEX_NAME)
    with open(path + ".tmp", "wb") as file:
        file.write(_INDEX.dump_json(index) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    sync(os.fspath(split_dir))


def sync(path: str) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parsed_index(content: bytes, path: str) -> Index:
    try:
        index = _INDEX.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not a valid index ({key + ': ' if key else ''}{first['msg']})") from error
    if problem := _problem(index):
        raise UserError(f"{path} is not a valid index ({problem})")
    return index


def _problem(index: Index) -> str | None:
    """What no writer of ours would have written, so that reading goes wrong only where a shard is damaged."""
    for name, size in (("frame_shape", index.frame_bytes), ("action_shape", math.prod(index.action_shape))):
        shape, most = getattr(index, name), _MAX_FRAME_BYTES if name == "frame_shape" else _MAX_ACTIONS
        if min(shape, default=1) < 1 or size > most:
            return f"{name}: {shape}, which no frame has"
    if index.encoding not in ("raw", "zstd") and index.frame_shape[2] not in IMAGE_MODES:
        return f"frame_shape: {index.frame_shape} with encoding {index.encoding}, whose frames have 1 or 3 channels"
    per_frame = index.frame_bytes + index.action_bytes
    if not 1 <= index.frames_per_record <= _MAX_RECORD_BYTES // per_frame:
        return f"frames_per_record: {index.frames_per_record}"
    if index.num_actions is not None and not 1 <= index.num_actions <= 2**31:
        return f"num_actions: {index.num_actions}"
    if index.fps is not None and not 0 < index.fps < math.inf:
        return f"fps: {index.fps}"
    for shard in index.shards:
        if os.path.basename(shard.file) != shard.file or shard.file in ("", ".", "..") or "\0" in shard.file:
            return f"shards: {shard.file!r} is no file's name"
        if not all(0 < length < 2**40 for length in shard.lengths) or not shard.lengths:
            return f"shards: {shard.file}: lengths of episodes"
    return None


_INDEX = TypeAdapter(Index)
