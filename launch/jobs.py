"""Watches, stops and continues runs.

    python launch/jobs.py list | status RUN | logs RUN [-f] | cancel RUN | resume RUN … | explain RUN

RUN is a run's name, or the path of its directory. Names are looked up under `--storage`, or `JASMINE_STORAGE`, or else
the `storage:` of every cluster in `cluster_configs/`. Nothing but `cancel` and `resume` changes a run, and `cancel` only
leaves a request that the supervisor finds, so it works from every machine that sees the directory (and takes a job that
waits out of its queue).
"""

import argparse
import glob
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As a script, Python puts this file's directory first, where modules named like common ones lie.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from launch.backends import backend_named
    from launch.config import REPOSITORY, AnyCluster, change_settings, cluster_names, expand_path, load_cluster
    from launch.errors import Parser, UserError, did_you_mean, run_entry_point
    from launch.logs import follow_logs, hosts_in_order, show_logs
    from launch.options import Job, check_options, find_job
    from launch.plan import MASK, Plan
    from launch.record import ACTIVE, Attempt, RunRecord
    from launch.run_dir import RunDir, in_use, last_json_lines
    from launch.snapshot import SCRIPT_DIR, take_snapshot
    from launch.standing import Standing, Watch, read_standing, settle
    from launch.submit import Request, carry_out, jobs_command
except ModuleNotFoundError as missing:
    from launch.interpreter import continue_with_project_python

    continue_with_project_python(missing)


def main(arguments: list[str]) -> int:
    """Carry out the command line `arguments` and return the exit code."""
    parser, commands = _parser()
    first = arguments[0] if arguments else ""
    if first not in commands and first[:1] not in ("", "-"):
        raise UserError(f"unknown command {first!r}{did_you_mean(first, commands)} (there are: {', '.join(commands)})")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command is not resume:
        raise UserError(f"{rest[0]}: not an argument of this command (see `{parser.prog} {first} --help`)")
    options.job_arguments = tuple(rest)
    if options.command in (status, cancel, explain) and (elements := _sweep(options)):
        return _for_each(options, elements)
    return options.command(options)


def _sweep(options: argparse.Namespace) -> list[str]:
    """Return the runs of the sweep that RUN names; none where it names a run."""
    for root in _storage_roots(options.storage):
        if (root / options.run / "run.json").is_file() or "/" in options.run or not root.is_dir():
            continue
        found = [path.name for path in root.glob(f"{glob.escape(options.run)}.*") if (path / "run.json").is_file()]
        if elements := [name for name in found if name[len(options.run) + 1 :].isdecimal()]:
            return sorted(elements, key=lambda name: int(name.rpartition(".")[2]))
    return []


def _for_each(options: argparse.Namespace, elements: list[str]) -> int:
    """Carry out a command on all runs of a sweep: `status` as a table, the others one by one where they apply."""
    if options.command is status:
        return list_runs(argparse.Namespace(storage=options.storage, only=set(elements)))
    code = 0
    for name in elements:
        one = argparse.Namespace(**vars(options) | {"run": name})
        if options.command is cancel and not _find_run(one)[1].live:
            continue
        code = max(code, options.command(one))
    return code


def list_runs(options: argparse.Namespace) -> int:
    """Show one line for each run, the one that changed last at the end."""
    rows = []
    for root in _storage_roots(options.storage):
        for directory in root.iterdir() if root.is_dir() else []:
            if options.only and directory.name not in options.only:
                continue
            run = RunDir(directory)
            try:
                record = read_standing(run).record
            except UserError as error:
                if run.record.exists():
                    print(f"warning: {error}", file=sys.stderr)
                continue
            metrics = _last_metrics(run)
            step, loss = metrics.get("step", "-"), metrics.get("loss")
            rows.append(
                (
                    record.changed,
                    [
                        record.name,
                        record.job,
                        record.submissions[-1].plan.cluster if record.submissions else "-",
                        record.state,
                        str(len(record.attempts)),
                        str(step),
                        f"{loss:.4g}" if isinstance(loss, int | float) else "-",
                        _duration(time.time() - record.changed),
                    ],
                )
            )
    if options.only:
        rows.sort(key=lambda row: int(row[1][0].rpartition(".")[2]))
    else:
        rows.sort(key=lambda row: row[0])
    table = [row for _, row in rows]
    if not table:
        print(f"no runs in {', '.join(map(str, _storage_roots(options.storage)))}")
        return 0
    _print_table(["run", "job", "cluster", "state", "attempt", "step", "loss", "age"], table)
    return 0


def status(options: argparse.Namespace) -> int:
    """Show how one run stands."""
    run, standing = _find_run(options)
    record = standing.record
    plan = _last_plan(run, record)
    reason = f" ({record.reason})" if record.reason else ""
    print(f"{record.name}: {record.state}{reason}, for {_duration(time.time() - record.changed)}")
    print(f"  job        {record.job} {' '.join(plan.arguments)}".rstrip())
    print(f"  cluster    {plan.cluster}")
    for label, text in standing.seen.facts:
        print(f"  {label:<10} {text}")
    if standing.seen.detail:
        print(f"  {'scheduler':<10} {standing.seen.detail}")
    if record.state == "running" and record.supervisor is not None:
        print(f"  supervisor process {record.supervisor.pid} on {record.supervisor.host}")
    for attempt in record.attempts:
        running = record.state == "running" and attempt is record.attempts[-1]
        print(f"  {_attempt_line(attempt, otherwise='running' if running else 'lost')}")
    print(f"  progress   {_progress_line(run, record, plan)}")
    print(f"  directory  {run.root}")
    print(f"  logs       {jobs_command('logs', run)}")
    if record.state in ("lost", "failed"):
        print(f"  why        {jobs_command('explain', run)}")
    return 0


def logs(options: argparse.Namespace) -> int:
    """Show what the job printed: in the latest attempt, or from it on with `-f`."""
    run, standing = _find_run(options)
    record = standing.record
    attempts = run.attempts()
    if options.attempt is not None and options.attempt not in attempts:
        raise UserError(f"run {run.name!r} has no attempt {options.attempt} (there are: {attempts or 'none yet'})")
    attempt = options.attempt if options.attempt is not None else max(attempts, default=1)
    hosts = hosts_in_order(run, record, attempt)
    if options.host is not None and options.host not in hosts and not (options.follow and standing.live):
        there = sorted(hosts) or "none yet"
        raise UserError(f"attempt {attempt} of run {run.name!r} has no host {options.host} (there are: {there})")
    prefix = options.host is None

    def write(line: str) -> None:
        print(line, flush=options.follow)

    def announce(line: str) -> None:
        print(f"{run.name}: {line}", file=sys.stderr, flush=True)

    if options.follow:
        follow_logs(run, attempt, write, announce, host=options.host, prefix=prefix)
        announce(read_standing(run).record.state)
    elif not attempts:
        announce(f"{record.state}, and no attempt has started")
    else:
        show_logs(run, attempt, hosts if prefix else [options.host], write, prefix=prefix)
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Ask a run to save and stop, and wait until nothing of it lives."""
    run, standing = _find_run(options)
    record = standing.record
    if not standing.live:
        raise UserError(f"run {run.name!r} is not running (its state: {record.state}): there is nothing to cancel")
    settings = _last_plan(run, record).settings
    grace = int(settings["grace_seconds"])
    backend_named(settings["backend"]).cancel(run, record)
    print(f"{run.name}: asked to save and stop; it has {grace} s for that", flush=True)
    deadline = time.monotonic() + grace + 30
    lives = Watch(run, seconds=0.5)
    while lives():
        if time.monotonic() > deadline:
            raise UserError(f"run {run.name!r} has not stopped in time; see {run.supervisor_log}")
        time.sleep(0.1)
    standing = read_standing(run)
    record = settle(run, standing)
    reason = f" ({record.reason})" if record.reason else ""
    print(f"{run.name}: {record.state}{reason}; to go on: {jobs_command('resume', run)}")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Continue a run from its newest checkpoint: with the same code, settings and arguments where no other are given."""
    run, standing = _find_run(options)
    record = standing.record
    if standing.live:
        raise in_use(run)
    last = _last_plan(run, record)
    if options.cluster is not None:
        cluster, settings = load_cluster(options.cluster, options.set)
    else:
        cluster, settings = last.cluster, _stored_settings(last, options.set, run)
    arguments = (*last.arguments, *options.job_arguments)
    cwd = Path(last.cwd)
    if options.new_code:
        job = find_job(record.job, cwd)
        check_options(job, options.job_arguments)
        snapshot = take_snapshot(REPOSITORY, job.script)
        request = Request(run, job, arguments, cwd, cluster, settings, snapshot.code, snapshot.script, snapshot)
    else:
        if not last.code_dir.is_dir():
            raise UserError(f"{last.code_dir}: the run's code is gone; resume with --new-code to take this checkout's")
        script = Path(last.argv[1]).relative_to(last.code_dir).as_posix()
        check_options(Job(record.job, last.code_dir / script), options.job_arguments, root=last.code_dir)
        found = REPOSITORY / record.job if script.startswith(f"{SCRIPT_DIR}/") else last.code_dir / script
        request = Request(run, Job(record.job, found), arguments, cwd, cluster, settings, last.code, script, None)
    return carry_out([request], wait=options.wait)


def explain(options: argparse.Namespace) -> int:
    """Say in one paragraph why a run is not running, and what to do."""
    run, standing = _find_run(options)
    record = standing.record
    go_on = f"To go on: {jobs_command('resume', run)}"
    reason = f" ({record.reason})" if record.reason else ""
    seen = standing.seen
    if not reason and seen.detail and record.state not in ACTIVE:
        reason = f" ({seen.detail})"  # its supervisor could not write down how it ended
    if record.state == "submitted" and seen.detail:
        text = f"It is in the queue, {seen.detail}.{_blamed(record)}"
    elif record.state in ACTIVE:
        progress = _progress_line(run, record, _last_plan(run, record))
        text = f"It is {record.state}, {progress}. Nothing is wrong.{_blamed(record)}"
        if not seen.answered:
            text = f"{seen.detail}: {record.state}, {progress}."
    elif record.state == "finished":
        text = "It has finished: every process exited 0."
    elif record.state == "lost":
        last_words = _last_line(run.supervisor_log)
        said = f"; the last line it wrote is: {last_words}" if last_words else ""
        text = f"Its supervisor is gone without a word: killed, or its machine went down{said}."
        text += f" {seen.detail[0].upper()}{seen.detail[1:]}." if seen.detail else ""
        text += f" The last checkpoint stands. {go_on}"
    elif record.state == "failed":
        text = f"{_failure(run, record)}{reason}. Mend what that names; the last checkpoint stands. {go_on}{_blamed(record)}"
    else:
        text = f"It was {record.state}{reason}; its state is saved as far as the job had come. {go_on}"
    print(f"{record.name}: {text}")
    return 0


def _blamed(record: RunRecord) -> str:
    """Return a sentence about nodes at which attempts failed, `""` when there are none."""
    nodes = {blame.node: blame for blame in record.blames}
    counts = {node: sum(blame.node == node for blame in record.blames) for node in nodes}
    told = [f"{node} ({counts[node]}×, last: {blame.reason})" for node, blame in nodes.items()]
    settings = record.submissions[-1].plan.settings if record.submissions else {}
    hours = settings.get("exclude_hours")
    note = f"; one that failed twice is left out of the next attempt, for {hours:g} h" if hours else ""
    return f" Attempts failed at {', '.join(told)}{note}." if told else ""


def _failure(run: RunDir, record: RunRecord) -> str:
    attempt = next((a for a in reversed(record.attempts) if a.first_failed is not None), None)
    if attempt is None:
        return "It has failed"
    node = next((one.node for one in attempt.exits if one.host == attempt.first_failed), None)
    place = f" on {node}" if node else ""
    first = next(one for one in attempt.exits if one.host == attempt.first_failed)
    how = f"died of {first.signal}" if first.signal else f"exited with code {first.code}"
    log = run.log(attempt.number, first.host)
    said = _last_line(log)
    words = f"its last words are: {said}" if said else "it printed nothing"
    where = f"In attempt {attempt.number}, host {first.host} of {attempt.processes}{place}"
    return f"{where} failed first: it {how}; {words} (all of them: {log})"


def _last_line(path: Path) -> str | None:
    """Return the last line of a log that says something: of a traceback, the exception."""
    try:
        lines = path.read_text(errors="replace").splitlines()[-200:]
    except FileNotFoundError:
        return None
    exceptions = [line for before, line in itertools.pairwise(lines) if before.startswith("  ") and line[:1].isalpha()]
    if exceptions and any(line.startswith("Traceback (most recent call last)") for line in lines):
        return exceptions[-1].strip()
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def _stored_settings(plan: Plan, overrides: list[str], run: RunDir) -> AnyCluster:
    """Return the settings of the last submission, with secrets, which are not stored, looked up again."""
    settings = dict(plan.settings)
    hidden = [name for name, value in settings["env"].items() if value == MASK]
    hidden = [name for name in hidden if not any(item.startswith(f"env.{name}=") for item in overrides)]
    if hidden:
        known: dict[str, str] = dict(os.environ)
        if plan.cluster in cluster_names() or Path(plan.cluster).is_file():
            known |= load_cluster(plan.cluster)[1].env
        if absent := [name for name in hidden if name not in known]:
            raise UserError(
                f"run {run.name!r}: {absent[0]} is a secret and was not stored: add --set env.{absent[0]}=VALUE"
            )
        settings["env"] = settings["env"] | {name: known[name] for name in hidden}
    return change_settings(settings, overrides, origin=str(run.record))


def _storage_roots(storage: str | None) -> list[Path]:
    given = storage or os.environ.get("JASMINE_STORAGE")
    if given:
        return [expand_path(given, "storage", Path.cwd())]
    roots = []
    for name in cluster_names():
        try:
            roots.append(expand_path(load_cluster(name)[1].storage, "storage", Path.cwd()))
        except UserError:  # another cluster's file, of no interest to a command that does not name it
            continue
    return list(dict.fromkeys(roots))


def _find_run(options: argparse.Namespace) -> tuple[RunDir, Standing]:
    roots = _storage_roots(options.storage)
    run = next((RunDir(root / options.run) for root in roots if (root / options.run / "run.json").is_file()), None)
    if run is None:
        path = Path(options.run).expanduser().absolute()
        if "/" not in options.run and not (path / "run.json").is_file():
            names = [p.name for root in roots if root.is_dir() for p in root.iterdir() if (p / "run.json").is_file()]
            hint = did_you_mean(options.run, names)
            raise UserError(f"no run {options.run!r} in {', '.join(map(str, roots))}{hint} (`jobs.py list` shows them)")
        run = RunDir(Path(os.path.normpath(path)))
    return run, read_standing(run)


def _last_plan(run: RunDir, record: RunRecord) -> Plan:
    if not record.submissions:
        raise UserError(f"{run.record}: no submission is recorded: submit the run again under the same --name")
    return record.submissions[-1].plan


def _last_metrics(run: RunDir) -> dict[str, Any]:
    """Return the newest value of every metric among the last lines; not each line has each of them."""
    newest: dict[str, Any] = {}
    for line in last_json_lines(run.metrics, 20):
        newest |= line
    return newest


def _progress_line(run: RunDir, record: RunRecord, plan: Plan) -> str:
    metrics = _last_metrics(run)
    step = metrics.get("step")
    if not isinstance(step, int):
        return "no step logged yet"
    words = [f"step {step}"]
    total = _number_of_steps(plan)
    if total is not None:
        words[0] += f" of {total}"
    if isinstance(metrics.get("loss"), int | float):
        words.append(f"loss {metrics['loss']:.4g}")
    if isinstance(metrics.get("frames_per_second"), int | float):
        words.append(f"{metrics['frames_per_second']:,.0f} frames/s")
    times = [line["step_time"] for line in last_json_lines(run.metrics, 20) if isinstance(line.get("step_time"), float)]
    if record.state == "running" and times:
        words.append(f"{1 / statistics.median(times):.3g} steps/s")
    if record.state == "running" and total is not None and times:
        words.append(f"about {_duration((total - step) * statistics.median(times))} to go")
    return ", ".join(words)


def _number_of_steps(plan: Plan) -> int | None:
    """Return the last `--num_steps` among the job's arguments, cut by `--stop_at_step`; None when it is not given."""
    text = "\0".join(plan.arguments).replace("=", "\0")
    found = {
        name: [int(n) for n in re.findall(rf"(?:^|\0)--{name}\0(\d+)(?=\0|$)", text)]
        for name in ("num[_-]steps", "stop[_-]at[_-]step")
    }
    return min((numbers[-1] for numbers in found.values() if numbers), default=None)


def _attempt_line(attempt: Attempt, *, otherwise: str) -> str:
    """Describe an attempt; `otherwise` stands for an outcome that was not written down."""
    shape = f"{attempt.processes}×{attempt.devices or attempt.devices_per_process}"
    ended = attempt.ended if attempt.ended is not None else time.time()
    exits = sorted(attempt.exits, key=lambda one: one.host)
    codes = " ".join(f"host-{one.host}:{one.signal or one.code}" for one in exits)
    failed = (
        f", host-{attempt.first_failed} first" if attempt.first_failed is not None and attempt.processes > 1 else ""
    )
    outcome = attempt.outcome or otherwise
    lasted = _duration(ended - attempt.started)
    cause = f" ({attempt.cause})" if attempt.cause else ""
    return f"attempt {attempt.number:<2} {shape} {outcome}{failed}{cause} after {lasted}  {codes}".rstrip()


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * length:
            return f"{whole // length} {unit}"
    return f"{whole} s"


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table: with colours on a terminal, as plain aligned lines elsewhere."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    common = Parser(add_help=False, allow_abbrev=False)
    common.add_argument("--storage", metavar="DIR", help="where the run directories are")
    parser = Parser(prog="python launch/jobs.py", description="Watch, stop and continue runs.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(
        name: str, function: Callable[[argparse.Namespace], int], *, run: bool = True
    ) -> argparse.ArgumentParser:
        assert function.__doc__ is not None
        text = function.__doc__.splitlines()[0]
        added = commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        added.set_defaults(command=function)
        if run:
            added.add_argument("run", metavar="RUN", help="a run's name, or the path of its directory")
        return added

    command("list", list_runs, run=False).set_defaults(only=None)
    command("status", status)
    show = command("logs", logs)
    show.add_argument("-f", "--follow", action="store_true", help="go on, through restarts, until the run ends")
    show.add_argument("--host", type=int, metavar="K", help="only this host, without prefix")
    show.add_argument("--attempt", type=int, metavar="K", help="this attempt instead of the latest")
    command("cancel", cancel)
    again = command("resume", resume)
    again.usage = "%(prog)s RUN [--cluster OTHER] [--set KEY=VALUE …] [--new-code] [--wait] [JOB ARGS…]"
    again.add_argument("--cluster", metavar="NAME|FILE", help="run on this cluster instead")
    again.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the cluster")
    again.add_argument("--new-code", action="store_true", help="take this checkout's code instead of the run's own")
    again.add_argument("--wait", action="store_true", help="show the job's output and return its exit code")
    command("explain", explain)
    return parser, list(commands.choices)


if __name__ == "__main__":
    run_entry_point(main)
