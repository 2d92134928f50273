"""Reads every record of a dataset and names what is damaged: `python -m jasmine.data.verify PATH`.

One line per problem, with file and record; exit code 1 if there is any. What is checked, for our format: every file of
the index is there with its size and number of records, no other file lies beside them, every record passes ArrayRecord's
checksum and holds as many frames and actions as the index implies, images decode, actions are in range. For the
published format: every record passes the checksum and is a record of plain data. Nothing found in a record is executed.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jasmine.command_line import parse
from jasmine.data.bucket import is_bucket_url
from jasmine.data.images import IMAGE_ERRORS, open_image
from jasmine.data.index import ACTION_DTYPE, INDEX_NAME, Index, Shard, read_index
from jasmine.data.published import BadRecordError, parse_record, published_files
from jasmine.data.records import ShardReaders
from jasmine.data.splits import find_splits
from jasmine.errors import EXIT_USER_ERROR, UserError

FOUND_PROBLEMS = 1

Advance = Callable[[int], None]  # told how many bytes have been looked at


@dataclass(frozen=True)
class Options:
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A dataset, or one split of it; of our format or the published one."""


def problems(folder: str, advance: Advance = lambda _: None) -> Iterator[str]:
    """One line for everything that is wrong with the split in `folder`."""
    if not os.path.exists(os.path.join(folder, INDEX_NAME)):
        for path in published_files(folder):
            yield from _published_problems(path, advance)
        return
    try:
        index = read_index(folder)
    except UserError as error:
        yield str(error)
        return
    if not index.complete:
        yield f"{folder} is unfinished: the command that makes it goes on with it"
    if not index.shards:
        yield f"{folder} holds no episodes"
    listed = Counter(shard.file for shard in index.shards)
    for path in published_files(folder):
        if os.path.basename(path) not in listed:
            yield f"{path} is not in {INDEX_NAME}: it belongs elsewhere, or the index is of another version"
    for file, times in listed.items():
        if times > 1:
            yield f"{os.path.join(folder, INDEX_NAME)} lists {file} {times} times"
    for shard in index.shards:
        yield from _shard_problems(os.path.join(folder, shard.file), index, shard, advance)


def _shard_problems(path: str, index: Index, shard: Shard, advance: Advance) -> Iterator[str]:
    per_record = index.frames_per_record
    # How many frames each record holds: as many as fit, and what is left of the episode in its last one.
    held = [min(per_record, length - first) for length in shard.lengths for first in range(0, length, per_record)]
    if not os.path.isfile(path):
        yield f"{path} is missing: {INDEX_NAME} lists it"
        return
    size = os.path.getsize(path)
    if size != shard.size:
        what = "truncated" if size < shard.size else "too long"
        yield f"{path} is {what}: {size} bytes where {INDEX_NAME} says {shard.size}"
        return
    for record, payload in _records(path, len(held), advance):
        if isinstance(payload, UserError):
            yield str(payload)
            continue
        problem = _payload_problem(index, payload, held[record])
        if problem is not None:
            yield f"{path}: record {record} is not as {INDEX_NAME} says: {problem}"


def _published_problems(path: str, advance: Advance) -> Iterator[str]:
    for record, payload in _records(path, None, advance):
        if isinstance(payload, UserError):
            yield str(payload)
            continue
        try:
            found = parse_record(payload)
            if not found.length or not found.video or len(found.video) % found.length:
                yield f"{path}: record {record} has {len(found.video)} bytes of pixels for {found.length} frames"
        except BadRecordError as error:
            yield f"{path}: record {record} cannot be read: {error}"


def _records(path: str, count: int | None, advance: Advance) -> Iterator[tuple[int, bytes | UserError]]:
    """Every record's payload, or why it cannot be read; (-1, error) alone if the file cannot be opened."""
    readers = ShardReaders([path], None if count is None else [count])
    size = os.path.getsize(path)
    seen = 0
    try:
        total = readers.num_records(0)
        for record in range(total):
            try:
                yield record, readers.read(0, record)[0]
            except UserError as error:
                yield record, error
            advance(size * (record + 1) // total - seen)
            seen = size * (record + 1) // total
    except UserError as error:
        yield -1, error
    finally:
        readers.close()
    advance(size - seen)


def _payload_problem(index: Index, payload: bytes, held: int) -> str | None:
    """What is wrong with a record of `held` frames, by the layout in `jasmine.data.payload`."""
    if index.encoding in ("raw", "zstd"):
        pixels_end = held * index.frame_bytes
    else:
        if len(payload) < 4 * held:
            return f"{len(payload)} bytes for {held} images"
        ends = 4 * held + np.cumsum(np.frombuffer(payload, "<u4", held), dtype=np.int64)
        pixels_end = int(ends[-1])
    expected = pixels_end + held * index.action_bytes
    if len(payload) != expected:
        return f"{len(payload)} bytes, not {expected}"
    if index.encoding not in ("raw", "zstd"):
        starts = [4 * held, *ends[:-1].tolist()]
        for number, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True)):
            problem = _image_problem(index, payload[start:end])
            if problem is not None:
                return f"image {number}: {problem}"
    if index.num_actions is not None:
        actions = np.frombuffer(payload, ACTION_DTYPE, offset=pixels_end)
        if actions.size and not 0 <= actions.min() <= actions.max() < index.num_actions:
            return f"actions from {actions.min()} to {actions.max()}, not in [0, {index.num_actions})"
    return None


def _image_problem(index: Index, encoded: bytes) -> str | None:
    height, width, _ = index.frame_shape
    try:
        with open_image(encoded) as image:
            if image.size != (width, height):
                return f"{image.height}×{image.width}, not {height}×{width}"
            image.load()
            return None
    except IMAGE_ERRORS as error:
        return f"cannot be decoded ({error})"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    try:
        options = parse(Options, sys.argv[1:] if arguments is None else arguments, prog="python -m jasmine.data.verify")
        if is_bucket_url(options.path):
            raise UserError(
                f"{options.path} is in a bucket, whose files are verified when they are fetched; this reads folders: "
                "verify the data where they were made, or copy them to a disk"
            )
        folders = find_splits(options.path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    files = [path for folder in folders.values() for path in published_files(folder)]
    count = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # problems appear above the bar, but go where stdout goes
    ) as progress:
        bar = progress.add_task("verify", total=sum(os.path.getsize(path) for path in files))
        for folder in folders.values():
            for problem in problems(folder, lambda amount: progress.advance(bar, amount)):
                count += 1
                print(problem, flush=True)
    where = f"{len(files)} files in {', '.join(folders)}"
    found = f"{count} problem{'s' if count > 1 else ''} in" if count else "sound;"
    print(f"{options.path}: {found} {where}")
    return FOUND_PROBLEMS if count else 0


if __name__ == "__main__":
    sys.exit(main())
