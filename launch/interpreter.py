"""Finds the project's own Python for somebody who typed `python`. Imports nothing but the standard library."""

import os
import sys
from pathlib import Path
from typing import NoReturn


def continue_with_project_python(missing: ModuleNotFoundError) -> NoReturn:
    """Runs this command again with `.venv/bin/python` of the project, or exits with one line that says what to do."""
    project = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "python"
    if project.exists() and Path(sys.prefix) != project.parents[1]:
        os.execv(project, [str(project), *sys.argv])
    print(
        f"error: {sys.executable} has no module {missing.name!r}: run `make setup` in the project first",
        file=sys.stderr,
    )
    sys.exit(2)
