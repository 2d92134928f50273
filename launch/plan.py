"""The plan: exactly what will run, decided before anything is created.

`--dry-run` prints a plan, a backend consumes the same object, and `run.json` keeps it; so what a dry run shows is what
runs. Two values exist only once an attempt starts and stand in the plan as what they will be: the attempt's number
(counting up from `first_attempt`) and the coordinator's port (`FREE_PORT`).
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import LocalCluster, expand_path
from launch.errors import UserError
from launch.snapshot import SCRIPT_DIR, Code

FREE_PORT = "<free port>"
MASK = "<masked>"

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)

# Variables that would tell a job that it is a process of whatever cluster the submitting shell belongs to.
_FOREIGN_IDENTITY = re.compile(
    r"(SLURM|SLURMD|SBATCH|PMI|PMIX|OMPI|TORCHELASTIC|JOBSET)_.*|JOB_COMPLETION_INDEX"
    r"|JAX_(COORDINATOR_.*|NUM_PROCESSES|PROCESS_ID|LOCAL_DEVICE_IDS)|JASMINE_(RUN_DIR|ATTEMPT)"
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

    @property
    def arguments(self) -> tuple[str, ...]:
        """The job's own arguments."""
        return self.argv[2:]

    @property
    def code_dir(self) -> Path:
        """The root of the code that runs."""
        return Path(self.run_dir) / "code" / self.code.hash


def make_plan(
    *,
    run_dir: Path,
    job: str,
    script: Path,
    script_in_code: str,
    arguments: tuple[str, ...],
    cwd: Path,
    cluster: str,
    settings: LocalCluster,
    code: Code,
    first_attempt: int,
) -> Plan:
    """Decide what runs.

    Args:
        script: where the script was found; `script_in_code` is its path inside the snapshot.
        settings: of the cluster, after overrides.

    Raises:
        UserError: a path in the settings names a variable that is not set, or `python` is no executable file.
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
    if settings.devices_per_process != "auto":
        env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(settings.devices_per_process)}
    env |= settings.env
    hosts = []
    for index in range(settings.processes):
        identity = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{FREE_PORT}",
            "JAX_NUM_PROCESSES": str(settings.processes),
            "JAX_PROCESS_ID": str(index),
        }
        hosts.append(Host(index, identity if settings.processes > 1 else {}))
    python = str(expand_path(settings.python, "python", cwd)) if settings.python else sys.executable
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise UserError(f"python: {python} is not an executable file; give the full path of an interpreter")
    return Plan(
        run=run_dir.name,
        run_dir=str(run_dir),
        job=job,
        argv=(python, str(code_dir / script_in_code), *arguments),
        cwd=str(cwd),
        cluster=cluster,
        settings=settings.model_dump(),
        code=code,
        first_attempt=first_attempt,
        env=env,
        hosts=tuple(hosts),
    )


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables that name a process of another cluster or run."""
    return {name: value for name, value in environment.items() if not _FOREIGN_IDENTITY.fullmatch(name)}


def host_environment(plan: Plan, host: Host, attempt: int, port: int) -> dict[str, str]:
    """Return the variables that the plan gives to one process of one attempt, complete."""
    identity = {name: value.replace(FREE_PORT, str(port)) for name, value in host.env.items()}
    return {**plan.env, **identity, "JASMINE_ATTEMPT": str(attempt)}


def masked(plan: Plan) -> Plan:
    """Return the plan with the values of secret-looking variables replaced, fit to be shown and stored."""

    def mask(env: Mapping[str, str]) -> dict[str, str]:
        return {name: MASK if _SECRET.search(name) else value for name, value in env.items()}

    settings = {**plan.settings, "env": mask(plan.settings["env"])}
    return dataclasses.replace(plan, settings=settings, env=mask(plan.env))


def show(plan: Plan) -> str:
    """Return the plan as YAML, secrets masked: the text that `--dry-run` prints."""
    import yaml

    values = dataclasses.asdict(masked(plan))
    values["argv"] = list(values["argv"])
    values["hosts"] = list(values["hosts"])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6)
