"""Submits a job to a cluster: read, plan, then either show the plan or carry it out.

    python launch/submit.py --cluster NAME|FILE [--name RUN] [--set KEY=VALUE …] [--dry-run] [--wait] [JOB [ARGS…]]
    … [--sweep OPTION=VALUES …] [--after RUN …] [--export-sbatch FILE] [--pipeline FILE]

All that can be known to be wrong is refused before anything is created. Between the first file created and the
job's submission the run's lock is held, so two submissions of one name cannot both go through.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# As a script, Python puts this file's directory first, where modules named like common ones lie.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from launch.backends import Backend, backend_named
    from launch.config import REPOSITORY, AnyCluster, expand_path, load_cluster
    from launch.errors import Parser, UserError, did_you_mean, run_entry_point
    from launch.logs import follow_logs
    from launch.options import DEFAULT_JOB, Job, baselines, check_options, find_job, known_options
    from launch.pipeline import fill_places, read_pipeline
    from launch.plan import Plan, make_plan, masked
    from launch.record import ACTIVE, RunRecord, Submission, read_record, write_record
    from launch.run_dir import RunDir, in_use
    from launch.snapshot import Code, Snapshot, take_snapshot
    from launch.standing import is_live, read_standing
except ModuleNotFoundError as missing:
    from launch.interpreter import continue_with_project_python

    continue_with_project_python(missing)

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


def main(arguments: list[str]) -> int:
    """Carry out the command line `arguments` and return the exit code."""
    parser = _parser()
    own, words = _split(arguments, parser)
    options = parser.parse_args(own)
    cwd = Path.cwd()
    if options.cluster is None:
        raise UserError("--cluster is missing: --cluster local is this machine")
    if options.pipeline is not None:
        if words or options.sweep or options.after or options.name:
            raise UserError(
                "--pipeline names jobs, arguments and runs in its file: give it alone, with --cluster and --set"
            )
        stages = pipeline_requests(Path(options.pipeline), options.cluster, options.set, cwd)
        return _carry_out_stages(stages, dry_run=options.dry_run)
    cluster, settings = load_cluster(options.cluster, options.set)
    job = find_job(words[0] if words else DEFAULT_JOB, cwd)
    swept = [sweep_values(text) for text in options.sweep]
    check_options(job, [*words[1:], *(f"--{key}" for key, _ in swept)], reserved=_option_names(parser))
    storage = expand_path(settings.storage, "storage", cwd)
    name = checked_name(options.name if options.name is not None else unused_name(storage, job))
    snapshot = take_snapshot(REPOSITORY, job.script)
    given = tuple(words[1:])
    after = tuple(runs_to_wait_for(options.after, storage))
    requests = [
        Request(
            RunDir(storage / run), job, given + more, cwd, cluster, settings, snapshot.code, snapshot.script, snapshot,
            sweep=name if swept else None, after=after,
        )
        for run, more in sweep_elements(name, swept)
    ]  # fmt: skip
    if options.export_sbatch is not None:
        return _export(requests, Path(options.export_sbatch))
    if options.dry_run:
        print(requests[0].backend.preview([plan_for(request) for request in requests]), end="")
        return 0
    if options.interactive:
        if len(requests) > 1 or settings.backend != "slurm" or after:
            raise UserError("--interactive is for one run on a Slurm cluster")
        return _carry_out_here(requests[0])
    return carry_out(requests, wait=options.wait)


def sweep_values(text: str) -> tuple[str, list[str]]:
    """Return the option and the values that `OPTION=A,B,C` or `OPTION=0..3` names.

    Raises:
        UserError: it is neither.
    """
    key, equals, values = text.partition("=")
    key = key.lstrip("-")
    if bounds := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", values):
        first, last = int(bounds.group(1)), int(bounds.group(2))
        found = [str(value) for value in range(first, last + 1)]
    else:
        found = [value for value in values.split(",") if value]
    if not key or not equals or not found:
        raise UserError(f"--sweep {text}: expected OPTION=VALUE,VALUE or OPTION=FIRST..LAST, as in --sweep seed=0..3")
    return key, found


def sweep_elements(name: str, swept: list[tuple[str, list[str]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return a run's name and additional arguments for each combination of the swept values; without any, the run itself."""
    if not swept:
        return [(name, ())]
    combinations = itertools.product(*([(f"--{key}", value) for value in values] for key, values in swept))
    return [
        (checked_name(f"{name}.{index}"), tuple(itertools.chain.from_iterable(combination)))
        for index, combination in enumerate(combinations)
    ]


def runs_to_wait_for(names: Sequence[str], storage: Path) -> list[str]:
    """Return those runs among `names` that have not finished.

    Raises:
        UserError: there is no such run, or it is not going to finish.
    """
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
        if not run.slurm_job.exists():
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
        name, settings = load_cluster(cluster, [*overrides, *stage.set])
        job = find_job(stage.job, cwd)
        check_options(job, stage.arguments)
        storage = expand_path(settings.storage, "storage", cwd)
        run_names = {other: checked_name(f"{pipeline.name}-{other}") for other in [*stage.after, stage.name]}
        places = {other: str(storage / run) for other, run in run_names.items()}
        arguments = tuple(fill_places(argument, places) for argument in stage.arguments)
        snapshot = take_snapshot(REPOSITORY, job.script)
        run = RunDir(storage / run_names[stage.name])
        done = {request.run.name for request in requests if _has_finished(request.run)}
        after = tuple(run_names[other] for other in stage.after if run_names[other] not in done)
        requests.append(
            Request(run, job, arguments, cwd, name, settings, snapshot.code, snapshot.script, snapshot, after=after)
        )
    return requests


def _has_finished(run: RunDir) -> bool:
    record = read_record(run)
    return record is not None and record.state == "finished"


def _carry_out_stages(stages: Sequence[Request], *, dry_run: bool) -> int:
    """Submit the stages of a pipeline that have not finished; on this machine, which has no queue, one after the other."""
    todo = [stage for stage in stages if not _has_finished(stage.run)]
    plans = [plan_for(stage) for stage in todo]  # all that can be refused is, before the first one starts
    if dry_run:
        print("\n".join(stage.backend.preview([plan]) for stage, plan in zip(todo, plans, strict=True)), end="")
        return 0
    for stage in todo:
        local = stage.settings.backend == "local"
        code = carry_out([dataclasses.replace(stage, after=()) if local else stage], wait=local)
        if code != 0:
            return code
    return 0


def _export(requests: Sequence[Request], path: Path) -> int:
    from launch.backends import slurm

    (request,) = requests[:1]
    if len(requests) > 1 or request.settings.backend != "slurm":
        raise UserError(
            "--export-sbatch writes the script of one run on a Slurm cluster, not of a sweep or of this machine"
        )
    text = slurm.export(plan_for(request), REPOSITORY, request.job.script)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--export-sbatch {path}: it exists; name another file") from None
    except OSError as error:
        raise UserError(f"--export-sbatch {path}: cannot be written: {error.strerror}") from error
    print(f"submit it with: sbatch {shlex.quote(str(path))}")
    return 0


def checked_name(name: str) -> str:
    """Return `name`, a run's name.

    Raises:
        UserError: it would not do as the name of a directory everywhere.
    """
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: a run's name is 1 to 63 letters, digits, '.', '_' and '-', and starts with a letter or digit"
        )
    return name


def unused_name(storage: Path, job: Job) -> str:
    """Return `<job>-<date>-<time>`, with a number where that is taken."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", job.script.stem).lstrip("._-")[:40] or "job"
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, count = base, 1
    while (storage / name).exists():
        count += 1
        name = f"{base}-{count}"
    return name


def plan_for(request: Request) -> Plan:
    """Return what `request` would run now, on top of what its run directory holds.

    Raises:
        UserError: the run is live, was made with another job, or cannot be where it should.
    """
    run = request.run
    record = read_record(run)
    if record is not None and record.job != request.job.name:
        raise UserError(
            f"run {run.name!r} was made with the job {record.job}, not {request.job.name}: choose another --name"
        )
    if is_live(run):
        raise in_use(run)
    _check_place(run, record)
    return _plan(request)


def carry_out(requests: Sequence[Request], *, wait: bool) -> int:
    """Create or continue one run, or all elements of a sweep, and start them; with `wait`, show a run's output to the end.

    Returns:
        0 once it is submitted; with `wait` the job's exit code.

    Raises:
        UserError: a run is live or not ours to continue, its directory cannot be written, or the cluster refuses. Nothing
            of a new run is left behind then.
    """
    if wait and len(requests) > 1:
        raise UserError("--wait is for one run, not for a sweep: watch it with `jobs.py list`")
    for request in requests:
        plan_for(request)  # refuse before the first file is touched
    locks: list[int] = []
    undo: list[tuple[RunDir, RunRecord | None]] = []
    plans: list[Plan] = []
    try:
        for request in requests:
            locks.append(_take(request.run))
            undo.append((request.run, read_record(request.run)))
            plans.append(_record_submission(request))
        told = requests[0].backend.submit(plans, locks)
    except (OSError, UserError) as error:
        for run, past in undo:
            _undo(run, past)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{requests[0].run.root}: cannot be written: {error.strerror}") from error
    finally:
        for lock in locks:
            os.close(lock)  # a supervisor on this machine has its own copy; without one the run is free again
    plan = plans[0]
    if plan.sweep is not None:
        _tell_sweep(plans, requests[0].backend.shape(plan), told)
        return 0
    _tell_submitted(plan, requests[0].backend.shape(plan), told)
    return _wait_for(requests[0].run, plan) if wait else 0


def _carry_out_here(request: Request) -> int:
    """Run one attempt in an allocation, show what it prints, and return its exit code; Ctrl-C saves and stops it."""
    from launch.backends import slurm

    plan_for(request)
    run, past = request.run, read_record(request.run)
    lock = _take(run)
    try:
        plan = _record_submission(request)
        attempt = slurm.start_interactively(plan, run)
    except (OSError, UserError) as error:
        _undo(run, past)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{run.root}: cannot be written: {error.strerror}") from error
    finally:
        os.close(lock)
    show = functools.partial(print, flush=True)
    while True:
        try:
            follow_logs(
                run, plan.first_attempt, show, show, prefix=len(plan.hosts) > 1, is_live=lambda: attempt.poll() is None
            )
            break
        except KeyboardInterrupt:
            print("\nsaving and stopping", file=sys.stderr)
            run.cancel_request.touch()
    record = read_standing(run).record
    print(f"{run.name}: {record.state}{f': {record.reason}' if record.reason else ''}", file=sys.stderr)
    if record.exit_code is None:
        print(f"see {run.supervisor_log}", file=sys.stderr)
        return 1
    return record.exit_code


def _take(run: RunDir) -> int:
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        return run.lock()
    except OSError as error:
        raise UserError(f"storage {run.root.parent}: cannot make the run directory there: {error.strerror}") from error


def _record_submission(request: Request) -> Plan:
    """Write all of a run that has to be there before it starts; its lock is held."""
    run = request.run
    plan = _plan(request)  # again: the run's past may have changed before the lock was ours
    record = read_record(run) or RunRecord(name=run.name, job=request.job.name, state="submitted", changed=time.time())
    if request.snapshot is not None:
        request.snapshot.write(run.code)
    run.cancel_request.unlink(missing_ok=True)
    record.state, record.changed = "submitted", time.time()
    record.reason, record.exit_code, record.supervisor = None, None, None
    record.submissions.append(Submission(time=time.time(), plan=masked(plan)))
    write_record(run, record)
    run.append_event("submitted", attempt=plan.first_attempt, cluster=plan.cluster, code=plan.code.hash)
    return plan


def _undo(run: RunDir, past: RunRecord | None) -> None:
    """Leave a run as it was before a submission that was refused: gone, if it was new."""
    if past is None:
        shutil.rmtree(run.root, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            write_record(run, past)


def _plan(request: Request) -> Plan:
    return make_plan(
        run_dir=request.run.root,
        job=request.job.name,
        script=request.job.script,
        script_in_code=request.script_in_code,
        arguments=request.arguments,
        cwd=request.cwd,
        cluster=request.cluster,
        settings=request.settings,
        code=request.code,
        first_attempt=max(request.run.attempts(), default=0) + 1,
        sweep=request.sweep,
        after=request.after,
    )


def _check_place(run: RunDir, record: RunRecord | None) -> None:
    """Refuse a place that cannot be written, or a directory that is not a run's."""
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


def _wait_for(run: RunDir, plan: Plan) -> int:
    """Show the run's output until it has ended; return the job's exit code, or 1 if the supervisor was killed."""
    try:
        follow_logs(
            run,
            plan.first_attempt,
            write=lambda line: print(line, flush=True),
            announce=lambda line: print(f"{plan.run}: {line}", file=sys.stderr, flush=True),
            prefix=len(plan.hosts) > 1,
        )
    except KeyboardInterrupt:
        print(f"\nthe run goes on without this terminal; to end it: {jobs_command('cancel', run)}", file=sys.stderr)
        return 130
    record = read_standing(run).record
    reason = f": {record.reason}" if record.reason else ""
    print(f"{plan.run}: {record.state}{reason}", file=sys.stderr)
    if record.state == "lost" or record.state in ACTIVE or record.exit_code is None:
        return 1
    return record.exit_code


def jobs_command(command: str, run: RunDir) -> str:
    """Return the shell command that does `command` to a run, as typed in the current directory."""
    default = expand_path(os.environ.get("JASMINE_STORAGE", "runs"), "JASMINE_STORAGE", Path.cwd())
    shown = run.name if run.root.parent == default else str(run.root)
    script = str(REPOSITORY / "launch" / "jobs.py")
    if REPOSITORY.is_relative_to(Path.cwd()) or Path.cwd().is_relative_to(REPOSITORY):
        script = os.path.relpath(script)
    return f"python {shlex.quote(script)} {command} {shlex.quote(shown)}"


def _tell_submitted(plan: Plan, shape: str, told: str) -> None:
    run = RunDir(Path(plan.run_dir))
    what = "submitted" if plan.first_attempt == 1 else f"goes on with attempt {plan.first_attempt}"
    print(f"{plan.run}: {what} on {plan.cluster}, {shape}, code {plan.code.hash}")
    print(f"  job        {told}")
    print(f"  directory  {plan.run_dir}")
    for command in ("logs -f", "status", "cancel"):
        print(f"  {command:<9}  {jobs_command(command, run)}", flush=True)


def _tell_sweep(plans: Sequence[Plan], shape: str, told: str) -> None:
    plan = plans[0]
    print(f"{plan.sweep}: {len(plans)} runs submitted on {plan.cluster}, each {shape}, code {plan.code.hash}")
    print(f"  job        {told}")
    for one in plans:
        print(f"  {one.run}  {' '.join(one.arguments[-2 * len(plan.arguments) :])}")
    assert plan.sweep is not None
    sweep = RunDir(Path(plan.run_dir).parent / plan.sweep)
    for command in ("status", "cancel"):
        print(f"  {command:<9}  {jobs_command(command, sweep)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python launch/submit.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --cluster NAME|FILE [--name RUN] [--set KEY=VALUE …] [--dry-run] [--wait] [JOB [ARGS…]]",
        description="Start a training job on a cluster, or continue the run of that name.",
        epilog=f"JOB is a baseline ({', '.join(baselines()) or 'none'};\nthe default is {DEFAULT_JOB}) or the path of a "
        "Python script. What follows it goes to the job.",
    )
    parser.add_argument("--cluster", metavar="NAME|FILE", help="a file in cluster_configs/, by its stem, or a path")
    parser.add_argument("--name", metavar="RUN", help="the run's name; that of an existing run continues it")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the cluster")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, create nothing")
    parser.add_argument("--sweep", metavar="OPTION=VALUES", action="append", default=[],
                        help="a run for each value: seed=0..3 or max_lr=1e-4,3e-4; several are combined")  # fmt: skip
    parser.add_argument("--after", metavar="RUN", action="append", default=[], help="start when RUN has finished")
    parser.add_argument("--pipeline", metavar="FILE", help="submit the stages that a file describes")
    parser.add_argument(
        "--export-sbatch", metavar="FILE", help="write a batch script that needs no launcher, submit nothing"
    )
    parser.add_argument("--interactive", action="store_true",
                        help="run in this shell's Slurm allocation, or in a new one, and show the output")  # fmt: skip
    parser.add_argument("--wait", action="store_true", help="show the job's output and return its exit code")
    return parser


def _option_names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _split(arguments: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Split into the launcher's options and `[JOB, its arguments…]`; JOB is the first word that is no option.

    Raises:
        UserError: an option before JOB that the launcher does not have.
    """
    takes_value = {name: action.nargs is None for action in parser._actions for name in action.option_strings}
    position = 0
    while position < len(arguments) and arguments[position].startswith("-"):
        option = arguments[position].partition("=")[0]
        if option not in takes_value:
            names = _option_names(parser)
            default = baselines().get(DEFAULT_JOB)
            if default and option.removeprefix("--").replace("-", "_") in (known_options(default) or ()):
                raise UserError(
                    f"{option} is an option of the job: name the job before it, as in `{DEFAULT_JOB} {option} …`"
                )
            raise UserError(f"unknown option {option}{did_you_mean(option, names)} (there are: {', '.join(names)})")
        position += 1 + (takes_value[option] and "=" not in arguments[position])
    return list(arguments[:position]), list(arguments[position:])


if __name__ == "__main__":
    run_entry_point(main)
