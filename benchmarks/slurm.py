"""Measures what Slurm costs a run: submission, and the time lost by everything that can happen to a job.

    python benchmarks/slurm.py [--repeats 5] [--quick]

Brings up the testbed of `tests/clusters/` (a real Slurm on this machine, nodes on loopback addresses or, for the loss of a
node, in network namespaces) and trains a tiny VQ-VAE tokenizer in it, 2 nodes × 1 process, compilation cached. Time lost is
from the last step logged before an event to the first one after it. It holds Slurm's own delays of this configuration
(KillWait 5 s, SlurmdTimeout 10 s for the node loss) and `hang_timeout` (10 s here). The last line is one JSON object of
seconds. `--quick` does each thing once and leaves the deaths of processes and nodes out.
"""

import argparse
import functools
import json
import os
import shlex
import signal
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

from jasmine.data.writer import EpisodeWriter
from launch.run_dir import RunDir, read_json_lines
from tests.clusters.slurm import SlurmCluster, missing_programs, networks_allowed, running_cluster

ROOT = Path(__file__).resolve().parents[1]
JOB = shlex.split(
    "train_tokenizer_vqvae --seq_len 4 --batch_size 8 --model_dim 16 --ffn_dim 32 --num_blocks 1 --num_heads 2 "
    "--patch_size 8 --num_latents 16 --latent_dim 8 --dtype float32 --log_interval 1 "
    "--log_checkpoint_interval 5 --num_steps 100000"
)
SETTINGS = shlex.split(
    "nodes=2 cpus_per_node=4 time_limit=120 grace_seconds=30 heartbeat_timeout=20 max_failures=999 exclude_hours=0 "
    "hang_timeout=10 env.JAX_PLATFORMS=cpu env.JAX_NUM_CPU_DEVICES=1"
)
PATIENCE_SECONDS = 180.0


class Login:
    """A shell on the cluster's login node."""

    def __init__(self, root: Path, cluster: SlurmCluster) -> None:
        self.root, self.cluster = root, cluster
        (root / "slurm.yaml").write_text("backend: slurm\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JASMINE_", "JAX_"))}
        self.env |= cluster.env | {"JASMINE_STORAGE": str(root / "runs"), "PYTHONPATH": str(ROOT)}
        self.env["JASMINE_COMPILATION_CACHE_DIR"] = str(root / "cache")

    def command(self, name: str, *arguments: str) -> float:
        """Run one of the launcher's commands; return its seconds."""
        begin = time.monotonic()
        command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
        subprocess.run(command, cwd=self.root, env=self.env, check=True, capture_output=True)
        return time.monotonic() - begin

    def submit(self, name: str, *job: str) -> tuple[RunDir, float]:
        """Submit the training; return its run and the command's seconds."""
        settings = [part for value in SETTINGS for part in ("--set", value)]
        data = ["--data_dir", str(self.root / "data")]
        arguments = ["--cluster", "slurm.yaml", "--name", name, *settings, *JOB, *data, *job]
        return RunDir(self.root / "runs" / name), self.command("submit", *arguments)


def wait(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        time.sleep(0.1)


def step_times(run: RunDir) -> dict[int, list[float]]:
    """When steps were logged, in Unix seconds, by attempt."""
    lines = [*read_json_lines(run.root / "metrics.superseded.jsonl"), *read_json_lines(run.metrics)]
    times: dict[int, list[float]] = {}
    for line in lines:
        times.setdefault(int(line["attempt"]), []).append(float(line["time"]))
    return times


def _has_event(run: RunDir, name: str) -> bool:
    return any(event["event"] == name for event in run.events())


def lost_by(login: Login, name: str, repeats: int, fault: Callable[[RunDir, int], None]) -> list[float]:
    """Do `fault(run, attempt)` to a run, again and again once it trains; return the seconds without a step around each."""
    run, _ = login.submit(name)
    struck: list[int] = []  # one fault may cost several attempts
    for _ in range(repeats):
        wait(functools.partial(_trains_after, run, struck, 12), f"{name}: trains again after attempts {struck}")
        struck.append(max(step_times(run)))
        fault(run, struck[-1])
    wait(functools.partial(_trains_after, run, struck, 1), f"{name}: the last attempt")
    login.command("jobs", "cancel", name)
    times = step_times(run)
    after = [min(at for attempt, steps in times.items() if attempt > one for at in steps) for one in struck]
    lost = [again - max(times[one]) for one, again in zip(struck, after, strict=True)]
    print(f"{name}: {' '.join(f'{value:.1f}' for value in sorted(lost))}", file=sys.stderr, flush=True)
    return lost


def _trains_after(run: RunDir, struck: list[int], count: int) -> bool:
    """Return whether the newest attempt is a new one, and has logged that many steps."""
    times = step_times(run)
    newest = max(times, default=0)
    return newest > max(struck, default=0) and len(times[newest]) >= count


def _lost_by_node_loss(folder: Path, name: str, repeats: int, nodes: int) -> list[float]:
    """Cut a node of the job off, again and again, each time with the ones before back; return the seconds lost."""
    with running_cluster(nodes=nodes, slurmd_timeout=10, own_networks=True) as cluster:

        def pull(run: RunDir, attempt: int) -> None:
            cluster.bring_back(cluster.nodes)
            record = json.loads(run.record.read_text())
            cluster.pull_cable(record["attempts"][-1]["nodes"][1])

        return lost_by(Login(folder, cluster), name, repeats, pull)


def to_process(signum: signal.Signals, host: int) -> Callable[[RunDir, int], None]:
    """A fault: send a signal to one process of the job."""
    return lambda run, attempt: os.kill(int(run.pid_file(attempt, host).read_text()), signum)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often each thing is measured")
    parser.add_argument("--quick", action="store_true", help="submission, preemption and a hang, each once")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    if missing := missing_programs():
        sys.exit(f"error: no Slurm here: {', '.join(missing)} missing")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
        with EpisodeWriter(Path(folder) / "data" / "train", frame_shape=(16, 16, 3), fps=15, encoding="raw") as writer:
            for _ in range(8):
                writer.write(data)
        with running_cluster() as cluster:
            login = Login(Path(folder), cluster)
            login.submit("warm", "--stop_at_step", "2")  # fills the compilation cache
            warm = RunDir(login.root / "runs" / "warm")
            wait(functools.partial(_has_event, warm, "finished"), "the compilation cache is filled")
            for index in range(repeats):
                run, latency = login.submit(f"first-{index}", "--stop_at_step", "2")
                wait(functools.partial(_has_event, run, "finished"), run.name)
                marks = {event["event"]: float(event["time"]) for event in reversed(run.events())}
                seconds.setdefault("submit_returned", []).append(latency)
                seconds.setdefault("submit_to_running", []).append(marks["attempt_started"] - marks["submitted"])
                seconds.setdefault("submit_to_first_step", []).append(marks["first_step"] - marks["submitted"])

            print(json.dumps(seconds), file=sys.stderr, flush=True)

            def preempt(run: RunDir, attempt: int) -> None:
                blocker = ["sbatch", "-p", "high", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "true"]
                cluster.command(*blocker)

            seconds["lost_by_preemption"] = lost_by(login, "preempted", repeats, preempt)
            if not options.quick:
                seconds["lost_by_rank_death"] = lost_by(login, "killed", repeats, to_process(signal.SIGKILL, 1))
                seconds["lost_by_death_of_rank_0"] = lost_by(login, "killed-0", repeats, to_process(signal.SIGKILL, 0))
            seconds["lost_by_hang"] = lost_by(login, "stopped", repeats, to_process(signal.SIGSTOP, 1))
        if not options.quick and networks_allowed():
            # A node that was not lost before is there for each loss; or every lost one is needed again.
            for name, nodes in (("lost_by_node_loss", 2 + repeats), ("lost_by_node_loss_no_spare", 3)):
                seconds[name] = _lost_by_node_loss(Path(folder), name, repeats, nodes)
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in seconds.items()}))


if __name__ == "__main__":
    main()
