"""What a watcher does with the TPUs of a run, and what cancelling does: the real client and API, VMs without agents."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from launch import jobs
from launch.backends import cloud_tpu as backend
from launch.backends.cloud_tpu import Rented, read_resource, watched_by, write_resource
from launch.backends.cloud_tpu_watch import RETRY_SECONDS, WATCH_VARIABLE, _Claim, _Watcher, watch
from launch.errors import UserError
from launch.plan import Plan
from launch.record import RunRecord, read_record
from launch.run_dir import RunDir
from tests.clusters.cloud_tpu import CloudTpu
from tests.launch.checkouts import check_events, wait_until
from tests.launch.tpus import planned, rent_first


@pytest.fixture
def cloud(cloud_tpu: CloudTpu, monkeypatch: pytest.MonkeyPatch) -> CloudTpu:
    """A cloud whose API this process reaches; watchers look often."""
    for name, value in (cloud_tpu.env | {WATCH_VARIABLE: "0.1"}).items():
        monkeypatch.setenv(name, value)
    return cloud_tpu


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def watcher_of(plan: Plan, clock: Callable[[], float] = time.monotonic, id: str = "me") -> _Watcher:
    """A watcher that looks when a test lets it, and draws the longest pauses there are."""
    run = RunDir.at(plan.run_dir)
    return _Watcher(run, _Claim(run, id), clock=clock, draw=lambda _, most: most)


def rented(plan: Plan) -> Rented:
    found = read_resource(RunDir.at(plan.run_dir))
    assert found is not None
    return found


def record_of(plan: Plan) -> RunRecord:
    record = read_record(RunDir.at(plan.run_dir))
    assert record is not None
    return record


def events_of(plan: Plan) -> list[str]:
    check_events(RunDir.at(plan.run_dir))
    return [event["event"] for event in RunDir.at(plan.run_dir).events()]


def until_gone(watcher: _Watcher, cloud: CloudTpu, id: str) -> None:
    """Let a watcher look until a resource is gone, and once more, so that it knows."""
    wait_until(lambda: watcher._look() or cloud.state(id) is None)
    watcher._look()


@contextmanager
def watching(plan: Plan) -> Iterator[threading.Thread]:
    """Somebody who watches the run meanwhile, and at the end of the block sees it off."""
    run = RunDir.at(plan.run_dir)
    thread = threading.Thread(target=watch, args=(run,))
    thread.start()
    wait_until(lambda: watched_by(run) is not None)
    try:
        yield thread
    finally:
        run.cancel_request.touch()
        thread.join(60)
        assert not thread.is_alive()


def test_without_capacity_it_waits_where_there_is_one_zone_and_moves_on_where_there_are_more(
    tmp_path: Path, cloud: CloudTpu
) -> None:
    cloud.no_capacity("us-west4-a")
    patient = planned(tmp_path, "zone_patience=60", name="patient")
    restless = planned(tmp_path, "zone_patience=60", "zone=[us-west4-a, us-central1-a]", name="restless")
    first, other = rent_first(patient), rent_first(restless)
    for one in (first, other):
        cloud.wait(one.id, "WAITING_FOR_RESOURCES")
    one_zone, two_zones = watcher_of(patient), watcher_of(restless, clock := Clock())
    two_zones._look()
    assert rented(restless).leaving is None  # not yet

    for plan, old in ((patient, first), (restless, other)):  # asked for a while ago
        write_resource(RunDir.at(plan.run_dir), Rented(old.id, old.zone, 1, time.time() - 100, made=True))
    assert not one_zone._look()
    assert rented(patient).leaving is None
    until_gone(two_zones, cloud, other.id)
    clock.now += 1000
    two_zones._look()
    moved = rented(restless)
    assert (moved.zone, moved.number, moved.spent) == ("us-central1-a", 2, {})
    assert events_of(restless) == ["submitted", "tpu_requested", "tpu_gone", "tpu_requested", "restarted"]
    cloud.no_capacity("us-west4-a", on=False)
    cloud.wait(first.id, "ACTIVE")
    one_zone._look()
    assert rented(patient).id == first.id


def test_the_pause_before_another_tpu_doubles_with_each_that_came_to_nothing(tmp_path: Path, cloud: CloudTpu) -> None:
    cloud.fail_provisioning("There is no more capacity in the zone", count=3)
    plan = planned(tmp_path, "max_failures=0")  # a lack of capacity is nobody's failure
    rent_first(plan)
    watcher = watcher_of(plan, clock := Clock())
    watcher.period = 1000.0  # what it is in use, a quarter of a minute, does not shorten the pauses either
    for number in (1, 2, 3):
        id = rented(plan).id
        cloud.wait(id, "FAILED")
        until_gone(watcher, cloud, id)
        clock.now += 1.5 * RETRY_SECONDS * 2**number - 0.1
        watcher._look()
        assert rented(plan).number == number
        clock.now += 0.2
        watcher._look()
        assert (rented(plan).number, rented(plan).zone) == (number + 1, "us-west4-a")


def test_only_the_time_in_which_it_could_look_counts_against_vms_that_boot(tmp_path: Path, cloud: CloudTpu) -> None:
    plan = planned(tmp_path, "boot_timeout=60")
    cloud.wait(rent_first(plan).id, "ACTIVE")
    watcher = watcher_of(plan, clock := Clock())
    watcher._look()
    clock.now += 300  # storage was away
    for _ in range(3):
        watcher._look()
        assert rented(plan).leaving is None
        clock.now += 25
    watcher._look()
    leaving = rented(plan).leaving
    assert leaving is not None
    assert leaving.why == "VM 0 of its TPU did not come up within 60 s"


def test_a_run_that_is_preempted_too_often_ends(tmp_path: Path, cloud: CloudTpu) -> None:
    plan = planned(tmp_path, "max_preemptions=1", "accelerator_type=v5litepod-4")
    rent_first(plan)
    watcher = watcher_of(plan, clock := Clock())
    for number in (1, 2):
        id = rented(plan).id
        cloud.wait(id, "ACTIVE")
        cloud.preempt(id, grace=0)
        cloud.wait(id, "SUSPENDED")
        until_gone(watcher, cloud, id)
        clock.now += 1000
        assert watcher._look() == (number == 2)
    record = record_of(plan)
    assert (record.state, record.exit_code) == ("preempted", 75)
    assert record.reason == "preempted by Google Cloud; its restarts are used up (max_preemptions: 1)"
    assert not cloud.resources()
    again = ["tpu_gone", "tpu_requested", "restarted"]
    assert events_of(plan) == ["submitted", "tpu_requested", *again, "tpu_gone", "ended"]


def test_two_watchers_that_both_believe_to_be_the_one_rent_one_tpu(tmp_path: Path, cloud: CloudTpu) -> None:
    cloud.hold("WAITING_FOR_RESOURCES")
    cloud.fail_provisioning("There is no more capacity in the zone")
    plan = planned(tmp_path)
    first = rent_first(plan)
    cloud.hold("WAITING_FOR_RESOURCES", on=False)
    cloud.wait(first.id, "FAILED")
    cloud.hold("WAITING_FOR_RESOURCES")
    watchers = [watcher_of(plan, id=name) for name in ("one", "other")]

    def look(watcher: _Watcher) -> None:
        watcher.period = 0.05

        def looked() -> bool:
            with suppress(OSError):  # two threads of one process have one name for what they are about to write
                watcher._look()
            return rented(plan).number == 2 and rented(plan).made

        wait_until(looked)

    threads = [threading.Thread(target=look, args=(watcher,)) for watcher in watchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name.rpartition("/")[2] for name in cloud.resources()} == {f"{first.id[:-1]}2"}
    assert rented(plan).made

    with watching(plan):  # whoever sees the other one leaves it at that
        with pytest.raises(UserError, match="is watched already, by process"):
            watch(RunDir.at(plan.run_dir))
        assert jobs.main(["cancel", plan.run_dir]) == 0


def bring_to(state: str, plan: Plan, cloud: CloudTpu) -> None:
    """Rent the run's TPU and bring it to a state, in which it stays for some seconds at least."""
    if state == "FAILED":
        cloud.fail_provisioning("no such network", code=3)
    elif state in ("CREATING", "ACCEPTED"):
        cloud.hold(state)
    id = rent_first(plan).id
    if state in ("SUSPENDING", "SUSPENDED"):
        cloud.wait(id, "ACTIVE")
        (vm,) = cloud.vms(id)
        wait_until((vm.disk / "up").exists)
        cloud.preempt(id, grace=2 if state == "SUSPENDING" else 0)
    cloud.wait(id, state)
    cloud.hold("CREATING", on=False)


@pytest.mark.parametrize("watched", [True, False])
def test_cancel_ends_a_run_whatever_its_tpu_is_about(tmp_path: Path, cloud: CloudTpu, watched: bool) -> None:
    busy = "setup=[\"touch ~/up; trap '' TERM; while :; do sleep 0.2; done\"]"  # it takes all the time that it is given
    for state in ("CREATING", "ACCEPTED", "SUSPENDING", "SUSPENDED", "FAILED"):
        plan = planned(tmp_path, "accelerator_type=v5litepod-4", "max_failures=9", busy, name=state.lower())
        bring_to(state, plan, cloud)
        with watching(plan) if watched else nullcontext():
            assert jobs.main(["cancel", plan.run_dir]) == 0
        assert record_of(plan).state == "cancelled"
        cloud.hold("ACCEPTED", on=False)
        assert not cloud.resources()
    deletions = [(one["path"], one["status"]) for one in cloud.requests if one["method"] == "DELETE"]
    assert len({path for path, _ in deletions}) >= 5
    # None while it was SUSPENDING, which the API would refuse.
    assert {status for path, status in deletions if "/j-suspending-" in path} == {200}


def test_cancel_waits_as_long_as_cloud_tpu_may_take(
    tmp_path: Path, cloud: CloudTpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.hold("DELETING")
    plan = planned(tmp_path, "grace_seconds=1")
    bring_to("ACCEPTED", plan, cloud)
    assert backend.stop_seconds(record_of(plan)) > backend.RELEASE_SECONDS
    with monkeypatch.context() as changed:
        changed.setattr(backend, "stop_seconds", lambda record: 0.5)
        with pytest.raises(UserError, match="has not stopped in time"):
            jobs.main(["cancel", plan.run_dir])
    threading.Timer(0.5, lambda: cloud.hold("DELETING", on=False)).start()
    assert jobs.main(["cancel", plan.run_dir]) == 0
    assert record_of(plan).state == "cancelled"
