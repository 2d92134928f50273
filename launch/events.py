"""What stands in `events.jsonl`: one schema for what the launcher and the job write, on every backend.

An event is one JSON object on a line: a name, when, where and in which attempt it was written, and the fields of its kind. A
field means the same wherever it stands; null is the same as its absence. The job, which does not import this package, writes
by the same schema; tests hold what real runs write on all backends against it. Readers pass over lines that are not whole,
and over kinds and fields that they do not know: runs outlive the code that wrote them.

Everything else that is told about a run in time (`launch.goodput`, `jobs.py report`) follows from these events.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMMON = ("time", "event", "attempt", "hostname")
"""In every event. `process` is there as well if the job wrote it."""

_NUMBER = (int, float)

FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "time": (_NUMBER, "Unix seconds, by the clock of the machine that wrote it"),
    "event": (str, "the kind"),
    "attempt": (int, "the attempt that it happened in, or that is to come"),
    "hostname": (str, "the machine that wrote it"),
    "process": (int, "the process of the job that wrote it; none: the launcher"),
    "host": (int, "the process that it is about"),
    "hosts": (list, "the processes that it is about"),
    "node": (str, "the machine that it is about, as its cluster calls it"),
    "nodes": (list, "such machines"),
    "cluster": (str, "the cluster's name"),
    "code": (_NUMBER, "an exit code; 128 + the number of the signal that a process died of"),
    "snapshot": (str, "the hash of the code that runs"),
    "job": (str, "the id of a job in the scheduler"),
    "resource": (str, "the id of a queued resource"),
    "zone": (str, "where that is"),
    "type": (str, "its accelerator type"),
    "processes": (int, "how many processes"),
    "devices": (int, "how many devices they have together"),
    "device_kind": (str, "what they are"),
    "mesh": (dict, "the mesh: axis to size"),
    "seconds": (_NUMBER, "how long it took"),
    "restore_seconds": (_NUMBER, "how long reading the checkpoint took"),
    "blocked_seconds": (_NUMBER, "for how long training stood still for it"),
    "step": (int, "updates finished"),
    "spent": (dict, "seconds of this attempt that the process has spent on what, so far (`jasmine.training.pace`)"),
    "bytes": (int, "what each device gave to the all-reduce"),
    "bytes_per_second": (_NUMBER, "what each device sent while it lasted"),
    "all_reduce_seconds": (_NUMBER, "how long an all-reduce over all devices takes"),
    "compute_seconds": (list, "how long each process takes for the same arithmetic on its first device"),
    "bytes_per_device": (int, "memory of the compiled step"),
    "model_flops": (_NUMBER, "FLOPs of a step by the model, over all devices"),
    "begun": (bool, "whether it could be begun"),
    "signal": (str, "the signal's name"),
    "why": (str, "who asked for it, or what it is due to"),
    "cause": (str, "one line on what it is due to"),
    "reason": (str, "one line on why"),
    "blamed": (int, "the process at fault"),
    "after": (str, "how the attempt before ended, or why"),
    "used": (int, "restarts used up of their budget"),
    "of": (int, "that budget"),
    "batch": (int, "the number of a batch; without rollbacks it is the step that takes it, from 0"),
    "action": (str, "what was done about it: stopped, skipped, rolled back"),
    "windows": (list, "the first windows of the batch"),
    "file": (str, "where all that is known of it stands"),
    "back_from": (int, "the step at which it turned back"),
    "left_out": (list, "the batches that no step takes"),
    "state": (str, "the state that the run is in from then on"),
}


@dataclass(frozen=True)
class Kind:
    """One kind of event: what it says, the fields that it always has, and those that it may have."""

    meaning: str
    has: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()


_END = ("state", "code", "reason")

KINDS: dict[str, Kind] = {
    # the launcher: on its way to the machines
    "submitted": Kind("a submission was accepted", ("cluster", "snapshot")),
    "tpu_requested": Kind("a TPU was asked for", ("resource", "zone", "type")),
    "scheduled": Kind("the run has its machines", (), ("job", "resource", "nodes")),
    "vm_missing": Kind("some of the TPU's VMs do not come up", ("resource", "hosts")),
    "attempt_started": Kind("all processes are being started", ("processes",), ("job", "resource", "nodes")),
    # the job: process 0, but for a failed preflight
    "init": Kind("all processes have met and see their devices", ("processes", "devices", "device_kind")),
    "preflight": Kind(
        "the machines are well",
        ("processes", "all_reduce_seconds", "bytes", "bytes_per_second"),
        ("compute_seconds",),
    ),
    "preflight_failed": Kind("a machine is not, or holds up the others", ("reason",), ("blamed", "node")),
    "started": Kind("the job begins at step 0", ("step", "mesh", "processes", "devices")),
    "resumed": Kind("the job goes on from a checkpoint", ("step", "mesh", "processes", "devices"), ("restore_seconds",)),
    "compiled": Kind("the step is compiled", ("seconds", "bytes_per_device", "model_flops")),
    "first_step": Kind("the first step of the attempt is done", ("step", "spent")),
    "step_mark": Kind("once a minute: so far has it come", ("step", "spent")),
    "checkpoint": Kind("a save begins, or could not", ("step", "begun", "blocked_seconds", "spent")),
    "checkpoint_committed": Kind("a save was found to be complete", ("step",)),
    "evaluated": Kind("an evaluation is done; its metrics are `val_…`", ("step", "seconds", "spent")),
    "nonfinite": Kind("a loss or gradient is not finite", ("step", "batch", "cause", "action", "windows", "file")),
    "rolled_back": Kind("the job went back to a checkpoint", ("step", "back_from", "left_out", "spent")),
    "saved": Kind("the state is saved after a signal, and the job leaves", ("step", "spent")),
    # both: the job says at which step, the launcher why, and what becomes of the run
    "signalled": Kind("asked to save and leave", ("signal",), ("why", "step", "spent")),
    "finished": Kind("the job is through; then the run is", (), ("step", "spent", *_END)),
    # the launcher: how an attempt and a run end
    "host_exited": Kind("a process has ended", ("host", "code"), ("node", "signal")),
    "failed": Kind("an attempt has failed; `host` was the first to", ("cause",), ("host", "node", "code", "signal")),
    "preempted": Kind("an attempt was taken from its machines, or all of it saved and left", (), ("cause",)),
    "killed": Kind("processes that did not leave were killed", ("hosts",)),
    "hang": Kind("there are no steps; `host` holds them up, where one stands out", ("reason",), ("host", "node")),
    "vm_lost": Kind("VMs were rebooted or are gone", ("hosts", "nodes")),
    "tpu_gone": Kind("a TPU is given up", ("resource", "zone", "why")),
    "blamed": Kind("a failure is put down to a machine", ("node", "reason")),
    "excluded": Kind("machines are left out of the next attempt", ("nodes",)),
    "restarted": Kind("there is to be another attempt", ("after", "used"), ("of", "resource", "zone")),
    "cancelled": Kind("the run has ended because it was asked to", ("state",), _END),
    "ended": Kind("the run has ended in another way", ("state",), _END),
}  # fmt: skip


def problem(event: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an event by the schema, as one line; None for a right one."""
    name = event.get("event")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return f"no kind of event: {name!r}"
    there = {field: value for field, value in event.items() if value is not None}
    if missing := [field for field in (*COMMON, *kind.has) if field not in there]:
        return f"{name}: has no {missing[0]}"
    for field, value in there.items():
        if name == "evaluated" and field.startswith("val_"):
            right: type | tuple[type, ...] = _NUMBER
        elif field in (*COMMON, "process", *kind.has, *kind.may_have):
            right = FIELDS[field][0]
        else:
            return f"{name}: {field} is no field of it"
        if not isinstance(value, right) or (isinstance(value, bool) and right is not bool):
            return f"{name}: {field} is {value!r}"
    return None
