"""Which splits a dataset has, and walking through their episodes: what the tools that look at whole datasets share."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jasmine.data.episodes import INDEX_NAME, Episodes, open_dataset
from jasmine.data.published import published_files
from jasmine.errors import UserError

USUAL_ORDER = ("train", "val", "test")
FRAMES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Options for datasets of the published format, which does not store its frame shape."""

    image_height: int | None = None
    """Frame shape, for datasets of the published format only; guessed if not given."""
    image_width: int | None = None
    image_channels: int = 3

    def frame_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels), or None if neither size was given."""
        if self.image_height is None and self.image_width is None:
            return None
        if self.image_height is None or self.image_width is None:
            raise UserError("--image_height and --image_width must be given together")
        return self.image_height, self.image_width, self.image_channels


def find_splits(path: str) -> dict[str, str]:
    """Name to folder of every split at `path`, which is a dataset or a split itself. UserError if there is none."""
    if _is_split(path):
        return {os.path.basename(os.path.abspath(path)): path}
    names = [entry.name for entry in os.scandir(path) if _is_split(entry.path)] if os.path.isdir(path) else []
    if not names:
        open_dataset(path)  # raises, and knows best what to say
    ordered = [name for name in USUAL_ORDER if name in names] + sorted(set(names) - set(USUAL_ORDER))
    return {name: os.path.join(path, name) for name in ordered}


def windows(dataset: Episodes, episode: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """An episode's frames uint8 (T, H, W, C) and actions int32 (T, …), piece by piece: episodes may exceed memory."""
    length = int(dataset.lengths[episode])
    for start in range(0, length, FRAMES_AT_ONCE):
        yield dataset.read_window(episode, start, min(FRAMES_AT_ONCE, length - start))


def _is_split(path: str) -> bool:
    return os.path.exists(os.path.join(path, INDEX_NAME)) or bool(published_files(path))
