"""Finds queued resources that cost money for nothing, and deletes them on request: `jobs.py gc`.

A resource says in its metadata which run it is for, and that run says whether it needs it. Where that run cannot be seen from
here (it is on another machine's disk, or its directory has been deleted), this can tell nothing: such a resource is listed,
and deleted only if it is named. What could not be asked is told, for a resource there may leak as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.backends.cloud_tpu import read_resource, request_digest, watched_by
from launch.backends.cloud_tpu_api import NoAnswerError, Resource, Tpus
from launch.cluster_files import cluster_names, load_cluster
from launch.config import CloudTpuCluster
from launch.errors import UserError, did_you_mean, warn_once
from launch.find import runs_in, storage_roots
from launch.record import ACTIVE, RunRecord, read_record
from launch.run_dir import RunDir

DELETE_SECONDS = 120.0


@dataclass(frozen=True)
class Leak:
    """A queued resource that no run seems to need, and why; `sure` is not set where its run cannot be seen from here."""

    resource: Resource
    project: str
    why: str
    sure: bool = True


@dataclass(frozen=True)
class Places:
    """Projects with zones that have been asked, and leaks there; `silent` is set if others did not answer."""

    asked: list[tuple[str, str]]
    leaks: list[Leak]
    silent: bool


def collect(clusters: Sequence[str], storage: str | None, delete: Sequence[str] | None) -> int:
    """Print what leaks, and delete it if told to; return the exit code, 1 where something could not be asked or deleted.

    Args:
        clusters: where to look; without any, at all that there are files for, and wherever runs have been.
        storage: where the runs are; None for all places that are known.
        delete: the ids of what to delete; empty for all that surely leaks, None for nothing.

    Raises:
        UserError: there is nothing to ask, or a name is not that of a leak.
    """
    found = find_leaks(clusters, storage)
    places = ", ".join(f"{project}/{zone}" for project, zone in found.asked)
    print(f"asked: {places or 'nobody'}")
    for leak in found.leaks:
        print(f"{leak.resource.id} in {leak.resource.zone}: {leak.resource.state}, {leak.why}")
    if found.asked and not found.leaks:
        print("nothing leaks there")
    names = [leak.resource.id for leak in found.leaks]
    if unknown := next((name for name in delete or () if name not in names), None):
        raise UserError(f"--delete {unknown}: it is not listed here{did_you_mean(unknown, names)}; nothing was deleted")
    chosen = [
        leak for leak in found.leaks if delete is not None and (leak.resource.id in delete if delete else leak.sure)
    ]
    if any(leak.sure for leak in found.leaks) and delete is None:
        print("to delete them, once you have read that: the same with --delete")
    for leak in found.leaks:
        if not leak.sure and leak not in chosen:
            print(f"to delete {leak.resource.id} whatever its run does: --delete {leak.resource.id}")
    deleted = [_delete(leak) for leak in chosen]
    return 0 if all(deleted) and not found.silent else 1


def _delete(leak: Leak) -> bool:
    """Delete a resource and say so; return whether the API has taken that."""
    try:
        gone = Tpus(leak.project).delete(leak.resource.zone, leak.resource.id, wait=DELETE_SECONDS)
    except NoAnswerError as error:
        print(f"{leak.resource.id}: Cloud TPU does not answer: {error}")
        return False
    print(f"{leak.resource.id}: {'deleted' if gone else 'is being deleted'}")
    return True


def find_leaks(clusters: Sequence[str], storage: str | None) -> Places:
    """Return our queued resources that no run needs; see `collect`.

    Raises:
        UserError: a cluster's file is wrong, or there is nothing to ask.
    """
    asked, leaks, silent, unset = [], [], False, ""
    for project, zone in dict.fromkeys([*_of_clusters(clusters), *(() if clusters else _of_runs(storage))]):
        if "$" in project:
            unset = f"{project} is not set here"
            continue
        try:
            resources = Tpus(project).list(zone)
        except NoAnswerError as error:
            warn_once(f"{project}/{zone}: Cloud TPU does not answer: {error}")
            silent = True
            continue
        asked.append((project, zone))
        leaks += [leak for one in resources if one.run_dir and (leak := _leak(one, project)) is not None]
    if not asked and not silent:
        why = unset or "no cluster here is a Cloud TPU, and no run was on one"
        raise UserError(f"gc: {why}, so nothing was asked: export the variable, or name a cluster with --cluster")
    if unset:
        warn_once(f"{unset}: clusters of that project were not asked")
    return Places(asked, leaks, silent)


def _of_clusters(clusters: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in clusters or cluster_names():
        try:
            settings = load_cluster(name)[1]
        except UserError:
            if clusters:
                raise
            continue  # a file that nobody could submit with
        if isinstance(settings, CloudTpuCluster):
            yield from ((settings.project, zone) for zone in settings.zone)


def _of_runs(storage: str | None) -> Iterator[tuple[str, str]]:
    """Yield where runs have rented or may have rented; `--set` can name any project and zone."""
    for run in (run for root in storage_roots(storage) for run in runs_in(root)):
        try:
            record = read_record(run)
            rented = read_resource(run)
        except (UserError, OSError) as error:
            warn_once(f"{run.root}: {error}")
            continue
        for submission in record.submissions if record else ():
            settings = submission.plan.settings
            if settings["backend"] == "cloud_tpu":
                zones = [*settings["zone"], *([rented.zone] if rented else [])]
                yield from ((str(settings["project"]), str(zone)) for zone in zones)


def _leak(resource: Resource, project: str) -> Leak | None:
    """Return why a resource of a run is not needed; None where it is, or is about to be gone."""
    if resource.state == "DELETING":
        return None
    run = RunDir.at(resource.run_dir)
    try:
        if (record := read_record(run)) is None:
            return Leak(resource, project, f"there is no run in {run.root} (seen from here)", sure=False)
        digests = [request_digest(submission.plan) for submission in record.submissions]
        if resource.request and resource.request not in digests:
            return Leak(
                resource, project, f"it is of another run than the one in {run.root} (seen from here)", sure=False
            )
        why = _why_not_needed(run, record, resource)
    except (UserError, OSError) as error:
        return Leak(resource, project, f"whether its run needs it cannot be told: {error}", sure=False)
    return None if why is None else Leak(resource, project, why)


def _why_not_needed(run: RunDir, record: RunRecord, resource: Resource) -> str | None:
    if record.state not in ACTIVE:
        return f"run {record.name!r} is {record.state}"
    rented = read_resource(run)
    if rented is not None and rented.id != resource.id:
        return f"run {record.name!r} goes on on {rented.id}"
    if record.submissions and record.submissions[-1].plan.settings.get("backend") != "cloud_tpu":
        return f"run {record.name!r} goes on on {record.submissions[-1].plan.cluster}"
    if resource.state in ("SUSPENDED", "FAILED") and watched_by(run) is None:
        return f"it is {resource.state}, and nothing watches run {record.name!r}"
    return None
