"""Finds episodes that a dataset holds more than once: `python -m jasmine.data.duplicates PATH`.

An episode of the training split that is also in the validation split makes validation meaningless. Two episodes are
the same if all their pixels are; with `--first_frames N`, if their first N frames are (the same recording, cut off
differently). One line per repeated episode; exit code 1 if a split repeats an episode of another.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jasmine.command_line import parse
from jasmine.data.episodes import Episodes
from jasmine.data.opening import open_dataset
from jasmine.data.splits import ShapeOptions, find_splits, windows
from jasmine.errors import EXIT_USER_ERROR, ClusterError, UserError

FOUND_ACROSS_SPLITS = 1


@dataclass(frozen=True)
class Options(ShapeOptions):
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A dataset, or one split of it."""
    first_frames: int = 0
    """Compare only so many frames from each episode's beginning; shorter episodes are left out. 0: all frames."""


@dataclass(frozen=True, order=True)
class EpisodeId:
    split: str
    episode: int

    def __str__(self) -> str:
        return f"{self.split} episode {self.episode}"


def duplicates(
    datasets: Mapping[str, Episodes], first_frames: int = 0, advance: Callable[[int], None] = lambda _: None
) -> list[list[EpisodeId]]:
    """Groups of two or more equal episodes, in order of appearance.

    Args:
        datasets: the splits by name.
        first_frames: compare so many frames; 0 compares all.
        advance: told how many episodes have been read.
    """
    found: defaultdict[bytes, list[EpisodeId]] = defaultdict(list)
    for split, dataset in datasets.items():
        for episode, length in enumerate(dataset.lengths.tolist()):
            if length >= first_frames:
                found[_digest(dataset, episode, first_frames)].append(EpisodeId(split, episode))
            advance(1)
    return [group for group in found.values() if len(group) > 1]


def _digest(dataset: Episodes, episode: int, first_frames: int) -> bytes:
    digest = hashlib.blake2b(repr(dataset.frame_shape).encode(), digest_size=16)
    if first_frames:
        digest.update(dataset.read_window(episode, 0, first_frames)[0].tobytes())
        return digest.digest()
    for frames, _ in windows(dataset, episode):
        digest.update(frames.tobytes())
    return digest.digest()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    try:
        options = parse(
            Options, sys.argv[1:] if arguments is None else arguments, prog="python -m jasmine.data.duplicates"
        )
        if options.first_frames < 0:
            raise UserError(f"--first_frames {options.first_frames} must not be negative")
        datasets: dict[str, Episodes] = {
            name: open_dataset(folder, frame_shape=options.frame_shape())
            for name, folder in find_splits(options.path).items()
        }
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as progress:
            bar = progress.add_task("episodes", total=sum(len(dataset.lengths) for dataset in datasets.values()))
            groups = duplicates(datasets, options.first_frames, lambda count: progress.advance(bar, count))
    except (UserError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    across = 0
    what = f"begins with the same {options.first_frames} frames as" if options.first_frames else "is the same as"
    for first, *others in groups:
        for other in others:
            across += other.split != first.split
            print(f"{other} {what} {first} ({datasets[other.split].lengths[other.episode]} frames)")
    repeated = sum(len(group) - 1 for group in groups)
    print(f"{options.path}: {repeated} repeated episodes, {across} of them across splits; read {', '.join(datasets)}")
    return FOUND_ACROSS_SPLITS if across else 0


if __name__ == "__main__":
    sys.exit(main())
