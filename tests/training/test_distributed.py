import pytest

from jasmine.errors import UserError
from jasmine.training.distributed import find_rendezvous


def test_alone_without_variables():
    assert find_rendezvous({}) is None
    assert find_rendezvous({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert find_rendezvous({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


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


def test_slurm_step_is_left_to_jax():
    found = find_rendezvous({"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"})
    assert found.source == "Slurm step"
    assert found.coordinator is None
