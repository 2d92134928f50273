"""Reads windows of frames and actions out of a split: what training asks of any format, and how ours answers.

Reads cost what they touch: the records that hold a window, and of those only the frames that were asked for.

Invariants: a split that is opened is whole, for shards that are missing or have another size are found then; whatever
cannot be decoded is an error that names file and record, never garbage.
"""

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jasmine.data import bucket
from jasmine.data.bucket import BucketFolder
from jasmine.data.index import ACTION_DTYPE, Index, read_bucket_index, read_index
from jasmine.data.payload import BadPayloadError, decode_frames
from jasmine.data.records import ShardReaders, WindowId, corrupt
from jasmine.data.staging import DataCache, StagedFiles
from jasmine.errors import UserError


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


class EpisodeDataset:
    """An opened split of our own format; see `Episodes` for the reads. Thread-safe and picklable.

    Opening reads the index and checks that every shard is there with its size; it opens no shard. Shards in a bucket are
    staged on the local disk when they are read (`jasmine.data.staging`), each in the generation that it has on opening.

    Args:
        split_dir: the split's folder, on this machine or `gs://`.
        allow_unfinished: open what an interrupted writer has finished so far, instead of refusing.
        cache: where shards from a bucket are staged; None for the host's cache with its default limit.

    Raises:
        UserError: the index is missing or not valid, the split is unfinished or empty, or a shard is missing or
            truncated. The read methods raise it for a corrupt record. All name the file.
    """

    def __init__(
        self, split_dir: str | os.PathLike[str], *, allow_unfinished: bool = False, cache: DataCache | None = None
    ) -> None:
        self.path = os.fspath(split_dir)
        folder = bucket.list_folder(self.path) if bucket.is_bucket_url(self.path) else None
        self.index = index = read_index(self.path) if folder is None else read_bucket_index(folder)
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
        self.staged: StagedFiles | None = None
        """The shards, where they lie in a bucket."""
        if folder is None:
            for path, shard in zip(paths, index.shards, strict=True):
                _check_size(path, shard.size)
        else:
            self.staged = _staged(folder, index, cache or DataCache.of_host())
        self._readers = ShardReaders(paths, counts, staged=self.staged)

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
        self._readers.num_records(int(self._shard_of[episode]))  # as many as its length says, before that is allocated
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
        rows = range(len(episodes)) if self.staged is None else self.staged.reading_order(self._shard_of[episodes])
        for row in rows:
            target = None if actions is None else actions[row]
            self._read_into(int(episodes[row]), int(starts[row]), frames[row], target)
        return frames, actions

    def shards_of(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """The numbers of the shards that hold these episodes: sorted, each once."""
        return np.unique(self._shard_of[episodes])

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
                actions_at = decode_frames(index, payload, held, low, frames[part])
            except BadPayloadError as error:
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


def _check_size(path: str, size: int) -> None:
    try:
        found = os.path.getsize(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), but the index lists it: restore the file"
        ) from error
    if found != size:
        raise corrupt(path, None, f"{found} bytes where the index says {size}")


def _staged(folder: BucketFolder, index: Index, cache: DataCache) -> StagedFiles:
    for shard in index.shards:
        path = f"{folder.url}/{shard.file}"
        if shard.file not in folder.objects:
            raise UserError(f"{path} is not there, but the index lists it: upload the file")
        if (found := folder.objects[shard.file].size) != shard.size:
            raise corrupt(path, None, f"{found} bytes where the index says {shard.size}")
    return StagedFiles(cache, [folder.objects[shard.file] for shard in index.shards])
