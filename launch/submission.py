"""Carries out requests: writes the run directories, hands the plans to a backend, and tells or shows what becomes of them.

Between the first file created and the job's submission the run's lock is held, so two submissions of one name cannot
both go through; a submission that is refused leaves nothing behind.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.errors import UserError
from launch.logs import follow_logs, last_words, to_stdout
from launch.objects import place, soft_delete
from launch.paths import REPOSITORY, expand_path
from launch.plan import Plan, masked
from launch.record import ACTIVE, RunRecord, Submission, read_record, write_record
from launch.request import Request, check_devices, checked_plan, unset_variable
from launch.run_dir import RunDir, remove_directory
from launch.standing import read_standing
from launch.text import printable
from launch.worker import EXIT_SAVED


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
    backend = requests[0].backend
    with recorded(requests) as (plans, locks):
        told = backend.submit(plans, locks)
    plan = plans[0]
    if (warning := soft_delete(place(plan.run_dir))) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    if plan.sweep is not None:
        _tell_sweep(plans, backend.shape(plan), told)
        return 0
    _tell_submitted(plan, backend.shape(plan), told)
    return _wait_for(requests[0].run, plan) if wait else 0


def carry_out_here(request: Request) -> int:
    """Run one attempt in an allocation, show what it prints, and return its exit code; Ctrl-C saves and stops it.

    Raises:
        UserError: there is no Slurm, or it does not grant the allocation; nothing of a new run is left behind then.
    """
    from launch.backends import slurm

    run = request.run
    with recorded([request]) as ((plan,), (lock,)), _hangup_interrupts():
        slurm.check_secrets(plan)
        said = _size(run.supervisor_log)
        attempt = slurm.start_interactively(plan, run, lock)
        try:
            while plan.first_attempt not in run.attempts():
                if attempt.poll() is not None:
                    words = last_words(run.supervisor_log) if _size(run.supervisor_log) > said else None
                    raise UserError(f"{run.name}: {words or 'no allocation to run in; Slurm says why above'}")
                if run.cancel_request.exists():
                    _stop_waiting(attempt)
                    if plan.first_attempt not in run.attempts():
                        return _end_before_start(run, plan)
                time.sleep(0.1)
        except KeyboardInterrupt:
            run.cancel_request.touch()  # for a supervisor that is about to start its attempt
            _stop_waiting(attempt)
            if plan.first_attempt not in run.attempts():
                raise UserError(f"{run.name}: not started, and not waiting for an allocation any more") from None
    show = to_stdout(flush=True)
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
    print(printable(f"{run.name}: {record.state}{f': {record.reason}' if record.reason else ''}"), file=sys.stderr)
    if record.exit_code is None:
        print(f"see {run.supervisor_log}", file=sys.stderr)
        return 1
    return record.exit_code


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stop_waiting(salloc: "subprocess.Popen[bytes]") -> None:
    """Have salloc take its request back."""
    salloc.terminate()
    salloc.wait()


def _end_before_start(run: RunDir, plan: Plan) -> int:
    """Write down that a run was cancelled while it waited; return its exit code."""
    record = read_record(run)
    assert record is not None
    record.state, record.changed, record.exit_code = "cancelled", time.time(), EXIT_SAVED
    write_record(run, record)
    run.append_event("cancelled", plan.first_attempt, state=record.state, code=EXIT_SAVED)
    print(f"{run.name}: cancelled while it waited for an allocation", file=sys.stderr)
    return EXIT_SAVED


@contextlib.contextmanager
def _hangup_interrupts() -> Iterator[None]:
    """Have a terminal that is closed, or a SIGTERM, interrupt the block as Ctrl-C does."""
    signals = [one for one in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(one) != signal.SIG_IGN]  # as by nohup
    before = [signal.signal(one, signal.default_int_handler) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


@contextlib.contextmanager
def recorded(requests: Sequence[Request]) -> Iterator[tuple[list[Plan], list[int]]]:
    """Have all of some runs written that has to be there before they start, and hold their locks; if they do not start,
    because the block raises, leave them as they were."""
    for request in requests:
        checked_plan(request)  # refuse before the first file is touched
        check_devices(request)
        if (variable := unset_variable(request.run)) is not None:
            raise UserError(
                f"storage: {request.run.root.parent}: {variable} is not set: export it, or give another place with --set "
                "storage=gs://BUCKET/FOLDER"
            )
    locks: list[tuple[RunDir, int]] = []
    undo: list[tuple[RunDir, RunRecord | None]] = []
    plans: list[Plan] = []
    try:
        for request in requests:
            locks.append((request.run, _take(request.run)))
            undo.append((request.run, read_record(request.run)))
            plans.append(_record_submission(request))
        yield plans, [lock for _, lock in locks]
    except (OSError, UserError) as error:
        for run, past in undo:
            _undo(run, past)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{requests[0].run.root}: cannot be written: {error.strerror}") from error
    finally:
        for run, lock in locks:
            run.release(lock)  # a supervisor on this machine has its own copy; without one the run is free again


def take_back(requests: Sequence[Request]) -> None:
    """Cancel runs that have just been submitted, the last one first, because one that belongs to them was refused."""
    for request in reversed(requests):
        try:
            request.backend.cancel(request.run, read_standing(request.run).record)
            print(f"{request.run.name}: cancelled", file=sys.stderr)
        except UserError as error:
            print(f"warning: {request.run.name} was submitted, and could not be cancelled: {error}", file=sys.stderr)


def _take(run: RunDir) -> int:
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        return run.lock()
    except OSError as error:
        raise UserError(f"storage {run.root.parent}: cannot make the run directory there: {error.strerror}") from error


def _record_submission(request: Request) -> Plan:
    """Write all of a run that has to be there before it starts; its lock is held."""
    run = request.run
    plan = request.plan()  # again: the run's past may have changed before the lock was ours
    record = read_record(run) or RunRecord(name=run.name, job=request.job.name, state="submitted", changed=time.time())
    if request.snapshot is not None:
        request.snapshot.write(run.code)
    run.cancel_request.unlink(missing_ok=True)
    record.state, record.changed = "submitted", time.time()
    record.reason, record.exit_code, record.supervisor = None, None, None
    record.submissions.append(Submission(time=time.time(), plan=masked(plan)))
    write_record(run, record)
    run.append_event("submitted", attempt=plan.first_attempt, cluster=plan.cluster, snapshot=plan.code.hash)
    return plan


def _undo(run: RunDir, past: RunRecord | None) -> None:
    """Leave a run as it was before a submission that was refused: gone, if it was new."""
    if past is None:
        remove_directory(run.root)
    else:
        with contextlib.suppress(OSError):
            write_record(run, past)


def _wait_for(run: RunDir, plan: Plan) -> int:
    """Show the run's output until it has ended; return the job's exit code, or 1 if the supervisor was killed."""
    try:
        follow_logs(
            run,
            plan.first_attempt,
            to_stdout(flush=True),
            announce=lambda line: print(f"{plan.run}: {line}", file=sys.stderr, flush=True),
            prefix=len(plan.hosts) > 1,
        )
    except KeyboardInterrupt:
        print(f"\nthe run goes on without this terminal; to end it: {jobs_command('cancel', run)}", file=sys.stderr)
        return 130
    record = read_standing(run).record
    reason = f": {record.reason}" if record.reason else ""
    print(printable(f"{plan.run}: {record.state}{reason}"), file=sys.stderr)
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
    run = RunDir.at(plan.run_dir)
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
    words = zip(*(one.arguments for one in plans), strict=True)
    first = next((position for position, found in enumerate(words) if len(set(found)) > 1), None)
    if first is not None and not plan.arguments[first].startswith("--"):
        first -= 1  # the option before its value
    for one in plans:
        print(f"  {one.run}  {shlex.join(one.arguments[first:] if first is not None else [])}")
    assert plan.sweep is not None
    sweep = RunDir(place(plan.run_dir).parent / plan.sweep)
    for command in ("status", "cancel"):
        print(f"  {command:<9}  {jobs_command(command, sweep)}", flush=True)
