"""A run on Cloud TPU without a launcher around it: its plan is on record, and a test rents, watches and cancels in its own
process."""

import sys
from pathlib import Path

from launch.backends.cloud_tpu import Rented, first_resource, pack_code, read_resource, rent
from launch.config import CloudTpuCluster
from launch.plan import Plan
from launch.request import Request, requests_for
from launch.run_dir import RunDir
from launch.submission import recorded

CLUSTER = f"""\
backend: cloud_tpu
accelerator_type: v5litepod-16
zone: us-west4-a
project: lab
storage: runs
vm_dir: ~/jasmine
python: {sys.executable}
grace_seconds: 20
boot_timeout: 60
silent_timeout: 8
"""


def requested(folder: Path, *overrides: str, name: str = "r") -> Request:
    """Return the request for a run in `folder/runs`; its VMs sleep until they are switched off, and have no agents."""
    (folder / "tpu.yaml").write_text(f"{CLUSTER}setup: [sleep 600]\n")
    (folder / "job.py").write_text("")
    (request,) = requests_for(
        [str(folder / "job.py")], cluster=str(folder / "tpu.yaml"), overrides=overrides, name=name, sweep=(), after=(),
        cwd=folder, reserved=(),
    )  # fmt: skip
    return request


def planned(folder: Path, *overrides: str, name: str = "r") -> Plan:
    """Return the plan of such a run, recorded and packed as by a submission that then goes on with renting."""
    with recorded([requested(folder, *overrides, name=name)]) as ((plan,), _):
        pack_code(plan)
    return plan


def rent_first(plan: Plan) -> Rented:
    """Rent the first TPU of a run, and return what is written down of it."""
    run, settings = RunDir.at(plan.run_dir), CloudTpuCluster.model_validate(plan.settings)
    rent(plan, settings, first_resource(run, settings, read_resource(run)))
    rented = read_resource(run)
    assert rented is not None
    return rented
