"""Measures layouts of the episode format, from which its defaults were chosen.

    python benchmarks/data_layout.py [--quick]

Writes the same 64×64×3 episodes of 160 frames with 1 to 160 frames in a record, compressed or not, and with several
records in one compressed group, then reads random 16-frame windows from the page cache, positioned and single-threaded
as the reader does. Rounds over all layouts are interleaved; figures are medians. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from benchmark_frames import episodes

SEQ_LEN, LENGTH = 16, 160
COMPRESSION = {"raw": "uncompressed", "zstd1": "zstd:1", "zstd3": "zstd:3", "snappy": "snappy", "brotli3": "brotli:3"}
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write(path: str, frames: np.ndarray, per_record: int, compression: str, group_size: int) -> float:
    """Writes all episodes; returns frames per second."""
    began = time.perf_counter()
    writer = ArrayRecordWriter(path, f"group_size:{group_size},{COMPRESSION[compression]}")
    for episode in frames:
        for first in range(0, LENGTH, per_record):
            writer.write(episode[first : first + per_record].tobytes())
    writer.close()
    return frames.shape[0] * LENGTH / (time.perf_counter() - began)


def read(path: str, num_episodes: int, per_record: int, seconds: float, seed: int) -> float:
    """Reads random windows for so many seconds of CPU time; returns frames per second of it."""
    reader = ArrayRecordReader(path, options=READER_OPTIONS, file_reader_buffer_size=32768)
    rng = np.random.default_rng(seed)
    window = np.empty((SEQ_LEN, 64 * 64 * 3), np.uint8)
    count, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        episode, start = int(rng.integers(num_episodes)), int(rng.integers(LENGTH - SEQ_LEN + 1))
        first, last = start // per_record, (start + SEQ_LEN - 1) // per_record
        reader.seek(episode * (LENGTH // per_record) + first)
        for record in range(first, last + 1):
            payload = np.frombuffer(reader.read(), np.uint8).reshape(per_record, -1)
            low, high = record * per_record, (record + 1) * per_record
            begin, end = max(start, low), min(start + SEQ_LEN, high)
            window[begin - start : end - start] = payload[begin - low : end - low]
        count += SEQ_LEN
    return count / (time.process_time() - began)


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer episodes, shorter and fewer rounds")
    args = parser.parse_args()
    num_episodes, rounds, seconds = (32, 3, 0.2) if args.quick else (128, 5, 0.5)
    kind, frames, _ = episodes(32, LENGTH)
    frames = np.concatenate([frames] * (num_episodes // len(frames)))

    layouts = [(n, c, 1) for c in ("raw", "zstd3") for n in (1, 4, 8, 16, 32, 160)]
    layouts += [(8, c, 1) for c in ("zstd1", "snappy", "brotli3")]
    layouts += [(n, c, 16 // n) for c in ("raw", "zstd3") for n in (1, 4, 8)]
    with tempfile.TemporaryDirectory() as folder:
        paths = {layout: os.path.join(folder, "{}-{}-{}".format(*layout)) for layout in layouts}
        written = {
            (n, c, group): write(paths[n, c, group], frames, n, c, group) for n, c, group in layouts
        }  # one pass: writing is not what the choice turns on
        speeds: dict[tuple[int, str, int], list[float]] = {layout: [] for layout in layouts}
        for number in range(rounds):
            for layout in layouts:
                speeds[layout].append(read(paths[layout], num_episodes, layout[0], seconds, number))
        results = [
            {
                "frames_per_record": n,
                "compression": c,
                "group_size": group,
                "frames_per_cpu_second": round(statistics.median(speeds[n, c, group])),
                "bytes_per_frame": round(os.path.getsize(paths[n, c, group]) / (num_episodes * LENGTH)),
                "written_frames_per_second": round(written[n, c, group]),
            }
            for n, c, group in layouts
        ]
    print(f"{'frames/record':>13} {'compression':>11} {'group':>5} {'read frames/s/core':>18} {'bytes/frame':>11}")
    for row in results:
        print(
            f"{row['frames_per_record']:13} {row['compression']:>11} {row['group_size']:5} "
            f"{row['frames_per_cpu_second']:18,} {row['bytes_per_frame']:11,}"
        )
    print(json.dumps({"frames": kind, "layouts": results}))


if __name__ == "__main__":
    main()
