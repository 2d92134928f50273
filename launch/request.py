"""From what a user typed to what is asked for: runs, sweeps and pipelines as validated requests, and the plan of each.

Nothing here creates anything: all that can be known to be wrong is refused by then.
"""

import itertools
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.backends import Backend, backend_named
from launch.cluster_files import load_cluster
from launch.config import AnyCluster
from launch.errors import UserError, notice_once, warn_once
from launch.objects import is_object, unreachable
from launch.options import (
    DATA_DIR,
    DEFAULT_JOB,
    Job,
    baselines,
    check_batch,
    check_options,
    check_required,
    find_job,
    given,
    missing_options,
    splitting_batch,
)
from launch.paths import REPOSITORY, expand_path
from launch.pipeline import fill_places, read_pipeline
from launch.plan import Plan, make_plan
from launch.record import RunRecord, read_record
from launch.run_dir import RunDir, in_use
from launch.snapshot import Code, Snapshot, take_snapshot
from launch.standing import is_live, read_standing
from launch.text import shown

# In one sweep; what Slurm's arrays hold unless it is configured otherwise.
MOST_RUNS = 1000
# What is meant as a range; a path with `..` in it is none.
_RANGE = re.compile(r"[\w+-][\w.+-]*\.\.[\w.+-]*|\.\.[\w+-][\w.+-]*")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Request:
    """What a submission asks for, validated; all of a plan but what depends on the run's past.

    Attributes:
        script_in_code: path of the script inside the snapshot.
        snapshot: the tree to store; None when `code` is in the run directory already.
        sweep: the name of the sweep that the run is an element of.
        after: names of runs that must have finished before it starts.
    """

    run: RunDir
    job: Job
    arguments: tuple[str, ...]
    cwd: Path
    cluster: str
    settings: AnyCluster
    code: Code
    script_in_code: str
    snapshot: Snapshot | None
    sweep: str | None = None
    after: tuple[str, ...] = ()

    @property
    def backend(self) -> Backend:
        """What submits it."""
        return backend_named(self.settings.backend)

    def plan(self, *, past: bool = True) -> Plan:
        """Return what would run now, on top of what the run directory holds; without its `past` the run is a new one."""
        return make_plan(
            run_dir=self.run.root,
            job=self.job.name,
            script=self.job.script,
            script_in_code=self.script_in_code,
            arguments=self.arguments,
            cwd=self.cwd,
            cluster=self.cluster,
            settings=self.settings,
            code=self.code,
            first_attempt=max(self.run.attempts(), default=0) + 1 if past else 1,
            sweep=self.sweep,
            after=self.after,
        )


def requests_for(
    words: Sequence[str],
    *,
    cluster: str,
    overrides: Sequence[str],
    name: str | None,
    sweep: Sequence[str],
    after: Sequence[str],
    cwd: Path,
    reserved: Sequence[str],
) -> list[Request]:
    """Return what a command line asks for: one run, or the elements of a sweep.

    Args:
        words: JOB and its arguments; without any, the default job's.
        sweep: `OPTION=VALUES` each.
        reserved: the launcher's own options, for the message about one that came too late.

    Raises:
        UserError: the cluster, the job, one of its options, a sweep or a name is wrong.
    """
    cluster_name, settings = load_cluster(cluster, overrides)
    job = find_job(words[0] if words else DEFAULT_JOB, cwd)
    swept = [sweep_values(text) for text in sweep]
    names = [key.replace("-", "_") for key, _ in swept]
    if twice := next((key for key in names if names.count(key) > 1), None):
        raise UserError(f"--sweep {twice}: it is swept twice; give all of its values in one --sweep")
    values = itertools.chain.from_iterable(itertools.chain(*_options(key, found)) for key, found in swept)
    check_options(job, [*words[1:], *values], reserved=reserved)
    storage = expand_path(settings.storage, "storage", cwd)
    run_name = checked_name(name if name is not None else unused_name(storage, job))
    snapshot = take_snapshot(REPOSITORY, job.script)
    waits_for = tuple(runs_to_wait_for(after, storage, settings.backend))
    own = with_data(job, tuple(words[1:]), settings)
    elements = [(RunDir(storage / run), (*own, *more)) for run, more in sweep_elements(run_name, swept)]
    together = [arguments for _, arguments in elements]
    return [
        Request(
            run, job, with_batch(run, job, arguments, settings, together), cwd, cluster_name, settings, snapshot.code,
            snapshot.script, snapshot, sweep=run_name if swept else None, after=waits_for,
        )
        for run, arguments in elements
    ]  # fmt: skip


def with_data(job: Job, arguments: tuple[str, ...], settings: AnyCluster) -> tuple[str, ...]:
    """Return a job's arguments with the data that `JASMINE_DATA_DIR` names, where they name none, and say so."""
    data = settings.env.get(DATA_DIR) or os.environ.get(DATA_DIR)
    if not data or "data_dir" not in missing_options(job, arguments):
        return arguments
    notice_once(f"--data_dir={data} is added: {DATA_DIR} says so")
    return (*arguments, f"--data_dir={data}")


def with_batch(
    run: RunDir, job: Job, arguments: tuple[str, ...], settings: AnyCluster, sweep: Sequence[Sequence[str]] = ()
) -> tuple[str, ...]:
    """Return a job's arguments with a batch size, where they have none and need one, and say so.

    A new run whose job has a default that does not split over the cluster's devices gets the next larger batch that does. A
    run that there is keeps the batch size that it was submitted with, whatever its cluster is now.

    Args:
        sweep: the arguments of all runs of the run's sweep, which get the same batch.
    """
    if job.name not in baselines() or given(arguments, "batch_size") is not None:
        return arguments
    try:
        record = read_record(run) if unreachable(run.root.parent) is None else None
    except UserError:
        return arguments  # `checked_plan` says it
    if record is not None:
        size = given(record.submissions[-1].plan.arguments, "batch_size") if record.submissions else None
        if size is None:
            return arguments
        why = "what the run was submitted with before"
    else:
        devices = settings.devices
        if devices is None or (found := splitting_batch(job, sweep or [arguments], devices)) is None:
            return arguments
        default, size = found[0], str(found[1])
        why = f"the default of {job.name}, {default}, does not split over the {devices} devices of this cluster"
    notice_once(f"--batch_size={size} is added: {why}")
    return (*arguments, f"--batch_size={size}")


def sweep_values(text: str) -> tuple[str, list[str]]:
    """Return the option and the values that `OPTION=A,B,C` or `OPTION=0..3` names.

    Raises:
        UserError: it is neither.
    """
    key, equals, values = text.partition("=")
    key = key.lstrip("-")
    if bounds := re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})", values):
        first, last = int(bounds.group(1)), int(bounds.group(2))
        found = [str(value) for value in range(first, min(last, first + MOST_RUNS) + 1)]
    else:
        found = [value for value in values.split(",") if value]
    if len(values.split(",")) > 1 and any(re.fullmatch(_RANGE, value) for value in found):
        raise UserError(f"--sweep {text}: a range stands alone, as in --sweep seed=0..3; write the values out instead")
    if not key or not equals or not found or re.fullmatch(_RANGE, found[0]):
        raise UserError(f"--sweep {text}: expected OPTION=VALUE,VALUE or OPTION=FIRST..LAST, as in --sweep seed=0..3")
    if repeated := next((value for value in found if found.count(value) > 1), None):
        raise UserError(f"--sweep {text}: {repeated} is given twice, which would be the same run twice; keep one")
    return key, found


def sweep_elements(name: str, swept: list[tuple[str, list[str]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return a run's name and additional arguments for each combination of the swept values; without any, the run itself."""
    if not swept:
        return [(name, ())]
    if (runs := math.prod(len(values) for _, values in swept)) > MOST_RUNS:
        raise UserError(f"--sweep: {runs} runs or more are too many for one sweep; {MOST_RUNS} is the most")
    combinations = itertools.product(*(_options(key, values) for key, values in swept))
    return [
        (checked_name(f"{name}.{index}"), tuple(itertools.chain.from_iterable(combination)))
        for index, combination in enumerate(combinations)
    ]


def _options(key: str, values: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the words that give an option each of its values, which to the job are values even if they look like options."""
    if any(value.startswith("-") for value in values):
        return [(f"--{key}={value}",) for value in values]
    return [(f"--{key}", value) for value in values]


def runs_to_wait_for(names: Sequence[str], storage: Path, backend: str) -> list[str]:
    """Return those runs among `names` that have not finished; all of them where their storage cannot be read.

    Raises:
        UserError: there is no such run, it is not going to finish, or `backend` cannot wait for it.
    """
    if unreachable(storage) is not None:
        return list(names)
    waiting = []
    for name in names:
        run = RunDir(storage / name)
        if read_record(run) is None:
            raise UserError(f"--after {name}: there is no such run in {storage}")
        standing = read_standing(run)
        if standing.record.state == "finished":
            continue
        if not standing.live:
            raise UserError(
                f"--after {name}: it is {standing.record.state} and will not finish by itself; resume it first"
            )
        if backend == "slurm" and standing.backend != "slurm":
            raise UserError(f"--after {name}: it does not run on Slurm, so Slurm cannot wait for it")
        waiting.append(name)
    return waiting


def pipeline_requests(path: Path, cluster: str, overrides: Sequence[str], cwd: Path) -> list[Request]:
    """Read a pipeline file, and return its stages in order.

    Raises:
        UserError: the file, a stage's job or one of its options is wrong; nothing was created.
    """
    pipeline = read_pipeline(path)
    requests: list[Request] = []
    for stage in pipeline.stages:
        name, settings = load_cluster(cluster, overrides) if not stage.set else ("", None)
        try:
            job = find_job(stage.job, cwd)
            check_options(job, stage.arguments)
            if settings is None:
                name, settings = load_cluster(cluster, [*overrides, *stage.set])
        except UserError as error:
            raise UserError(f"--pipeline {path}: stage {shown(stage.name)}: {error}") from error
        storage = expand_path(settings.storage, "storage", cwd)
        run_names = {other: checked_name(f"{pipeline.name}-{other}") for other in [*stage.after, stage.name]}
        places = {other: str(storage / run) for other, run in run_names.items()}
        snapshot = take_snapshot(REPOSITORY, job.script)
        run = RunDir(storage / run_names[stage.name])
        filled = tuple(fill_places(argument, places) for argument in stage.arguments)
        arguments = with_batch(run, job, with_data(job, filled, settings), settings)
        done = {request.run.name for request in requests if has_finished(request.run)}
        after = tuple(run_names[other] for other in stage.after if run_names[other] not in done)
        requests.append(
            Request(run, job, arguments, cwd, name, settings, snapshot.code, snapshot.script, snapshot, after=after)
        )
    return requests


def has_finished(run: RunDir) -> bool:
    """Return whether a run has finished; a run that does not exist, or cannot be read here, has not."""
    record = read_record(run) if unreachable(run.root.parent) is None else None
    return record is not None and record.state == "finished"


def checked_name(name: str) -> str:
    """Return `name`, a run's name.

    Raises:
        UserError: it would not do as the name of a directory everywhere.
    """
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"--name {shown(name)}: a run's name is 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return name


def unused_name(storage: Path, job: Job) -> str:
    """Return `<job>-<date>-<time>`, with a number where that is taken."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", job.script.stem).lstrip("._-")[:40] or "job"
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, count = base, 1
    while _is_taken(storage / name):
        count += 1
        name = f"{base}-{count}"
    return name


def _is_taken(path: Path) -> bool:
    """Return whether there is anything at a path; what is wrong with storage that does not tell, `checked_plan` says."""
    try:
        return unreachable(path.parent) is None and (path.exists() or path.is_dir())
    except OSError:
        return False


def checked_plan(request: Request, *, only_shown: bool = False) -> Plan:
    """Return what `request` would run now, if it may.

    Args:
        only_shown: it is not going to be submitted: storage that cannot be read is warned of, and the run is taken for new.

    Raises:
        UserError: the run is live, was made with another job, or cannot be where it should.
    """
    run = request.run
    if is_object(run.root) and request.settings.backend == "slurm":
        raise UserError(
            f"storage {run.root.parent}: on Slurm runs are in a directory that all nodes see, not in a bucket"
        )
    if unset_variable(run) is not None:
        return request.plan(past=False)
    if (problem := unreachable(run.root.parent)) is not None:
        unread = f"storage {run.root.parent}: cannot be read: {problem}"
        if not only_shown:
            raise UserError(unread)
        warn_once(f"{unread}; taken for one without runs")
        return request.plan(past=False)
    record = read_record(run)
    if record is not None and record.job != request.job.name:
        raise UserError(
            f"run {run.name!r} was made with the job {record.job}, not {request.job.name}: choose another --name"
        )
    try:
        if is_live(run):
            raise in_use(run)
        _check_place(run, record)
        return request.plan()
    except OSError as error:
        raise UserError(f"storage {run.root.parent}: cannot be read: {error.strerror}") from error


def check_devices(request: Request) -> None:
    """Refuse a job without an option that it needs, or with a mesh or batch that does not fit the devices which the cluster
    will have, where that is known.

    Raises:
        UserError: see `launch.options.check_required` and `launch.options.check_batch`.
    """
    check_required(request.job, request.arguments)
    if (devices := request.settings.devices) is not None:
        check_batch(request.job, request.arguments, devices)


def unset_variable(run: RunDir) -> str | None:
    """Return the variable in the URL of a run's directory that is not set here, None where there is none."""
    found = re.search(r"\$\{?\w+\}?", str(run.root)) if is_object(run.root) else None
    return found.group() if found else None


def _check_place(run: RunDir, record: RunRecord | None) -> None:
    """Refuse a place that cannot be written, or a directory that is not a run's."""
    if is_object(run.root):  # whether it can be written shows when the run is taken
        if record is None and {path.name for path in run.root.iterdir()} - {".lease"}:
            raise UserError(f"{run.root} exists and is not a run directory: choose another --name or storage")
        return
    if (
        record is None
        and run.root.exists()
        and (not run.root.is_dir() or {p.name for p in run.root.iterdir()} - {".lock"})
    ):
        raise UserError(f"{run.root} exists and is not a run directory: choose another --name or storage")
    nearest = next(path for path in (run.root, *run.root.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"storage {run.root.parent}: {nearest} is a file, not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"storage {run.root.parent}: no permission to write in {nearest}")
