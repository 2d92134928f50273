"""Measures reading training data from a bucket, staged on the local disk, against reading it from a folder.

    python benchmarks/gcs_data.py [--quick]

64×64×3 frames, 16-frame windows, batch 36, raw. The bucket is the tests' fake Cloud Storage, a process
on this machine: it shares its cores, and has no network. The last line is one JSON object:

    warm          both loaders once all is staged, in turns of 20 batches: `ratio` is the median over the rounds of staged to
                  local frames per second, `ratio_cpu` the same by CPU time
    cold          an empty cache, every answer 50 ms late: seconds to the first batch, until all shards are there, and for
                  as many batches as an epoch has; the same epoch from a folder
    small_cache   room for half of the shards, four reading threads, as in training: frames per second, fetches per step
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# The testbed is with the tests, which are not installed.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_frames import FRAME_SHAPE, NUM_ACTIONS, episodes

from jasmine.data.episodes import EpisodeDataset
from jasmine.data.pipeline import BatchIterator, batches
from jasmine.data.staging import DataCache
from jasmine.data.writer import EpisodeWriter
from tests.clusters.gcs import BUCKET, Gcs, running_gcs

SEQ_LEN, BATCH, LENGTH, SEED, ROUND = 16, 36, 160, 0, 20
FRAMES_PER_BATCH = SEQ_LEN * BATCH
LATENCY = 0.05


def write_data(folder: Path, num_episodes: int, num_shards: int) -> str:
    """Writes a split; returns what its frames are of."""
    kind, frames, actions = episodes(32, LENGTH)
    with EpisodeWriter(
        folder,
        frame_shape=FRAME_SHAPE,
        fps=15,
        encoding="raw",
        num_actions=NUM_ACTIONS,
        episodes_per_shard=num_episodes // num_shards,
    ) as writer:
        for k in np.arange(num_episodes) % len(frames):
            writer.write(frames[k], actions[k])
    return kind


def upload(folder: Path) -> str:
    """Puts a split into the bucket; returns its URL."""
    from google.cloud.storage import Client

    bucket = Client(project=None).bucket(BUCKET)
    for path in folder.iterdir():
        bucket.blob(f"data/{path.name}").upload_from_filename(str(path))
    return f"gs://{BUCKET}/data"


@contextlib.contextmanager
def reading(path: str, cache: DataCache | None = None, threads: int = 1) -> Iterator[BatchIterator]:
    """The batches of a split, from the first step on."""
    dataset = EpisodeDataset(path, cache=cache)
    feed = batches(dataset, seq_len=SEQ_LEN, batch_size=BATCH, seed=SEED, num_threads=threads)
    with contextlib.closing(feed) as iterator:
        yield iterator


def warm(local: str, remote: str, cache: DataCache, rounds: int) -> dict[str, Any]:
    """Both in turns. They read when they are asked, without threads, so that each pays for its own work only."""
    wall: dict[str, list[float]] = {"local": [], "staged": []}
    cpu: dict[str, list[float]] = {"local": [], "staged": []}
    with reading(local, threads=0) as from_folder, reading(remote, cache, threads=0) as from_bucket:
        contenders = {"local": from_folder, "staged": from_bucket}
        for number in range(-2, rounds):
            for name in list(contenders)[:: 1 if number % 2 else -1]:
                cpu_began, began = time.thread_time(), time.perf_counter()
                for _ in range(ROUND):
                    next(contenders[name])
                if number >= 0:  # before, files were opened
                    wall[name].append(time.perf_counter() - began)
                    cpu[name].append(time.thread_time() - cpu_began)
    ratios = {
        key: [a / b for a, b in zip(figures["local"], figures["staged"], strict=True)]
        for key, figures in (("ratio", wall), ("ratio_cpu", cpu))
    }
    speeds = {name: round(ROUND * FRAMES_PER_BATCH / statistics.median(values)) for name, values in wall.items()}
    return {
        **{key: round(statistics.median(values), 3) for key, values in ratios.items()},
        "ratio_quartiles": [round(value, 3) for value in statistics.quantiles(ratios["ratio"], n=4)[::2]],
        **{f"{name}_frames_per_second": speed for name, speed in speeds.items()},
        "rounds": rounds,
    }


def staged_bytes(cache: DataCache) -> int:
    """How much of the data is there."""
    return sum(path.stat().st_size for path in Path(cache.folder).glob("*.array_record"))


def cold(local: str, remote: str, cache: DataCache, steps: int) -> dict[str, float]:
    """The first epoch."""
    size = sum(path.stat().st_size for path in Path(local).glob("*.array_record"))
    figures: dict[str, float] = {"megabytes": round(size / 1e6)}
    began = time.perf_counter()
    with reading(remote, cache) as iterator:
        next(iterator)
        figures["first_batch_seconds"] = time.perf_counter() - began
        for _ in range(steps - 1):
            next(iterator)
            if "all_staged_seconds" not in figures and staged_bytes(cache) == size:
                figures["all_staged_seconds"] = time.perf_counter() - began
        figures["epoch_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    with reading(local) as iterator:
        for _ in range(steps):
            next(iterator)
        figures["local_epoch_seconds"] = time.perf_counter() - began
    return {key: round(value, 2) for key, value in figures.items()}


def small_cache(gcs: Gcs, remote: str, cache: DataCache, num_shards: int, steps: int) -> dict[str, float]:
    """Steps with a cache that holds half of the data."""
    before = len(gcs.requests)
    began = time.perf_counter()
    with reading(remote, cache, threads=4) as iterator:
        for _ in range(steps):
            next(iterator)
        seconds = time.perf_counter() - began
    fetches = [one for one in gcs.requests[before:] if one["query"].get("alt") == "media"]
    return {
        "frames_per_second": round(steps * FRAMES_PER_BATCH / seconds),
        "fetches_per_step": round(len(fetches) / steps, 2),
        "shards": num_shards,
    }


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data, and fewer rounds")
    options = parser.parse_args()
    rounds, num_episodes, num_shards = (20, 60, 10) if options.quick else (100, 300, 20)
    # Threads that read ahead may still be fetching when the folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, running_gcs(Path(folder) / "gcs") as gcs:
        os.environ.update(gcs.env)
        local = str(Path(folder) / "data")
        kind = write_data(Path(local), num_episodes, num_shards)
        remote = upload(Path(local))
        size = sum(path.stat().st_size for path in Path(local).glob("*.array_record"))
        steps = num_episodes * (LENGTH - SEQ_LEN + 1) // BATCH
        gcs.latency(LATENCY)
        first_epoch = cold(local, remote, DataCache(f"{folder}/cold", 2 * size), steps)
        gcs.latency(0)
        side_by_side = warm(local, remote, DataCache(f"{folder}/cold", 2 * size), rounds)
        half = small_cache(gcs, remote, DataCache(f"{folder}/small", size // 2), num_shards, 8 if options.quick else 40)
    result: dict[str, Any] = {"frames": kind, "warm": side_by_side, "cold": first_epoch, "small_cache": half}
    for name in ("warm", "cold", "small_cache"):
        print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in result[name].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
