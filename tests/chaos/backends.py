"""The clusters that chaos runs on: this machine, a real Slurm, a fake Cloud TPU; and what a user types on each."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.objects import place
from launch.run_dir import RunDir
from tests.clusters.cloud_tpu import CloudTpu, running_cloud_tpu
from tests.clusters.gcs import Gcs, running_gcs
from tests.clusters.slurm import SlurmCluster, missing_programs, running_cluster
from tests.jobs import QUICK_COMPILE, REPO, TINY

JOB = "tests/chaos/job.py"
SAVE_EVERY = 8
# So long a schedule that no campaign comes to its end; the last attempt is told where to stop.
OPTIONS = [*TINY, "--num_steps", "20000", "--max_lr", "1e-4", "--log_checkpoint_interval", str(SAVE_EVERY)]
DISK_MEGABYTES = 192

# Runs Python with the clock of this host off by as many seconds as its file says.
PYTHON = """\
#!/bin/bash
host="${{GCE_METADATA_IP:-${{SLURM_NODEID:-${{JAX_PROCESS_ID:-}}}}}}"
if [ -r "{root}/chaos/clock-${{host%%:*}}" ]; then
    export CHAOS_CLOCK="$(cat "{root}/chaos/clock-${{host%%:*}}")" PYTHONPATH="{root}/clock:$PYTHONPATH"
fi
exec "{python}" "$@"
"""
# The clock that tells the date, as Python sees it. Clocks that only measure are right on every machine, and stay so.
SITECUSTOMIZE = """\
import os, runpy, sys, time
_seconds, _time, _time_ns = float(os.environ["CHAOS_CLOCK"]), time.time, time.time_ns
time.time = lambda: _time() + _seconds
time.time_ns = lambda: _time_ns() + int(1e9 * _seconds)
_here = os.path.dirname(os.path.abspath(__file__))
_others = [os.path.join(path, "sitecustomize.py") for path in sys.path if os.path.abspath(path) != _here]
_next = next((path for path in _others if os.path.isfile(path)), None)
if _next:
    runpy.run_path(_next)
"""


@dataclass(frozen=True)
class Topology:
    """A shape of the job: what the launcher is told, and how many processes and devices that makes."""

    processes: int
    devices: int
    settings: tuple[str, ...]
    mesh: tuple[str, ...] = ("-1", "1", "1")

    @property
    def name(self) -> str:
        """For people, as in `2×1 fsdp 2`."""
        axes = " ".join(
            f"{axis} {size}" for axis, size in zip(("fsdp", "tensor"), self.mesh[1:], strict=True) if size != "1"
        )
        return f"{self.processes}×{self.devices} {axes}".strip()

    @property
    def options(self) -> list[str]:
        """The job's options."""
        pairs = zip(("data", "fsdp", "tensor"), self.mesh, strict=True)
        return [word for axis, size in pairs for word in (f"--mesh.{axis}", size)]


@dataclass
class Backend:
    """A cluster that is up, and a shell from which runs go to it.

    Attributes:
        root: the campaign's folder; `chaos` in it is where jobs are held, `disk` a small file system where there is one.
        topologies: the first is that of runs that never move.
        bucket: the Cloud Storage in which the run is, None where it is on a disk.
        own_disk: whether `disk` is a file system of its own, which can be filled.
    """

    name: str
    root: Path
    run_name: str
    env: dict[str, str]
    topologies: Sequence[Topology]
    bucket: Gcs | None = None
    slurm: SlurmCluster | None = None
    tpu: CloudTpu | None = None
    own_disk: bool = False
    clock_hosts: Sequence[str] = field(default_factory=list)

    @property
    def run(self) -> RunDir:
        """The run's directory."""
        return RunDir(place(f"{self.env['JASMINE_STORAGE']}/{self.run_name}"))

    @property
    def chaos(self) -> Path:
        """Where jobs are held, and clocks set."""
        return self.root / "chaos"

    @property
    def disk(self) -> Path:
        """Where the runs are, if not in a bucket."""
        return self.root / "disk"

    def argv(self, *words: str) -> list[str]:
        """A command of the launcher: `jobs status …`."""
        return [sys.executable, str(REPO / "launch" / f"{words[0]}.py"), *words[1:]]

    def command(self, *words: str, seconds: float = 900) -> "subprocess.CompletedProcess[str]":
        """Run it, whatever its exit code."""
        return subprocess.run(
            self.argv(*words), cwd=self.root / "home", env=self.env, capture_output=True, text=True, timeout=seconds
        )

    def shape(self, topology: Topology) -> list[str]:
        """The launcher's options for a shape."""
        return [word for setting in topology.settings for word in ("--set", setting)]

    def submission(self, topology: Topology, *job: str) -> list[str]:
        """The words of the first submission."""
        where = ["--cluster", "chaos.yaml", "--name", self.run_name, *self.shape(topology)]
        return [
            "submit",
            *where,
            str(REPO / JOB),
            *OPTIONS,
            "--data_dir",
            str(self.root / "data"),
            *topology.options,
            *job,
        ]

    def resumption(self, topology: Topology, *job: str) -> list[str]:
        """The words that let the run go on in a shape."""
        where = ["--cluster", "chaos.yaml", *self.shape(topology)]
        return ["jobs", "resume", self.run_name, *where, *topology.options, *job]

    def leaks(self, seconds: float) -> list[str]:
        """Return what the cluster still holds for the run, after so long at most."""
        deadline = time.monotonic() + seconds
        while (left := self._held()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left

    def _held(self) -> list[str]:
        if self.slurm is not None:
            return self.slurm.command("squeue", "-h").splitlines()
        return [f"{name}: {state}" for name, state in self.tpu.resources().items()] if self.tpu is not None else []


LOCAL = [
    Topology(2, 1, ("processes=2", "devices_per_process=1")),
    Topology(1, 1, ("processes=1", "devices_per_process=1")),
    Topology(1, 4, ("processes=1", "devices_per_process=4"), ("-1", "4", "1")),
    Topology(2, 2, ("processes=2", "devices_per_process=2"), ("-1", "2", "2")),
    Topology(4, 1, ("processes=4", "devices_per_process=1"), ("-1", "2", "1")),
    Topology(1, 2, ("processes=1", "devices_per_process=2"), ("-1", "1", "2")),
]
SLURM = [
    Topology(2, 1, ("nodes=2", "processes_per_node=1", "env.JAX_NUM_CPU_DEVICES=1")),
    Topology(1, 2, ("nodes=1", "processes_per_node=1", "env.JAX_NUM_CPU_DEVICES=2"), ("-1", "1", "2")),
    Topology(4, 1, ("nodes=2", "processes_per_node=2", "env.JAX_NUM_CPU_DEVICES=1"), ("-1", "2", "1")),
    Topology(2, 2, ("nodes=2", "processes_per_node=1", "env.JAX_NUM_CPU_DEVICES=2"), ("-1", "2", "2")),
    Topology(1, 1, ("nodes=1", "processes_per_node=1", "env.JAX_NUM_CPU_DEVICES=1")),
]
TPU = [
    Topology(2, 4, ("slices=2", "accelerator_type=v5litepod-4")),
    Topology(1, 4, ("slices=1", "accelerator_type=v5litepod-4"), ("-1", "4", "1")),
    Topology(1, 8, ("slices=1", "accelerator_type=v5litepod-8"), ("-1", "4", "2")),
    Topology(2, 4, ("slices=2", "accelerator_type=v5litepod-4"), ("-1", "2", "2")),
]

_COMMON = """\
python: {python}
max_failures: 100000
max_preemptions: 100000
compilation_cache: {cache}
"""
_CLUSTERS = {
    "local": """\
backend: local
grace_seconds: 15
hang_timeout: 8
env: {env}
""",
    "slurm": """\
backend: slurm
cpus_per_node: 4
time_limit: 120
grace_seconds: 15
heartbeat_timeout: 20
hang_timeout: 8
preflight_seconds: 60
exclude_hours: 0 # its nodes have done nothing wrong
env: {env}
""",
    "cloud_tpu": """\
backend: cloud_tpu
accelerator_type: v5litepod-4
zone: us-west4-a
project: lab
vm_dir: ~/jasmine
grace_seconds: 15
heartbeat_timeout: 20
hang_timeout: 8
preflight_seconds: 60
silent_timeout: 15
boot_timeout: 60
env: {env}
""",
}


@contextlib.contextmanager
def running_backend(name: str, root: Path, *, bucket: bool, step_seconds: float, cache: Path) -> Iterator[Backend]:
    """A cluster inside the `with` block, with an empty storage in a bucket or on a small disk; nothing of it runs after it.

    Args:
        name: local, slurm or cloud_tpu.
        root: an empty folder.
        step_seconds: how long a step takes at least.
        cache: of compiled programs.
    """
    for folder in ("home", "chaos", "clock", "disk"):
        (root / folder).mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_", "JASMINE_"))}
    env |= {"XDG_CACHE_HOME": str(root / "cache"), "JASMINE_STORAGE": str(root / "disk" / "runs")}
    job_env = {**QUICK_COMPILE, "CHAOS_DIR": str(root / "chaos"), "CHAOS_STEP_SECONDS": str(step_seconds)}
    python = root / "python"
    python.write_text(PYTHON.format(root=root, python=sys.executable))
    (root / "clock" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    python.chmod(0o755)
    backend = Backend(name, root, f"chaos-{name.replace('_', '-')}-{os.getpid()}", env, LOCAL)
    with contextlib.ExitStack() as stack:
        if bucket:
            backend.bucket = stack.enter_context(running_gcs(root / "gcs"))
            env |= {**backend.bucket.env, "JASMINE_STORAGE": f"{backend.bucket.root}/runs"}
        else:
            backend.own_disk = stack.enter_context(_small_disk(root / "disk"))
        if name == "local":
            job_env["JASMINE_HEARTBEAT_TIMEOUT"] = "20"
            backend.clock_hosts = [str(index) for index in range(4)]
        elif name == "slurm":
            if missing := missing_programs():
                raise RuntimeError(f"no Slurm here: {', '.join(missing)} missing")
            job_env["JAX_PLATFORMS"] = "cpu"
            backend.slurm = stack.enter_context(running_cluster(nodes=3, grace=6))
            backend.topologies, backend.clock_hosts = SLURM, ["0", "1"]
            env |= {**backend.slurm.env, "PATH": os.environ["PATH"]}  # with the daemons' folders
        else:
            vms = backend.bucket.env if backend.bucket else {}
            backend.tpu = stack.enter_context(running_cloud_tpu(root / "cloud", vm_env=vms))
            backend.topologies = TPU
            env |= {**backend.tpu.env, "JASMINE_WATCH_SECONDS": "0.5"}
        text = _CLUSTERS[name].format(env="{" + ", ".join(f"{k}: {v!r}" for k, v in job_env.items()) + "}")
        (root / "home" / "chaos.yaml").write_text(text + _COMMON.format(python=python, cache=cache))
        if name == "local":
            env["JAX_PLATFORMS"] = "cpu"
        yield backend


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system on `folder` where that is allowed; whether it was. At the end its contents are in the folder."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        kept = folder.with_name("disk-contents")
        shutil.copytree(folder, kept, symlinks=True, ignore_dangling_symlinks=True)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
        kept.rename(folder)


def environment(variables: Mapping[str, str]) -> None:
    """Let this process find what the shell of a backend finds; `launch.standing` asks clusters from here."""
    for name in [name for name in os.environ if name not in variables]:
        del os.environ[name]
    os.environ.update(variables)
