"""Token datasets: what a trained tokenizer makes of the windows of a dataset, so that training need not run it again.

Tokenizers count time from a window's first frame, so the tokens of a frame depend on where its window starts, and are
stored once for every window. On disk a token dataset is an ordinary one (`jasmine.data.index`) with an episode for
each of the source's that has a window. What is a frame there is here a whole window, written as a grey picture, uint8
(seq_len, row bytes, 1), and what is an action there is here the actions of the window, (seq_len, *action_shape):

    row t: frame t's tokens or latents, little-endian · where a LAM was given, the int32 latent action from t to t + 1

What the bytes mean stands in the index: `metadata["tokens"]` is a `TokenInfo`, `metadata["origin"]` an `Origin`.

Invariants: with stride 1, `WindowSampler` finds as many windows in a `TokenDataset`, in the same order, as in the source,
so a seed gives the same examples at each step; `episode_ids` names an episode as the source does.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from jasmine.data.episodes import EpisodeDataset, Episodes
from jasmine.data.index import INDEX_NAME, Index
from jasmine.data.opening import open_dataset
from jasmine.data.records import WindowId
from jasmine.data.staging import DataCache, StagedFiles
from jasmine.errors import UserError

LATENT_ACTION_DTYPE = np.dtype("<i4")
# Of codebook indices, the smallest that holds them, and of latents.
_DTYPES = ("uint8", "uint16", "uint32", "float32")


@dataclasses.dataclass(frozen=True)
class EncoderInfo:
    """The trained model that a token dataset was made with.

    Attributes:
        path: its run directory when the dataset was made.
        job: the baseline that trained it.
        step: of the checkpoint.
        fingerprint: of its architecture and weights (`jasmine.training.runs`).
        config: the run's options.
    """

    path: str
    job: str
    step: int
    fingerprint: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path} (step {self.step}, {self.fingerprint})"


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What a token dataset holds: all that a model has to know of it.

    Attributes:
        kind: `tokens` (codebook indices) or `latents` (vectors).
        dtype: of the stored values, as numpy names it.
        shape: of one frame's values: (N,) or (N, L).
        seq_len: frames in a window.
        stride: frames from the start of a window to the start of the next.
        frame_shape: (H, W, C) of the source's frames.
        action_shape: of one frame's action in the source.
        tokenizer: what encoded the frames.
        lam: what the latent actions come from; None without.
    """

    kind: Literal["tokens", "latents"]
    dtype: str
    shape: tuple[int, ...]
    seq_len: int
    stride: int
    frame_shape: tuple[int, int, int]
    action_shape: tuple[int, ...]
    tokenizer: EncoderInfo
    lam: EncoderInfo | None

    @property
    def stored_dtype(self) -> np.dtype:
        """`dtype` in the byte order on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def value_bytes(self) -> int:
        """Bytes of one frame's tokens or latents."""
        return math.prod(self.shape) * self.stored_dtype.itemsize

    @property
    def window_shape(self) -> tuple[int, int, int]:
        """Of the grey picture that a window is stored as."""
        return self.seq_len, self.value_bytes + (self.lam is not None) * LATENT_ACTION_DTYPE.itemsize, 1

    def pack(self, values: np.ndarray, latent_actions: np.ndarray | None) -> np.ndarray:
        """Windows as they are stored.

        Args:
            values: tokens (B, seq_len, N) or latents (B, seq_len, N, L).
            latent_actions: (B, seq_len - 1) with a LAM, else None.

        Returns:
            uint8 (B, seq_len, row bytes, 1).
        """
        rows = np.zeros((len(values), *self.window_shape), np.uint8)
        stored = np.ascontiguousarray(values.astype(self.stored_dtype)).reshape(*rows.shape[:2], -1)
        rows[:, :, : self.value_bytes, 0] = stored.view(np.uint8)
        if latent_actions is not None:
            stored = np.ascontiguousarray(latent_actions.astype(LATENT_ACTION_DTYPE))[..., None]
            rows[:, :-1, self.value_bytes :, 0] = stored.view(np.uint8)
        return rows

    def unpack(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Inverse of `pack`, as a batch has it: `tokens` int32 or `latents` float32, and `latent_actions` int32
        (B, seq_len), the last of each window 0."""
        values = rows[:, :, : self.value_bytes, 0].view(self.stored_dtype).reshape(*rows.shape[:2], *self.shape)
        batch: dict[str, np.ndarray] = {
            self.kind: values.astype(np.int32 if self.kind == "tokens" else np.float32, copy=False)
        }
        if self.lam is not None:
            actions = rows[:, :, self.value_bytes :, 0].view(LATENT_ACTION_DTYPE)[..., 0]
            batch["latent_actions"] = actions.astype(np.int32)
        return batch


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a token dataset was made from.

    Attributes:
        source: the folder of the split that was encoded.
        num_frames: of that split.
        skipped_episodes: its episodes, in order, that are too short for a window.
        windows_per_shard: windows are counted over the split; episodes are in one shard if their first windows' numbers
            agree but for the remainder by this.
    """

    source: str
    num_frames: int
    skipped_episodes: tuple[int, ...]
    windows_per_shard: int


@dataclasses.dataclass(frozen=True)
class TokenMetadata:
    """`Index.metadata` of a token dataset."""

    tokens: TokenInfo
    origin: Origin
    maker: Literal["tokenize"] = "tokenize"


def token_metadata(index: Index, split_dir: str) -> TokenMetadata | None:
    """What the windows stored in a split are, by its index; None where it holds frames.

    Raises:
        UserError: the index says so in a way that this code does not understand.
    """
    if "tokens" not in index.metadata:
        return None
    path = os.path.join(split_dir, INDEX_NAME)
    try:
        found = _METADATA.validate_python(index.metadata)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("metadata", *first["loc"])))
        raise UserError(f"{path} does not describe tokens as this version does ({key}: {first['msg']})") from error
    if impossible := _impossible(found):
        raise UserError(f"{path}: metadata.{impossible} cannot be: no writer of ours has written it")
    if found.tokens.window_shape != index.frame_shape:
        raise UserError(
            f"{path}: windows of {index.frame_shape}, where metadata.tokens says {found.tokens.window_shape}"
        )
    return found


def _impossible(metadata: TokenMetadata) -> str | None:
    """Which of the values is none that there can be."""
    tokens, skipped = metadata.tokens, metadata.origin.skipped_episodes
    if tokens.dtype not in _DTYPES:
        return f"tokens.dtype = {tokens.dtype!r:.40}"
    for name in ("shape", "frame_shape", "action_shape"):
        if any(size < 1 for size in getattr(tokens, name)):
            return f"tokens.{name} = {getattr(tokens, name)!r:.40}"
    if not 1 <= tokens.stride < 2**31:
        return f"tokens.stride = {tokens.stride!r:.40}"
    # Of the source, of which a part, or an index that is not complete, lists less.
    if list(skipped) != sorted(set(skipped)) or any(not 0 <= episode < 2**31 for episode in skipped):
        return f"origin.skipped_episodes = {skipped!r:.40}"
    return None


class TokenDataset:
    """A token dataset, opened to train from. Thread-safe and picklable.

    Args:
        stored: the dataset on disk.
        metadata: what its windows are.
    """

    def __init__(self, stored: EpisodeDataset, metadata: TokenMetadata) -> None:
        self.path = stored.path
        self.tokens = tokens = metadata.tokens
        self._stored = stored
        skipped = metadata.origin.skipped_episodes
        self.episode_ids = np.delete(np.arange(len(stored.lengths) + len(skipped)), skipped)
        """Which episode of the source each is, int64 (E,)."""
        self.lengths = stored.lengths + tokens.seq_len - 1
        """Episode lengths, int64 (E,), that have as many windows of `seq_len` as are stored: the source's, for stride 1."""

    @property
    def staged(self) -> StagedFiles | None:
        """The shards, where they lie in a bucket."""
        return self._stored.staged

    def shards_of(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `EpisodeDataset.shards_of`."""
        return self._stored.shards_of(episodes)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the source's frames."""
        return self.tokens.frame_shape

    @property
    def fps(self) -> float | None:
        """Frames per second of the recording; None where it is not known."""
        return self._stored.fps

    @property
    def num_actions(self) -> int | None:
        """Actions are integers in [0, num_actions); None without actions."""
        return self._stored.num_actions

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one frame's action."""
        return self.tokens.action_shape

    @property
    def num_frames(self) -> int:
        """Frames of the source that are in a window."""
        covered = (self._stored.lengths - 1) * self.tokens.stride + self.tokens.seq_len
        return int(covered.sum())

    def check_seq_len(self, seq_len: int) -> None:
        """Raises UserError unless `seq_len` is that of the stored windows."""
        if seq_len != self.tokens.seq_len:
            raise UserError(
                f"--seq_len={seq_len}: {self.path} holds the tokens of windows of {self.tokens.seq_len} frames; train with "
                f"--seq_len={self.tokens.seq_len}, or tokenize the data anew"
            )

    def read_windows(
        self, episodes: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, length: int
    ) -> dict[str, np.ndarray]:
        """B windows at once; `starts` counts windows, `length` is `seq_len`.

        Returns:
            `tokens` int32 (B, length, N) or `latents` float32 (B, length, N, L); `actions` int32 (B, length,
            *action_shape) where the source has them; `latent_actions` int32 (B, length) where a LAM was given.

        Raises:
            UserError: `length` is not the stored one; a record is corrupt (names it).
        """
        self.check_seq_len(length)
        rows, actions = self._stored.read_windows(episodes, starts, 1)
        batch = self.tokens.unpack(rows[:, 0])
        return batch if actions is None else batch | {"actions": actions[:, 0]}

    def locate(self, episode: int, start: int) -> WindowId:
        """The file and record of a window; its episode and first frame as the source counts them."""
        stored = self._stored.locate(episode, start)
        return WindowId(stored.file, stored.record, int(self.episode_ids[episode]), start * self.tokens.stride)


def open_training_data(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    frame_shape: tuple[int, int, int] | None = None,
    cache: DataCache | None = None,
) -> Episodes | TokenDataset:
    """Opens a split to train from, of frames or of tokens. Arguments and errors: `jasmine.data.opening.open_dataset`."""
    dataset = open_dataset(path, split, frame_shape=frame_shape, cache=cache)
    if isinstance(dataset, EpisodeDataset):
        metadata = token_metadata(dataset.index, dataset.path)
        return dataset if metadata is None else TokenDataset(dataset, metadata)
    return dataset


_METADATA = TypeAdapter(TokenMetadata)
