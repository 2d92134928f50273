"""Supervises a run from VM 0 of its TPU: attempt after attempt on the same VMs, for as long as they are there.

A crash costs seconds and not the TPU: what a v5litepod-256 costs in waiting is paid once. What ends the run, or shows that
these VMs will not do, ends with `over.json`: the agents then give the TPU back, so that a launcher that is switched off leaks
nothing.
Invariants:

- While its resource is ACTIVE this process alone changes the record; once the resource is suspended or gone, the watcher does
  (`launch.backends.cloud_tpu_watch`), after it has fenced off what may still live here.
- It believes exit files, and that a VM is gone when its sign of life has another start, or stops changing; it never compares
  the clocks of two machines.
- It may be killed at any moment and started again: an attempt without an outcome is settled before the next one begins.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    # As a script, Python puts this file's directory first; what it imports starts two levels up.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.backends.cloud_tpu_vm import BEAT_SECONDS, OBJECT_BEAT_SECONDS
from launch.backends.local import FAILURE_GRACE_SECONDS
from launch.config import CloudTpuCluster
from launch.objects import be_patient, in_parallel, is_object
from launch.outcome import Ask, kind, outcome
from launch.outcome import ending as ending_after
from launch.plan import Plan
from launch.record import ACTIVE, Attempt, HostExit, RunRecord, State, Supervisor, read_record, write_record
from launch.run_dir import RunDir, read_json, write_atomically
from launch.shipping import Shipper
from launch.supervision import collect_exits, find_hang, has_progressed, note_exit, watchdog_of
from launch.watchdog import Hang, Silence
from launch.worker import EXIT_SAVED, die_with_parent

POLL_SECONDS = 0.5
# When a VM is gone the others hang in a collective with it, and have nothing to say about why.
LOST_GRACE_SECONDS = 2.0
LOOK_SECONDS = 2.0
STACKS_SECONDS = 4.0
# Between attempts, doubled with every failure in a row, and drawn at random around that.
RESTART_SECONDS, MOST_RESTART_SECONDS = 1.0, 60.0


def main() -> int:
    """Supervise the run until it has ended or its VMs are of no more use."""
    die_with_parent(signal.SIGKILL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=RunDir.at, required=True)
    parser.add_argument("--resource", required=True)
    options = parser.parse_args()
    be_patient()
    run: RunDir = options.run_dir
    log = Shipper(run.supervisor_log)
    try:
        return _supervise(run, options.resource)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        log.close()


def _supervise(run: RunDir, resource: str) -> int:
    record = read_record(run)
    if record is None or not record.submissions:
        return 1
    if (over := run.tpu_over(resource)).exists():
        return 0
    why: str = record.state
    if record.state in ACTIVE:  # else an earlier supervisor has ended the run, and was killed
        settings = CloudTpuCluster.model_validate(record.submissions[-1].plan.settings)
        why = _Supervisor(run, record, record.submissions[-1].plan, settings, resource).run_to_the_end()
    write_atomically(over, json.dumps({"why": why, "reason": record.reason, "time": time.time()}))
    return 0


class _Vms:
    """Which of the VMs live, by their signs of life."""

    def __init__(self, run: RunDir, resource: str, count: int, silent_seconds: float) -> None:
        self.run, self.resource, self.count, self.silent_seconds = run, resource, count, silent_seconds
        self._beats: dict[int, dict[str, Any]] = {}
        self._silences = [Silence() for _ in range(count)]

    def living(self) -> dict[int, str]:
        """Return the start of each VM that lives, if only to save what it can before it goes down."""
        paths = [self.run.tpu_vm(self.resource, vm) for vm in range(self.count)]
        found = enumerate(in_parallel(read_json, paths, of=self.run.root))
        self._beats |= {vm: beat for vm, beat in found if beat is not None}
        pause = 1.5 * MOST_RESTART_SECONDS
        silent = {vm: self._silences[vm].seconds(beat, pause) for vm, beat in self._beats.items()}
        return {vm: str(beat["start"]) for vm, beat in self._beats.items() if silent[vm] < self.silent_seconds}

    def usable(self) -> dict[int, str]:
        """Return the start of each VM that lives and is not going down."""
        return {vm: start for vm, start in self.living().items() if not self._beats[vm]["going_down"]}

    def names(self) -> list[str]:
        """Return the hosts' own names, in order."""
        return [str(self._beats[vm]["host"]) if vm in self._beats else "?" for vm in range(self.count)]


class _Supervisor:
    def __init__(self, run: RunDir, record: RunRecord, plan: Plan, settings: CloudTpuCluster, resource: str) -> None:
        self.run, self.record, self.plan, self.settings, self.resource = run, record, plan, settings, resource
        beat_seconds = OBJECT_BEAT_SECONDS if is_object(run.root) else BEAT_SECONDS
        self.vms = _Vms(run, resource, len(plan.hosts), max(settings.silent_timeout, 3 * beat_seconds))
        self.hosts = [host.index for host in plan.hosts]
        self.asked: Ask | None = None
        self.number: int | None = None
        self.in_a_row = 0  # failures

    def run_to_the_end(self) -> str:
        """Make attempts; return why there are no more here: the state that the run ended in, or "replace"."""
        self._settle_earlier_attempt()
        self.run.append_event("scheduled", self._next_number(), resource=self.resource)
        while True:
            starts = self._gather()
            if starts is None:
                return "replace"
            if self.run.cancel_request.exists():
                return self._end("cancelled", EXIT_SAVED)
            size = self.run.metrics_size()
            attempt = self._begin(starts)
            lost = self._see_to_the_end(attempt, starts)
            attempt.ended = time.time()
            if attempt.outcome is None:
                attempt.outcome = outcome(attempt.exits)
            if (blamed := self.run.blame(attempt.number)) and attempt.cause is None:
                attempt.cause = str(blamed.get("reason"))
            if lost and attempt.outcome == "failed":
                attempt.outcome = "preempted"  # no failure of the job: it does not count as one
            if attempt.outcome == "preempted":
                self.run.append_event("preempted", attempt=attempt.number, cause=attempt.cause)
            if (end := self._follow(attempt, progress=has_progressed(self.run, attempt, size))) is not None:
                return end

    # --- an attempt --------------------------------------------------------------------------------------------

    def _gather(self) -> dict[int, str] | None:
        """Wait until all VMs live; None if some do not come up in time."""
        missing_for = Silence()  # storage that is away is no fault of theirs
        while True:
            starts = self.vms.usable()
            if len(starts) == len(self.plan.hosts):
                return starts
            if self._is_replaced():
                self._leave()
            if self.run.cancel_request.exists():
                return starts
            if missing_for.seconds("some") > self.settings.boot_timeout:
                missing = [vm for vm in range(len(self.plan.hosts)) if vm not in starts]
                self.record.reason = f"VM {missing[0]} of its TPU does not come up ({len(missing)} missing)"
                self.run.append_event("vm_missing", self._next_number(), resource=self.resource, hosts=missing)
                self._write("submitted")
                return None
            time.sleep(POLL_SECONDS)

    def _next_number(self) -> int:
        return max([self.plan.first_attempt - 1, *self.run.attempts()]) + 1

    def _begin(self, starts: dict[int, str]) -> Attempt:
        number = self._next_number()
        attempt = Attempt(
            number=number,
            processes=len(self.plan.hosts),
            devices_per_process="auto",
            devices=f"{self.settings.tpu.chips_per_host} {self.settings.tpu.generation.name}",
            code=self.plan.code.hash,
            nodes=self.vms.names(),
            started=time.time(),
        )
        self.record.supervisor = Supervisor(host=attempt.nodes[0], pid=os.getpid())
        self.record.attempts.append(attempt)
        self.record.reason = None
        self.run.begin_attempt(number)
        self.number = number
        self._write("running")
        self.run.append_event(
            "attempt_started",
            attempt=number,
            processes=len(self.plan.hosts),
            resource=self.resource,
            nodes=attempt.nodes,
        )
        go = {"resource": self.resource, "starts": {str(vm): start for vm, start in starts.items()}}
        write_atomically(self.run.go_file(number), json.dumps(go))
        return attempt

    def _see_to_the_end(self, attempt: Attempt, starts: dict[int, str]) -> bool:
        """Collect exits until every process has ended or its VM is lost; return whether a VM was lost."""
        waiting = set(self.hosts)
        watchdog = watchdog_of(self.run, self.plan, attempt.number)
        look_at, kill_at = 0.0, None
        told = lost_any = False
        while waiting:
            time.sleep(POLL_SECONDS)
            ended = collect_exits(self.run, attempt, waiting)
            now = time.monotonic()
            if now > look_at:
                look_at = now + LOOK_SECONDS
                if self._is_replaced():
                    self._leave()
                living = self.vms.living()
                if lost := [vm for vm in sorted(waiting) if living.get(vm) != starts[vm]]:
                    lost_any = True
                    self._lose(attempt, lost, waiting)
                    ended = True
                if kill_at is None and (hang := find_hang(self.run, attempt, self.hosts, watchdog)):
                    self._give_up(attempt, hang, waiting)
                    break
            if self.asked is None and self.run.cancel_request.exists():
                self.asked = "cancel"
            if self.asked and not told:
                told, kill_at = True, now + self.settings.grace_seconds
                self.run.append_event("signalled", attempt=attempt.number, signal="SIGTERM", why=self.asked)
                self.run.ask_file(attempt.number, "leave").touch()
            if ended and waiting:
                broken = any(kind(one) in ("failed", "stopped") for one in attempt.exits)
                grace = FAILURE_GRACE_SECONDS if broken else self.settings.grace_seconds
                limit = now + (LOST_GRACE_SECONDS if lost_any else grace)
                kill_at = limit if kill_at is None else min(kill_at, limit)
            if kill_at is not None and now > kill_at:
                self._kill(attempt, waiting)
        collect_exits(self.run, attempt, waiting)
        for host in sorted(waiting):  # its VM did not even say that it has killed it
            note_exit(self.run, attempt, _killed(host, on_purpose=True))
        return lost_any

    def _lose(self, attempt: Attempt, lost: list[int], waiting: set[int]) -> None:
        attempt.cause = f"VM {lost[0]} ({attempt.nodes[lost[0]]}) was rebooted or is gone"
        for vm in lost:
            waiting.discard(vm)
            note_exit(self.run, attempt, _killed(vm, on_purpose=False))
        self.run.append_event("vm_lost", attempt=attempt.number, hosts=lost, nodes=[attempt.nodes[vm] for vm in lost])

    def _kill(self, attempt: Attempt, waiting: set[int]) -> None:
        self.run.append_event("killed", attempt=attempt.number, hosts=sorted(waiting))
        self.run.ask_file(attempt.number, "kill").touch()
        deadline = time.monotonic() + 10
        while waiting and time.monotonic() < deadline:
            time.sleep(0.1)
            collect_exits(self.run, attempt, waiting)
        for host in sorted(waiting):
            note_exit(self.run, attempt, _killed(host, on_purpose=True))
        waiting.clear()

    def _give_up(self, attempt: Attempt, hang: Hang, waiting: set[int]) -> None:
        """End an attempt that hangs, after its processes have written where they are."""
        node = attempt.nodes[hang.host] if hang.host is not None else None
        attempt.outcome, attempt.cause = "failed", hang.reason + (f", on {node}" if node else "")
        attempt.first_failed = hang.host if hang.host is not None else min(waiting)
        self.run.append_event("hang", attempt=attempt.number, host=hang.host, node=node, reason=hang.reason)
        self.run.append_event("failed", attempt=attempt.number, host=hang.host, node=node, cause=attempt.cause)
        self.run.ask_file(attempt.number, "stacks").touch()
        time.sleep(STACKS_SECONDS)
        self._kill(attempt, waiting)

    # --- what follows ------------------------------------------------------------------------------------------

    def _follow(self, attempt: Attempt, *, progress: bool) -> str | None:
        """Write down what becomes of the run; return why there are no more attempts, None if there is another."""
        assert attempt.outcome is not None
        limits = {
            "failed": ("max_failures", self.settings.max_failures),
            "preempted": ("max_preemptions", self.settings.max_preemptions),
            "finished": ("", None),
        }
        before = [one for one in self.record.attempts[:-1] if one.number >= self.plan.first_attempt]
        spent = sum(one.outcome == attempt.outcome for one in before)
        end = ending_after(attempt, asked=self.asked, progress=progress, spent=spent, budget=limits[attempt.outcome])
        if end is not None:
            return self._end(end.state, end.code, end.reason)
        self.record.reason = (
            f"attempt {attempt.number} {attempt.outcome}: {attempt.cause or 'goes on from its last checkpoint'}"
        )
        self._write("submitted")
        self.run.append_event("restarted", attempt=attempt.number + 1, after=attempt.outcome, used=spent + 1)
        self.in_a_row = 0 if progress or attempt.outcome != "failed" else self.in_a_row + 1
        pause = min(MOST_RESTART_SECONDS, RESTART_SECONDS * 2**self.in_a_row) * random.uniform(0.5, 1.5)
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not self.run.cancel_request.exists():
            time.sleep(POLL_SECONDS)
        return None

    def _settle_earlier_attempt(self) -> None:
        """Give an attempt whose supervisor was killed, with its VM or without it, an outcome."""
        for attempt in self.record.attempts:
            if attempt.outcome is None:
                attempt.ended, attempt.outcome, attempt.cause = time.time(), "preempted", self._why_lost(attempt)
                self.run.append_event("preempted", attempt=attempt.number, cause=attempt.cause)
                self.run.fence_off_earlier_attempts()  # their processes leave, on all VMs

    def _why_lost(self, attempt: Attempt) -> str:
        """Return what has become of the supervisor of an attempt: where the agent of VM 0 is the one that it was told of, and
        only that, then nothing else has happened."""
        go, beat = read_json(self.run.go_file(attempt.number)), read_json(self.run.tpu_vm(self.resource, 0))
        if go is None or beat is None or go["resource"] != self.resource:
            return "its supervisor is gone"
        return "its supervisor was killed" if go["starts"].get("0") == beat["start"] else "VM 0 was rebooted"

    def _is_replaced(self) -> bool:
        """Return whether somebody else has begun, or is about to begin, another attempt; or this TPU is not the run's."""
        resource = read_json(self.run.tpu_resource)
        newest = self.number if self.number is not None else max(self.run.attempts(), default=0) + 1
        return self.run.newest_attempt() > newest or (resource is not None and resource["id"] != self.resource)

    def _leave(self) -> NoReturn:
        print(f"the run goes on elsewhere; the supervisor on {self.resource} leaves", flush=True)
        sys.exit(1)

    def _write(self, state: State) -> None:
        if self._is_replaced():
            self._leave()
        self.record.state, self.record.changed = state, time.time()
        write_record(self.run, self.record)

    def _end(self, state: State, code: int, reason: str | None = None) -> str:
        self.record.exit_code, self.record.reason = code, reason
        number = self.record.attempts[-1].number if self.record.attempts else self.plan.first_attempt
        event = state if state in ("finished", "cancelled") else "ended"
        self.run.append_event(event, attempt=number, state=state, code=code, reason=reason)
        self._write(state)
        return state


def _killed(host: int, *, on_purpose: bool) -> HostExit:
    """Return the end of a process whose worker could not write it down; on purpose: killed because of another one."""
    stopped = ["SIGKILL"] if on_purpose else []
    return HostExit(host=host, code=137, signal="SIGKILL", forwarded=stopped, ended=time.time())


if __name__ == "__main__":
    sys.exit(main())
