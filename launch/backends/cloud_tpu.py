"""The `cloud_tpu` backend: each run rents its TPU as a queued resource, and gives it back at its end.

Three programs take part, and meet in the run directory: the agent of each VM with the supervisor beside the first
(`cloud_tpu_vm`, `cloud_tpu_supervisor`), which need no launcher once the VMs are up, and a watcher (`cloud_tpu_watch`),
which rents another TPU when one is preempted or lost. What the API calls ACTIVE only means that the VMs exist (and are paid
for): how the job is, the run directory says.

Submission goes through XManager (`launch.xm`): a sweep is one experiment, each of its runs a work unit.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from launch import lease
from launch.backends import Sighting
from launch.backends.cloud_tpu_api import (
    API,
    ENDPOINT,
    REQUEST,
    RUN_DIR,
    WAITING,
    NoAnswerError,
    Resource,
    StillThereError,
    Tpus,
    queued_resource,
    resource_id,
)
from launch.config import CloudTpuCluster
from launch.errors import UserError, warn_once
from launch.objects import is_object, unreachable
from launch.plan import Plan, masked, scrubbed
from launch.record import RunRecord, State
from launch.run_dir import RunDir, read_json, write_atomically, written
from launch.shipping import log_here
from launch.snapshot import fetch_code
from launch.text import printable

# How long a question that a person waits for may take.
QUERY_SECONDS = 5.0
# How long a TPU may take to be deleted.
RELEASE_SECONDS = 300.0
# A watcher on another machine that has not renewed its claim for this long is gone.
STALE_SECONDS = 120.0

_PLAIN = {
    "CREATING": "its request has just been made",
    "ACCEPTED": "its request is accepted",
    "WAITING_FOR_RESOURCES": "it waits for capacity",
    "PROVISIONING": "its VMs are being made",
    "ACTIVE": "its VMs are there",
    "SUSPENDING": "its VMs are being taken away",
    "SUSPENDED": "its VMs were taken away",
    "FAILED": "Cloud TPU could not provide it",
    "DELETING": "its VMs are being deleted",
}


@dataclass(frozen=True)
class Leaving:
    """Why a resource is being replaced; the budget that this counts for (None: no budget); whether to try the next zone."""

    why: str
    counts: Literal["preempted", "failed"] | None = None
    other_zone: bool = False


@dataclass(frozen=True)
class Rented:
    """A queued resource of a run, as `cloud_tpu/resource.json` has it.

    Attributes:
        number: how many there have been for this run.
        created: when it was asked for, in Unix seconds.
        made: whether the API has confirmed it.
        spent: how many were replaced since the submission, by the budget that they count for.
        leaving: set once it is being replaced.
    """

    id: str
    zone: str
    number: int
    created: float
    made: bool = False
    spent: dict[str, int] = field(default_factory=dict)
    leaving: Leaving | None = None


def read_resource(run: RunDir) -> Rented | None:
    """Return the newest resource of a run, None before there is one.

    Raises:
        UserError: what was written down of it is damaged; it must not be taken for none.
    """
    noted = read_json(run.tpu_resource)
    if noted is None and not run.tpu_resource.exists():
        return None
    try:
        return TypeAdapter(Rented).validate_python(noted)
    except ValidationError as error:
        raise UserError(
            f"{run.tpu_resource}: damaged: {error.errors()[0]['msg']}; `gcloud compute tpus queued-resources list` shows "
            "what is rented"
        ) from error


def write_resource(run: RunDir, rented: Rented) -> None:
    """Write down which resource is the run's."""
    run.tpu_resource.parent.mkdir(exist_ok=True)
    write_atomically(run.tpu_resource, json.dumps(dataclasses.asdict(rented)))


def first_resource(run: RunDir, settings: CloudTpuCluster, last: Rented | None) -> Rented:
    """Return what a new submission of a run rents first, after what earlier ones have rented last. Its number is new: of
    VMs by an old name it stands in the run directory that they have nothing more to do."""
    folder = run.root / "cloud_tpu"
    there = unreachable(run.root.parent) is None and folder.is_dir()  # for a dry run it does not have to be reached
    tails = [path.name.rpartition("-")[2] for path in folder.iterdir()] if there else []
    number = 1 + max([last.number if last else 0, *(int(tail) for tail in tails if tail.isdecimal())])
    return Rented(resource_id(str(run.root), number), settings.zone[0], number, time.time())


def next_resource(run: RunDir, settings: CloudTpuCluster, last: Rented) -> Rented:
    """Return what to rent in the place of a resource that is left."""
    assert last.leaving is not None
    number, spent, counts = last.number + 1, dict(last.spent), last.leaving.counts
    if counts:
        spent[counts] = spent.get(counts, 0) + 1
    place = settings.zone.index(last.zone) if last.zone in settings.zone else 0
    zone = settings.zone[(place + last.leaving.other_zone) % len(settings.zone)]
    return Rented(resource_id(str(run.root), number), zone, number, time.time(), spent=spent)


def rent(plan: Plan, settings: CloudTpuCluster, rented: Rented) -> None:
    """Ask for a resource, after writing down which. To do it again is to do it once.

    Raises:
        UserError: the API refuses the request.
        NoAnswerError: it does not answer; whether the resource exists is not known, and its name stands in the run directory.
    """
    run = RunDir.at(plan.run_dir)
    write_resource(run, rented)
    request = queued_resource(settings, rented.zone, rented.id, metadata_for(plan, settings, rented), _labels(plan))
    try:
        Tpus(settings.project).create(rented.zone, rented.id, request)
    except UserError:
        run.tpu_resource.unlink(missing_ok=True)  # there is none, or it is not this one
        raise
    write_resource(run, dataclasses.replace(rented, made=True))
    fields = {"resource": rented.id, "zone": rented.zone, "type": settings.accelerator_type}
    run.append_event("tpu_requested", max(run.attempts(), default=0) + 1, **fields)


def metadata_for(plan: Plan, settings: CloudTpuCluster, rented: Rented) -> dict[str, str]:
    """Return the metadata of a run's VMs: what boots them, and which run they are for."""
    return {
        "startup-script": startup_script(plan, settings, rented),
        RUN_DIR: plan.run_dir,
        REQUEST: request_digest(plan),
    }


def request_digest(plan: Plan) -> str:
    """Return what tells the TPUs of a plan from those of all others: the same for whoever asks, with whatever launcher."""
    asked = json.dumps([plan.run_dir, plan.argv, masked(plan).settings], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def startup_script(plan: Plan, settings: CloudTpuCluster, rented: Rented) -> str:
    """Return the script that every VM runs at every boot."""
    code, log = "", ""
    resource = f"projects/{settings.project}/locations/{rented.zone}/queuedResources/{rented.id}"
    if is_object(root := RunDir.at(plan.run_dir).root):
        code = f"/storage/v1/b/{root.bucket}/o/{quote(f'{root.key}/code/{plan.code.hash}.tar.gz', safe='')}?alt=media"
        name = quote(f"{root.key}/cloud_tpu/{rented.id}/startup-", safe="")
        log = f"/upload/storage/v1/b/{root.bucket}/o?uploadType=media&name={name}"
    values = {
        "run_dir": plan.run_dir,
        "code_url": code,
        "log_url": log,
        "give_back_url": f"{os.environ.get(ENDPOINT, API)}/v2/{resource}?force=true",
        "resource": rented.id,
        "code": plan.code.hash,
        "vm_dir": settings.vm_dir,
        "python": settings.python or "",
    }
    exports = {name: os.environ[name] for name in (ENDPOINT,) if name in os.environ}
    lines = ["#!/bin/bash", *(f"{name}={shlex.quote(value)}" for name, value in values.items())]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    # Each line for itself, so that one with a mistake fails and does not make the script around it unreadable.
    lines += [
        "run_setup() {",
        *(f"    eval {shlex.quote(line)} || return 1" for line in settings.setup),
        "    :",
        "}",
        "",
    ]
    return "\n".join(lines) + Path(__file__).with_name("cloud_tpu_startup.sh").read_text()


def _labels(plan: Plan) -> dict[str, str]:
    return {"jasmine": re.sub(r"[^a-z0-9_-]+", "-", plan.run.lower())[:63]}


# --- what every backend has to offer --------------------------------------------------------------------------------


def preview(plans: Sequence[Plan]) -> str:
    """Return the requests as YAML: what is sent to the API, with the VMs' startup script in it."""
    import yaml
    from google.cloud import tpu_v2
    from google.protobuf import json_format

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as such."""

    Dumper.add_representer(
        str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
    )
    shown = []
    for plan in plans:
        run, settings = RunDir.at(plan.run_dir), _settings(plan)
        last = read_resource(run) if unreachable(run.root.parent) is None else None
        rented = first_resource(run, settings, last)
        metadata = metadata_for(plan, settings, rented)
        request = queued_resource(settings, rented.zone, rented.id, metadata, _labels(plan))
        body = json_format.MessageToDict(tpu_v2.QueuedResource.pb(request))
        parent = f"projects/{settings.project}/locations/{rented.zone}"
        call = {"POST": f"/v2/{parent}/queuedResources?queuedResourceId={rented.id}", "body": body}
        header = f"# {plan.run}: {shape(plan)}; {_billed(settings)}\n# {_one_line(plan)}\n"
        shown.append(header + yaml.dump(call, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6))
    return "---\n".join(shown)


def _one_line(plan: Plan) -> str:
    return printable(shlex.join(["job:", plan.job, *plan.arguments])).replace("\n", "\\n")


def submit(plans: Sequence[Plan], locks: Sequence[int]) -> str:
    """Rent a TPU for each run that waits for no other, and start the watchers; an experiment of XManager for all of them."""
    from launch.xm import launch_planned

    if "$" in (project := plans[0].settings["project"]):
        raise UserError(f"project: {project} is not set: export it, or give the project with --set project=NAME")
    for plan in plans:
        pack_code(plan)
    launch_planned(plans)
    settings = _settings(plans[0])
    first = read_resource(RunDir.at(plans[0].run_dir))
    what = (
        f"queued resource {first.id} in {first.zone}"
        if first
        else f"a TPU once {', '.join(plans[0].after)} has finished"
    )
    more = f" and {len(plans) - 1} more" if len(plans) > 1 else ""
    return f"{what}{more}; {_billed(settings)}"


def pack_code(plan: Plan) -> None:
    """Store the run's code as the tarball that the VMs fetch; in Cloud Storage it is one already."""
    if is_object(plan.code_dir):
        return
    target = plan.code_dir.with_name(f"{plan.code.hash}.tar.gz")
    if target.exists():
        return
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(plan.code_dir, arcname=".")
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(target)


def start(plan: Plan) -> None:
    """Rent the TPU of a run that is on record, unless it waits for others, and start its watcher.

    Raises:
        UserError: the API refuses, or does not answer.
    """
    run, settings = RunDir.at(plan.run_dir), _settings(plan)
    old = read_resource(run)
    try:
        if old is not None and (found := Tpus(settings.project).get(old.zone, old.id)) and found.state != "DELETING":
            run.fence_off_earlier_attempts()
            Tpus(settings.project).delete(old.zone, old.id)  # of an earlier submission, which has ended
        if plan.after:
            run.tpu_resource.unlink(missing_ok=True)  # the watcher begins with the first one of this submission
        else:
            rent(plan, settings, first_resource(run, settings, old))
    except StillThereError as error:
        raise UserError(f"Cloud TPU still has what an earlier run of that name rented: {error}; try again") from error
    except NoAnswerError as error:
        raise UserError(f"Cloud TPU does not answer: {error}") from error
    start_watcher(run, plan.code_dir)


def give_back(plans: Sequence[Plan]) -> None:
    """Delete what has been rented for runs that could not all be started; what may be left is told."""
    for plan in plans:
        rented = None
        try:
            if (rented := read_resource(RunDir.at(plan.run_dir))) is not None:
                Tpus(_settings(plan).project).delete(rented.zone, rented.id)
        except (NoAnswerError, UserError, OSError) as error:
            what = f"{rented.id} in {rented.zone}" if rented else f"the TPU of run {plan.run!r}"
            warn_once(f"{what} may be left, `jobs.py gc` shows it: {error}")


def start_watcher(run: RunDir, code_dir: Path) -> None:
    """Start a watcher of a run, detached from this terminal, from the run's own code. It holds the run from now on."""
    here = fetch_code(code_dir)
    script = here / "launch" / "backends" / "cloud_tpu_watch.py"
    claim = uuid.uuid4().hex
    with log_here(run.watcher_log).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(run.root), claim],
            cwd=here,
            env=scrubbed(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    write_claim(run, claim, process.pid)
    process.returncode = 0  # it is meant to outlive us: no warning about a child that still runs


def write_claim(run: RunDir, id: str, pid: int) -> None:
    """Write down that a process of this machine watches a run."""
    claim = {"id": id, "host": socket.gethostname(), "pid": pid, "started": _process_start(pid)}
    write_atomically(run.watcher, json.dumps(claim))


def shape(plan: Plan) -> str:
    """Return chips and VMs of a run, for people."""
    settings = _settings(plan)
    slices = f"{settings.slices} slices, each " if settings.slices > 1 else ""
    return f"{slices}{settings.accelerator_type}: {settings.tpu.description}"


def _billed(settings: CloudTpuCluster) -> str:
    chips = settings.slices * settings.tpu.chips
    kind = {"on-demand": "on demand", "spot": "as spot", "reserved": f"from reservation {settings.reservation}"}
    return f"{chips} chips billed {kind[settings.provisioning]} from when they are ACTIVE until the run ends"


def look(runs: Sequence[tuple[RunDir, RunRecord]]) -> list[Sighting]:
    """Return how the queued resources of runs and their watchers are; a zone is asked once, however many runs are there."""
    settings = [CloudTpuCluster.model_validate(record.submissions[-1].plan.settings) for _, record in runs]
    noted = [_read_resource(run) for run, _ in runs]
    rented = [None if isinstance(one, str) else one for one in noted]
    places = {(one.project, held.zone) for one, held in zip(settings, rented, strict=True) if held}
    known: dict[tuple[str, str], dict[str, Resource] | str] = {}
    silent = ""
    for project, zone in sorted(places):
        ids = [h.id for s, h in zip(settings, rented, strict=True) if h and (s.project, h.zone) == (project, zone)]
        try:
            known[project, zone] = silent or _resources(project, zone, ids)
        except (NoAnswerError, UserError) as error:
            silent = str(error)
            known[project, zone] = silent
    return [
        Sighting(live=True, detail=held, answered=False)
        if isinstance(held, str)
        else _sighting(run, record, one, held, known[one.project, held.zone] if held else "")
        for (run, record), one, held in zip(runs, settings, noted, strict=True)
    ]


def _read_resource(run: RunDir) -> Rented | str | None:
    """As `read_resource`, with the message of its error in place of the error."""
    try:
        return read_resource(run)
    except UserError as error:
        return str(error)


def _resources(project: str, zone: str, ids: Sequence[str]) -> dict[str, Resource]:
    tpus = Tpus(project)
    if len(ids) == 1:
        found = tpus.get(zone, ids[0], patience=QUERY_SECONDS)
        return {ids[0]: found} if found else {}
    return {one.id: one for one in tpus.list(zone, patience=QUERY_SECONDS)}


def _sighting(
    run: RunDir, record: RunRecord, settings: CloudTpuCluster, rented: Rented | None, known: dict[str, Resource] | str
) -> Sighting:
    """Return how a run is, given the resources in the zone of its TPU, or why they are not known."""
    watcher = watched_by(run)
    facts = [("watcher", f"process {watcher['pid']} on {watcher['host']}" if watcher else "none")]
    if rented is not None:
        facts.append(("TPU", f"{rented.id} ({settings.accelerator_type}) in {rented.zone}"))

    def seen(live: bool, state: State | None, detail: str, *, answered: bool = True, holds: bool = False) -> Sighting:
        return Sighting(live, state, detail, answered, tuple(facts), holds)

    if rented is None:
        after = ", ".join(record.submissions[-1].plan.after)
        if watcher:
            return seen(True, "submitted", f"waiting for {after} to finish" if after else "")
        return seen(False, "lost", "it never got a TPU, and nothing watches it")
    if isinstance(known, str):
        detail = f"Cloud TPU does not answer ({known}); this is how the run stood when it was last seen"
        return seen(True, None, detail, answered=False)
    found = known.get(rented.id)
    if found is None and run.cancel_request.exists() and not watcher:
        return seen(False, "cancelled", "its TPU was deleted before the job began or could save")
    if found is not None and found.state in WAITING:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.created or rented.created))
        return seen(True, "submitted", f"waiting since {since}: {_PLAIN[found.state]} ({found.state})")
    if found is not None and found.state in ("ACTIVE", "SUSPENDING"):
        vms = settings.slices * settings.tpu.hosts
        up = sum(run.tpu_vm(rented.id, vm).exists() for vm in range(vms))
        return seen(True, None, f"{_PLAIN[found.state]} ({found.state}), {up} of {vms} VMs have come up")
    what = f"{_PLAIN[found.state]} ({found.state})" if found else "its TPU is gone"
    if found is not None and found.error:
        what += f": {found.error}"
    if rented.leaving is not None:
        what = rented.leaving.why
    if found is not None and found.state in ("SUSPENDED", "FAILED") and run.cancel_request.exists() and not watcher:
        return seen(False, "cancelled", what)
    if watcher:
        return seen(True, "submitted", f"{what}; its watcher sees to another one")
    if found is not None and found.state == "DELETING":
        return seen(True, None, what)
    lost = f"{what}, and nothing watches it: `jobs.py watch {run.name}` rents another one"
    if found is not None:
        lost += f", `jobs.py cancel {run.name}` only gives it back"
    return seen(False, "lost", lost, holds=found is not None)


def cancel(run: RunDir, record: RunRecord) -> None:
    """Ask the run to save and stop; VMs that live give the TPU back themselves, any other TPU is deleted here."""
    settings = CloudTpuCluster.model_validate(record.submissions[-1].plan.settings)
    run.cancel_request.touch()
    rented = read_resource(run)
    if rented is None:
        return
    tpus = Tpus(settings.project)
    asked, beat = written(run.cancel_request), written(run.tpu_vm(rented.id, 0))
    lives = asked is not None and beat is not None and asked - beat < settings.silent_timeout
    try:
        found = tpus.get(rented.zone, rented.id)
        if found is not None and not (found.state == "ACTIVE" and lives):
            tpus.delete(rented.zone, rented.id)
    except NoAnswerError as error:
        raise UserError(
            f"Cloud TPU does not answer ({error}); the request is noted, and its watcher or its VMs will find it"
        ) from error


def stop_seconds(record: RunRecord) -> float:
    """Return the time that VMs have to save, and Cloud TPU to delete a resource that has none to save."""
    return float(record.submissions[-1].plan.settings["grace_seconds"]) + 30 + RELEASE_SECONDS


def release(run: RunDir, record: RunRecord) -> None:
    """Return once the run's TPU is gone."""
    rented = read_resource(run)
    project = record.submissions[-1].plan.settings["project"]
    try:
        if rented is None or Tpus(project).delete(rented.zone, rented.id, wait=RELEASE_SECONDS):
            return
    except NoAnswerError as error:
        raise UserError(f"{rented.id if rented else run.name}: Cloud TPU does not answer: {error}") from error
    raise UserError(f"{rented.id} in {rented.zone} is still being deleted; `jobs.py gc` shows whether it stays")


# --- who watches --------------------------------------------------------------------------------------


def watched_by(run: RunDir) -> dict[str, Any] | None:
    """Return who watches a run (`host`, `pid`), None where nobody does."""
    claim = read_json(run.watcher)
    if claim is None:
        return None
    if claim["host"] == socket.gethostname():
        with contextlib.suppress(OSError, IndexError):
            return claim if _process_start(int(claim["pid"])) == int(claim["started"]) else None
        return None
    if (renewed := written(run.watcher)) is None:
        return None
    by_the_same_clock = lease.now(run.root) if is_object(run.root) else time.time()
    return claim if by_the_same_clock - renewed < STALE_SECONDS else None


def _process_start(pid: int) -> int:
    """Return when a process was started, in the kernel's ticks, -1 for one that has ended and that nobody has asked about; it
    tells processes of one id apart."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return -1 if state in "ZX" else int(fields[18])


def _settings(plan: Plan) -> CloudTpuCluster:
    return CloudTpuCluster.model_validate(plan.settings)
