"""Measures what Cloud TPU costs a run before it trains, and when its TPU is taken away, on the tests' fake of the API.

    python benchmarks/cloud_tpu.py [--repeats 5] [--quick]

The fake (`tests/clusters/cloud_tpu.py`) speaks the real API to the real client, and its VMs are processes that run the real
startup script; what Google needs to make VMs, and the installation of the environment on them, is not in these figures. A
tiny VQ-VAE tokenizer trains on a v5litepod-4 (1 VM) and a v5litepod-16 (4 VMs), compilation cached. Time lost by a preemption
is from the last step logged before it to the first one after it, with a watcher that looks every second. The last line is one
JSON object of seconds. `--quick` does each thing once, on one VM.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The testbed is with the tests, which are not installed.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slurm import JOB, step_times

from jasmine.data.writer import EpisodeWriter
from launch.backends.cloud_tpu import read_resource
from launch.run_dir import RunDir
from tests.clusters.cloud_tpu import CloudTpu, running_cloud_tpu

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 180.0
CLUSTER = """\
backend: cloud_tpu
accelerator_type: v5litepod-4
zone: us-west4-a
project: lab
vm_dir: ~/jasmine
python: {python}
grace_seconds: 30
compilation_cache: {cache}
"""


class Laptop:
    """A shell from which runs go to the TPU."""

    def __init__(self, root: Path, cloud: CloudTpu) -> None:
        self.root, self.cloud = root, cloud
        (root / "tpu.yaml").write_text(CLUSTER.format(python=sys.executable, cache=root / "cache"))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("JASMINE_", "JAX_"))} | cloud.env
        self.env |= {"JASMINE_STORAGE": str(root / "runs"), "JASMINE_WATCH_SECONDS": "1", "PYTHONPATH": str(ROOT)}

    def command(self, name: str, *arguments: str) -> float:
        """Run one of the launcher's commands; return its seconds."""
        begin = time.monotonic()
        command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
        subprocess.run(command, cwd=self.root, env=self.env, check=True, capture_output=True)
        return time.monotonic() - begin

    def submit(self, name: str, kind: str, *job: str) -> tuple[RunDir, float]:
        """Submit the training; return its run and the command's seconds."""
        cluster = ["--cluster", "tpu.yaml", "--name", name, "--set", f"accelerator_type={kind}"]
        data = ["--data_dir", str(self.root / "data"), "--batch_size", "16"]
        return RunDir(self.root / "runs" / name), self.command("submit", *cluster, *JOB, *data, *job)


def wait(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        time.sleep(0.05)


def _has_event(run: RunDir, name: str) -> bool:
    return any(event["event"] == name for event in run.events())


def _has_steps(run: RunDir, attempt: int, count: int) -> bool:
    return len(step_times(run).get(attempt, [])) >= count


def start_times(laptop: Laptop, name: str, kind: str) -> dict[str, float]:
    """Submit once; return the seconds of its stages."""
    run, latency = laptop.submit(name, kind, "--stop_at_step", "2")
    rented = read_resource(run)
    assert rented is not None
    wait(lambda: laptop.cloud.state(rented.id) in ("ACTIVE", None), f"{name} is ACTIVE")
    active = time.time()
    wait(functools.partial(_has_event, run, "finished"), name)
    marks = {event["event"]: float(event["time"]) for event in reversed(run.events())}
    laptop.cloud.wait(rented.id, None)
    return {"submit_returned": latency, "active_to_first_step": marks["first_step"] - active,
            "end_to_tpu_given_back": time.time() - marks["finished"]}  # fmt: skip


def lost_by_preemption(laptop: Laptop, kind: str, repeats: int) -> list[float]:
    """Preempt a run in every attempt; return the seconds without a step around each."""
    run, _ = laptop.submit("preempted", kind)
    for attempt in range(1, repeats + 1):
        wait(functools.partial(_has_steps, run, attempt, 12), f"attempt {attempt}")
        rented = read_resource(run)
        assert rented is not None
        laptop.cloud.preempt(rented.id)
    wait(functools.partial(_has_steps, run, repeats + 1, 1), "the last attempt")
    laptop.command("jobs", "cancel", "preempted")
    times = step_times(run)
    return [min(times[attempt + 1]) - max(times[attempt]) for attempt in range(1, repeats + 1)]


def imports() -> dict[str, float]:
    """Seconds of a whole `submit.py --dry-run`, by backend; `local` is what others pay for XManager being there."""
    seconds = {}
    for cluster in ("local", "tpu-v5-256"):
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--cluster", cluster, "--dry-run"]
        taken = []
        for _ in range(5):
            begin = time.monotonic()
            subprocess.run(
                command, check=True, capture_output=True, env=os.environ | {"JASMINE_STORAGE": tempfile.gettempdir()}
            )
            taken.append(time.monotonic() - begin)
        seconds[f"dry_run_{cluster}"] = statistics.median(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often each thing is measured")
    parser.add_argument("--quick", action="store_true", help="each once, on one VM")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    kinds = ["v5litepod-4"] if options.quick else ["v5litepod-4", "v5litepod-16"]
    results = imports()
    with tempfile.TemporaryDirectory() as folder:
        data = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
        with EpisodeWriter(Path(folder) / "data" / "train", frame_shape=(16, 16, 3), fps=15, encoding="raw") as writer:
            for _ in range(8):
                writer.write(data)
        with running_cloud_tpu(Path(folder) / "cloud") as cloud:
            laptop = Laptop(Path(folder), cloud)
            for kind in kinds:
                start_times(laptop, f"warm-{kind}", kind)  # fills the compilation cache
                rows = [start_times(laptop, f"{kind}-{index}", kind) for index in range(repeats)]
                results |= {f"{key}_{kind}": statistics.median(row[key] for row in rows) for key in rows[0]}
                print(json.dumps(rows), file=sys.stderr, flush=True)
            lost = lost_by_preemption(laptop, kinds[0], repeats)
            print(f"preempted: {' '.join(f'{value:.1f}' for value in sorted(lost))}", file=sys.stderr, flush=True)
            results["lost_by_preemption"] = statistics.median(lost)
    print(json.dumps({name: round(value, 2) for name, value in results.items()}))


if __name__ == "__main__":
    main()
