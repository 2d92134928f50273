"""A checkout of its own for each test: the real launcher, a stand-in for the baseline, and a git repository."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.plan import scrubbed
from launch.run_dir import RunDir
from tests.clusters.slurm import SlurmCluster
from tests.launch.checkouts import Checkout, wait_until
from tests.launch.slurm_login import end_all_jobs, login

REPOSITORY = Path(__file__).resolve().parents[2]

TRAIN_CONFIG = """
import dataclasses

from jasmine.training.mesh import MeshConfig

VERSION = "one"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int = 10
    max_lr: float = 1e-4
    data_dir: str = ""
    log: bool = False
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
"""

MESH_CONFIG = """
import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1
    fsdp: int = 1
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    root = tmp_path / "it's a checkout"
    for folder in ("launch", "cluster_configs"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("jasmine", "jasmine/baselines", "jasmine/baselines/maskgit", "jasmine/training"):
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    (root / "jasmine/training/config.py").write_text(TRAIN_CONFIG)
    (root / "jasmine/training/mesh.py").write_text(MESH_CONFIG)
    baseline = Path(__file__).with_name("fake_baseline.py")
    shutil.copy(baseline, root / "jasmine/baselines/maskgit/train_tokenizer_vqvae.py")
    shutil.copy(baseline, root / "jasmine/baselines/train_lam.py")
    (root / ".gitignore").write_text("__pycache__/\nignored/\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    home = tmp_path / "where I work"
    home.mkdir()
    env = {name: value for name, value in scrubbed(os.environ).items() if not name.startswith(("JASMINE_", "JAX_"))}
    made = Checkout(root, home, env)
    yield made
    for directory in (home / "runs").glob("*"):  # a failed test must leave nothing running
        run = RunDir(directory)
        run.cancel_request.touch()
        wait_until(lambda run=run: not run.is_live(), 30)  # type: ignore[misc]


@pytest.fixture
def here(checkout: Checkout, slurm: SlurmCluster) -> Iterator[Checkout]:
    """A login node: a checkout in which `slurm.yaml` is the cluster."""
    login(checkout, slurm)
    yield checkout
    end_all_jobs(slurm)
