"""What every kind of maker has in common: its options, and the `Source` that it hands to the making loop.

A source knows how to record one numbered item of one split and nothing about files written, resuming or progress;
`maker.py` knows only those. An item is an episode number of a game, or a file number of a folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jasmine.data.index import Encoding
from jasmine.errors import UserError

SPLITS = ("train", "val", "test")
# How often one episode of a game is begun anew, with another level and other actions, until it is long enough.
MAX_ATTEMPTS = 256


@dataclass(frozen=True)
class Episode:
    """`frames`: uint8 (T, H, W, 3). `actions`: int32 (T,), or None where nobody acted."""

    frames: np.ndarray
    actions: np.ndarray | None


@dataclass(frozen=True)
class Skipped:
    """An item that gives no episode, and why."""

    reason: str


@dataclass(frozen=True)
class Source:
    """Numbered items of three splits. `record` must be picklable, and pure in (split, item)."""

    env: str
    frame_shape: tuple[int, int, int]
    fps: float
    num_actions: int | None
    wanted: Mapping[str, int]
    counts: Literal["items", "frames"]  # what `wanted` counts; with "frames" a split ends once it has that many
    record: Callable[[str, int], Episode | Skipped]
    action_names: tuple[str, ...] = ()  # by action number
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the files it reads; must be the same when gone on with


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options that all kinds share."""

    output_dir: Annotated[str | None, tyro.conf.arg(aliases=["--output_path"])] = None
    """Where the dataset goes; data/KIND if not given. The same command again goes on with an interrupted dataset."""
    seed: int = 0
    """Same options and seed: the same dataset, byte for byte."""
    min_episode_length: int = 16
    """In frames. Shorter episodes are discarded (a game plays another one instead)."""
    encoding: Encoding = "zstd"
    """How frames are stored. jpeg and webp lose detail; the others do not."""
    quality: int | None = None
    """Of jpeg and webp: 1 to 100."""
    frames_per_record: int | None = None
    """Frames stored together; by default what suits the encoding."""
    episodes_per_shard: int = 100
    """Most episodes in one file (of at most 1 GiB). An interrupted dataset goes on after its last whole file."""
    num_workers: int = 0
    """Processes that play or decode. 0: this one. The result does not depend on it."""


def episode_rng(seed: int, split: str, episode: int, attempt: int) -> np.random.Generator:
    """The one source of randomness of a game's episode."""
    return np.random.default_rng([seed, SPLITS.index(split), episode, attempt])


def first_fitting(
    play: Callable[[int], Episode],
    min_length: int,
    what: str,
    fits: Callable[[Episode], bool] = lambda _: True,
    attempts: int = MAX_ATTEMPTS,
) -> Episode:
    """The first of `play(0)`, `play(1)`, … with `min_length` frames that fits; UserError after so many attempts."""
    for attempt in range(attempts):
        episode = play(attempt)
        if len(episode.frames) >= min_length and fits(episode):
            return episode
    raise UserError(
        f"{what}: no episode of --min_episode_length {min_length} frames in {attempts} games; choose a smaller one"
    )


def check_lengths(min_length: int, max_length: int) -> None:
    """UserError unless 1 <= min_length <= max_length."""
    if not 1 <= min_length <= max_length:
        raise UserError(f"--min_episode_length {min_length} must lie between 1 and --max_episode_length {max_length}")
