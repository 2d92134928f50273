"""The one seam: `launch` never imports jax or jasmine, `jasmine` never imports launch."""

import ast
import subprocess
import sys

import pytest

from tests.jobs import REPO

FORBIDDEN = {"launch": {"jax", "jasmine", "flax", "orbax", "grain", "numpy"}, "jasmine": {"launch"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_do_not_import_each_other(package):
    found = []
    for path in (REPO / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found += [(path.name, name) for name in names if name.split(".")[0] in FORBIDDEN[package]]
    assert not found


HEAVY = ("jax", "numpy", "submitit", "xmanager", "google.cloud.tpu_v2", "google.cloud.storage")


def test_submitting_loads_no_heavy_module():
    """XManager and Google's clients are for runs on Cloud TPU, and not before one of them is asked for."""
    code = (
        "import sys, launch.submit, launch.jobs, launch.backends.local, launch.backends.slurm, launch.backends.cloud_tpu; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
