"""Finds runs by what people call them: a name, looked up wherever runs may be, or the path of a directory."""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from launch.cluster_files import cluster_names, load_cluster
from launch.errors import UserError, did_you_mean, warn_once
from launch.objects import SCHEME, in_parallel, is_object, unreachable
from launch.paths import expand_path
from launch.run_dir import RunDir
from launch.standing import Standing, read_standing
from launch.text import unfit


def storage_roots(storage: str | None) -> Iterator[Path]:
    """Yield where runs may be, this machine's disks first; buckets that cannot be asked are left out, with a warning.

    Raises:
        UserError: the one place that was given cannot be asked.
    """
    given = storage or os.environ.get("JASMINE_STORAGE")
    if given:
        root = expand_path(given, "storage", Path.cwd())
        if (problem := unreachable(root)) is not None:
            raise UserError(f"storage {root}: {problem}")
        yield root
        return
    roots = []
    for name in cluster_names():
        with contextlib.suppress(
            UserError
        ):  # another cluster's file, of no interest to a command that does not name it
            roots.append(expand_path(load_cluster(name)[1].storage, "storage", Path.cwd()))
    for root in sorted(dict.fromkeys(roots), key=is_object):
        if "$" in str(root):
            continue
        if (problem := unreachable(root)) is None:
            yield root
        else:
            warn_once(f"{root}: {problem}")


def runs_in(root: Path, pattern: str = "*") -> list[RunDir]:
    """Return the runs in a storage root, none where there is no such directory."""
    paths = list(root.glob(pattern)) if root.is_dir() else []
    found = in_parallel(lambda path: (path / "run.json").is_file(), paths, of=root)
    return [RunDir(path) for path, is_run in zip(paths, found, strict=True) if is_run]


def find_run(name: str, storage: str | None) -> tuple[RunDir, Standing]:
    """Return a run by its name or the path of its directory, and how it stands.

    Args:
        storage: the root that it is in; None looks at all that are known.

    Raises:
        UserError: there is none.
    """
    if problem := unfit(name):
        raise UserError(f"RUN: {problem}")
    roots = []
    run = None
    for root in storage_roots(storage):
        roots.append(root)
        if (root / name / "run.json").is_file():
            run = RunDir(root / name)
            break
    if run is None:
        if name.startswith(SCHEME):
            return (run := RunDir(expand_path(name, "RUN", Path.cwd()))), read_standing(run)
        path = Path(os.path.expanduser(name)).absolute()
        if "/" not in name and not (path / "run.json").is_file():
            names = [run.name for root in roots for run in runs_in(root)]
            if elements := _elements(name, names):
                told = ", ".join(elements[:3]) + (", …" if len(elements) > 3 else "")
                raise UserError(f"{name!r} is a sweep: name one of its runs: {told}")
            hint = did_you_mean(name, names)
            raise UserError(f"no run {name!r} in {', '.join(map(str, roots))}{hint} (`jobs.py list` shows them)")
        run = RunDir(Path(os.path.normpath(path)))
    return run, read_standing(run)


def sweep_of(name: str, storage: str | None) -> list[str]:
    """Return the runs of the sweep of that name; none where it is a run's name."""
    if "/" in name:
        return []
    for root in storage_roots(storage):
        if (root / name / "run.json").is_file():
            return []
        if elements := _elements(name, [run.name for run in runs_in(root, f"{glob.escape(name)}.*")]):
            return elements
    return []


def _elements(sweep: str, names: list[str]) -> list[str]:
    """Return the names that the runs of a sweep have, in the order of their numbers."""
    found = [name for name in names if name.startswith(f"{sweep}.") and name[len(sweep) + 1 :].isdecimal()]
    return sorted(found, key=lambda name: int(name.rpartition(".")[2]))
