"""Watches over a run on Cloud TPU from outside: rents its TPU, and another one when that is preempted, lost or refused.

    python launch/jobs.py watch RUN

Submitting starts one, detached. It holds nothing that is not in the run directory, so it may be killed and started again,
on any machine that sees the directory. Invariants:

- One watcher at a time: the holder of `watcher.json`, which it renews. Where two believe that they hold it (their clocks or
  storage are off), they still do the same: which resource is the run's is written down before it is created, and creating
  or deleting one twice is doing it once.
- A resource is replaced only once the API does not know it any more, and after all processes there may be have been fenced
  off; so no two TPUs train the same run.
- It changes the record only when no supervisor can: before the VMs of a resource are up, and after they are gone.
"""

import contextlib
import dataclasses
import os
import random
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # As a script, Python puts this file's directory first; what it imports starts two levels up.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.backends.cloud_tpu import (
    Leaving,
    Rented,
    first_resource,
    next_resource,
    read_resource,
    rent,
    watched_by,
    write_claim,
    write_resource,
)
from launch.backends.cloud_tpu_api import WAITING, NoAnswerError, Resource, Tpus
from launch.config import CloudTpuCluster
from launch.errors import UserError
from launch.objects import be_patient
from launch.outcome import Ending
from launch.plan import Plan
from launch.record import ACTIVE, RunRecord, State, read_record, write_record
from launch.run_dir import RunDir, read_json
from launch.shipping import Shipper
from launch.standing import read_standing
from launch.watchdog import Silence
from launch.worker import EXIT_SAVED

# How often a state is asked for; tests and the impatient may set it.
WATCH_VARIABLE = "JASMINE_WATCH_SECONDS"
WATCH_SECONDS = 15.0
# Before another TPU is asked for, doubled with every one in a row that came to nothing, and drawn at random around that.
RETRY_SECONDS, MOST_RETRY_SECONDS = 5.0, 600.0


def main(arguments: list[str]) -> int:
    """Watch the run in the directory `arguments[0]`, which is claimed already as `arguments[1]`, to its end."""
    run = RunDir.at(arguments[0])
    be_patient()
    log = Shipper(run.watcher_log)
    try:
        return watch(run, arguments[1])
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        log.close()


def watch(run: RunDir, claimed: str | None = None) -> int:
    """Watch a run until it has ended and its TPU is gone; return 0, or 1 if another watcher took over.

    Args:
        claimed: the id under which whoever started this process has claimed the run for it.

    Raises:
        UserError: somebody else watches it.
    """
    claim = _Claim(run, claimed)
    try:
        return _Watcher(run, claim).watch()
    finally:
        claim.release()


class _Claim:
    """What keeps a second watcher away."""

    def __init__(self, run: RunDir, id: str | None) -> None:
        self.run, self.id = run, id or uuid.uuid4().hex
        if id is not None:
            return
        if (other := watched_by(run)) is not None:
            raise UserError(f"run {run.name!r} is watched already, by process {other['pid']} on {other['host']}")
        self.renew()
        time.sleep(0.5)  # whoever has claimed it at the same moment, the one that wrote last has it
        if not self.held():
            raise UserError(f"run {run.name!r} is watched already, by somebody who began at the same moment")

    def renew(self) -> None:
        write_claim(self.run, self.id, os.getpid())

    def held(self) -> bool:
        claim = read_json(self.run.watcher)
        return claim is not None and claim["id"] == self.id

    def release(self) -> None:
        if self.held():
            with contextlib.suppress(OSError):
                self.run.watcher.unlink()


class _Watcher:
    def __init__(
        self,
        run: RunDir,
        claim: _Claim,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.run, self.claim, self.clock, self.draw = run, claim, clock, draw
        self.period = float(os.environ.get(WATCH_VARIABLE, WATCH_SECONDS))
        self.in_a_row = 0
        self._vm0 = Silence(clock)
        self._asked_to_end_at: float | None = None
        self._rent_at: float | None = None  # once the resource before is gone

    def watch(self) -> int:
        told: str | None = None
        while True:
            try:
                done = self._look()
            except (NoAnswerError, UserError, OSError) as error:
                done = False  # the API, storage or a login may work again, and nobody else replaces the TPU
                if str(error) != told:
                    told = str(error)
                    self._say(f"cannot look after it: {told}; trying again")
            if done:
                return 0
            self._rest()
            with contextlib.suppress(OSError):
                if not self.claim.held():
                    self._say("another watcher has taken over")
                    return 1
                self.claim.renew()

    def _rest(self) -> None:
        """Wait until it is time to look again; that is at once when the run is to be cancelled."""
        deadline = time.monotonic() + self.period
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self.period))
            with contextlib.suppress(OSError):
                if self.run.cancel_request.exists() and self._asked_to_end_at is None:
                    return

    def _look(self) -> bool:
        """Look once, and do what follows; return whether there is nothing left to watch."""
        record = read_record(self.run)
        if record is None or not record.submissions:
            return not self.run.tpu_resource.exists()  # a record that is not there just now ends nobody's rent
        plan = record.submissions[-1].plan
        if plan.settings["backend"] != "cloud_tpu":
            return True  # resumed elsewhere
        settings = CloudTpuCluster.model_validate(plan.settings)
        tpus = Tpus(settings.project)
        noted = read_resource(self.run)
        if noted is None:
            return self._rent_first(record, plan, settings)
        found = tpus.get(noted.zone, noted.id)
        record = read_record(self.run) or record  # again: its VMs may have ended it before they gave the TPU back
        if record.state not in ACTIVE:
            return self._see_off(tpus, noted, found)
        if self.run.cancel_request.exists():
            return self._cancel(record, settings, tpus, noted, found)
        if noted.leaving is None and found is None and not noted.made:
            return self._rent(record, plan, settings, noted)  # whoever was about to was interrupted
        leaving = noted.leaving or self._why_leave(settings, noted, found)
        if leaving is not None:
            return self._replace(record, plan, settings, tpus, noted, leaving, found)
        if found is None:
            why = "its TPU was deleted, by neither its VMs nor its watcher"
            self._settle(record, why)
            return self._end(record, Ending("cancelled", EXIT_SAVED, why))
        return False

    def _why_leave(self, settings: CloudTpuCluster, noted: Rented, found: Resource | None) -> Leaving | None:
        """Return why a resource is of no more use, None while it is of use."""
        if (over := read_json(self.run.tpu_over(noted.id))) is not None and over["why"] == "replace":
            return Leaving(str(over["reason"]), self._budget(noted))
        if (broken := self._broken_vm(noted)) is not None:
            return Leaving(broken, "failed")
        if found is None:
            return None
        if found.state == "SUSPENDED":
            return Leaving("preempted by Google Cloud", "preempted")
        if found.state == "FAILED":
            no_capacity = _is_about_capacity(found.error)
            why = f"Cloud TPU could not provide it: {found.error or 'without a reason'}"
            return Leaving(why, None if no_capacity else "failed", other_zone=no_capacity)
        if found.state in WAITING:
            waited = time.time() - noted.created
            if len(settings.zone) > 1 and waited > settings.zone_patience:
                return Leaving(f"no capacity in {noted.zone} for {waited:.0f} s", other_zone=True)
        elif found.state == "ACTIVE" and (silent := self._silence(settings, noted)):
            return Leaving(silent, self._budget(noted))
        return None

    def _budget(self, noted: Rented) -> Literal["preempted", "failed"]:
        """Return what the loss of a resource counts as; one on which no attempt has begun may never be of use, and is not
        asked for again without end."""
        return "preempted" if self._has_begun(noted) else "failed"

    def _has_begun(self, noted: Rented) -> bool:
        """Return whether an attempt was made on a resource; its VMs have clocks of their own, so that is not told by time."""
        goes = (read_json(self.run.go_file(number)) for number in reversed(self.run.attempts()))
        return any(go is not None and go["resource"] == noted.id for go in goes)

    def _broken_vm(self, noted: Rented) -> str | None:
        """Return what a VM that could not be set up has left word of."""
        for log in self.run.tpu_over(noted.id).parent.glob("startup-*.log"):
            errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            return f"{errors[-1].removeprefix('error: ') if errors else 'a VM could not be set up'}; see {log}"
        return None

    # --- what there is to do -----------------------------------------------------------------------------------

    def _rent_first(self, record: RunRecord, plan: Plan, settings: CloudTpuCluster) -> bool:
        """Rent the first TPU of a run that has waited for others to finish."""
        for name in plan.after:
            standing = read_standing(RunDir(self.run.root.parent / name))
            if standing.record.state != "finished":
                if standing.live or standing.record.state in ACTIVE:
                    return False
                return self._end(
                    record, Ending("failed", 1, f"{name}, which it was to follow, is {standing.record.state}")
                )
        if self.run.cancel_request.exists():
            return self._end(record, Ending("cancelled", EXIT_SAVED))
        return self._rent(record, plan, settings, first_resource(self.run, settings, None))

    def _rent(self, record: RunRecord, plan: Plan, settings: CloudTpuCluster, rented: Rented) -> bool:
        """Ask for a resource; return whether that is refused, which ends the run."""
        try:
            rent(plan, settings, rented)
        except UserError as error:
            return self._end(record, Ending("failed", 1, str(error)))
        return False

    def _see_off(self, tpus: Tpus, noted: Rented, found: Resource | None) -> bool:
        """The run has ended: its VMs give the TPU back, and if they do not, this does."""
        if found is None:
            return True
        self._asked_to_end_at = self._asked_to_end_at or self.clock()
        if found.state == "DELETING" or self.clock() - self._asked_to_end_at < 60:
            return False
        self._say(f"the run has ended and {noted.id} is still {found.state}: deleting it")
        tpus.delete(noted.zone, noted.id)
        return False

    def _cancel(
        self, record: RunRecord, settings: CloudTpuCluster, tpus: Tpus, noted: Rented, found: Resource | None
    ) -> bool:
        if found is None:
            return self._end(record, Ending("cancelled", EXIT_SAVED))
        self._asked_to_end_at = self._asked_to_end_at or self.clock()
        has_vms = found.state == "ACTIVE" and self.run.tpu_vm(noted.id, 0).exists()
        if not has_vms or self.clock() - self._asked_to_end_at > settings.grace_seconds + 30:
            tpus.delete(noted.zone, noted.id)
        return False

    def _silence(self, settings: CloudTpuCluster, noted: Rented) -> str | None:
        """Return what is wrong when VM 0, which supervises, has not come up, or lives no more."""
        beat = self.run.tpu_vm(noted.id, 0)
        text = beat.read_text() if beat.exists() else None
        silent = self._vm0.seconds((noted.id, text), 3 * self.period)
        if text is None:
            late = silent > settings.boot_timeout
            return f"VM 0 of its TPU did not come up within {settings.boot_timeout} s" if late else None
        lost = silent > max(settings.silent_timeout, 3 * self.period)
        return f"VM 0 of its TPU has been silent for {settings.silent_timeout} s" if lost else None

    def _replace(
        self,
        record: RunRecord,
        plan: Plan,
        settings: CloudTpuCluster,
        tpus: Tpus,
        noted: Rented,
        leaving: Leaving,
        found: Resource | None,
    ) -> bool:
        """Give up a resource; once it is gone and some time has passed, rent the next one, if a budget allows."""
        if noted.leaving is None:
            self._say(f"{noted.id}: {leaving.why}")
            noted = dataclasses.replace(noted, leaving=leaving)
            write_resource(self.run, noted)  # a watcher after this one then knows why it is gone
            self.run.fence_off_earlier_attempts()
            self._settle(record, leaving.why, failed=leaving.counts == "failed")
            self._rent_at = None
        if found is not None and not tpus.delete(noted.zone, noted.id):
            return False
        if self._rent_at is None:
            number = max(self.run.attempts(), default=0) or 1
            self.run.append_event("tpu_gone", number, resource=noted.id, zone=noted.zone, why=leaving.why)
            self.in_a_row = 0 if self._has_begun(noted) else self.in_a_row + 1
            pause = min(MOST_RETRY_SECONDS, RETRY_SECONDS * 2**self.in_a_row, 4 * self.period * 2**self.in_a_row)
            self._rent_at = self.clock() + pause * self.draw(0.5, 1.5)
        spent = noted.spent.get(leaving.counts, 0) if leaving.counts else 0
        limit = {"preempted": settings.max_preemptions, "failed": settings.max_failures, None: None}[leaving.counts]
        if limit is not None and spent >= limit:
            key = "max_preemptions" if leaving.counts == "preempted" else "max_failures"
            state: State = "preempted" if leaving.counts == "preempted" else "failed"
            code = EXIT_SAVED if leaving.counts == "preempted" else 1
            return self._end(record, Ending(state, code, f"{leaving.why}; its restarts are used up ({key}: {limit})"))
        if self.clock() < self._rent_at:
            return False
        following = next_resource(self.run, settings, noted)
        if self._rent(record, plan, settings, following):
            return True
        fields = {"resource": following.id, "zone": following.zone, "after": leaving.why, "used": spent + 1}
        self.run.append_event("restarted", max(self.run.attempts(), default=0) + 1, **fields)
        return False

    def _settle(self, record: RunRecord, why: str, *, failed: bool = False) -> None:
        """Write down the end of an attempt that its VMs did not see to the end."""
        for attempt in record.attempts:
            if attempt.outcome is None:
                attempt.ended, attempt.outcome, attempt.cause = time.time(), "failed" if failed else "preempted", why
                self.run.append_event(attempt.outcome, attempt.number, cause=why)
        record.state, record.reason, record.changed = "submitted", why, time.time()
        write_record(self.run, record)

    def _end(self, record: RunRecord, end: Ending) -> bool:
        record.state, record.exit_code, record.reason, record.changed = end.state, end.code, end.reason, time.time()
        write_record(self.run, record)
        event = end.state if end.state in ("finished", "cancelled") else "ended"
        number = record.attempts[-1].number if record.attempts else record.submissions[-1].plan.first_attempt
        self.run.append_event(event, number, state=end.state, code=end.code, reason=end.reason)
        self._say(f"{end.state}{f': {end.reason}' if end.reason else ''}")
        return True

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.run.name}: {text}", flush=True)


def _is_about_capacity(error: str) -> bool:
    """Return whether a resource failed because there are not enough chips at the moment, and not because of the request."""
    words = ("capacity", "resource_exhausted", "resource exhausted", "stockout", "no more resources")
    return any(word in error.lower() for word in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
