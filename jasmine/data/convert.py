"""Turns a dataset of the published format (see `jasmine.data.published`) into ours.

    python -m jasmine.data.convert SRC DST [--encoding zstd]

SRC is a split's folder of `*.array_record` files, or a dataset of such splits; DST gets the same layout. Interrupted,
the same command goes on after the last finished shard; a finished DST is never overwritten. Each record becomes one
episode: the published format does not say which consecutive chunks belong together.

Invariant: with a lossless encoding, every frame and action that is read from DST equals that of SRC; of each split
that it has written, the command reads a sample of episodes back and compares.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jasmine.command_line import parse
from jasmine.data.episodes import EpisodeDataset
from jasmine.data.index import INDEX_NAME, LOSSLESS, Encoding, read_index
from jasmine.data.published import PublishedDataset, published_files
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import EXIT_USER_ERROR, UserError

_SAMPLE = 32


@dataclass(frozen=True)
class Config:
    """Converts published ArrayRecord files into episodes with random access to windows.

    Attributes:
        src: a split's folder of *.array_record files, or a dataset of such splits.
        dst: where to write; the same layout.
        encoding: how frames are stored; raw, zstd, png and webp-lossless lose nothing.
        quality: 1-100, for webp and jpeg.
        fps: frames per second of the recording, if you know it.
        image_height: of the stored frames; not needed for 64×64×3, as are the next two.
        image_width: of the stored frames.
        image_channels: of the stored frames.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    encoding: Encoding = "zstd"
    quality: int | None = None
    fps: float | None = None
    image_height: int | None = None
    image_width: int | None = None
    image_channels: int = 3


def convert(config: Config) -> None:
    """Converts every split of `config.src`.

    Raises:
        UserError: nothing to convert, damaged input, or `config.dst` is finished already or holds something else.
    """
    pairs = _splits(config.src, config.dst)
    todo = [(source, target) for source, target in pairs if not _is_finished(target)]
    if not todo:
        raise UserError(f"{config.dst} is converted already: choose another folder, or delete it first")
    for source, target in todo:
        dataset = PublishedDataset(source, frame_shape=_frame_shape(config))
        _convert_split(config, dataset, target)
        _compare_sample(config, dataset, EpisodeDataset(target))


def _convert_split(config: Config, dataset: PublishedDataset, target: str) -> None:
    episodes = np.flatnonzero(dataset.lengths)
    console = Console(stderr=True)
    columns = (TextColumn(f"Converting to {target}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        EpisodeWriter(
            target,
            frame_shape=dataset.frame_shape,
            fps=config.fps,
            encoding=config.encoding,
            quality=config.quality,
            num_actions=dataset.num_actions,
            action_shape=dataset.action_shape,
            env="published",
            metadata={"maker": "convert", "source": os.path.abspath(dataset.path)},
        ) as writer,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=len(episodes), completed=writer.num_episodes)
        for episode in episodes[writer.num_episodes :]:
            writer.write(*dataset.read_episode(int(episode)))
            progress.advance(task)


def _compare_sample(config: Config, dataset: PublishedDataset, converted: EpisodeDataset) -> None:
    episodes = np.flatnonzero(dataset.lengths)
    same = np.array_equal(dataset.lengths[episodes], converted.lengths)
    for number in np.unique(np.linspace(0, len(episodes) - 1, _SAMPLE, dtype=int)):
        frames, actions = dataset.read_episode(int(episodes[number]))
        new_frames, new_actions = converted.read_episode(int(number))
        same &= (actions is None) == (new_actions is None)
        if actions is not None and new_actions is not None:
            same &= np.array_equal(actions, new_actions)
        same &= config.encoding not in LOSSLESS or np.array_equal(frames, new_frames)
        if not same:
            raise UserError(
                f"{converted.path} differs from {dataset.path} in episode {number}: delete it, convert anew"
            )


def _splits(src: str, dst: str) -> list[tuple[str, str]]:
    names = sorted(os.listdir(src)) if os.path.isdir(src) else []
    for folder in (src, *(os.path.join(src, name) for name in names)):
        if os.path.exists(os.path.join(folder, INDEX_NAME)):
            raise UserError(f"{folder} is in Jasmine's format already (it has {INDEX_NAME}): train on it as it is")
    if published_files(src):
        return [(src, dst)]
    pairs = [(os.path.join(src, name), os.path.join(dst, name)) for name in names]
    pairs = [(source, target) for source, target in pairs if published_files(source)]
    if not pairs:
        raise UserError(f"no *.array_record files in {src} or in folders there: is this the dataset?")
    return pairs


def _is_finished(target: str) -> bool:
    return os.path.exists(os.path.join(target, INDEX_NAME)) and read_index(target).complete


def _frame_shape(config: Config) -> tuple[int, int, int] | None:
    if config.image_height is None and config.image_width is None:
        return None
    if config.image_height is None or config.image_width is None:
        raise UserError("give both --image_height and --image_width, or neither")
    return config.image_height, config.image_width, config.image_channels


def main() -> None:
    """The command."""
    try:
        convert(parse(Config, sys.argv[1:], prog="python -m jasmine.data.convert"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
