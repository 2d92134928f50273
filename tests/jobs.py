"""Starts real training jobs of one or more processes, as a cluster would, and reads what they left behind."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.backends.local import free_port
from launch.events import problem

REPO = Path(__file__).resolve().parent.parent
TOKENIZER = REPO / "jasmine" / "baselines" / "maskgit" / "train_tokenizer_vqvae.py"
FAULTY = REPO / "tests" / "training" / "faulty_job.py"
BASELINES = {path.stem: path for path in (REPO / "jasmine" / "baselines").rglob("train_*.py")}

# Small enough that a step takes milliseconds; float32, since curves are compared.
TINY = shlex.split(
    "--seq_len 4 --batch_size 8 --model_dim 16 --ffn_dim 32 --num_blocks 1 --num_heads 2 --patch_size 8 --num_latents 16 "
    "--latent_dim 8 --dtype float32 --log_interval 1 --num_steps 40 --log_checkpoint_interval 10 --log_batch_checksum"
)

# With arrays so large that their files have no checksums.
WIDE = ["--model_dim", "64", "--ffn_dim", "256"]

# The same for all baselines, with a learning rate at which a few steps tell two curves apart.
SMALL = shlex.split(
    "--seq_len 4 --batch_size 8 --model_dim 16 --ffn_dim 32 --num_blocks 1 --num_heads 2 --dtype float32 --log_interval 1 "
    "--num_steps 6 --warmup_steps 0 --wsd_decay_steps 0 --max_lr 3e-3 --log_checkpoint_interval 2 --log_batch_checksum"
)
FAMILY = {
    "vqvae": ("train_tokenizer_vqvae", "--patch_size 8 --latent_dim 8 --num_latents 16"),
    "mae": ("train_tokenizer_mae", "--patch_size 8 --latent_dim 8"),
    "lam": (
        "train_lam",
        "--patch_size 8 --latent_dim 8 --num_latents 5 --max_lr 1e-4",
    ),  # above, all is soon one action
    "maskgit": (
        "train_dynamics_maskgit",
        (
            "--tokenizer_checkpoint {vqvae} --num_actions 5 --latent_action_dim 8 --lam_dim 16 --lam_ffn_dim 32 "
            "--lam_num_blocks 1 --lam_num_heads 2 --lam_patch_size 8"
        ),
    ),
    "causal": ("train_dynamics_causal", "--tokenizer_checkpoint {vqvae} --lam_checkpoint {lam}"),
    "diffusion": (
        "train_dynamics_diffusion",
        "--tokenizer_checkpoint {mae} --use_gt_actions --label_fraction 0.5 --diffusion_denoise_steps 8",
    ),
    "dreamer": (
        "train_dynamics_diffusion",
        (
            "--tokenizer_checkpoint {mae} --use_gt_actions --diffusion_denoise_steps 8 --shortcut --norm rms --ffn swiglu "
            "--positions rope --qk_norm --logit_soft_cap 20 --num_heads 4 --num_kv_heads 2 --num_blocks 2 --time_every 2 "
            "--num_registers 2"
        ),
    ),
}
"""Every baseline once, by a short name: its job, and options besides SMALL; `{name}` is another one's run directory."""


# Programs of these sizes take longer to optimise than to run. Who trains for long sets it to nothing.
QUICK_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@dataclasses.dataclass
class Job:
    """Processes of one job. `finish` waits for all and returns their exit codes."""

    processes: list[subprocess.Popen]
    outputs: list[list[str]]
    readers: list[threading.Thread]

    def finish(self, timeout: float = 600) -> list[int]:
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
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    base |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JASMINE_HEARTBEAT_TIMEOUT": "20"}
    base |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(REPO)}
    if processes > 1:
        base |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    job = Job([], [], [])
    keep = [str(REPO / "tests" / "keep_programs.py")] if processes > 1 and script.suffix == ".py" else []
    for index in range(processes):
        process = subprocess.Popen(
            [sys.executable, *keep, str(script), *args],
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


def run(args: Sequence[str], *, expect: int | None = 0, timeout: float = 600, **options) -> Job:
    """Starts a job and waits; fails with its output unless every process ends with `expect`."""
    job = start(args, **options)
    codes = job.finish(timeout)
    if expect is not None:
        assert codes == [expect] * len(codes), f"exit codes {codes}\n" + "\n---\n".join(map("".join, job.outputs))
    return job


class Family:
    """Runs of six steps of every baseline, each trained when it is first asked for: `family["lam"]` is its directory."""

    def __init__(self, data: Path, root: Path):
        self.data, self.root = data, root

    def args(self, name: str, run_dir: Path, *more: str) -> list[str]:
        """The command line of a run like `family[name]`, elsewhere, with more options."""
        options = shlex.split(FAMILY[name][1])
        options = [str(self[option[1:-1]]) if option.startswith("{") else option for option in options]
        return [*SMALL, *options, "--data_dir", str(self.data), "--ckpt_dir", str(run_dir), *more]

    def __getitem__(self, name: str) -> Path:
        run_dir = self.root / name
        if not run_dir.exists():
            run(self.args(name, run_dir), script=BASELINES[FAMILY[name][0]])
        return run_dir


def metrics(run_dir: Path, key: str) -> dict[int, float]:
    """A metric by step. Each step must stand once, and in order."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)), f"steps missing order or doubled: {steps}"
    return {record["step"]: record[key] for record in records}


def events(run_dir: Path, name: str) -> list[dict]:
    """Events of one kind. All that there are must be as the schema says."""
    records = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert not [(found, record) for record in records if (found := problem(record)) is not None]
    return [record for record in records if record["event"] == name]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def flip_a_bit(checkpoint: Path) -> None:
    """Changes one bit of a large array of a checkpoint: small ones lie in the index, which has checksums of its own."""
    largest = max((path for path in checkpoint.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))


def wait_until(condition: Callable[[], bool], timeout: float = 120, what: str = "condition") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)
