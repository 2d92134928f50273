"""The fixtures of the Slurm testbed. A laptop without Slurm skips; CI must have it, and fails without."""

import os
from collections.abc import Iterator

import pytest

from tests.clusters.slurm import (
    ACCOUNT_PACKAGES,
    ACCOUNT_PROGRAMS,
    PACKAGES,
    SlurmCluster,
    missing_programs,
    networks_allowed,
    running_cluster,
)


@pytest.fixture(scope="session")
def needs_slurm() -> None:
    """Skips a test on a laptop without Slurm; fails it in CI."""
    if missing := missing_programs():
        reason = f"no Slurm here: {', '.join(missing)} missing (apt-get install {PACKAGES})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm(needs_slurm: None) -> Iterator[SlurmCluster]:
    """Four nodes with eight GPUs each, shared by all tests of a session."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def slurm_with_accounts(needs_slurm: None) -> Iterator[SlurmCluster]:
    """Two nodes and slurmdbd; the controller forgets a job two seconds after its end."""
    if missing := missing_programs(ACCOUNT_PROGRAMS):
        reason = f"no accounts of Slurm here: {', '.join(missing)} missing (apt-get install {ACCOUNT_PACKAGES})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_cluster(nodes=2, accounts=True) as cluster:
        yield cluster


@pytest.fixture
def slurm_with_cables(needs_slurm: None) -> Iterator[SlurmCluster]:
    """Three nodes, each with a network of its own, and a controller that gives up a silent node after ten seconds."""
    if not networks_allowed():
        pytest.skip("network namespaces cannot be made here (they need root)")
    with running_cluster(nodes=3, slurmd_timeout=10, own_networks=True) as cluster:
        yield cluster
