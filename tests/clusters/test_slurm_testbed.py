"""The testbed is a Slurm cluster: it runs jobs over several nodes, and allots GPUs."""

import time

from tests.clusters.slurm import SlurmCluster


def test_a_job_over_two_nodes_sees_its_gpus(slurm: SlurmCluster, tmp_path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'echo \"$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES\"'\n")
    output = tmp_path / "out"
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", f"--output={output}", "--parsable"]
    job = slurm.command("sbatch", *options, str(script)).strip()
    deadline = time.monotonic() + 30
    while slurm.job_state(job) != "COMPLETED":
        assert time.monotonic() < deadline, slurm.command("scontrol", "show", "job", job)
        time.sleep(0.1)
    assert sorted(output.read_text().splitlines()) == ["127.0.0.11 0,1", "127.0.0.12 0,1"]
