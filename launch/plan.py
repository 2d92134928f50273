"""The plan: exactly what will run, decided before anything is created.

`--dry-run` prints a plan, a backend consumes the same object, and `run.json` keeps it; so what a dry run shows is what
runs. What exists only once an attempt starts stands in the plan as what it will be: the attempt's number (counting up
from `first_attempt`), the node that the coordinator runs on (`FIRST_NODE`) and its port (`FREE_PORT`).
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import AnyCluster, CloudTpuCluster, LocalCluster, SlurmCluster
from launch.errors import UserError
from launch.objects import place
from launch.paths import expand_path
from launch.snapshot import SCRIPT_DIR, Code
from launch.text import unfit
from launch.values import SECRET_NAME

FREE_PORT = "<free port>"
FIRST_NODE = "<first node>"
MASK = "<masked>"

# Of one argument or variable, and of all together: Linux takes 128 KiB and 2 MiB, the submitting shell's own among them.
MOST_BYTES, MOST_BYTES_IN_ALL = 100 << 10, 1 << 20

# Variables that would tell a job that it is a process of whatever cluster the submitting shell belongs to. How to reach
# Slurm is no identity.
_FOREIGN_IDENTITY = re.compile(
    r"(SLURM|SLURMD|SBATCH|PMI|PMIX|OMPI|TORCHELASTIC|JOBSET)_(?!CONF$|JWT$).*|JOB_COMPLETION_INDEX"
    r"|JAX_(COORDINATOR_.*|NUM_PROCESSES|PROCESS_ID|LOCAL_DEVICE_IDS)|JASMINE_(RUN_DIR|ATTEMPT)"
    r"|(TPU|MEGASCALE)_(WORKER_ID|WORKER_HOSTNAMES|PROCESS_ADDRESSES|NUM_SLICES|SLICE_ID|COORDINATOR_ADDRESS)|JASMINE_HOST"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
)


@dataclass(frozen=True)
class Host:
    """One process of the job, and the variables that only it gets."""

    index: int
    env: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What will run, where, and with which code.

    Attributes:
        run: the run's name; `run_dir` its directory, absolute.
        job: a baseline's name or a script's path.
        argv: the command of every process; `argv[1]` is a script inside the code snapshot.
        cwd: where the job runs: the directory of submission, so that relative paths mean what they meant there.
        cluster: the cluster's name; `settings` all of its keys after overrides.
        code: the snapshot in `run_dir/code/`.
        first_attempt: the number of the first attempt, from 1.
        env: the variables every process gets on top of the submitting shell's.
        hosts: the processes.
        sweep: the name of the sweep that the run is an element of.
        after: names of runs that must have finished before this one starts.
    """

    run: str
    run_dir: str
    job: str
    argv: tuple[str, ...]
    cwd: str
    cluster: str
    settings: dict[str, Any]
    code: Code
    first_attempt: int
    env: dict[str, str]
    hosts: tuple[Host, ...]
    sweep: str | None = None
    after: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The job's own arguments."""
        return self.argv[2:]

    @property
    def code_dir(self) -> Path:
        """The root of the code that runs, in the run directory."""
        return place(self.run_dir) / "code" / self.code.hash

    def with_code_in(self, here: Path) -> "Plan":
        """Return the plan for a machine on which the code lies in `here` (see `launch.snapshot.fetch_code`)."""
        there = str(self.code_dir)
        python, script, *arguments = self.argv
        argv = (python, script.replace(there, str(here)), *arguments)
        env = {name: value.replace(there, str(here)) for name, value in self.env.items()}
        return dataclasses.replace(self, argv=argv, env=env)


def make_plan(
    *,
    run_dir: Path,
    job: str,
    script: Path,
    script_in_code: str,
    arguments: tuple[str, ...],
    cwd: Path,
    cluster: str,
    settings: AnyCluster,
    code: Code,
    first_attempt: int,
    sweep: str | None = None,
    after: tuple[str, ...] = (),
) -> Plan:
    """Decide what runs.

    Args:
        script: where the script was found; `script_in_code` is its path inside the snapshot.
        settings: of the cluster, after overrides.

    Raises:
        UserError: a path in the settings names a variable that is not set, `python` is no executable file, or a text could
            not be handed to a process as it is.
    """
    code_dir = run_dir / "code" / code.hash
    # A script from elsewhere may import its neighbours, as it would without the launcher; only it itself is snapshot.
    neighbours = [str(script.parent)] if script_in_code.startswith(f"{SCRIPT_DIR}/") else []
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    cache = os.environ.get("JASMINE_COMPILATION_CACHE_DIR") or settings.compilation_cache
    env = {
        "JASMINE_RUN_DIR": str(run_dir),
        "JASMINE_STORAGE": str(run_dir.parent),
        "JASMINE_COMPILATION_CACHE_DIR": str(expand_path(cache, "compilation_cache", cwd)),
        "PYTHONPATH": os.pathsep.join([str(code_dir), *neighbours, *inherited]),
        "PYTHONUNBUFFERED": "1",
    }
    env |= settings.env
    if isinstance(settings, LocalCluster):
        if settings.devices_per_process != "auto":
            cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(settings.devices_per_process)}
            env = {**env, **cpu, **settings.env}
        hosts = _hosts(settings.processes, "127.0.0.1")
    elif isinstance(settings, CloudTpuCluster):
        # What belongs to this machine alone stays here; jax itself finds its peers on a pod.
        env["PYTHONPATH"] = str(code_dir)
        env["JASMINE_COMPILATION_CACHE_DIR"] = settings.compilation_cache
        env |= {**_timeouts(settings), "JASMINE_LOCAL_DEVICES": str(settings.tpu.chips_per_host), **settings.env}
        hosts = tuple(Host(index, {}) for index in range(settings.slices * settings.tpu.hosts))
    else:
        env |= _timeouts(settings)
        if settings.gpus_per_node:
            env["JASMINE_LOCAL_DEVICES"] = str(settings.gpus_per_node // settings.processes_on_a_node)
        env |= settings.env
        on_a_node = settings.processes_on_a_node
        hosts = _hosts(settings.nodes * on_a_node, FIRST_NODE, settings.gpus_per_node // on_a_node, on_a_node)
    if isinstance(settings, CloudTpuCluster):
        python, elsewhere = settings.python or "python", True  # that of the VM's agent
    else:
        python = str(expand_path(settings.python, "python", cwd)) if settings.python else sys.executable
        elsewhere = isinstance(settings, SlurmCluster) and bool(settings.container and settings.python)
    if not elsewhere and (not os.access(python, os.X_OK) or os.path.isdir(python)):
        raise UserError(f"python: {python} is not an executable file; give the full path of an interpreter")
    argv = (python, str(code_dir / script_in_code), *arguments)
    _check_passable(argv, run_dir, cwd, env)
    return Plan(
        run=run_dir.name,
        run_dir=str(run_dir),
        job=job,
        argv=argv,
        cwd=str(cwd),
        cluster=cluster,
        settings=settings.model_dump(),
        code=code,
        first_attempt=first_attempt,
        env=env,
        hosts=hosts,
        sweep=sweep,
        after=after,
    )


def _check_passable(argv: tuple[str, ...], run_dir: Path, cwd: Path, env: Mapping[str, str]) -> None:
    """Refuse what could not be written down and handed to a process exactly as it is."""
    named = [("storage", str(run_dir)), ("the working directory", str(cwd)), ("python", argv[0])]
    named += [("the arguments of the job", word) for word in argv[1:]]
    named += [(f"env.{name}", value) for name, value in env.items()]
    for name, text in named:
        if len(text.encode(errors="replace")) > MOST_BYTES:
            raise UserError(f"{name}: a text of over {MOST_BYTES >> 10} KiB; put it into a file")
        if problem := unfit(text, lines=True):
            raise UserError(f"{name}: {'it has control characters in it' if SECRET_NAME.search(name) else problem}")
    if sum(len(text.encode()) for _, text in named) > MOST_BYTES_IN_ALL:
        raise UserError(f"the arguments of the job and env: over {MOST_BYTES_IN_ALL >> 10} KiB together; use files")


def _timeouts(settings: SlurmCluster | CloudTpuCluster) -> dict[str, str]:
    return {
        "JASMINE_INIT_TIMEOUT": str(settings.init_timeout),
        "JASMINE_HEARTBEAT_TIMEOUT": str(settings.heartbeat_timeout),
        "JASMINE_PREFLIGHT": str(settings.preflight_seconds),
    }


def _hosts(processes: int, address: str, gpus: int = 0, on_a_node: int = 1) -> tuple[Host, ...]:
    """Return the job's processes, `on_a_node` of them on each node with a share of `gpus` of its GPUs."""
    hosts = []
    for index in range(processes):
        env = {}
        if processes > 1:
            env = {
                "JAX_COORDINATOR_ADDRESS": f"{address}:{FREE_PORT}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        if gpus:  # left to itself, jax would take the one GPU that has the number of the task on its node
            first = index % on_a_node * gpus
            env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(first, first + gpus)))
        hosts.append(Host(index, env))
    return tuple(hosts)


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables that name a process of another cluster or run."""
    return {name: value for name, value in environment.items() if not _FOREIGN_IDENTITY.fullmatch(name)}


def identity(host: Host, port: int, first_node: str = "127.0.0.1") -> dict[str, str]:
    """Return the variables that only this process gets, now that the coordinator's place is known."""
    return {
        name: value.replace(FREE_PORT, str(port)).replace(FIRST_NODE, first_node) for name, value in host.env.items()
    }


def host_environment(plan: Plan, host: Host, attempt: int, port: int) -> dict[str, str]:
    """Return the variables that the plan gives to one process of one attempt, complete."""
    return {**plan.env, **identity(host, port), "JASMINE_ATTEMPT": str(attempt)}


def masked(plan: Plan) -> Plan:
    """Return the plan with the values of secret-looking variables replaced, fit to be shown and stored."""

    def mask(env: Mapping[str, str]) -> dict[str, str]:
        return {name: MASK if SECRET_NAME.search(name) else value for name, value in env.items()}

    settings = {**plan.settings, "env": mask(plan.settings["env"])}
    return dataclasses.replace(plan, settings=settings, env=mask(plan.env))


def show(plan: Plan) -> str:
    """Return the plan as YAML, secrets masked: the text that `--dry-run` prints."""
    import yaml

    values = dataclasses.asdict(masked(plan))
    values["argv"] = list(values["argv"])
    values["hosts"] = list(values["hosts"])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6)
