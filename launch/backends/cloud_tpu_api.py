"""Queued resources of the Cloud TPU API, by Google's own client, with what a launcher needs on top of it.

A resource's name says which attempt of which run it is for (`resource_id`), so creating it is idempotent: a response that is
lost, or two watchers that want the same thing, lead to one resource, never to two. One of that name that was asked for
otherwise, by a run whose directory has been deleted, is not taken for it. Calls that fail for a reason that passes
(too many requests, an API that is away) are made again for a while, at growing and random intervals.

`JASMINE_CLOUD_TPU_ENDPOINT` (http://HOST:PORT) names another API, without credentials: the tests' own.
"""

import functools
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from launch.config import CloudTpuCluster
from launch.errors import UserError, notice_once

ENDPOINT = "JASMINE_CLOUD_TPU_ENDPOINT"
API = "https://tpu.googleapis.com"
# In the metadata of every VM: the run that it is for, and a digest of all that was asked for.
RUN_DIR, REQUEST = "jasmine-run-dir", "jasmine-request"
# How long a call is made again while the API is away, and how long one try may take.
PATIENCE_SECONDS = 60.0
CALL_SECONDS = 30.0
# How long it is waited for that an earlier resource of the same name is gone.
GONE_SECONDS = 180.0

# States in which a resource has, or will have, VMs; SUSPENDED has lost them, FAILED never gets any.
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")

_Answer = TypeVar("_Answer")


class NoAnswerError(Exception):
    """The API cannot be reached, or does not work at the moment; or the login there does not."""


class StillThereError(NoAnswerError):
    """A resource cannot be created yet, because an earlier one of its name is still being deleted."""


@dataclass(frozen=True)
class Resource:
    """A queued resource as the API describes it.

    Attributes:
        id: its short name; `zone` where it is.
        state: as the API spells it, such as "ACTIVE".
        error: what it failed with, `""` if it did not.
        run_dir: the run it is for, `""` if it is none of ours.
        request: what it was asked for, as `REQUEST` in the metadata of its VMs has it.
        created: Unix seconds, 0 where the API does not say.
    """

    id: str
    zone: str
    state: str
    error: str = ""
    run_dir: str = ""
    request: str = ""
    created: float = 0.0


def resource_id(run_dir: str, attempt: int) -> str:
    """Return the id of the resource that a run's attempt starts on: readable, and of this run directory alone."""
    name = re.sub(r"[^a-z0-9]+", "-", run_dir.rpartition("/")[2].lower()).strip("-")[:36].strip("-")
    digest = hashlib.sha256(run_dir.encode()).hexdigest()[:8]
    return f"j-{name}-{digest}-{attempt}" if name else f"j-{digest}-{attempt}"


def queued_resource(
    settings: CloudTpuCluster, zone: str, id: str, metadata: dict[str, str], labels: dict[str, str]
) -> Any:
    """Return the `tpu_v2.QueuedResource` for one attempt."""
    from google.cloud import tpu_v2

    network = tpu_v2.NetworkConfig(enable_external_ips=settings.external_ips)
    if settings.network:
        network.network = settings.network
    if settings.subnetwork:
        network.subnetwork = settings.subnetwork
    node = tpu_v2.Node(
        accelerator_type=settings.accelerator_type,
        runtime_version=settings.runtime_version or settings.tpu.generation.runtime,
        network_config=network,
        labels={**settings.labels, **labels},
        metadata=metadata,
    )
    if settings.service_account:
        scope = ["https://www.googleapis.com/auth/cloud-platform"]
        node.service_account = tpu_v2.ServiceAccount(email=settings.service_account, scope=scope)
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=f"projects/{settings.project}/locations/{zone}", node=node)
    if settings.slices > 1:
        several = tpu_v2.QueuedResource.Tpu.NodeSpec.MultisliceParams(node_count=settings.slices, node_id_prefix=id)
        spec.multislice_params = several
    else:
        spec.node_id = id
    resource = tpu_v2.QueuedResource(tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]))
    if settings.provisioning == "spot":
        resource.spot = tpu_v2.QueuedResource.Spot()
    elif settings.provisioning == "reserved":
        resource.guaranteed = tpu_v2.QueuedResource.Guaranteed()
        resource.reservation_name = _reservation(settings, zone)
    return resource


def _reservation(settings: CloudTpuCluster, zone: str) -> str:
    name = settings.reservation or ""
    return name if name.startswith("projects/") else f"projects/{settings.project}/locations/{zone}/reservations/{name}"


class Tpus:
    """The queued resources of a project. Importing Google's client takes about a second, so it is made at the first call."""

    def __init__(self, project: str) -> None:
        self.project = project
        self._made: Any = None

    @property
    def _client(self) -> Any:
        if self._made is None:
            from google.auth.exceptions import DefaultCredentialsError
            from google.cloud import tpu_v2

            if endpoint := os.environ.get(ENDPOINT):
                from google.auth.credentials import AnonymousCredentials

                self._made = tpu_v2.TpuClient(
                    transport="rest",
                    credentials=AnonymousCredentials(),
                    client_options={"api_endpoint": endpoint},
                )
            else:
                try:
                    self._made = tpu_v2.TpuClient(transport="rest")
                except DefaultCredentialsError as error:
                    raise UserError(
                        "no Google Cloud credentials here: run `gcloud auth application-default login` first"
                    ) from error
        return self._made

    def create(self, zone: str, id: str, resource: Any) -> Resource:
        """Create a queued resource, or find that it is there already; one of its name that is being deleted is waited for.

        Raises:
            UserError: the API refuses the request, or there is a resource of that name that was asked for otherwise.
            StillThereError: an earlier resource of that name is not gone after `GONE_SECONDS`.
            NoAnswerError: the API does not answer; the resource may have been created.
        """
        from google.api_core import exceptions

        parent = f"projects/{self.project}/locations/{zone}"
        request = {"parent": parent, "queued_resource_id": id, "queued_resource": resource}
        asked = _described(resource).request
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            try:
                self._try(
                    lambda: self._client.create_queued_resource(request=request, timeout=CALL_SECONDS, retry=None)
                )
                return self.get(zone, id) or Resource(id, zone, "CREATING", created=time.time())
            except exceptions.Conflict as error:
                found = self.get(zone, id)
                if found is not None and found.state != "DELETING":
                    if found.request == asked:
                        return found  # an earlier try of this one, whose response was lost
                    raise UserError(
                        f"Cloud TPU has a resource {id} in {zone} already, of another request (it is {found.state}): choose "
                        f"another --name, or delete it with `jobs.py gc --delete {id}`"
                    ) from error
                if time.monotonic() > deadline:
                    raise StillThereError(f"{id} in {zone}: {_words(error)}") from error
                notice_once(f"{id} in {zone}, of an earlier run of that name, is still being deleted: waiting for that")
                time.sleep(0.5)
            except exceptions.ClientError as error:
                raise UserError(f"Cloud TPU refuses {id} in {zone}: {_words(error)}") from error

    def get(self, zone: str, id: str, patience: float = PATIENCE_SECONDS) -> Resource | None:
        """Return a resource, None where there is none of that name.

        Raises:
            NoAnswerError: the API does not answer.
        """
        from google.api_core import exceptions

        try:
            return _described(
                self._try(
                    lambda: self._client.get_queued_resource(
                        name=self._name(zone, id), timeout=min(CALL_SECONDS, patience), retry=None
                    ),
                    patience,
                )
            )
        except exceptions.NotFound:
            return None
        except exceptions.ClientError as error:
            raise NoAnswerError(_words(error)) from error

    def list(self, zone: str, patience: float = PATIENCE_SECONDS) -> list[Resource]:
        """Return all queued resources in a zone.

        Raises:
            NoAnswerError: the API does not answer, or refuses.
        """
        from google.api_core import exceptions

        parent = f"projects/{self.project}/locations/{zone}"
        try:
            found = self._try(
                lambda: list(
                    self._client.list_queued_resources(parent=parent, timeout=min(CALL_SECONDS, patience), retry=None)
                ),
                patience,
            )
        except exceptions.ClientError as error:
            raise NoAnswerError(_words(error)) from error
        return [_described(one) for one in found]

    def delete(self, zone: str, id: str, *, wait: float = 0.0) -> bool:
        """Delete a resource with its VMs; return whether it was gone within `wait` seconds. One that is not there is gone.

        Raises:
            NoAnswerError: the API does not answer.
        """
        from google.api_core import exceptions

        deadline = time.monotonic() + wait
        while True:
            found = self.get(zone, id)
            if found is None:
                return True
            # While it suspends, deletion would be forced upon VMs that are still saving; it ends by itself.
            if found.state not in ("DELETING", "SUSPENDING"):
                request = {"name": self._name(zone, id), "force": True}
                try:
                    delete = functools.partial(self._client.delete_queued_resource, timeout=CALL_SECONDS, retry=None)
                    self._try(functools.partial(delete, request=request))
                except exceptions.NotFound:
                    return True
                except exceptions.ClientError as error:
                    found = self.get(zone, id)  # somebody else may have asked for that at the same moment
                    goes = found is None or found.state in ("DELETING", "SUSPENDING")
                    if not goes and time.monotonic() > deadline:
                        raise NoAnswerError(_words(error)) from error
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def _name(self, zone: str, id: str) -> str:
        return f"projects/{self.project}/locations/{zone}/queuedResources/{id}"

    def _try(self, call: Callable[[], _Answer], patience: float = PATIENCE_SECONDS) -> _Answer:
        """Return what `call` does; make it again while the API is away."""
        import requests
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError, TransportError

        deadline = time.monotonic() + patience
        delay = 0.5
        while True:
            try:
                return call()
            except (
                exceptions.ServerError, exceptions.TooManyRequests, exceptions.RetryError, requests.ConnectionError,
                requests.Timeout, TransportError,
            ) as error:  # fmt: skip
                if time.monotonic() + delay > deadline:
                    raise NoAnswerError(_words(error)) from error
                time.sleep(delay * random.uniform(0.5, 1.5))
                delay = min(2 * delay, 10.0)
            except GoogleAuthError as error:  # one that has expired, until somebody renews it
                raise NoAnswerError(f"the Google Cloud login does not work: {(*error.args, error)[0]}") from error


def _described(one: Any) -> Resource:
    from google.cloud import tpu_v2

    specs = list(one.tpu.node_spec)
    metadata = dict(specs[0].node.metadata) if specs else {}
    failed = one.state.failed_data.error.message if "failed_data" in one.state else ""
    return Resource(
        id=one.name.rpartition("/")[2],
        zone=one.name.split("/")[3] if one.name else "",
        state=tpu_v2.QueuedResourceState.State(one.state.state).name,
        error=failed,
        run_dir=metadata.get(RUN_DIR, ""),
        request=metadata.get(REQUEST, ""),
        created=one.create_time.timestamp() if one.create_time else 0.0,
    )


def _words(error: Exception) -> str:
    """Return an API error as one line."""
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(re.sub(r"^[A-Z]+ https?://\S+: ", "", str(message)).split())
