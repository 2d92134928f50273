"""Which processes belong to a run, told from outside: by the run directory on their command line or in their environment."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

# What stands in a command line, and what the process is then.
_ROLES = {
    "launch/worker.py": "worker",
    "backends/local.py": "supervisor",
    "slurm_attempt.py": "supervisor",
    "cloud_tpu_supervisor.py": "supervisor",
    "cloud_tpu_vm.py": "agent",
    "cloud_tpu_watch.py": "watcher",
    "jobs.py watch": "watcher",
}


@dataclass(frozen=True)
class Process:
    """A living process of a run. `role`: rank, worker, supervisor, agent, watcher or other; `host`: of a rank or worker."""

    pid: int
    role: str
    host: int | None
    command: str

    def send(self, signum: signal.Signals) -> None:
        """Send it a signal; it may have ended meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)


def processes_of(run: str) -> list[Process]:
    """Return what lives of the run in the directory `run` (a path or a URL)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            words = folder.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
            variables = folder.joinpath("environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(item.partition("=")[::2] for item in variables)
            if run not in words and environment.get("JASMINE_RUN_DIR") != run:
                continue
            command = " ".join(words)
            role = next((role for text, role in _ROLES.items() if text in command), "other")
            if role == "other" and "tests/chaos/job.py" in command:
                role = "rank"
            names = ("JASMINE_HOST", "JAX_PROCESS_ID", "SLURM_PROCID")
            host = next((int(environment[name]) for name in names if name in environment), None)
            found.append(Process(int(folder.name), role, host if role in ("rank", "worker") else None, command))
    return found


def wait_for_end(run: str, seconds: float) -> list[Process]:
    """Wait until nothing of the run lives; return what lives after so long."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
