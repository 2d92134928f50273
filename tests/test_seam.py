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


def test_submitting_loads_no_heavy_module():
    code = (
        "import sys, launch.submit, launch.jobs; print([m for m in ('jax', 'numpy', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
