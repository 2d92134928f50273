"""Runs a script in a process that keeps its compiled programs, whichever one of its job it is.

    python tests/keep_programs.py SCRIPT [ARGUMENT …]

Jax keeps those of process 0, which on CPUs are not those of the others: they would compile at every start.
"""

import contextlib
import os
import runpy
import sys
from typing import Any


def keep_programs() -> None:
    """Has jax write what this process compiles into its cache, too."""
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def write_anyway(*args: Any, **options: Any) -> None:
        mine, state.process_id = state.process_id, 0
        try:
            write(*args, **options)
        finally:
            state.process_id = mine

    compiler._cache_write = write_anyway


if __name__ == "__main__":
    with contextlib.suppress(ImportError, AttributeError):  # it only saves time
        keep_programs()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
