"""Every benchmark runs, and its last line is its figures as JSON. The figures themselves are not tested: machines differ."""

import json
import subprocess
import sys

import pytest

from tests.jobs import REPO

BENCHMARKS = {
    "checkpoint": "small",
    "cloud_tpu": "lost_by_preemption",
    "data_layout": "layouts",
    "dataloader": "ratio_raw",
    "gcs_data": "warm",
    "sampling": "maskgit_dim128_batch1",
    "scaling": "chips",
    "slurm": "lost_by_hang",
    "startup": "1x1_warm",
    "train_step": "baselines",
}


def test_every_benchmark_is_listed_here():
    scripts = {path.stem for path in (REPO / "benchmarks").glob("*.py") if "argparse" in path.read_text()}
    assert scripts == set(BENCHMARKS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_prints_its_figures(name, request):
    if name == "slurm":
        request.getfixturevalue("needs_slurm")
    command = [sys.executable, str(REPO / "benchmarks" / f"{name}.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert BENCHMARKS[name] in json.loads(done.stdout.splitlines()[-1])
