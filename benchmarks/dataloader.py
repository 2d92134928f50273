"""Measures the data pipeline against the loader of the published Jasmine code, interleaved in one run.

    python benchmarks/dataloader.py [--quick] [--reference DIR]

64×64×3 frames, 16-frame windows out of 160-frame episodes, batch 36, everything in the page cache. The other side is,
with `--reference DIR` (a checkout of the published code), its own `jasmine/utils/dataloader.py`; without it, a loader
of our own writing that takes the same steps: one pickled record per 160 frames, unpickled in a filter and again in a
random slice, batched by Grain's DataLoader. Figures are medians over the repeats; the last line is one JSON object.

`frames_per_second` is by the wall clock; `frames_per_cpu_second` divides by the CPU time of this process, all its
threads included (worker processes are not in it, so it is given only where there are none).
"""

import argparse
import importlib.util
import json
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from benchmark_frames import FRAME_SHAPE, NUM_ACTIONS, episodes

from jasmine.data.episodes import EpisodeDataset
from jasmine.data.index import Encoding
from jasmine.data.pipeline import batches
from jasmine.data.published import PublishedDataset
from jasmine.data.records import ShardReaders
from jasmine.data.sampling import WindowSampler
from jasmine.data.writer import EpisodeWriter

SEQ_LEN, BATCH, LENGTH, SEED = 16, 36, 160, 0
FRAMES_PER_BATCH = SEQ_LEN * BATCH


@dataclass(frozen=True)
class Figures:
    """Medians of one contender; `repeats` are its single frames_per_second."""

    frames_per_second: float
    frames_per_cpu_second: float | None
    first_batch_seconds: float
    repeats: tuple[float, ...]


@dataclass
class Contender:
    """An endless iterator of batches, its name, and whether all its work is done in this process."""

    name: str
    open: Callable[[], Iterator[Any]]
    in_process: bool = True


def published_style_loader(paths: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """What the published loader does, for runs without a checkout of it; no worker processes."""

    class LongEnough(grain.transforms.Filter):
        def filter(self, element: bytes) -> bool:
            return pickle.loads(element)["sequence_length"] >= SEQ_LEN

    class RandomWindow(grain.transforms.RandomMap):
        def random_map(self, element: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
            record = pickle.loads(element)
            video = np.frombuffer(record["raw_video"], np.uint8).reshape(record["sequence_length"], *FRAME_SHAPE)
            start = rng.integers(0, len(video) - SEQ_LEN + 1)
            return {
                "videos": video[start : start + SEQ_LEN],
                "actions": record["actions"][start : start + SEQ_LEN],
            }

    source = grain.sources.ArrayRecordDataSource(paths)
    sampler = grain.samplers.IndexSampler(len(source), shuffle=True, num_epochs=None, seed=SEED)
    return iter(
        grain.DataLoader(
            data_source=source,
            sampler=sampler,
            operations=[LongEnough(), RandomWindow(), grain.transforms.Batch(BATCH, drop_remainder=True)],
            worker_count=0,
            read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=1),
        )
    )


def reference_loader(checkout: Path, paths: list[str], num_workers: int) -> Iterator[dict[str, np.ndarray]]:
    """The published code's own loader, imported from a checkout of it."""
    spec = importlib.util.spec_from_file_location("reference_dataloader", checkout / "jasmine/utils/dataloader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    height, width, channels = FRAME_SHAPE
    return iter(
        module.get_dataloader(paths, SEQ_LEN, BATCH, height, width, channels, num_workers=num_workers, seed=SEED)
    )


def write_data(root: Path, num_episodes: int) -> tuple[str, list[str]]:
    """Writes the same episodes in both of our encodings and in the published format."""
    kind, frames, actions = episodes(32, LENGTH)
    order = np.arange(num_episodes) % len(frames)
    encodings: tuple[Encoding, ...] = ("raw", "zstd")
    for encoding in encodings:
        with EpisodeWriter(
            root / encoding,
            frame_shape=FRAME_SHAPE,
            fps=15,
            encoding=encoding,
            num_actions=NUM_ACTIONS,
            episodes_per_shard=100,
        ) as writer:
            for k in order:
                writer.write(frames[k], actions[k])
    (root / "published").mkdir()
    paths = []
    for first in range(0, num_episodes, 100):
        paths.append(str(root / "published" / f"data_{first:06d}.array_record"))
        record_writer = ArrayRecordWriter(paths[-1], "group_size:1")
        for k in order[first : first + 100]:
            record = {"raw_video": frames[k].tobytes(), "sequence_length": LENGTH, "actions": actions[k]}
            record_writer.write(pickle.dumps(record))
        record_writer.close()
    return kind, paths


def measure(contenders: list[Contender], repeats: int, seconds: float) -> dict[str, Figures]:
    """Opens all, then goes round them `repeats` times, `seconds` of batches each."""
    iterators: dict[str, Iterator[Any]] = {}
    first: dict[str, float] = {}
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for contender in contenders:
        began = time.perf_counter()
        iterators[contender.name] = contender.open()
        batch = next(iterators[contender.name])
        assert batch["videos"].shape == (BATCH, SEQ_LEN, *FRAME_SHAPE), contender.name
        first[contender.name] = time.perf_counter() - began
        wall[contender.name], cpu[contender.name] = [], []
    for _ in range(repeats):
        for contender in contenders:
            for _ in range(8):  # batches that were ready already
                next(iterators[contender.name])
            count, cpu_began, began = 0, time.process_time(), time.perf_counter()
            while time.perf_counter() - began < seconds:
                next(iterators[contender.name])
                count += 1
            wall[contender.name].append(count * FRAMES_PER_BATCH / (time.perf_counter() - began))
            cpu[contender.name].append(count * FRAMES_PER_BATCH / (time.process_time() - cpu_began))
    for iterator in iterators.values():
        getattr(iterator, "close", lambda: None)()
    return {
        c.name: Figures(
            frames_per_second=round(statistics.median(wall[c.name])),
            frames_per_cpu_second=round(statistics.median(cpu[c.name])) if c.in_process else None,
            first_batch_seconds=round(first[c.name], 2),
            repeats=tuple(round(value) for value in wall[c.name]),
        )
        for c in contenders
    }


def ratio(ours: Figures, rival: Figures) -> dict[str, float]:
    """How many times faster: the median over the rounds, each of which measured both within seconds; and per CPU time."""
    by_round = [a / b for a, b in zip(ours.repeats, rival.repeats, strict=True)]
    assert ours.frames_per_cpu_second
    assert rival.frames_per_cpu_second
    return {
        "by_clock": round(statistics.median(by_round), 1),
        "by_cpu_time": round(ours.frames_per_cpu_second / rival.frames_per_cpu_second, 1),
    }


def bounds(split_dir: Path, seconds: float) -> dict[str, int]:
    """Where the time of the raw encoding goes: frames per second of ever larger parts of the work, one thread."""
    dataset = EpisodeDataset(split_dir)
    sampler = WindowSampler(dataset.lengths, SEQ_LEN, SEED)
    readers = ShardReaders([str(split_dir / shard.file) for shard in dataset.index.shards])
    per_record = dataset.index.frames_per_record
    episode = dataset.read_episode(0)[0]
    batch = np.empty((BATCH, SEQ_LEN, *FRAME_SHAPE), np.uint8)

    def sample(step: int) -> None:
        sampler.windows(step, BATCH)

    def copy(_step: int) -> None:
        for row in range(BATCH):
            batch[row] = episode[row : row + SEQ_LEN]

    def records(step: int) -> None:
        for number, start in zip(*sampler.windows(step, BATCH), strict=True):
            shard, inside = divmod(int(number), 100)
            first, last = start // per_record, (start + SEQ_LEN - 1) // per_record
            readers.read(shard, inside * (LENGTH // per_record) + int(first), int(last - first + 1))

    def windows(step: int) -> None:
        dataset.read_windows(*sampler.windows(step, BATCH), SEQ_LEN)

    def rate(work: Callable[[int], None]) -> int:
        step, began = 0, time.process_time()
        while time.process_time() - began < seconds:
            work(step)
            step += 1
        return round(step * FRAMES_PER_BATCH / (time.process_time() - began))

    parts: dict[str, Callable[[int], None]] = {
        "sampling": sample,
        "copying_into_the_batch": copy,
        "sampling_and_reading_records": records,
        "sampling_and_reading_windows": windows,
    }
    return {name: rate(work) for name, work in parts.items()}


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter repeats and fewer episodes")
    parser.add_argument("--reference", type=Path, help="checkout of the published code to compare with")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="worker processes to try as well")
    args = parser.parse_args()
    repeats, seconds, num_episodes = (2, 0.3, 60) if args.quick else (7, 3.0, 600)
    flags.FLAGS.mark_as_parsed()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        root = Path(folder)
        kind, paths = write_data(root, num_episodes)

        def ours(encoding: str, num_workers: int = 0) -> Callable[[], Iterator[Any]]:
            dataset = (
                PublishedDataset(str(root / encoding)) if encoding == "published" else EpisodeDataset(root / encoding)
            )
            return lambda: batches(
                dataset, seq_len=SEQ_LEN, batch_size=BATCH, seed=SEED, num_workers=num_workers, num_threads=1
            )

        def theirs(num_workers: int = 0) -> Callable[[], Iterator[Any]]:
            if args.reference is None:
                return lambda: published_style_loader(paths)
            return lambda: reference_loader(args.reference, paths, num_workers)

        rival = "reference" if args.reference else "published_style"
        figures = measure(
            [
                Contender("ours_raw", ours("raw")),
                Contender(rival, theirs()),
                Contender("ours_zstd", ours("zstd")),
                Contender("ours_reading_published", ours("published")),
            ],
            repeats,
            seconds,
        )
        with_workers = []
        for n in args.workers:
            with_workers.append(Contender(f"ours_raw_{n}_workers", ours("raw", n), in_process=False))
            with_workers.append(Contender(f"ours_zstd_{n}_workers", ours("zstd", n), in_process=False))
            if args.reference:
                with_workers.append(Contender(f"reference_{n}_workers", theirs(n), in_process=False))
        figures |= measure(with_workers, repeats, seconds)
        limits = bounds(root / "raw", seconds)

    for name, figure in figures.items():
        per_cpu = (
            "" if figure.frames_per_cpu_second is None else f", {figure.frames_per_cpu_second:,.0f} per CPU second"
        )
        print(f"{name:24} {figure.frames_per_second:10,.0f} frames/s{per_cpu}")
    for name, value in limits.items():
        print(f"one core, {name:32} {value:10,.0f} frames/s")
    result = {
        "frames": kind,
        "rival": rival,
        "cores": os.cpu_count(),
        "ratio_raw": ratio(figures["ours_raw"], figures[rival]),
        "ratio_zstd": ratio(figures["ours_zstd"], figures[rival]),
        "one_core_frames_per_second": limits,
        "loaders": {name: asdict(figure) for name, figure in figures.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
