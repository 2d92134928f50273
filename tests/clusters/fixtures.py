"""The fixtures of the testbeds: Slurm, a fake Cloud TPU and a fake Cloud Storage.

A laptop without Slurm skips its tests; CI must have it, and fails without.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.cloud_tpu import CloudTpu, running_cloud_tpu
from tests.clusters.gcs import Gcs, running_gcs
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
    """Two nodes and slurmdbd, with an account `lab` and a qos `hurry`; the controller forgets a job two seconds after its
    end."""
    if missing := missing_programs(ACCOUNT_PROGRAMS):
        reason = f"no accounts of Slurm here: {', '.join(missing)} missing (apt-get install {ACCOUNT_PACKAGES})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_cluster(nodes=2, accounts=True) as cluster:
        yield cluster


@pytest.fixture
def slurm_with_cables(needs_slurm: None) -> Iterator[SlurmCluster]:
    """Four nodes, each with a network of its own, and a controller that soon gives up a silent node."""
    if not networks_allowed():
        pytest.skip("network namespaces cannot be made here (they need root)")
    with running_cluster(nodes=4, slurmd_timeout=10, message_timeout=4, own_networks=True) as cluster:
        yield cluster


@pytest.fixture
def cloud_tpu(tmp_path: Path) -> Iterator[CloudTpu]:
    """A Cloud TPU of the test's own, without any resources."""
    with running_cloud_tpu(tmp_path / "cloud") as cloud:
        yield cloud


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcs]:
    """A Cloud Storage of the test's own with an empty bucket; this process and its children find it."""
    with running_gcs(tmp_path / "gcs") as storage:
        for name, value in storage.env.items():
            monkeypatch.setenv(name, value)
        yield storage
