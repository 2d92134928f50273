import importlib.util
import os
import subprocess
import sys

import pytest

from jasmine.errors import ClusterError, UserError
from jasmine.training import distributed
from jasmine.training.distributed import find_rendezvous
from tests.jobs import REPO


def test_alone_without_variables():
    assert find_rendezvous({}) is None
    assert find_rendezvous({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert find_rendezvous({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


def test_a_coordinator_whose_name_nobody_knows_is_named_within_a_minute(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(distributed.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("JASMINE_ATTEMPT", "1")
    found = distributed.Rendezvous("Slurm step", "node-7.invalid:1234", 2, 1)
    with pytest.raises(ClusterError, match=r"cannot resolve the name node-7\.invalid of the node of process 0"):
        distributed._wait_for_coordinator(found, timeout=1800)
    assert next(clock) < 120


def test_explicit_coordinator():
    env = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    found = find_rendezvous(env)
    assert (found.coordinator, found.num_processes, found.process_id) == ("10.0.0.1:1234", 4, 2)
    del env["JAX_PROCESS_ID"]
    with pytest.raises(UserError, match="JAX_PROCESS_ID not set although JAX_COORDINATOR_ADDRESS is"):
        find_rendezvous(env)


def test_torchrun_variables():
    env = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
    env |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    found = find_rendezvous(env)
    assert (found.coordinator, found.num_processes, found.process_id) == ("host-0:29500", 8, 5)
    assert found.local_device_ids == (1,)
    del env["MASTER_PORT"]
    with pytest.raises(UserError, match="MASTER_ADDR or MASTER_PORT"):
        find_rendezvous(env)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NODEID": "0",
}


def test_slurm_step_is_left_to_jax_but_not_the_batch_script_around_it():
    found = find_rendezvous(SLURM)
    assert found.source == "Slurm step"
    assert found.coordinator is None
    assert find_rendezvous({name: value for name, value in SLURM.items() if "STEP" not in name}) is None


@pytest.mark.parametrize(
    ("extra", "devices"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_STEP_TASKS_PER_NODE": "1(x6)"}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_LOCALID": "3"}, (3,)),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"},
            (2, 3),
        ),
        ({"CUDA_VISIBLE_DEVICES": "5", "SLURM_STEP_TASKS_PER_NODE": "3(x2)", "SLURM_LOCALID": "2"}, (0,)),
        ({"SLURM_GPUS_ON_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_a_slurm_task_takes_all_gpus_that_are_its_own(extra, devices):
    assert find_rendezvous(SLURM | extra).local_device_ids == devices


def test_gke_pod_is_found(monkeypatch):
    from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

    monkeypatch.setattr(GkeTpuCluster, "is_env_present", classmethod(lambda _: True))
    monkeypatch.setattr(GkeTpuCluster, "get_process_count", classmethod(lambda _: 4))
    assert find_rendezvous({}).source == "GKE TPU"
    monkeypatch.setattr(GkeTpuCluster, "get_process_count", classmethod(lambda _: 1))
    assert find_rendezvous({}) is None


def test_numbers_that_are_none_are_named():
    with pytest.raises(UserError, match="WORLD_SIZE='two'"):
        find_rendezvous({"RANK": "0", "WORLD_SIZE": "two"})


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="jax looks for GPUs here")
def test_the_tpu_compiler_is_no_tpu():
    program = (
        "import jax; from jasmine.training import distributed as d; d.initialize(); print(jax.devices()[0].platform)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )
    assert importlib.util.find_spec("libtpu") is not None
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
