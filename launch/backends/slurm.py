"""The `slurm` backend: one sbatch job for a run, or one array for a sweep, submitted by submitit.

The batch script starts `launch.backends.slurm_attempt` on the first node, which runs one attempt and asks Slurm to run the
job again where the run goes on. Nothing of ours runs on the login node once a job is submitted.

The truth about a job is what squeue, scontrol and, where there is one, sacct say; many clusters have no sacct, and
slurmctld forgets a job some minutes after its end, so what happened is in the run directory as well. A scheduler that
does not answer in time changes nothing that is known.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.backends import Sighting
from launch.config import ENVIRONMENT, SlurmCluster
from launch.errors import UserError
from launch.outcome import nodes_to_exclude
from launch.plan import Plan, scrubbed
from launch.record import RunRecord, State, read_record
from launch.run_dir import RunDir, write_atomically
from launch.text import unfit

# How long a command waits for Slurm, and how long it then takes it for silent.
QUERY_SECONDS = 5.0

# What becomes of a run whose job has ended in a way that its supervisor could not write down.
_ENDED: dict[str, tuple[State, str]] = {
    "CANCELLED": ("cancelled", "its job was cancelled in Slurm"),
    "TIMEOUT": ("failed", "its job reached the time limit, and was not put back into the queue"),
    "NODE_FAIL": ("failed", "a node of its job failed, and Slurm did not put it back into the queue"),
    "OUT_OF_MEMORY": ("failed", "its job needed more memory than it had asked for (key: memory)"),
    "BOOT_FAIL": ("failed", "a node of its job could not boot"),
    "DEADLINE": ("failed", "its job's deadline has passed"),
    "PREEMPTED": ("preempted", "its job was preempted, and Slurm did not put it back into the queue"),
    "FAILED": ("failed", "its job's supervisor was killed, or could not start"),
    "COMPLETED": ("lost", "its job has ended without writing down how"),
}

# Slurm's reasons for waiting, for people.
_WAITING = {
    "Resources": "as many nodes as it asks for are not free yet",
    "Priority": "jobs of a higher priority are before it",
    "None": "it has just been put into the queue",
    "BeginTime": "Slurm lets a job that was put back into the queue wait before it starts again",
    "Dependency": "it waits for the run before it to finish",
    "DependencyNeverSatisfied": "the run before it did not finish, so it will never start; cancel it",
    "PartitionTimeLimit": "it asks for more time than the partition allows (key: time_limit)",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows (key: nodes)",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "JobHeldUser": "it is held by its owner; `scontrol release` lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "JobHoldMaxRequeue": "it was put back into the queue so often that Slurm holds it; `scontrol release` lets it go",
    "launch": "a node could not start it, so Slurm holds it; `scontrol release` lets it go",
    "JobArrayTaskLimit": "as many elements of the sweep as are allowed run already",
    "Reservation": "its reservation has not begun",
    "BadConstraints": "no node has what it asks for (keys: constraint, gpus_per_node, cpus_per_node, memory)",
    "Licenses": "licences that it needs are taken",
    "Cleaning": "what is left of its last attempt is being cleaned up",
}


# --- what is submitted -------------------------------------------------------------------------------------------


def preview(plans: Sequence[Plan]) -> str:
    """Return the batch script."""
    return batch_script(plans)


def shape(plan: Plan) -> str:
    """Return nodes, GPUs and processes of a run, for people."""
    settings = _settings(plan)
    nodes, gpus, processes = settings.nodes, settings.gpus_per_node, len(plan.hosts)
    on = f"{nodes} node{'s' * (nodes > 1)}"
    what = f"{nodes * gpus} GPU{'s' * (nodes * gpus > 1)} on {on}" if gpus else on
    return f"{what}, {processes} process{'es' * (processes > 1)}"


def batch_script(plans: Sequence[Plan]) -> str:
    """Return what sbatch gets, for one run or for the array of a sweep."""
    plan, settings = plans[0], _settings(plans[0])
    where = shlex.quote(plan.run_dir)
    if plan.sweep is not None:
        where = f"{shlex.quote(_sweep_stem(plan))}.$SLURM_ARRAY_TASK_ID"
    supervisor = f"{where}/code/{plan.code.hash}/launch/backends/slurm_attempt.py"
    # The supervisor runs beside the job's container, where there is one, with the Python that submitted.
    outside = sys.executable if settings.container and settings.python else plan.argv[0]
    return _sbatch_text(plans, f"exec {shlex.quote(outside)} {supervisor} --run_dir {where}", settings.setup)


# What only the launcher's supervisor looks at.
_SUPERVISED = ("JASMINE_PREFLIGHT", "JASMINE_LOCAL_DEVICES")


def export(plans: Sequence[Plan], checkout: Path, script: Path) -> str:
    """Return a batch script that runs `script` as the plans of a run or a sweep would, without the launcher, with the code in
    `checkout`."""
    plan, settings = plans[0], _settings(plans[0])
    variables = {name: value for name, value in plan.with_code_in(checkout).env.items() if name not in _SUPERVISED}
    if plan.sweep is not None:
        del variables["JASMINE_RUN_DIR"]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    files = {name: source for name, source in settings.secrets.items() if source != ENVIRONMENT}
    lines += [f'export {name}="$(cat {shlex.quote(os.path.expanduser(f))})"' for name, f in files.items()]
    if plan.sweep is not None:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        for index, one in enumerate(plans):
            where, arguments = shlex.quote(one.run_dir), shlex.join(one.arguments)
            lines.append(f"{index}) export JASMINE_RUN_DIR={where}; set -- {arguments} ;;")
        lines.append("esac")
    else:
        lines.append(f"set -- {shlex.join(plan.arguments)}")
    exports = "\n".join(lines)
    cpus = settings.cpus_per_node
    per_task = f" --cpus-per-task={max(1, cpus // settings.processes_on_a_node)}" if cpus else ""
    job = shlex.join([*in_container(plan, [checkout, script.parent]), plan.argv[0], str(script)])
    body = f"""\
{exports}
mkdir -p "$JASMINE_RUN_DIR"
cd {shlex.quote(plan.cwd)} || exit 2
ulimit -c 0
# --wait: when one process has ended, the others have this many seconds to end as well.
srun --wait=30 --kill-on-bad-exit=0 --unbuffered --mpi=none{per_task} \\
    {job} "$@"
code=$?
# 75: the state is saved, and the job wants to go on. `scontrol requeue` has Slurm run this script again.
if [ "$code" -eq 75 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}" && sleep 60
fi
exit "$code\""""
    log = _percent_safe(str(Path(plan.cwd) / f"{plan.sweep or plan.run}-"))
    return _sbatch_text(plans, body, settings.setup, output=log + ("%A_%a.log" if plan.sweep is not None else "%j.log"))


def in_container(plan: Plan, code: Sequence[Path] = ()) -> list[str]:
    """Return what goes before the command of a task in srun's call, to run it in the plan's container, if it has one:
    options of srun, or the container's own command. It sees the folders of the storage, the job and its `code`."""
    settings = _settings(plan)
    image = settings.container
    if image is None:
        return []
    image, *more = (os.path.expanduser(os.path.expandvars(one)) for one in (image, *settings.container_mounts))
    mounts = [str(Path(plan.run_dir).parent), plan.cwd, *map(str, code), *more]
    both_sides = [mount if ":" in mount else f"{mount}:{mount}" for mount in dict.fromkeys(mounts)]
    if settings.container_runtime == "pyxis":
        return [
            f"--container-image={image}",
            f"--container-mounts={','.join(both_sides)}",
            "--no-container-mount-home",
        ]
    gpus = ["--nv"] if settings.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *(f"--bind={mount}" for mount in both_sides), image]


def _sbatch_text(plans: Sequence[Plan], command: str, setup: list[str], output: str | None = None) -> str:
    from submitit.slurm.slurm import _make_sbatch_string  # the pure part of submitit's executor: needs no srun

    plan, settings = plans[0], _settings(plans[0])
    _check_paths(plan, settings)
    verbatim = [f"#SBATCH {line}" for line in settings.extra]
    parameters = _executor_parameters(plans, settings)
    if output is not None:
        parameters["additional_parameters"]["output"] = output
    return _make_sbatch_string(
        command=command,
        folder=str(_folder(plan)),
        setup=[*verbatim, *setup] or None,
        use_srun=False,
        wckey=None,
        map_count=len(plans) if plan.sweep is not None else None,
        **parameters,
    )


def _check_paths(plan: Plan, settings: SlurmCluster) -> None:
    """Refuse paths that sbatch, or what runs containers, would read as something else."""
    for path in (plan.run_dir, plan.cwd):
        if problem := unfit(path) or ("\\" in path and f"{path} has a backslash in it"):
            raise UserError(f"{problem}, and sbatch takes no such path; choose another storage or directory")
        if settings.container and (found := re.search("[:,]", path)):
            raise UserError(
                f"{path}: {found[0]!r} in a path separates what a container mounts; choose another storage or directory"
            )


def _executor_parameters(plans: Sequence[Plan], settings: SlurmCluster) -> dict[str, Any]:
    """Return the plans in the words of submitit's executor."""
    plan = plans[0]
    log = _percent_safe(str(RunDir(Path(plan.run_dir)).supervisor_log))
    if plan.sweep is not None:
        log = f"{_percent_safe(_sweep_stem(plan))}.%a/supervisor.log"
    more: dict[str, Any] = {
        "output": log,
        "requeue": True,
        # To the tasks only: the supervisor stays to see them save.
        "signal": f"TERM@{settings.grace_seconds}",
        "export": "ALL",
    }
    gpus = settings.gpus_per_node
    optional = {
        "reservation": settings.reservation,
        "gpus-per-node": f"{settings.gpu_type}:{gpus}" if settings.gpu_type else gpus or None,
        "mail-user": settings.mail,
        "mail-type": "END,FAIL,REQUEUE" if settings.mail else None,
        "dependency": _dependency(plan),
        "kill-on-invalid-dep": "yes" if plan.after else None,
    }
    more |= {key: value for key, value in optional.items() if value is not None}
    cpus = settings.cpus_per_node
    chosen = {
        "job_name": plan.sweep or plan.run,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "nodes": settings.nodes,
        "ntasks_per_node": settings.processes_on_a_node,
        "cpus_per_task": max(1, cpus // settings.processes_on_a_node) if cpus else None,
        "mem": settings.memory,
        "time": settings.time_limit,  # None leaves it to the partition, where submitit would say five minutes
        "constraint": settings.constraint,
        "exclude": _excluded(plans, settings),
    }
    return {**chosen, "stderr_to_stdout": True, "additional_parameters": more}


def _excluded(plans: Sequence[Plan], settings: SlurmCluster) -> str | None:
    """Return the nodes to stay away from: those of the settings, and those at which earlier attempts of the runs failed."""
    records = [read_record(RunDir(Path(plan.run_dir))) for plan in plans]
    blames = [blame for record in records if record is not None for blame in record.blames]
    blamed = nodes_to_exclude(blames, time.time(), settings.exclude_hours)
    return ",".join([*filter(None, [settings.exclude]), *blamed]) or None


def _settings(plan: Plan) -> SlurmCluster:
    return SlurmCluster.model_validate(plan.settings)


def _folder(plan: Plan) -> Path:
    return Path(plan.run_dir) / "slurm"


def _sweep_stem(plan: Plan) -> str:
    return plan.run_dir.rpartition(".")[0]


def _percent_safe(path: str) -> str:
    return path.replace("%", "%%")


def _dependency(plan: Plan) -> str | None:
    """Return `afterok:<job>…` for the runs before this one that have not finished; for one whose job is not known yet
    (a dry run of a pipeline) its name stands in the place of the id."""
    storage = Path(plan.run_dir).parent
    ids = [_read_job_id(RunDir(storage / name)) or f"<job of {name}>" for name in plan.after]
    return f"afterok:{':'.join(ids)}" if ids else None


def _read_job_id(run: RunDir) -> str | None:
    try:
        return run.slurm_job.read_text().strip() or None
    except OSError:
        return None


def check_secrets(plan: Plan) -> None:
    """Refuse secrets that are not where the settings say.

    Raises:
        UserError: one is not.
    """
    for name, source in _settings(plan).secrets.items():
        if source == ENVIRONMENT and name not in os.environ:
            raise UserError(f"secrets: {name} is not set in this shell: export it, or name a file that holds it")
        if source != ENVIRONMENT and not Path(os.path.expanduser(source)).is_file():
            raise UserError(f"secrets: {name}: there is no such file; give '{ENVIRONMENT}' or the path of one")


def submit(plans: Sequence[Plan], locks: Sequence[int]) -> str:
    """Submit one job, or one array, and note its id in each run directory."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    plan = plans[0]
    check_secrets(plan)
    text = batch_script(plans)

    class Executor(submitit.SlurmExecutor):
        """Submits our script in the place of a pickled function."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            # A job that is submitted from inside another one must not take that one's shape for its own.
            leaked = sorted(os.environ.keys() - scrubbed(os.environ).keys())
            return ["env", *(f"--unset={name}" for name in leaked), "sbatch", str(submission_file_path)]

    try:
        for one in plans:
            _folder(one).mkdir(exist_ok=True)
            RunDir(Path(one.run_dir)).slurm_job.unlink(missing_ok=True)
        executor = Executor(_folder(plan))
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's complaint there as it comes
            job = executor._submit_command("")
    except RuntimeError as error:
        if isinstance(error, FailedJobError | FailedSubmissionError):
            raise UserError(f"sbatch refused: {_complaint(str(error))}") from error
        raise UserError(
            "there is no Slurm here (srun is not on the PATH): submit from a login node, or look at it with --dry-run"
        ) from error
    for index, one in enumerate(plans):
        run = RunDir(Path(one.run_dir))
        write_atomically(run.slurm_job, f"{job.job_id}_{index}\n" if plan.sweep is not None else f"{job.job_id}\n")
    return f"Slurm job {job.job_id}"


def preview_interactive(plan: Plan) -> str:
    """Return the command that an interactive run starts with.

    Raises:
        UserError: the allocation of this shell does not have the nodes.
    """
    return shlex.join([*_allocation(plan), *_interactive_attempt(plan)]) + "\n"


def start_interactively(plan: Plan, run: RunDir, lock: int) -> "subprocess.Popen[bytes]":
    """Start one attempt of a run in the allocation that this shell has, or in one that salloc waits for; return the process
    that lasts as long as the attempt. It holds the run by the descriptor `lock`; what salloc says goes to this terminal.

    Raises:
        UserError: the allocation does not have the nodes, or there is no Slurm here.
    """
    allocation = _allocation(plan)
    run.slurm_job.unlink(missing_ok=True)  # of an earlier submission
    to_its_log = ["sh", "-c", 'log=$0; exec "$@" >>"$log" 2>&1', str(run.supervisor_log)]
    command = [*allocation, *to_its_log, *_interactive_attempt(plan), "--lock", str(lock)]
    environment = scrubbed(os.environ) if allocation else dict(os.environ)
    try:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock]
        )
    except FileNotFoundError as error:
        raise UserError(
            "there is no Slurm here (salloc is not on the PATH): --interactive needs a login node"
        ) from error


def _allocation(plan: Plan) -> list[str]:
    """Return salloc's command, without that which is to run; nothing where this shell has an allocation."""
    settings = _settings(plan)
    if "SLURM_JOB_ID" in os.environ:
        have = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        if have != settings.nodes:
            raise UserError(
                f"this allocation has {have} node(s) and the run wants {settings.nodes}: --set nodes={have}"
            )
        return []
    lines = [line.removeprefix("#SBATCH ") for line in batch_script([plan]).split("\n") if line.startswith("#SBATCH")]
    not_its = ("--output", "--open-mode", "--requeue", "--export")
    return ["salloc", *(word for line in lines if not line.startswith(not_its) for word in shlex.split(line))]


def _interactive_attempt(plan: Plan) -> list[str]:
    script = plan.code_dir / "launch" / "backends" / "slurm_attempt.py"
    return [plan.argv[0], str(script), "--run_dir", plan.run_dir, "--interactive"]


def _complaint(text: str) -> str:
    """Return the lines of sbatch's complaint as one, without its prefixes."""
    lines = [line.partition("error: ")[2] or line for line in text.splitlines() if "error:" in line]
    return "; ".join(dict.fromkeys(line.strip() for line in lines)) or " ".join(text.split())


# --- what Slurm says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job as Slurm describes it; `fields` have scontrol's names."""

    state: str
    fields: Mapping[str, str]

    def field(self, name: str) -> str:
        """Return a field, `""` where there is none or it says there is nothing."""
        value = self.fields.get(name, "")
        return "" if value in ("(null)", "None", "N/A", "Unknown") else value


class NoAnswerError(Exception):
    """The scheduler could not be asked."""


@dataclass
class _Silence:
    """That the controller did not answer, and when: for a while it is not asked again, so that a command which has several
    questions does not wait for each."""

    said: str = ""
    since: float = float("-inf")


_silence = _Silence()


def ask(*command: str, patience: float = QUERY_SECONDS, text: str | None = None) -> str:
    """Return what one of Slurm's commands prints.

    Args:
        patience: seconds to wait for it.
        text: what it reads.

    Raises:
        NoAnswerError: there is no such command here, it failed, or took too long.
    """
    if time.monotonic() - _silence.since < QUERY_SECONDS and command[0] != "sacct":
        raise NoAnswerError(_silence.said)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=patience, env=scrubbed(os.environ)
        )
    except OSError as error:
        raise NoAnswerError(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        _silence.said, _silence.since = f"no word from {command[0]} within {patience:.0f} s", time.monotonic()
        raise NoAnswerError(_silence.said) from error
    if done.returncode != 0:
        complaint = _complaint(done.stderr) or f"{command[0]} exited {done.returncode}"
        if "contact slurm controller" in complaint:
            _silence.said, _silence.since = complaint, time.monotonic()
        raise NoAnswerError(complaint)
    return done.stdout


def jobs_now(job_ids: Sequence[str]) -> dict[str, Job]:
    """Return what Slurm knows of jobs, without those that it has forgotten; asks once for all of them.

    Raises:
        NoAnswerError: the scheduler could not be asked.
    """
    if not job_ids:
        return {}
    names, form = ("JobState", "NodeList", "ExcNodeList", "StartTime", "Reason"), "%i|%T|%N|%x|%S|%r"
    try:
        options = ["--array", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}", f"--format={form}"]
        text = ask("squeue", *options)
    except NoAnswerError as error:
        if "Invalid job id" not in str(error):
            raise
        text = ""
    found = {}
    for line in text.splitlines():
        job_id, *values = line.split("|", len(names))
        found[job_id] = Job(values[0], dict(zip(names, values, strict=True)))
    forgotten = [job_id for job_id in job_ids if job_id not in found]
    return found | (_jobs_in_accounts(forgotten) if forgotten else {})


def _jobs_in_accounts(job_ids: Sequence[str]) -> dict[str, Job]:
    try:
        text = ask("sacct", "-X", "-n", "-P", "-D", "-j", ",".join(job_ids), "-o", "JobID,State,NodeList")
    except NoAnswerError:  # many clusters have no accounts
        return {}
    found = {}
    for line in text.splitlines():  # of a job that was put back into the queue, the last one counts
        job_id, state, nodes = line.split("|")
        found[job_id] = Job(state.split()[0], {"NodeList": nodes})
    return found


def look(runs: Sequence[tuple[RunDir, RunRecord]]) -> list[Sighting]:
    """Return what Slurm says about the jobs of runs."""
    ids = [_read_job_id(run) for run, _ in runs]
    try:
        jobs = jobs_now([job_id for job_id in ids if job_id is not None])
    except NoAnswerError as error:
        jobs, silent = {}, f"Slurm does not answer ({error}); this is how the run stood when it was last seen"
    else:
        silent = ""
    sightings = []
    for job_id in ids:
        if job_id is None:
            sightings.append(Sighting(live=False, state="lost", detail="it has no job in Slurm"))
        elif silent:
            sightings.append(Sighting(live=True, detail=silent, answered=False, facts=(("Slurm job", job_id),)))
        else:
            sightings.append(_sighting(job_id, jobs.get(job_id)))
    return sightings


def _sighting(job_id: str, job: Job | None) -> Sighting:
    facts = [("Slurm job", job_id)]
    if job is None:
        forgotten = f"Slurm does not know job {job_id} any more"
        return Sighting(live=False, state="lost", detail=forgotten, facts=tuple(facts))
    if nodes := job.field("NodeList"):
        facts.append(("nodes", nodes))
    if excluded := job.field("ExcNodeList"):
        facts.append(("excluded", excluded))
    state = job.state.split()[0] if job.state else ""
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        waiting = why_waiting(job)
        return Sighting(live=True, state="submitted", detail=waiting, facts=tuple(facts))
    if state in ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING", "STOPPED"):
        return Sighting(live=True, detail=f"its job is {state.lower()}", facts=tuple(facts))
    ended, reason = _ENDED.get(state, ("lost", f"its job ended as {state}"))
    if job.field("Reason") == "DependencyNeverSatisfied":
        reason = "not started: a run that it was to follow did not finish"
    return Sighting(live=False, state=ended, detail=reason, facts=tuple(facts))


def why_waiting(job: Job) -> str:
    """Return in plain words why a job does not run."""
    reason = job.fields.get("Reason", "None")
    word = re.split(r"[,_ (]", reason)[0]
    if word.startswith(("QOS", "Assoc")) or word in ("MaxJobsPerAccount", "AssocGrpGRES"):
        plain = "a limit of the account or quality of service is reached"
    else:
        plain = _WAITING.get(word, "")
    start = job.field("StartTime")
    expected = (
        f"; expected to start at {start.replace('T', ' ')}" if start and word in ("Resources", "Priority") else ""
    )
    return f"waiting: {plain} ({reason}){expected}" if plain else f"waiting: {reason}{expected}"


def cancel(run: RunDir, record: RunRecord) -> None:
    """Ask the supervisor, where one runs, to save and stop; take a job that waits out of the queue."""
    run.cancel_request.touch()
    job_id = _read_job_id(run)
    if job_id is None:
        return
    try:
        ask("scancel", "--state=PENDING", job_id)
    except NoAnswerError as error:
        if "Invalid job id" in str(error):  # it runs, or has ended
            return
        raise UserError(
            f"Slurm does not answer ({error}); the run's supervisor, if it runs, will find the request"
        ) from error


def stop_seconds(record: RunRecord) -> float:
    """Return the time that processes have to save, and some for whoever sees to them."""
    return float(record.submissions[-1].plan.settings["grace_seconds"]) + 30


def release(run: RunDir, record: RunRecord) -> None:
    """Return at once: a job that has ended holds no nodes."""
