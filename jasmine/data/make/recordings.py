"""Recordings that exist already: video files, and folders of numbered images.

One file, or one folder of images, is one episode without actions. Files are found in natural order ("9" before "10"),
shuffled by the seed and dealt to the splits, so no file is in two of them. Frame rates are converted by time stamps:
frame k of an episode is what the recording shows k / target_fps seconds after its first frame; frames are dropped or
repeated for that, never blended. An episode is held in memory while it is made. Video streams carry no checksums: damage that
still decodes to a picture goes unseen.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import av
import numpy as np
import tyro
from av.video.reformatter import Interpolation
from PIL import Image

from jasmine.data.images import IMAGE_ERRORS, open_image
from jasmine.data.make.source import SPLITS, CommonOptions, Episode, Skipped, Source
from jasmine.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What files of these names may be inside: some of FFmpeg's formats are lists of other files, or of addresses, to be read in
# the place of this one, and recordings come from strangers.
VIDEO_FORMATS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,gif"
# How much earlier than its container says a video may end: durations are rounded, and audio may outlast the pictures.
MISSING_END_SECONDS = 1.0
MISSING_END_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class _Recordings(CommonOptions):
    input_path: str
    """The folder that holds the recordings."""
    env_name: str = "video"
    """A name for where the frames come from; remembered in the dataset."""
    train_ratio: float = 0.8
    """Shares of the recordings for each split; they add up to 1."""
    val_ratio: float = 0.1
    test_ratio: float = 0.1
    target_fps: float = 10.0
    min_episode_length: int = 16
    """In frames. Shorter recordings are left out."""
    skip_bad: bool = False
    """Leave unreadable recordings out instead of stopping at the first one."""


@dataclass(frozen=True, kw_only=True)
class Video(_Recordings):
    """Video files (mp4, webm, mkv, avi, mov, gif …) in a folder and its subfolders, without sound."""

    target_width: int = 160
    target_height: int = 90


@dataclass(frozen=True, kw_only=True)
class Pngs(_Recordings):
    """Folders of numbered images (png, jpg, webp, bmp): each subfolder is an episode."""

    env_name: str = "pngs"
    original_fps: float = 60.0
    """Images per second of the recording."""
    target_width: int = 64
    target_height: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: keeps the shape)")] = None
    """By default what keeps the shape of the very first image."""


def video_source(options: Video) -> Source:
    """All video files under `input_path`. UserError where there are none."""
    _check(options)
    root = options.input_path
    if os.path.isfile(root):
        files = [os.path.basename(root)]
        root = os.path.dirname(root)
    else:
        files = sorted(_files_under(root, VIDEO_SUFFIXES), key=natural_key)
    if not files:
        raise UserError(f"--input_path {root}: no video files ({', '.join(VIDEO_SUFFIXES)}) in it")
    dealt = deal(files, (options.train_ratio, options.val_ratio, options.test_ratio), options.seed)
    paths = {split: tuple(os.path.join(root, name) for name in names) for split, names in dealt.items()}
    return Source(
        env=options.env_name,
        frame_shape=(options.target_height, options.target_width, 3),
        fps=options.target_fps,
        num_actions=None,
        wanted={split: len(names) for split, names in dealt.items()},
        counts="items",
        record=partial(_record_video, options, paths),
        inputs={"files": dealt, "fingerprint": _fingerprint(root, files)},
    )


def pngs_source(options: Pngs) -> Source:
    """Each subfolder of `input_path` with images in it. UserError where there is none."""
    _check(options)
    if options.original_fps < options.target_fps:
        raise UserError(f"--target_fps {options.target_fps:g} exceeds --original_fps {options.original_fps:g}")
    root = options.input_path
    folders = {}
    for name in sorted(os.listdir(root), key=natural_key):
        folder = os.path.join(root, name)
        if os.path.isdir(folder):
            images = [image for image in os.listdir(folder) if image.lower().endswith(IMAGE_SUFFIXES)]
            if images:
                folders[name] = tuple(os.path.join(folder, image) for image in sorted(images, key=natural_key))
    if not folders:
        raise UserError(f"--input_path {root}: no subfolders with images ({', '.join(IMAGE_SUFFIXES)}) in it")
    dealt = deal(list(folders), (options.train_ratio, options.val_ratio, options.test_ratio), options.seed)
    height = options.target_height or _height_that_keeps_shape(next(iter(folders.values()))[0], options.target_width)
    names = [os.path.relpath(image, root) for images in folders.values() for image in images]
    return Source(
        env=options.env_name,
        frame_shape=(height, options.target_width, 3),
        fps=options.target_fps,
        num_actions=None,
        wanted={split: len(episodes) for split, episodes in dealt.items()},
        counts="items",
        record=partial(
            _record_images, options, height, {split: [folders[name] for name in dealt[split]] for split in SPLITS}
        ),
        inputs={"files": dealt, "fingerprint": _fingerprint(root, names)},
    )


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts "frame9" before "frame10", and "007" and "7" always in the same order."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() and part.isascii() else (1, part) for part in parts], name


def deal(names: list[str], ratios: tuple[float, float, float], seed: int) -> dict[str, list[str]]:
    """Shuffles names and deals them to the splits; with at least three names no split with a share stays empty."""
    order = np.argsort(np.random.default_rng(seed).random(len(names)), kind="stable")
    bounds = np.round(np.cumsum([0.0, *ratios]) * len(names)).astype(int)
    sizes = np.diff(bounds)
    if len(names) >= len(SPLITS):
        for split, ratio in enumerate(ratios):
            if ratio > 0 and sizes[split] == 0:
                sizes[sizes.argmax()] -= 1
                sizes[split] = 1
    ends = np.cumsum(sizes)
    shuffled = [names[i] for i in order]
    return {split: shuffled[end - size : end] for split, size, end in zip(SPLITS, sizes, ends, strict=True)}


def decode(path: str, fps: float, height: int, width: int) -> np.ndarray:
    """A video file's frames at `fps`, resized: uint8 (T, height, width, 3). UserError if it is not a whole video."""
    try:
        with av.open(path, options={"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise UserError(f"{path}: no pictures in this file")
            frames = list(_shown(container, fps, height, width))
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be decoded ({error.strerror}); repair it or give --skip_bad") from None
    if not frames:
        raise UserError(f"{path}: no pictures can be decoded; repair it or give --skip_bad")
    return np.stack(frames)


def _shown(container: av.container.InputContainer, fps: float, height: int, width: int) -> Iterator[np.ndarray]:
    """The picture shown at each multiple of 1/fps, from the first one to the end of the last."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frame_period = 1 / float(stream.average_rate) if stream.average_rate else 1 / fps
    # Containers round time stamps to their clock (Matroska to 1 ms, GIF to 10 ms): a picture is not late for that.
    clock = float(stream.time_base) if stream.time_base else 0.0
    tolerance = max(1e-6, min(clock, frame_period / 4))
    start = end = 0.0
    current: av.VideoFrame | None = None
    emitted = 0

    def shown_before(time: float) -> Iterator[np.ndarray]:
        nonlocal emitted
        picture = None
        while current is not None and start + emitted / fps < time - tolerance:
            picture = _picture(current, height, width) if picture is None else picture
            yield picture
            emitted += 1

    for frame in container.decode(stream):
        time = end if frame.time is None else float(frame.time)
        if frame.is_corrupt:
            raise UserError(f"{container.name}: damaged picture at {time:.2f} s; repair it or give --skip_bad")
        if current is None:
            start = time
        yield from shown_before(time)
        current = frame
        end = time + (float(frame.duration * frame.time_base) if frame.duration and frame.time_base else frame_period)
    yield from shown_before(end)

    declared = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if not declared and container.duration:
        declared = container.duration / av.time_base
    if declared - (end - start) > max(MISSING_END_SECONDS, MISSING_END_SHARE * declared):
        raise UserError(
            f"{container.name}: pictures end after {end - start:.1f} s of {declared:.1f} s; "
            "repair it or give --skip_bad"
        )


def _picture(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3), upright: cameras note in the file how they were held."""
    quarter_turns = round(frame.rotation / 90)  # counterclockwise
    if quarter_turns % 2:
        height, width = width, height
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=Interpolation.AREA)
    return np.rot90(pixels, quarter_turns) if quarter_turns else pixels


def _record_video(options: Video, paths: dict[str, tuple[str, ...]], split: str, item: int) -> Episode | Skipped:
    path = paths[split][item]
    try:
        frames = decode(path, options.target_fps, options.target_height, options.target_width)
    except UserError as error:
        if options.skip_bad:
            return Skipped(str(error))
        raise
    return _long_enough(frames, options, path)


def _record_images(
    options: Pngs, height: int, images: dict[str, list[tuple[str, ...]]], split: str, item: int
) -> Episode | Skipped:
    paths = images[split][item]
    step = options.original_fps / options.target_fps
    count = int(np.ceil(len(paths) / step - 1e-9))
    chosen = [paths[int(k * step + 1e-9)] for k in range(count)]
    try:
        frames = np.stack([_image(path, height, options.target_width) for path in chosen])
    except UserError as error:
        if options.skip_bad:
            return Skipped(str(error))
        raise
    return _long_enough(frames, options, os.path.dirname(paths[0]))


def _long_enough(frames: np.ndarray, options: _Recordings, path: str) -> Episode | Skipped:
    if len(frames) < options.min_episode_length:
        return Skipped(
            f"{path}: {len(frames)} frames at {options.target_fps:g} fps, "
            f"fewer than --min_episode_length {options.min_episode_length}"
        )
    return Episode(frames, None)


def _image(path: str, height: int, width: int) -> np.ndarray:
    try:
        with open_image(path) as image:
            pixels = image.convert("RGB")
    except IMAGE_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole image ({reason}); repair it or give --skip_bad") from None
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(pixels)


def _height_that_keeps_shape(path: str, width: int) -> int:
    original_height, original_width, _ = _image_shape(path)
    return max(1, round(original_height * width / original_width))


def _image_shape(path: str) -> tuple[int, int, int]:
    try:
        with open_image(path) as image:
            return image.height, image.width, 3
    except IMAGE_ERRORS as error:
        raise UserError(f"{path}: not an image ({error}); repair or remove it, or give --target_height") from None


def _files_under(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths relative to `root`."""
    for folder, _, names in os.walk(root):
        for name in names:
            if name.lower().endswith(suffixes):
                yield os.path.relpath(os.path.join(folder, name), root)


def _fingerprint(root: str, names: list[str]) -> str:
    """Changes when a file is added, removed, renamed or has another size."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(f"{name}\0{os.path.getsize(os.path.join(root, name))}\0".encode())
    return digest.hexdigest()


def _check(options: Video | Pngs) -> None:
    if not os.path.exists(options.input_path):
        raise UserError(f"--input_path {options.input_path} does not exist")
    ratios = (options.train_ratio, options.val_ratio, options.test_ratio)
    if min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6:
        raise UserError(f"--train_ratio, --val_ratio and --test_ratio add up to {sum(ratios):g}; they must to 1")
    if options.min_episode_length < 1 or options.target_width < 1 or (options.target_height or 1) < 1:
        raise UserError("--min_episode_length, --target_width and --target_height must be at least 1")
    if options.target_fps <= 0:
        raise UserError(f"--target_fps {options.target_fps:g} must be above 0")
