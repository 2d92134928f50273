"""Which splits a dataset has, and walking through their episodes: what the tools that look at whole datasets share."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from jasmine.data.bucket import is_bucket_url, list_folder
from jasmine.data.episodes import Episodes
from jasmine.data.index import INDEX_NAME
from jasmine.data.opening import bucket_splits, is_split, open_dataset
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
    """Name to folder of every split at `path`, which is a dataset or a split itself. UserError if there is none.

    In a bucket (`gs://`) only splits of our own format are found.
    """
    if is_bucket_url(path):
        here = list_folder(path)
        found = {here.url.rpartition("/")[2]: here.url} if INDEX_NAME in here.objects else bucket_splits(path)
        if not found:
            open_dataset(path)  # raises, and knows best what to say
        return {name: found[name] for name in _ordered(found)}
    if is_split(path):
        return {os.path.basename(os.path.abspath(path)): path}
    names = [entry.name for entry in os.scandir(path) if is_split(entry.path)] if os.path.isdir(path) else []
    if not names:
        open_dataset(path)  # raises, and knows best what to say
    return {name: os.path.join(path, name) for name in _ordered(names)}


def windows(dataset: Episodes, episode: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """An episode's frames uint8 (T, H, W, C) and actions int32 (T, …), piece by piece: episodes may exceed memory."""
    length = int(dataset.lengths[episode])
    for start in range(0, length, FRAMES_AT_ONCE):
        yield dataset.read_window(episode, start, min(FRAMES_AT_ONCE, length - start))


def _ordered(names: Collection[str]) -> list[str]:
    return [name for name in USUAL_ORDER if name in names] + sorted(set(names) - set(USUAL_ORDER))
