"""Measures the time from `submit.py` to the first training step, with a cold and a warm compilation cache.

    python benchmarks/startup.py [--quick]

Each run is a real submission to the `local` cluster of the VQ-VAE tokenizer at its small shape (batch 4 × 16 frames of
64×64×3, dim 128, 2 blocks, float32) on frames of noise, stopped after two steps. Times are seconds since `submit.py` was
started; the last line is one JSON object. `--quick` leaves the job of two processes out.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jasmine.data.writer import EpisodeWriter

ROOT = Path(__file__).resolve().parents[1]
JOB = shlex.split(
    "--batch_size 4 --seq_len 16 --model_dim 128 --ffn_dim 512 --num_blocks 2 --dtype float32 --num_steps 100 "
    "--stop_at_step 2 --log_interval 1"
)


def submit(storage: Path, cache: Path, data: Path, name: str, processes: int, devices: int) -> dict[str, float]:
    """Submits one run and waits for its end; seconds until each of its marks."""
    env = {**os.environ, "JASMINE_COMPILATION_CACHE_DIR": str(cache), "JASMINE_STORAGE": str(storage)}
    sets = [f"processes={processes}", f"devices_per_process={devices}", "max_failures=0"]
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--cluster", "local", "--name", name]
    command += [part for value in sets for part in ("--set", value)]
    begin = time.time()
    subprocess.run(
        [*command, "train_tokenizer_vqvae", *JOB, "--data_dir", str(data)], env=env, check=True, capture_output=True
    )
    marks = {"submit_returned": time.time() - begin}
    run_dir = storage / name
    while json.loads((run_dir / "run.json").read_text())["state"] in ("submitted", "running"):
        time.sleep(0.1)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    for mark in ("attempt_started", "started", "compiled", "first_step", "finished"):
        marks[mark] = min(event["time"] for event in events if event["event"] == mark) - begin
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one process only, once warm")
    options = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
        with EpisodeWriter(root / "data" / "train", frame_shape=(64, 64, 3), fps=15, encoding="raw") as writer:
            writer.write(frames)
        for processes, devices in [(1, 1)] if options.quick else [(1, 1), (2, 2)]:
            topology = f"{processes}x{devices}"
            cache = root / f"cache-{topology}"
            runs = [
                submit(root / "runs", cache, root / "data", f"run-{topology}-{k}", processes, devices)
                for k in range(2 if options.quick else 4)
            ]
            result[f"{topology}_cold"] = runs[0]
            result[f"{topology}_warm"] = {mark: statistics.median(run[mark] for run in runs[1:]) for mark in runs[0]}
    for name, marks in result.items():
        print(f"{name}: " + "  ".join(f"{mark} {seconds:.2f} s" for mark, seconds in marks.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
