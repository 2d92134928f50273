"""Shows what a dataset holds: `python -m jasmine.data.inspect PATH [--out DIR]`.

Prints counts, shapes, lengths, sizes and how often each action occurs, and with `--out` writes `contact_sheet.png`
(a row per episode, frames over time from left to right) and `sample.gif` (some episodes side by side, at their speed).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw

from jasmine.command_line import parse
from jasmine.data.episodes import EpisodeDataset, Episodes
from jasmine.data.opening import open_dataset
from jasmine.data.published import published_files
from jasmine.data.splits import ShapeOptions, find_splits, windows
from jasmine.errors import EXIT_USER_ERROR, ClusterError, UserError

MARGIN = 4
LABEL_WIDTH = 96
TILE_PIXELS = 128  # smaller frames are enlarged by a whole factor up to about this
GIF_SECONDS = 10.0
DEFAULT_FPS = 10.0  # where the dataset does not say


@dataclass(frozen=True)
class Options(ShapeOptions):
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A dataset, or one split of it."""
    out: str | None = None
    """Folder for contact_sheet.png and sample.gif; no pictures if not given."""
    split: str | None = None
    """The split that the pictures show; by default the first."""
    rows: int = 8
    """Episodes in the contact sheet."""
    columns: int = 10
    """Frames of each."""
    gif_episodes: int = 4
    """Episodes side by side in the GIF, at most 10 seconds of each."""
    action_episodes: int = 200
    """Actions are counted in so many randomly chosen episodes."""
    seed: int = 0
    """Which episodes are chosen."""


def describe(name: str, dataset: Episodes, action_episodes: int, seed: int) -> list[str]:
    """A split in a few lines of text."""
    lengths = dataset.lengths
    height, width, channels = dataset.frame_shape
    if isinstance(dataset, EpisodeDataset):
        sizes = [shard.size for shard in dataset.index.shards]
    else:
        sizes = [os.path.getsize(file) for file in published_files(dataset.path)]
    size = sum(sizes)
    per_frame = size / dataset.num_frames
    smaller = f", {height * width * channels / per_frame:.1f}× smaller than its pixels"
    seconds = f", {dataset.num_frames / dataset.fps / 60:.1f} minutes at {dataset.fps:g} fps" if dataset.fps else ""
    lines = [
        f"{name}: {len(lengths)} episodes, {dataset.num_frames} frames{seconds}",
        f"  frames   {height}×{width}×{channels} uint8",
        f"  lengths  min {lengths.min()}, median {np.median(lengths):g}, max {lengths.max()} frames",
        f"  on disk  {size / 2**20:.1f} MiB in {len(sizes)} files; {per_frame:,.0f} bytes a frame{smaller}",
    ]
    names: list[str] = []
    if isinstance(dataset, EpisodeDataset):
        index = dataset.index
        quality = "" if index.quality is None else f" quality {index.quality}"
        lines.insert(2, f"  made of  {index.env or '?'}; {index.encoding}{quality}, {index.frames_per_record} a record")
        names = list(index.metadata.get("action_names", []))
    if dataset.num_actions is None:
        return [*lines, "  actions  none"]
    if dataset.action_shape:
        return [*lines, f"  actions  {dataset.action_shape} of {dataset.num_actions} values each"]
    chosen = choose(len(lengths), action_episodes, seed)
    counts = np.zeros(dataset.num_actions, np.int64)
    for episode in chosen:
        for _, actions in windows(dataset, episode):
            assert actions is not None
            counts += np.bincount(actions, minlength=len(counts))
    lines.append(f"  actions  {dataset.num_actions}; share of each in {len(chosen)} episodes:")
    for action, count in enumerate(counts):
        share = count / counts.sum()
        label = f"{action} {names[action]}" if action < len(names) else str(action)
        lines.append(f"    {label:<14} {share:6.1%} {'▇' * round(40 * share)}".rstrip())
    return lines


def contact_sheet(dataset: Episodes, episodes: Sequence[int], columns: int) -> Image.Image:
    """One row per episode: its number, and `columns` frames evenly spread from its first to its last."""
    height, width, _ = dataset.frame_shape
    scale = _scale(height, width)
    tile_width, tile_height = width * scale + MARGIN, height * scale + MARGIN
    size = (LABEL_WIDTH + columns * tile_width + MARGIN, len(episodes) * tile_height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(episodes):
        top = MARGIN + row * tile_height
        length = int(dataset.lengths[episode])
        draw.text((MARGIN, top), f"episode {episode}\n{length} frames", fill="black")
        for column, time in enumerate(np.linspace(0, length - 1, columns).round().astype(int)):
            frame, _ = dataset.read_window(episode, int(time), 1)
            sheet.paste(_picture(frame[0], scale), (LABEL_WIDTH + column * tile_width, top))
    return sheet


def animation(dataset: Episodes, episodes: Sequence[int], seconds: float) -> list[Image.Image]:
    """Frames that show the beginnings of several episodes side by side; an ended one keeps its last frame."""
    height, width, _ = dataset.frame_shape
    scale = _scale(height, width)
    most = max(1, round(seconds * (dataset.fps or DEFAULT_FPS)))
    clips = [dataset.read_window(e, 0, min(most, int(dataset.lengths[e])))[0] for e in episodes]
    pictures = []
    for time in range(max(len(clip) for clip in clips)):
        picture = Image.new("RGB", (len(clips) * (width * scale + MARGIN) - MARGIN, height * scale), "white")
        for column, clip in enumerate(clips):
            picture.paste(_picture(clip[min(time, len(clip) - 1)], scale), (column * (width * scale + MARGIN), 0))
        pictures.append(picture)
    return pictures


def choose(num_episodes: int, count: int, seed: int) -> list[int]:
    """`count` different episodes (or all, if there are fewer), in ascending order."""
    chosen = np.random.default_rng(seed).choice(num_episodes, min(count, num_episodes), replace=False)
    return sorted(chosen.tolist())


def write_pictures(dataset: Episodes, options: Options, out: str) -> list[str]:
    """Writes contact_sheet.png and sample.gif to `out`; returns their paths."""
    os.makedirs(out, exist_ok=True)
    num_episodes = len(dataset.lengths)
    sheet_path, gif_path = os.path.join(out, "contact_sheet.png"), os.path.join(out, "sample.gif")
    contact_sheet(dataset, choose(num_episodes, options.rows, options.seed), options.columns).save(sheet_path)
    first, *others = animation(dataset, choose(num_episodes, options.gif_episodes, options.seed), GIF_SECONDS)
    milliseconds = round(1000 / (dataset.fps or DEFAULT_FPS))
    first.save(gif_path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return [sheet_path, gif_path]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    try:
        options = parse(
            Options, sys.argv[1:] if arguments is None else arguments, prog="python -m jasmine.data.inspect"
        )
        if min(options.rows, options.columns, options.gif_episodes) < 1:
            raise UserError("--rows, --columns and --gif_episodes must be at least 1")
        folders = find_splits(options.path)
        shown = options.split or next(iter(folders))
        if shown not in folders:
            raise UserError(f"--split {shown}: {options.path} has {', '.join(folders)}")
        for name, folder in folders.items():
            dataset = open_dataset(folder, frame_shape=options.frame_shape(), allow_unfinished=True)
            print("\n".join(describe(name, dataset, options.action_episodes, options.seed)))
            if name == shown and options.out is not None:
                print("  wrote    " + ", ".join(write_pictures(dataset, options, options.out)))
    except (UserError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _scale(height: int, width: int) -> int:
    return max(1, TILE_PIXELS // max(height, width))


def _picture(frame: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


if __name__ == "__main__":
    sys.exit(main())
