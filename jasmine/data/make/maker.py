"""Turns a `Source` into a dataset on disk, and goes on where an interrupted run stopped.

`make.json` in the dataset's folder holds everything that the content depends on, and the items that were skipped. It
is written before the first frame; a later run must agree with it. What is on disk is whole shards only, and items are
pure, so going on means: count the episodes in whole shards, find the item after them, record from there.
"""

import dataclasses
import itertools
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from jasmine.data.index import INDEX_NAME, LOSSY, read_index
from jasmine.data.make.source import SPLITS, CommonOptions, Episode, Skipped, Source
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError

RECIPE_NAME = "make.json"
# Raised whenever the same options begin to give other episodes: no dataset is made half one way and half another.
RECIPE_VERSION = 1
# Options that a dataset's content does not depend on. What lies at `input_path` is compared by itself.
FREE_OPTIONS = ("output_dir", "num_workers", "skip_bad", "input_path")

Record = Callable[[str, int], Episode | Skipped]


def make_dataset(kind: str, options: CommonOptions, source: Source, console: Console) -> str:
    """Makes all splits, or what is missing of them; returns the dataset's folder.

    Raises:
        UserError: the options are impossible, the folder holds something else or a dataset begun with other options
            (names the option), or an item cannot be recorded.
    """
    root = options.output_dir or os.path.join("data", kind)
    if options.seed < 0:
        raise UserError(f"--seed {options.seed} must not be negative")
    if options.episodes_per_shard < 1:
        raise UserError(f"--episodes_per_shard {options.episodes_per_shard} must be at least 1")
    if options.frames_per_record is not None and options.frames_per_record < 1:
        raise UserError(f"--frames_per_record {options.frames_per_record} must be at least 1")
    if options.quality is not None and (options.encoding not in LOSSY or not 1 <= options.quality <= 100):
        raise UserError(
            f"--quality {options.quality} must be from 1 to 100, and is for --encoding {' or '.join(LOSSY)}"
        )
    for name, value in dataclasses.asdict(options).items():
        if name.startswith("num_") and isinstance(value, int) and value < 0:
            raise UserError(f"--{name} {value} must not be negative")
    if not any(wanted > 0 for wanted in source.wanted.values()):
        raise UserError("nothing to make: every split is to have 0 episodes")
    recipe = _agreed_recipe(root, _recipe(kind, options, source))
    splits = [split for split in SPLITS if source.wanted[split] > 0]
    missing = [split for split in splits if not _is_complete(os.path.join(root, split))]
    if not missing:
        console.print(f"{root} is complete already: nothing to do", highlight=False, soft_wrap=True)
        return root
    executor = None
    if options.num_workers > 0:
        executor = ProcessPoolExecutor(options.num_workers, get_context("spawn"), _start_worker)
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            for split in missing:
                _make_split(root, split, recipe, options, source, executor, progress)
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for lack of memory: lower --num_workers") from None
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)
    lengths = {split: read_index(os.path.join(root, split)).lengths for split in splits}
    if not any(len(of_split) for of_split in lengths.values()):
        reason = next(skip["reason"] for skips in recipe["skipped"].values() for skip in skips)
        raise UserError(f"{root}: every recording was left out, the first because of {reason}")
    summary = ", ".join(f"{split} {len(lengths[split])} episodes, {lengths[split].sum()} frames" for split in splits)
    console.print(f"{root}: {summary}", highlight=False, soft_wrap=True)
    return root


def _make_split(
    root: str,
    split: str,
    recipe: dict[str, Any],
    options: CommonOptions,
    source: Source,
    executor: ProcessPoolExecutor | None,
    progress: Progress,
) -> None:
    skipped = recipe["skipped"].setdefault(split, [])
    known_skips = {skip["item"] for skip in skipped}
    wanted = source.wanted[split]
    metadata = {"made_as": recipe["kind"], "split": split, "options": recipe["options"]}
    if source.action_names:
        metadata["action_names"] = list(source.action_names)
    with EpisodeWriter(
        os.path.join(root, split),
        frame_shape=source.frame_shape,
        fps=source.fps,
        encoding=options.encoding,
        quality=options.quality,
        frames_per_record=options.frames_per_record,
        num_actions=source.num_actions,
        env=source.env,
        metadata=metadata,
        episodes_per_shard=options.episodes_per_shard,
    ) as writer:
        unit = "episodes" if source.counts == "items" else "frames"
        frames = int(writer.index.lengths.sum())
        bar = progress.add_task(split, total=wanted, frames=0, unit=unit)
        all_items = itertools.count() if source.counts == "frames" else range(wanted)
        unskipped = (item for item in all_items if item not in known_skips)
        items = itertools.islice(unskipped, writer.num_episodes, None)
        done = frames if source.counts == "frames" else writer.num_episodes + len(known_skips)
        progress.update(bar, completed=done)
        made = 0
        if source.counts == "items" or frames < wanted:
            for item, result in _recorded(source.record, split, items, executor, options.num_workers):
                if isinstance(result, Skipped):
                    skipped.append({"item": item, "reason": result.reason})
                    _write_recipe(root, recipe)
                    progress.console.print(f"left out: {result.reason}", highlight=False, soft_wrap=True)
                    progress.advance(bar)
                    continue
                writer.write(result.frames, result.actions)
                frames += len(result.frames)
                made += len(result.frames)
                progress.update(bar, advance=len(result.frames) if source.counts == "frames" else 1, frames=made)
                if source.counts == "frames" and frames >= wanted:
                    break


def _recorded(
    record: Record, split: str, items: Iterable[int], executor: ProcessPoolExecutor | None, num_workers: int
) -> Iterator[tuple[int, Episode | Skipped]]:
    """Results in the order of `items`, whoever records them; at most two per worker are held."""
    if executor is None:
        for item in items:
            yield item, record(split, item)
        return
    items = iter(items)
    running: deque[tuple[int, Future[Episode | Skipped]]] = deque()
    while True:
        for item in itertools.islice(items, 2 * num_workers - len(running)):
            running.append((item, executor.submit(record, split, item)))
        if not running:
            return
        item, future = running.popleft()
        yield item, future.result()


def _start_worker() -> None:
    """Interrupts are the parent's to handle; a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _recipe(kind: str, options: CommonOptions, source: Source) -> dict[str, Any]:
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if key not in FREE_OPTIONS}
    recipe = {
        "recipe_version": RECIPE_VERSION,
        "kind": kind,
        "options": chosen,
        "inputs": dict(source.inputs),
        "skipped": {},
    }
    return json.loads(json.dumps(recipe))


def _agreed_recipe(root: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe that stands in `root`, once it is known to be the wanted one; or `recipe`, written there."""
    path = os.path.join(root, RECIPE_NAME)
    try:
        os.makedirs(root, exist_ok=True)
        names = os.listdir(root)
        if RECIPE_NAME not in names:
            if any(not name.startswith(RECIPE_NAME) for name in names):
                raise UserError(f"{root} holds other files, and no {RECIPE_NAME}: choose an empty or new folder")
            _write_recipe(root, recipe)
            return recipe
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        old = {"kind": found["kind"], "recipe_version": found["recipe_version"], **found["options"]}
        old_inputs = found["inputs"]
        found["skipped"]
    except OSError as error:
        raise UserError(f"{root} cannot be used ({error.strerror}): choose a folder that can be written") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {root} and make it again") from None
    new = {"kind": recipe["kind"], "recipe_version": recipe["recipe_version"], **recipe["options"]}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{root} was begun with {key} {old.get(key)}, not {new.get(key)}: "
                "repeat the first command to go on, or choose another --output_dir"
            )
    if old_inputs != recipe["inputs"]:
        raise UserError(
            f"{root} was begun with other files at --input_path (added, removed or changed since): choose another "
            "--output_dir"
        )
    return found


def _write_recipe(root: str, recipe: dict[str, Any]) -> None:
    path = os.path.join(root, RECIPE_NAME)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(recipe, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def _is_complete(split_dir: str) -> bool:
    return os.path.exists(os.path.join(split_dir, INDEX_NAME)) and read_index(split_dir).complete


class _Speed(ProgressColumn):
    """Frames made a second; what was there before this run does not count."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time or task.elapsed or 0.0
        return Text(f"{task.fields['frames'] / elapsed if elapsed else 0:,.0f} frames/s", style="progress.data.speed")
