"""What the fake Cloud TPU's own process runs: the REST form of the Cloud TPU API v2, the life of queued resources, and
an admin URL by which a test makes the cloud misbehave.

Requests are read into, and answers written from, the client library's own protobuf messages, so that the JSON is that of
the real API, and a field that does not exist is refused.

Where the documents leave open what the API does, the fake is strict: a resource that is SUSPENDING or DELETING already
cannot be deleted, even by force.
"""

import contextlib
import copy
import itertools
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from google.cloud import tpu_v2
from google.protobuf import json_format

from tests.clusters.cloud_tpu_rules import ACCELERATOR_TYPES, PCI_IDS, Refusal, check, invalid, vm_metadata
from tests.clusters.cloud_tpu_vm import Vm
from tests.clusters.slurm import _free_ports

_States = tpu_v2.QueuedResourceState.State
_UNTIL_ACTIVE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_DELETED_WITHOUT_FORCE = ("ACCEPTED", "WAITING_FOR_RESOURCES", "FAILED", "SUSPENDED")
_PATH = re.compile(r"projects/([^/]+)/locations/([^/]+)/(queuedResources|nodes|operations)(?:/([^/]+))?")


@dataclass(eq=False)
class _Resource:
    """A queued resource. `wish` is what is to become of it: "", "preempt" or "delete"."""

    name: str
    pb: Any
    nodes: list[str]
    state: str = "CREATING"
    history: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    wish: str = ""
    grace: float = 0.0
    vms: list[Vm] = field(default_factory=list)

    @property
    def parent(self) -> str:
        return self.name.rpartition("/queuedResources/")[0]

    @property
    def zone(self) -> str:
        return self.parent.rpartition("/")[2]

    @property
    def node(self) -> Any:
        """What was asked of every node."""
        return self.pb.tpu.node_spec[0].node


class Cloud:
    """All projects and zones. Methods without underscore are the admin verbs; `answer` and `stop` are the server's."""

    def __init__(
        self, folder: Path, endpoint: str, bin_dir: Path | None, vm_env: Mapping[str, str], seconds: float, grace: float
    ) -> None:
        self._folder, self._bin_dir, self._seconds, self._grace = folder, bin_dir, seconds, grace
        self._vm_env = {"JASMINE_CLOUD_TPU_ENDPOINT": endpoint, **vm_env}
        self._changed = threading.Condition()
        self._resources: dict[str, _Resource] = {}
        self._operations: dict[str, dict[str, Any]] = {}
        self._once: dict[str, str] = {}  # request id -> operation
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._log: list[dict[str, Any]] = []
        self._full: set[str] = set()
        self._held: set[str] = set()
        self._errors: list[dict[str, Any]] = []
        self._failures: list[dict[str, Any]] = []
        self._lost_creates = 0
        self._latency = 0.0
        self._counter = itertools.count(1)
        self._subnet = random.randrange(8, 250)
        (self._metadata_port,) = _free_ports(1)

    # --- admin verbs -----------------------------------------------------------------------------------------------

    def resources(self) -> dict[str, str]:
        return {name: resource.state for name, resource in self._resources.items()}

    def history(self, name: str) -> list[str]:
        return self._find(name).history

    def vms(self, name: str) -> list[dict[str, Any]]:
        return [
            {
                "address": vm.address,
                "disk": str(vm.disk),
                "console": str(vm.console),
                "boots": vm.boots,
                "on": vm.is_on(),
            }
            for vm in self._find(name).vms
        ]

    def processes(self, name: str) -> list[int]:
        return [pid for vm in self._find(name).vms for pid in vm.processes()]

    def requests(self) -> list[dict[str, Any]]:
        return self._log

    def no_capacity(self, zone: str, on: bool = True) -> None:
        (self._full.add if on else self._full.discard)(zone)

    def hold(self, state: str, on: bool = True) -> None:
        if state not in (*_UNTIL_ACTIVE, "DELETING"):
            raise invalid(f"a resource can be held in {', '.join(_UNTIL_ACTIVE)} or DELETING, not in {state}")
        (self._held.add if on else self._held.discard)(state)

    def fail_provisioning(self, message: str, code: int = 8, count: int = 1) -> None:
        self._errors += [{"code": code, "message": message}] * count

    def preempt(self, name: str, grace: float | None = None) -> None:
        resource = self._find(name)
        if resource.state != "ACTIVE":
            raise invalid(f"{name} is {resource.state}, not ACTIVE")
        resource.wish = "preempt"
        resource.grace = self._grace if grace is None else grace
        self._enter(resource, "SUSPENDING")

    def reboot(self, name: str, worker: int) -> None:
        vm = self._find(name).vms[worker]
        vm.power_off()
        vm.boot()

    def kill_vm(self, name: str, worker: int) -> None:
        self._find(name).vms[worker].remove()

    def fail_next(self, status: int, count: int = 1, method: str | None = None) -> None:
        self._failures.append({"status": status, "count": count, "method": method})

    def lose_next_create(self, count: int = 1) -> None:
        self._lost_creates += count

    def latency(self, seconds: float) -> None:
        self._latency = seconds

    def _find(self, name: str) -> _Resource:
        """Return the latest resource with a full name, or with an id."""
        for full in reversed(self._resources):
            if name in (full, full.rpartition("/")[2]):
                return self._resources[full]
        raise Refusal(404, "NOT_FOUND", f"there is no {name}; there are {list(self._resources)}")

    def stop(self) -> None:
        """Delete everything at once, and return when no process is left."""
        with self._changed:
            self._stopping = True
            for resource in self._resources.values():
                resource.wish = "delete"
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # --- requests --------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, dict[str, Any] | None]:
        """Return the status and the JSON of an answer, None where the connection is to close without one."""
        url = urlsplit(target)
        query = dict(parse_qsl(url.query))
        path = unquote(url.path).strip("/")
        try:
            if path.startswith("admin/"):
                return 200, {"result": self._administer(path.removeprefix("admin/"), json.loads(body or b"{}"))}
            entry = {"method": method, "path": path, "query": query, "body": body.decode(), "status": 0}
            self._log.append(entry)
            time.sleep(self._latency)
            with self._changed:
                try:
                    self._fail_if_told(method)
                    found = self._call(method, path.removeprefix("v2/"), query, body)
                    entry["status"] = 200
                except Refusal as refusal:
                    entry["status"] = refusal.http
                    raise
                if method == "POST" and self._lost_creates:
                    self._lost_creates -= 1
                    return 0, None
        except Refusal as refusal:
            error = {"code": refusal.http, "message": refusal.message, "status": refusal.status}
            return refusal.http, {"error": error}
        return 200, found

    def _administer(self, verb: str, arguments: dict[str, Any]) -> Any:
        call = getattr(self, verb, None)
        if call is None or verb.startswith("_") or verb in ("answer", "stop"):
            raise Refusal(404, "NOT_FOUND", f"there is no admin verb {verb}")
        try:
            with self._changed:
                result = copy.deepcopy(call(**arguments))
                self._changed.notify_all()
        except (TypeError, IndexError) as error:
            raise invalid(f"{verb}: {error}") from None
        return result

    def _fail_if_told(self, method: str) -> None:
        for failure in self._failures:
            if failure["count"] and failure["method"] in (None, method):
                failure["count"] -= 1
                status = {429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}.get(
                    failure["status"], "UNKNOWN"
                )
                raise Refusal(failure["status"], status, "The service is currently unable to do this.")

    def _call(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        match = _PATH.fullmatch(path)
        if match is None:
            raise Refusal(404, "NOT_FOUND", f"Method not found: {method} {path}")
        parent, kind, name = path[: match.start(3) - 1], match[3], match[4]
        integers = "enum-encoding=int" in query.get("$alt", "")
        if "requestId" in query and query["requestId"] in self._once:
            return self._operations[self._once[query["requestId"]]]
        if method == "GET" and kind == "operations" and name:
            return self._get(self._operations, path)
        if method == "GET" and kind != "operations":
            views = self._views(kind)
            if name:
                return json_format.MessageToDict(self._get(views, path), use_integers_for_enums=integers)
            pattern = re.compile(re.escape(parent).replace("/\\-", "/[^/]+") + "/[^/]+/[^/]+")
            found = [view for full, view in views.items() if pattern.fullmatch(full)]
            first, size = int(query.get("pageToken") or 0), int(query.get("pageSize") or 0) or len(found)
            page = [json_format.MessageToDict(v, use_integers_for_enums=integers) for v in found[first : first + size]]
            rest = {"nextPageToken": str(first + size)} if first + size < len(found) else {}
            return {kind: page, **rest}
        if kind == "queuedResources" and method == "POST" and not name:
            return self._create(parent, query, body)
        if kind == "queuedResources" and method == "DELETE" and name:
            return self._delete(self._get(self._resources, path), query)
        raise Refusal(404, "NOT_FOUND", f"Method not found: {method} {path}")

    def _get(self, table: Mapping[str, Any], name: str) -> Any:
        if name not in table:
            raise Refusal(404, "NOT_FOUND", f"Resource '{name}' was not found")
        return table[name]

    def _create(self, parent: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        pb = tpu_v2.QueuedResource.pb(tpu_v2.QueuedResource())
        try:
            json_format.Parse(body, pb)
        except json_format.ParseError as error:
            raise invalid(f"Invalid JSON payload received. {error}") from None
        identity = query.get("queuedResourceId", "")
        name = f"{parent}/queuedResources/{identity}"
        nodes = check(parent, identity, pb)
        taken = [node for resource in self._resources.values() for node in resource.nodes]
        if name in self._resources or not {f"{parent}/nodes/{node}" for node in nodes}.isdisjoint(taken):
            raise Refusal(409, "ALREADY_EXISTS", f"Resource '{name}', or a node of it, already exists")
        pb.name = name
        pb.create_time.GetCurrentTime()
        resource = _Resource(name, pb, [f"{parent}/nodes/{node}" for node in nodes], grace=self._grace)
        self._resources[name] = resource
        operation = self._new_operation(resource, "create", query)
        thread = threading.Thread(target=self._live, args=(resource, operation), daemon=True)
        self._threads.append(thread)
        thread.start()
        return dict(operation)

    def _delete(self, resource: _Resource, query: dict[str, str]) -> dict[str, Any]:
        force = query.get("force", "").lower() == "true"
        state = resource.state
        if state in ("SUSPENDING", "DELETING") or not (force or state in _DELETED_WITHOUT_FORCE):
            hint = "" if force else " without force"
            raise Refusal(400, "FAILED_PRECONDITION", f"Resource '{resource.name}' is {state}: cannot be deleted{hint}")
        resource.wish = "delete"
        self._enter(resource, "DELETING")
        return dict(self._new_operation(resource, "delete", query))

    def _new_operation(self, resource: _Resource, verb: str, query: dict[str, str]) -> dict[str, Any]:
        operation: dict[str, Any] = {
            "name": f"{resource.parent}/operations/operation-{uuid.uuid4()}",
            "metadata": {
                "@type": "type.googleapis.com/google.cloud.tpu.v2.OperationMetadata",
                "target": resource.name,
                "verb": verb,
                "apiVersion": "v2",
            },
            "done": False,
        }
        self._operations[operation["name"]] = operation
        if "requestId" in query:
            self._once[query["requestId"]] = operation["name"]
        return operation

    def _views(self, kind: str) -> dict[str, Any]:
        """Return all queued resources or nodes as their messages, by full names."""
        views = {}
        for resource in self._resources.values():
            if kind == "queuedResources":
                views[resource.name] = self._view(resource)
            elif resource.state in ("PROVISIONING", "ACTIVE", "SUSPENDING") or resource.vms:
                views |= {name: self._node_view(resource, index) for index, name in enumerate(resource.nodes)}
        return views

    def _view(self, resource: _Resource) -> Any:
        view = copy.deepcopy(resource.pb)
        view.state.state = _States[resource.state].value
        if resource.error is not None:
            json_format.ParseDict(resource.error, view.state.failed_data.error)
        elif resource.state != "WAITING_FOR_RESOURCES":
            getattr(view.state, f"{resource.state.lower()}_data").SetInParent()
        if resource.state in ("SUSPENDING", "SUSPENDED"):
            view.state.state_initiator = tpu_v2.QueuedResourceState.StateInitiator.SERVICE.value
        return view

    def _node_view(self, resource: _Resource, index: int) -> Any:
        view = copy.deepcopy(resource.node)
        state = {"PROVISIONING": "CREATING", "ACTIVE": "READY", "SUSPENDING": "PREEMPTED"}.get(
            resource.state, "DELETING"
        )
        view.name = resource.nodes[index]
        view.state = tpu_v2.Node.State[state].value
        view.api_version = tpu_v2.Node.ApiVersion.V2.value
        view.queued_resource = resource.name
        view.multislice_node = len(resource.nodes) > 1
        view.create_time.CopyFrom(resource.pb.create_time)
        vms = self._vms_of_node(resource, index)
        for vm in vms:
            view.network_endpoints.add(ip_address=vm.address, port=8470)
        well = all(vm.is_on() for vm in vms)
        view.health = tpu_v2.Node.Health["HEALTHY" if well else "TIMEOUT"].value
        return view

    def _vms_of_node(self, resource: _Resource, index: int) -> list[Vm]:
        each = len(resource.vms) // len(resource.nodes)
        return resource.vms[index * each : (index + 1) * each]

    # --- the life of a resource ------------------------------------------------------------------------------------

    def _enter(self, resource: _Resource, state: str) -> None:
        resource.state = state
        resource.history.append(state)
        self._changed.notify_all()

    def _live(self, resource: _Resource, creation: dict[str, Any]) -> None:
        """Lead a resource from its creation to its deletion."""
        with self._changed:
            if self._becomes_active(resource, creation):
                self._changed.wait_for(lambda: resource.wish)
                if resource.wish == "preempt":
                    self._shut_down(resource)
                    self._enter(resource, "SUSPENDED")
            self._changed.wait_for(lambda: resource.wish == "delete")
            if not self._stopping:
                self._changed.wait(self._seconds)
            self._shut_down(resource)
            self._changed.wait_for(lambda: self._stopping or not self._is_held(resource))
            del self._resources[resource.name]
            for operation in self._operations.values():
                if operation["metadata"]["target"] == resource.name and not operation["done"]:
                    deleted = operation["metadata"]["verb"] == "delete"
                    empty = {"response": {"@type": "type.googleapis.com/google.protobuf.Empty"}}
                    operation |= (
                        empty if deleted else {"error": {"code": 10, "message": "deleted before it was accepted"}}
                    )
                    operation["done"] = True
            self._changed.notify_all()

    def _becomes_active(self, resource: _Resource, creation: dict[str, Any]) -> bool:
        for state in _UNTIL_ACTIVE:
            if resource.wish:
                return False
            self._enter(resource, state)
            if state == "ACCEPTED":
                view = json_format.MessageToDict(self._view(resource))
                kind = "type.googleapis.com/google.cloud.tpu.v2.QueuedResource"
                creation |= {"done": True, "response": {"@type": kind, **view}}
            self._changed.wait_for(lambda: resource.wish, self._seconds)
            self._changed.wait_for(lambda: resource.wish or not self._is_held(resource))
        if resource.wish:
            return False
        if self._errors:
            resource.error = self._errors.pop(0)
            self._enter(resource, "FAILED")
            return False
        resource.vms = self._make_vms(resource)
        for vm in resource.vms:
            vm.boot()
        self._enter(resource, "ACTIVE")
        return True

    def _is_held(self, resource: _Resource) -> bool:
        waits = resource.state == "WAITING_FOR_RESOURCES" and resource.zone in self._full
        return waits or resource.state in self._held

    def _shut_down(self, resource: _Resource) -> None:
        """Ask the VMs to end, and end them after the time of grace; without any, there is no notice either."""
        deadline = time.monotonic() + resource.grace
        for vm in resource.vms:
            if resource.state == "SUSPENDING":
                vm.metadata["instance"]["preempted"] = "TRUE"
            if resource.grace:
                vm.press_power_button()
        while not self._stopping and time.monotonic() < deadline and any(vm.processes() for vm in resource.vms):
            self._changed.wait(0.05)
        for vm in resource.vms:
            vm.remove()
        resource.vms = []

    def _make_vms(self, resource: _Resource) -> list[Vm]:
        chips, count = ACCELERATOR_TYPES[resource.node.accelerator_type]
        coordinator_port, megascale_port = _free_ports(2)
        run = next(self._counter)
        subnets = [next(self._counter) % 250 + 1 for _ in resource.nodes]
        addresses = [[f"127.{self._subnet}.{subnet}.{worker + 1}" for worker in range(count)] for subnet in subnets]
        env = self._vm_env | {"JAX_COORDINATOR_PORT": str(coordinator_port)}
        vms = []
        for index, worker in itertools.product(range(len(addresses)), range(count)):
            node = resource.nodes[index].rpartition("/")[2]
            megascale = {
                "MEGASCALE_COORDINATOR_ADDRESS": f"{addresses[0][0]}:{megascale_port}",
                "MEGASCALE_NUM_SLICES": len(addresses),
                "MEGASCALE_SLICE_ID": index,
            }
            many = megascale if len(addresses) > 1 else {}
            metadata = vm_metadata(resource.pb, node, worker, addresses[index], many)
            folder = self._folder / "vms" / f"{run:03}-{node}-w-{worker}"
            pci_id = PCI_IDS[resource.node.accelerator_type.partition("-")[0]]
            address = (addresses[index][worker], self._metadata_port)
            vms.append(Vm(folder, address, chips // count, pci_id, metadata, env, self._bin_dir))
        return vms


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    cloud: Cloud


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, headers first, waits 40 ms for the client to acknowledge them
    server: _Server

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.server.cloud.answer(self.command, self.path, body)
        if answer is None:
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = do_PATCH = _handle

    def log_message(self, *_: object) -> None:
        """Print nothing; `requests` has them."""


@contextlib.contextmanager
def serving(folder: Path, port: int, **options: Any) -> Iterator[str]:
    """Serve on 127.0.0.1 inside the `with` block, and give the URL."""
    with _Server(("127.0.0.1", port), _Handler) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        server.cloud = Cloud(folder, endpoint, **options)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield endpoint
        finally:
            server.cloud.stop()
            server.shutdown()
