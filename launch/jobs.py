"""Watches, stops and continues runs.

    python launch/jobs.py list | status RUN | logs RUN [-f] | cancel RUN | resume RUN … | explain RUN
                             | report RUN [--out FILE.html] | watch RUN | gc [--delete [ID …]]

RUN is a run's name, or the path of its directory. Names are looked up under `--storage`, or `JASMINE_STORAGE`, or else
the `storage:` of every cluster in `cluster_configs/`. What only looks (`list`, `status`, `logs`, `explain`, `report`) changes
no run. `cancel` leaves a request that the supervisor finds, so it works from every machine that sees the directory (and takes
a job that waits out of its queue). `resume` submits the run again. On Cloud TPU, `watch` does what the run's watcher does: it
rents TPUs, gives them back, and writes down what became of the run; `gc --delete` deletes TPUs that no run needs.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# As a script, Python puts this file's directory first, where modules named like common ones lie.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from launch.backends import backend_named
    from launch.cluster_files import change_settings, cluster_names, load_cluster
    from launch.config import AnyCluster
    from launch.describe import (
        attempt_line,
        blamed,
        duration,
        failure,
        host_lines,
        last_metrics,
        number,
        print_table,
        progress_line,
    )
    from launch.errors import EXIT_USER_ERROR, Parser, UserError, did_you_mean, run_entry_point
    from launch.find import find_run, runs_in, storage_roots, sweep_of
    from launch.logs import follow_logs, hosts_in_order, last_words, show_logs, to_stdout
    from launch.objects import in_parallel
    from launch.options import Job, baselines, check_options, find_job, given
    from launch.paths import REPOSITORY
    from launch.plan import MASK, Plan
    from launch.record import ACTIVE, RunRecord
    from launch.report import gather, summary
    from launch.report_page import check_free, write_page
    from launch.request import Request
    from launch.run_dir import RunDir, in_use
    from launch.snapshot import SCRIPT_DIR, fetch_code, take_snapshot
    from launch.standing import Watch, is_live, read_standing, read_standings, settle
    from launch.submission import carry_out, jobs_command
    from launch.text import printable
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
    if options.command in (status, cancel, explain) and (elements := sweep_of(options.run, options.storage)):
        return _all_of_a_sweep(options, elements)
    return options.command(options)


def _all_of_a_sweep(options: argparse.Namespace, elements: list[str]) -> int:
    """Carry out a command on all runs of a sweep: `status` as a table, `explain` one by one, `cancel` where they live."""
    if options.command is status:
        return list_runs(argparse.Namespace(storage=options.storage, only=set(elements)))
    each = [argparse.Namespace(**vars(options) | {"run": name}) for name in elements]
    if options.command is explain:
        return max(map(explain, each))
    found = (find_run(one.run, one.storage) for one in each)
    live = [(run, standing.record) for run, standing in found if standing.live or standing.seen.holds]
    if not live:
        raise UserError(f"no run of the sweep {options.run!r} is running: there is nothing to cancel")
    return _cancel(live)


def list_runs(options: argparse.Namespace) -> int:
    """Show one line for each run, the one that changed last at the end."""
    rows = []
    runs = [run for root in storage_roots(options.storage) for run in runs_in(root)]
    if options.only:
        runs = [run for run in runs if run.name in options.only]
    silent = ""
    newest = dict(zip(runs, in_parallel(last_metrics, runs, of=runs[0].root), strict=True)) if runs else {}
    for run, standing in zip(runs, read_standings(runs), strict=True):
        if isinstance(standing, UserError):
            print(f"warning: {printable(str(standing))}", file=sys.stderr)
            continue
        record = standing.record
        silent = silent or ("" if standing.seen.answered else standing.seen.detail)
        metrics = newest[run]
        step, loss = number(metrics.get("step"), finite=True), number(metrics.get("loss"))
        cells = [
            record.name,
            record.job,
            record.submissions[-1].plan.cluster if record.submissions else "-",
            record.state,
            str(len(record.attempts)),
            "-" if step is None else f"{step:.0f}",
            "-" if loss is None else f"{loss:.4g}",
            duration(time.time() - record.changed),
        ]
        rows.append((record.changed, cells))
    if silent:
        print(f"warning: {silent}", file=sys.stderr)
    if options.only:
        rows.sort(key=lambda row: int(row[1][0].rpartition(".")[2]))
    else:
        rows.sort(key=lambda row: row[0])
    table = [row for _, row in rows]
    if not table:
        print(f"no runs in {', '.join(map(str, storage_roots(options.storage)))}")
        return 0
    print_table(["run", "job", "cluster", "state", "attempt", "step", "loss", "age"], table)
    return 0


def status(options: argparse.Namespace) -> int:
    """Show how one run stands."""
    run, standing = find_run(options.run, options.storage)
    record = standing.record
    plan = _last_plan(run, record)

    def show(text: str) -> None:
        print(printable(text))

    reason = f" ({record.reason})" if record.reason else ""
    show(f"{record.name}: {record.state}{reason}, for {duration(time.time() - record.changed)}")
    show(f"  job        {record.job} {' '.join(plan.arguments)}".rstrip())
    show(f"  cluster    {plan.cluster}")
    for label, text in standing.seen.facts:
        show(f"  {label:<10} {text}")
    if standing.seen.detail:
        show(f"  {'scheduler':<10} {standing.seen.detail}")
    if record.state == "running" and record.supervisor is not None:
        show(f"  supervisor process {record.supervisor.pid} on {record.supervisor.host}")
    for attempt in record.attempts:
        running = record.state == "running" and attempt is record.attempts[-1]
        show(f"  {attempt_line(attempt, otherwise='running' if running else 'lost')}")
    show(f"  progress   {progress_line(run, record, plan)}")
    for line in host_lines(run, record):
        show(f"  hosts      {line}")
    print(f"  directory  {run.root}")
    print(f"  logs       {jobs_command('logs', run)}")
    if record.state in ("lost", "failed"):
        print(f"  why        {jobs_command('explain', run)}")
    return 0


def logs(options: argparse.Namespace) -> int:
    """Show what the job printed: in the latest attempt, or from it on with `-f`."""
    run, standing = find_run(options.run, options.storage)
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

    write = to_stdout(flush=options.follow)

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
    run, standing = find_run(options.run, options.storage)
    if not standing.live and not standing.seen.holds:
        state = standing.record.state
        raise UserError(f"run {run.name!r} is not running (its state: {state}): there is nothing to cancel")
    return _cancel([(run, standing.record)])


def _cancel(runs: list[tuple[RunDir, RunRecord]]) -> int:
    deadlines = []
    for run, record in reversed(runs):  # those of a sweep that wait come last, and must not start meanwhile
        settings = _last_plan(run, record).settings
        grace = int(settings["grace_seconds"])
        backend = backend_named(settings["backend"])
        backend.cancel(run, record)
        print(f"{run.name}: asked to save and stop; it has {grace} s for that", flush=True)
        deadlines.append(time.monotonic() + backend.stop_seconds(record))
    for run, _ in runs:
        lives = Watch(run, seconds=0.5)
        while lives():
            if time.monotonic() > max(deadlines):
                raise UserError(f"run {run.name!r} has not stopped in time; see {run.supervisor_log}")
            time.sleep(0.1)
        record = settle(run, read_standing(run))
        backend_named(_last_plan(run, record).settings["backend"]).release(run, record)
        reason = f" ({record.reason})" if record.reason else ""
        print(printable(f"{run.name}: {record.state}{reason}; to go on: {jobs_command('resume', run)}"))
    return 0


def resume(options: argparse.Namespace) -> int:
    """Continue a run from its newest checkpoint: with the same code, settings and arguments where no other are given."""
    run, standing = find_run(options.run, options.storage)
    record = standing.record
    if standing.live:
        raise in_use(run)
    last = _last_plan(run, record)
    if options.job_arguments and not options.job_arguments[0].startswith("-"):
        raise UserError(
            f"{options.job_arguments[0]}: resume takes options of the run's job {record.job}, and no job: --OPTION VALUE …"
        )
    trains = record.job in baselines() and record.job.startswith("train_")
    if record.state == "finished" and trains and not options.job_arguments and not options.new_code:
        more = "--num_steps N" + (" --stop_at_step 0" if given(last.arguments, "stop_at_step") else "")
        raise UserError(
            f"run {run.name!r} has finished; to go on, give it more to do: {jobs_command('resume', run)} {more}"
        )
    if options.cluster is not None:
        cluster, settings = load_cluster(options.cluster, options.set)
    else:
        cluster, settings = last.cluster, _stored_settings(last, options.set, run)
    arguments = (*last.arguments, *options.job_arguments)
    cwd = Path(last.cwd)
    after = tuple(name for name in last.after if is_live(RunDir(run.root.parent / name)))
    if options.new_code:
        job = find_job(record.job, cwd)
        check_options(job, options.job_arguments)
        snapshot = take_snapshot(REPOSITORY, job.script)
        code, script, found = snapshot.code, snapshot.script, job.script
    else:
        here = fetch_code(last.code_dir)
        script = last.argv[1].removeprefix(f"{last.code_dir}/")
        check_options(Job(record.job, here / script), options.job_arguments, root=here)
        found = REPOSITORY / record.job if script.startswith(f"{SCRIPT_DIR}/") else here / script
        snapshot, code = None, last.code
    request = Request(
        run, Job(record.job, found), arguments, cwd, cluster, settings, code, script, snapshot, after=after
    )
    return carry_out([request], wait=options.wait)


def watch(options: argparse.Namespace) -> int:
    """Watch over a run on Cloud TPU and rent another TPU when one is lost; submitting starts this by itself."""
    from launch.backends.cloud_tpu_watch import watch as watch_over

    run, standing = find_run(options.run, options.storage)
    plan = _last_plan(run, standing.record)
    if plan.settings["backend"] != "cloud_tpu":
        raise UserError(f"run {run.name!r} is on {plan.cluster}: only runs on Cloud TPU need to be watched")
    if standing.record.state not in (*ACTIVE, "lost"):
        raise UserError(f"run {run.name!r} is {standing.record.state}: {jobs_command('resume', run)} goes on")
    return watch_over(run)


def gc(options: argparse.Namespace) -> int:
    """List TPUs of ours that no run needs; with --delete, delete them."""
    from launch.backends.cloud_tpu_leaks import collect

    return collect(options.cluster, options.storage, options.delete)


def explain(options: argparse.Namespace) -> int:
    """Say in one paragraph why a run is not running, and what to do."""
    run, standing = find_run(options.run, options.storage)
    record = standing.record
    go_on = f"To go on: {jobs_command('resume', run)}"
    reason = f" ({record.reason})" if record.reason else ""
    seen = standing.seen
    if not reason and seen.detail and record.state not in ACTIVE:
        reason = f" ({seen.detail})"  # its supervisor could not write down how it ended
    waits = seen.detail or record.reason
    if record.state in ACTIVE and not seen.answered:
        text = f"{seen.detail}: {record.state}, {progress_line(run, record, _last_plan(run, record))}."
    elif record.state == "submitted" and waits:
        text = f"It is in the queue, {waits}.{blamed(record)}"
    elif record.state in ACTIVE:
        progress = progress_line(run, record, _last_plan(run, record))
        slow = host_lines(run, record)
        verdict = f"It could be faster: {'; '.join(slow)}." if slow else "Nothing is wrong."
        text = f"It is {record.state}, {progress}. {verdict}{blamed(record)}"
    elif record.state == "cancelled" and not record.attempts:
        text = f"It was cancelled before it had started{reason}. {go_on}"
    elif record.state == "finished":
        text = f"It has finished: every process exited 0.{blamed(record)}"
    elif record.state == "lost":
        words = last_words(run.supervisor_log)
        said = f"; the last line it wrote is: {words}" if words else ""
        text = f"Its supervisor is gone without a word: killed, or its machine went down{said}."
        text += f" {seen.detail[0].upper()}{seen.detail[1:]}." if seen.detail else ""
        text += f" The last checkpoint stands. {go_on}" if _has_checkpoint(run) else f" {go_on}"
    elif record.state == "failed":
        stands = "; the last checkpoint stands" if _has_checkpoint(run) else ""
        refused = " --OPTION VALUE" if record.exit_code == EXIT_USER_ERROR else ""  # else it refuses the same once more
        text = f"{failure(run, record)}{reason}. Mend what that names{stands}.{blamed(record)} {go_on}{refused}"
    else:
        text = f"It was {record.state}{reason}; its state is saved as far as the job had come. {go_on}"
    print(printable(f"{record.name}: {text}"))
    return 0


def _has_checkpoint(run: RunDir) -> bool:
    """Return whether there is one, as far as can be seen; where its storage cannot be asked, there may be."""
    try:
        return run.checkpoints.is_dir() and any(path.name.isdecimal() for path in run.checkpoints.iterdir())
    except OSError:
        return True


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
            raise UserError(f"run {run.name!r}: {absent[0]} is a secret and was not stored: export {absent[0]} first")
        settings["env"] = settings["env"] | {name: known[name] for name in hidden}
    return change_settings(settings, overrides, origin=str(run.record))


def report(options: argparse.Namespace) -> int:
    """Say where a run's time went, and draw all there is to see of it as a page."""
    run, standing = find_run(options.run, options.storage)
    out = None if options.no_html else Path(options.out or f"{run.name}-report.html").expanduser()
    if out is not None:
        check_free(out)
    try:
        found = gather(run, standing)
    except OSError as error:
        raise UserError(f"{run.root}: cannot be read: {error.strerror}") from error
    for line in summary(found):
        print(printable(line))
    if out is not None:
        write_page(out, found)
        print(f"  page             {out}")
    return 0


def _last_plan(run: RunDir, record: RunRecord) -> Plan:
    if not record.submissions:
        raise UserError(f"{run.record}: no submission is recorded: submit the run again under the same --name")
    return record.submissions[-1].plan


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    common = Parser(add_help=False, allow_abbrev=False)
    common.add_argument("--storage", metavar="DIR", help="where the run directories are")
    parser = Parser(
        prog="python launch/jobs.py",
        description="Watch, stop and continue runs.",
        epilog="`COMMAND --help` says more. `status`, `cancel` and `explain` also take the name of a sweep.",
        allow_abbrev=False,
    )
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
    again.usage = "%(prog)s RUN [--cluster OTHER] [--set KEY=VALUE …] [--new-code] [--wait] [--OPTION VALUE …]"
    again.add_argument("--cluster", metavar="NAME|FILE", help="run on this cluster instead")
    again.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the cluster")
    again.add_argument("--new-code", action="store_true", help="take this checkout's code instead of the run's own")
    again.add_argument("--wait", action="store_true", help="show the job's output and return its exit code")
    command("explain", explain)
    tell = command("report", report)
    tell.add_argument("--out", metavar="FILE.html", help="where to write the page (default: RUN-report.html, here)")
    tell.add_argument("--no-html", action="store_true", help="write no page")
    command("watch", watch)
    collect = command("gc", gc, run=False)
    collect.add_argument(
        "--cluster", metavar="NAME|FILE", action="append", default=[], help="look there, and not at all clusters"
    )
    collect.add_argument(
        "--delete",
        metavar="ID",
        nargs="*",
        help="delete these, or all that are listed and whose runs can be seen from here",
    )
    return parser, list(commands.choices)


if __name__ == "__main__":
    run_entry_point(main)
