"""Submits a job to a cluster: read, plan, then either show the plan or carry it out.

    python launch/submit.py --cluster NAME|FILE [--name RUN] [--set KEY=VALUE …] [--dry-run] [--wait] [JOB [ARGS…]]
    … [--preflight] [--sweep OPTION=VALUES …] [--after RUN …] [--export-sbatch FILE] [--pipeline FILE]

This is the command alone: `launch.request` makes requests of what was typed, `launch.submission` carries them out.
"""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

# As a script, Python puts this file's directory first, where modules named like common ones lie.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from launch.cluster_files import cluster_names
    from launch.errors import Parser, UserError, did_you_mean, run_entry_point
    from launch.options import DEFAULT_JOB, baselines, known_options
    from launch.paths import REPOSITORY
    from launch.plan import Plan
    from launch.request import Request, check_devices, checked_plan, has_finished, pipeline_requests, requests_for
    from launch.submission import carry_out, carry_out_here, take_back
except ModuleNotFoundError as missing:
    from launch.interpreter import continue_with_project_python

    continue_with_project_python(missing)


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
        for name in ("wait", "interactive", "export_sbatch"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is for one run, not for a pipeline")
        stages = pipeline_requests(Path(options.pipeline), options.cluster, options.set, cwd)
        return _carry_out_stages(stages, dry_run=options.dry_run, compile_first=options.preflight)
    requests = requests_for(
        words,
        cluster=options.cluster,
        overrides=options.set,
        name=options.name,
        sweep=options.sweep,
        after=options.after,
        cwd=cwd,
        reserved=_option_names(parser),
    )
    job = requests[0].job.name
    if options.name is None and job in baselines() and "--name" in [word.partition("=")[0] for word in words]:
        note = f"--name after {job} is the job's own, a name in wandb; the run's goes before {job}"
        print(f"note: {note}; this one is called {requests[0].run.name}", file=sys.stderr)
    if options.export_sbatch is not None:
        return _export(requests, Path(options.export_sbatch))
    if options.preflight:
        _preflight(requests)
    if options.dry_run and options.preflight:
        return 0
    if options.interactive and (len(requests) > 1 or requests[0].settings.backend != "slurm" or requests[0].after):
        raise UserError("--interactive is for one run on a Slurm cluster")
    if options.dry_run:
        plans = [checked_plan(request, only_shown=True) for request in requests]
        print(_preview_interactive(plans[0]) if options.interactive else requests[0].backend.preview(plans), end="")
        _warn_of_devices(requests)
        return 0
    if options.interactive:
        return carry_out_here(requests[0])
    return carry_out(requests, wait=options.wait)


def _preview_interactive(plan: Plan) -> str:
    from launch.backends import slurm

    return slurm.preview_interactive(plan)


def _preflight(requests: Sequence[Request]) -> None:
    from launch.preflight import preflight  # only here: no other submission needs it

    preflight(requests)


def _carry_out_stages(stages: Sequence[Request], *, dry_run: bool, compile_first: bool) -> int:
    """Submit the stages of a pipeline that have not finished."""
    todo = [stage for stage in stages if not has_finished(stage.run)]
    shown = dry_run or compile_first
    plans = [checked_plan(stage, only_shown=shown) for stage in todo]  # refuse what can be, before the first one starts
    if compile_first:
        _preflight(todo)
    if dry_run and compile_first:
        return 0
    if dry_run:
        print("\n".join(stage.backend.preview([plan]) for stage, plan in zip(todo, plans, strict=True)), end="")
        _warn_of_devices(todo)
        return 0
    for stage in todo:
        check_devices(stage)
    if not todo:
        print(f"all of its stages have finished: {', '.join(stage.run.name for stage in stages)}")
    submitted: list[Request] = []
    try:
        for stage in todo:
            carry_out([stage], wait=False)
            submitted.append(stage)
    except UserError:
        take_back(submitted)
        raise
    return 0


def _warn_of_devices(requests: Sequence[Request]) -> None:
    """Say what a submission would be refused for; what it would submit has been shown."""
    for request in requests:
        try:
            check_devices(request)
        except UserError as error:
            print(f"warning: this would be refused: {error}", file=sys.stderr)
            return


def _export(requests: Sequence[Request], path: Path) -> int:
    from launch.backends import slurm

    if requests[0].settings.backend != "slurm":
        raise UserError("--export-sbatch writes scripts for Slurm clusters")
    text = slurm.export([checked_plan(request) for request in requests], REPOSITORY, requests[0].job.script)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--export-sbatch {path}: it exists; name another file") from None
    except OSError as error:
        raise UserError(f"--export-sbatch {path}: cannot be written: {error.strerror}") from error
    _warn_of_devices(requests)
    print(f"submit it with: sbatch {shlex.quote(str(path))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    jobs = textwrap.fill(f"a baseline: {', '.join(baselines()) or 'none'}; or the path of a Python script", 100)
    parser = Parser(
        prog="python launch/submit.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --cluster NAME|FILE [--name RUN] [--set KEY=VALUE …] [OPTIONS] [JOB [ARGS…]]\n"
        "       %(prog)s --cluster NAME|FILE [--set KEY=VALUE …] [--dry-run] --pipeline FILE",
        description="Start a training job on a cluster, or continue the run of that name. Returns once it is submitted.",
        epilog=f"JOB is {jobs}.\nWithout one it is {DEFAULT_JOB}. All that follows JOB goes to the job; the options above "
        "come before it.",
    )
    option = parser.add_argument
    option("--cluster", metavar="NAME|FILE", help=f"one of {', '.join(cluster_names())}; or the path of such a file")
    option("--name", metavar="RUN", help="the run's name; that of an existing run continues it")
    option("--set", metavar="KEY=VALUE", action="append", default=[],
           help="override a key of the cluster; may be given several times")  # fmt: skip
    option("--dry-run", action="store_true", help="print exactly what would be submitted, create nothing")
    option("--preflight", action="store_true",
           help="compile the step for the cluster first, say what it takes, refuse what cannot fit")  # fmt: skip
    option("--wait", action="store_true", help="show the job's output and return its exit code")
    option("--sweep", metavar="OPTION=VALUES", action="append", default=[],
           help="a run for each value of a job's option: seed=0..3 or max_lr=1e-4,3e-4; several are combined")  # fmt: skip
    option("--after", metavar="RUN", action="append", default=[], help="start when RUN has finished")
    option("--pipeline", metavar="FILE", help="submit the stages that a file describes (see launch/pipeline.py)")
    option("--interactive", action="store_true",
           help="run in this shell's Slurm allocation, or in a new one, and show the output")  # fmt: skip
    option("--export-sbatch", metavar="FILE", help="write a Slurm script that needs no launcher, submit nothing")
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
