"""What tests on a real Slurm do over and over: be a login node, submit, and wait."""

import getpass
import json
import os

from tests.clusters.slurm import SlurmCluster
from tests.launch.checkouts import Checkout, wait_until

CLUSTER = """\
backend: slurm
partition: main
nodes: 2
processes_per_node: 2
gpus_per_node: 4
cpus_per_node: 4
time_limit: "10"
grace_seconds: 20
storage: runs
"""


def login(checkout: Checkout, slurm: SlurmCluster) -> None:
    """Make a checkout one of a login node of a cluster."""
    checkout.env |= slurm.env
    checkout.env["PATH"] = os.environ["PATH"]
    (checkout.home / "slurm.yaml").write_text(CLUSTER)
    os.environ |= slurm.env  # `launch.standing` asks Slurm from this process


def end_all_jobs(slurm: SlurmCluster) -> None:
    """Leave nothing in the queue."""
    slurm.command("scancel", "-f", "-u", getpass.getuser(), check=False)
    wait_until(lambda: not slurm.command("squeue", "-h").strip(), 60)


def submit(here: Checkout, *arguments: str, name: str = "r") -> str:
    """Submit to Slurm, and return what the command printed."""
    return here.submit(*arguments, name=name, cluster="slurm.yaml").stdout


def job_id(here: Checkout, name: str = "r") -> str:
    return here.directory(name).slurm_job.read_text().strip()


def events(here: Checkout, name: str = "r") -> list[str]:
    return [event["event"] for event in here.directory(name).events()]


def at_step(here: Checkout, step: int, *, attempt: int = 1, host: int = 0, name: str = "r") -> None:
    log = here.directory(name).log(attempt, host)
    wait_until(lambda: log.exists() and f"step {step}\n" in log.read_text(), 180)


def steps(here: Checkout, name: str = "r") -> list[int]:
    return [json.loads(line)["step"] for line in here.directory(name).metrics.read_text().splitlines()]
