"""Starts real training jobs of one or more processes, as a cluster would, and reads what they left behind."""

import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
TOKENIZER = REPO / "jasmine" / "baselines" / "maskgit" / "train_tokenizer_vqvae.py"
FAULTY = REPO / "tests" / "training" / "faulty_job.py"

# Small enough that a step takes milliseconds; float32, since curves are compared.
TINY = shlex.split(
    "--seq_len 4 --batch_size 8 --model_dim 16 --ffn_dim 32 --num_blocks 1 --num_heads 2 --patch_size 8 --num_latents 16 "
    "--latent_dim 8 --dtype float32 --log_interval 1 --num_steps 40 --log_checkpoint_interval 10 --log_batch_checksum"
)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclasses.dataclass
class Job:
    """Processes of one job. `finish` waits for all and returns their exit codes."""

    processes: list[subprocess.Popen]
    outputs: list[list[str]]
    readers: list[threading.Thread]

    def finish(self, timeout: float = 240) -> list[int]:
        deadline = time.monotonic() + timeout
        codes = []
        try:
            for process in self.processes:
                codes.append(process.wait(max(1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.send_signal(signal.SIGABRT)  # prints the stacks of its threads
                process.wait()
            for reader in self.readers:
                reader.join(10)
            logs = "\n---\n".join(self.output(index) for index in range(len(self.processes)))
            raise AssertionError(f"still running after {timeout} s:\n{logs}") from None
        for reader in self.readers:
            reader.join(10)
        return codes

    def output(self, process: int = 0) -> str:
        return "".join(self.outputs[process])


def start(
    args: Sequence[str],
    *,
    processes: int = 1,
    devices: int = 1,
    script: Path = TOKENIZER,
    env: dict[str, str] | None = None,
) -> Job:
    """Starts `processes` processes with `devices` CPU devices each, joined by an explicit coordinator."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_"))}
    base |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JASMINE_HEARTBEAT_TIMEOUT": "20"}
    base |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(REPO)}
    if processes > 1:
        base |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    job = Job([], [], [])
    for index in range(processes):
        process = subprocess.Popen(
            [sys.executable, str(script), *args],
            env=base | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}) | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines: list[str] = []
        reader = threading.Thread(target=lambda p=process, out=lines: out.extend(p.stdout), daemon=True)
        reader.start()
        job.processes.append(process)
        job.outputs.append(lines)
        job.readers.append(reader)
    return job


def run(args: Sequence[str], *, expect: int | None = 0, **options) -> Job:
    """Starts a job and waits; fails with its output unless every process ends with `expect`."""
    job = start(args, **options)
    codes = job.finish()
    if expect is not None:
        assert codes == [expect] * len(codes), f"exit codes {codes}\n" + "\n---\n".join(map("".join, job.outputs))
    return job


def metrics(run_dir: Path, key: str) -> dict[int, float]:
    """A metric by step. Each step must stand once, and in order."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)), f"steps missing order or doubled: {steps}"
    return {record["step"]: record[key] for record in records}


def events(run_dir: Path, name: str) -> list[dict]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == name]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def wait_until(condition: Callable[[], bool], timeout: float = 120, what: str = "condition") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)
