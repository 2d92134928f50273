"""A short campaign on each backend, so that every kind of fault strikes once; `make chaos` is the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.jobs import REPO

# Backend, its options, and what strikes there. A run that stays where it is has to be the same bit for bit.
CAMPAIGNS = {
    "local": (
        ["--stay", "-1"],
        ["kill_rank", "pause_rank", "tear_events", "disk_full", "damage_checkpoint", "skew_clock", "term_all_ranks"],
    ),
    "local --bucket": (
        ["--stay", "5"],
        [
            *("storage_503", "storage_silent", "storage_breaks_off", "storage_dies", "storage_stays_dead"),
            *("kill_worker", "term_supervisor"),
        ],
    ),
    "slurm": (
        ["--stay", "6"],
        ["preempt_slurm", "requeue", "scancel", "restart_controller", "kill_slurmd", "stop_rank", "kill_supervisor"],
    ),
    "cloud_tpu --bucket": (
        ["--stay", "5"],
        ["preempt_tpu", "preempt_tpu_at_once", "reboot_vm", "kill_vm", "kill_agent", "tpu_api_503", "kill_watcher"],
    ),
    "local on other shapes": (
        ["--stay", "0"],
        ["kill_all_ranks", "kill_everything", "kill_launcher", "term_rank", "cancel"],
    ),
}


def test_every_kind_of_fault_strikes_somewhere() -> None:
    assert sorted(FAULTS) == sorted(name for _, names in CAMPAIGNS.values() for name in names)


@pytest.mark.slow
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_a_disturbed_run_is_the_undisturbed_one(campaign: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if campaign == "slurm":
        request.getfixturevalue("needs_slurm")
    backend, *bucket = campaign.partition(" on ")[0].split()
    options, names = CAMPAIGNS[campaign]
    command = [sys.executable, "-m", "tests.chaos", "--backend", backend, *bucket, *options, "--seed", "4"]
    command += ["--faults", str(len(names)), "--only", ",".join(names), "--step_seconds", "0.1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "campaign")],
        cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
