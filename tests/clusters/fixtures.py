"""The fixtures of the Slurm testbed. A laptop without Slurm skips; CI must have it, and fails without."""

import os
from collections.abc import Iterator

import pytest

from tests.clusters.slurm import PACKAGES, SlurmCluster, missing_programs, running_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Four nodes with eight GPUs each, shared by all tests of a session."""
    if missing := missing_programs():
        reason = f"no Slurm here: {', '.join(missing)} missing (apt-get install {PACKAGES})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
