"""Submits a job to a cluster: read, plan, then either show the plan or carry it out.

    python launch/submit.py --cluster NAME|FILE [--name RUN] [--set KEY=VALUE …] [--dry-run] [--wait] [JOB [ARGS…]]

All that can be known to be wrong is refused before anything is created. Between the first file created and the
job's submission the run's lock is held, so two submissions of one name cannot both go through.
"""

import argparse
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
    cluster, settings = load_cluster(options.cluster, options.set)
    job = find_job(words[0] if words else DEFAULT_JOB, cwd)
    check_options(job, words[1:], reserved=_option_names(parser))
    storage = expand_path(settings.storage, "storage", cwd)
    name = options.name if options.name is not None else unused_name(storage, job)
    run = RunDir(storage / checked_name(name))
    snapshot = take_snapshot(REPOSITORY, job.script)
    request = Request(run, job, tuple(words[1:]), cwd, cluster, settings, snapshot.code, snapshot.script, snapshot)
    if options.dry_run:
        print(request.backend.preview([plan_for(request)]), end="")
        return 0
    return carry_out(request, wait=options.wait)


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


def carry_out(request: Request, *, wait: bool) -> int:
    """Create or continue the run and start it; with `wait`, show its output to the end.

    Returns:
        0 once it is submitted; with `wait` the job's exit code.

    Raises:
        UserError: the run is live or not ours to continue, or its directory cannot be written. Nothing of a new run is
            left behind then.
    """
    plan_for(request)  # refuse before the first file is touched
    run = request.run
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        lock = run.lock()
    except OSError as error:
        raise UserError(f"storage {run.root.parent}: cannot make the run directory there: {error.strerror}") from error
    try:
        plan = _plan(request)  # again: the run's past may have changed before the lock was ours
        past = read_record(run)
        record = past or RunRecord(name=run.name, job=request.job.name, state="submitted", changed=time.time())
        try:
            if request.snapshot is not None:
                request.snapshot.write(run.code)
            run.cancel_request.unlink(missing_ok=True)
            record.state, record.changed = "submitted", time.time()
            record.reason, record.exit_code, record.supervisor = None, None, None
            record.submissions.append(Submission(time=time.time(), plan=masked(plan)))
            write_record(run, record)
            run.append_event("submitted", attempt=plan.first_attempt, cluster=plan.cluster, code=plan.code.hash)
            told = request.backend.submit([plan], [lock])
        except (OSError, UserError) as error:
            _undo(run, past)
            if isinstance(error, UserError):
                raise
            raise UserError(f"{run.root}: cannot be written: {error.strerror}") from error
    finally:
        os.close(lock)  # a supervisor on this machine has its own copy; without one the run is free again
    _tell_submitted(plan, request.backend.shape(plan), told)
    return _wait_for(run, plan) if wait else 0


def _undo(run: RunDir, past: RunRecord | None) -> None:
    """Leave a run as it was before a submission that was refused: gone, if it was new."""
    if past is None:
        shutil.rmtree(run.root, ignore_errors=True)
        return
    before = read_record(run)
    if before is not None:
        before.submissions.pop()
        last = before.attempts[-1].outcome if before.attempts else None
        before.state, before.reason = last or "failed", "its last submission was refused"
        write_record(run, before)


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
