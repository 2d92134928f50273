"""The fake Cloud TPU does what the real one does, as far as the unmodified client and stock JAX can tell."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import tpu_v2

from launch.topology import tpu_types
from tests.clusters.cloud_tpu import CloudTpu, running_cloud_tpu
from tests.clusters.cloud_tpu_rules import ACCELERATOR_TYPES
from tests.conftest import REPO

PARENT = "projects/lab/locations/us-west4-a"
NodeSpec = tpu_v2.QueuedResource.Tpu.NodeSpec
METADATA = "http://$GCE_METADATA_HOST/computeMetadata/v1/instance"
CURL = "curl -sS -H 'Metadata-Flavor: Google'"


def client_of(cloud: CloudTpu) -> tpu_v2.TpuClient:
    options = {"api_endpoint": cloud.api_endpoint}
    return tpu_v2.TpuClient(transport="rest", credentials=AnonymousCredentials(), client_options=options)


def request(name: str, script: str = "", slices: int = 1, parent: str = PARENT, **node: Any) -> dict[str, Any]:
    """Arguments of `create_queued_resource`: a v5litepod-4, spot, unless `node` says otherwise."""
    node = {
        "accelerator_type": "v5litepod-4",
        "runtime_version": "v2-alpha-tpuv5-lite",
        "metadata": {"startup-script": script},
        **node,
    }
    many = {"multislice_params": NodeSpec.MultisliceParams(node_count=slices, node_id_prefix=name)}
    names = {"node_id": name} if slices == 1 else many
    spec = NodeSpec(parent=parent, node=tpu_v2.Node(**node), **names)
    resource = tpu_v2.QueuedResource(tpu={"node_spec": [spec]}, spot=tpu_v2.QueuedResource.Spot())
    return {"parent": parent, "queued_resource_id": name, "queued_resource": resource}


def start(cloud: CloudTpu, name: str, script: str = "", **options: Any) -> None:
    """Create a resource and wait until it is ACTIVE."""
    client_of(cloud).create_queued_resource(**request(name, script, **options))
    cloud.wait(name, "ACTIVE")


def delete(cloud: CloudTpu, name: str, force: bool = False) -> Any:
    full = f"{PARENT}/queuedResources/{name}"
    return client_of(cloud).delete_queued_resource(request=tpu_v2.DeleteQueuedResourceRequest(name=full, force=force))


def texts(cloud: CloudTpu, name: str, file: str, count: int | None = None, seconds: float = 30) -> list[str]:
    """Return what the VMs of a resource have in a file of their home directories, once `count` of them (all) have it."""
    paths = [vm.disk / file for vm in cloud.vms(name)]
    count = len(paths) if count is None else count
    cloud.wait_until(lambda: sum(path.exists() for path in paths) >= count, f"{count} files {file}", seconds)
    return [path.read_text() for path in paths if path.exists()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# --- the API -----------------------------------------------------------------------------------------------------------


def test_a_queued_resource_becomes_vms_that_run_its_script(cloud_tpu: CloudTpu) -> None:
    client = client_of(cloud_tpu)
    script = f"{CURL} {METADATA}/attributes/agent-worker-number > number && mv number worker"
    operation = client.create_queued_resource(
        **request("run-1", script, accelerator_type="v5litepod-16", labels={"owner": "me"})
    )
    created = operation.result(timeout=30)
    assert created.name == f"{PARENT}/queuedResources/run-1"
    cloud_tpu.wait("run-1", "ACTIVE")
    assert cloud_tpu.history("run-1") == ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]

    assert texts(cloud_tpu, "run-1", "worker") == ["0", "1", "2", "3"]
    vms = cloud_tpu.vms("run-1")
    assert len({vm.disk for vm in vms}) == len({vm.address for vm in vms}) == 4

    resource = client.get_queued_resource(name=created.name)
    assert resource.state.state == tpu_v2.QueuedResourceState.State.ACTIVE
    assert "active_data" in resource.state
    assert "spot" in resource
    node = client.get_node(name=f"{PARENT}/nodes/run-1")
    assert [endpoint.ip_address for endpoint in node.network_endpoints] == [vm.address for vm in vms]
    assert (node.state, node.labels) == (tpu_v2.Node.State.READY, {"owner": "me"})
    assert [node.name for node in client.list_nodes(parent=PARENT)] == [f"{PARENT}/nodes/run-1"]
    sent = [entry for entry in cloud_tpu.requests if entry["method"] == "POST"]
    assert [(entry["query"]["queuedResourceId"], entry["status"]) for entry in sent] == [("run-1", 200)]

    deletion = delete(cloud_tpu, "run-1", force=True)
    deletion.result(timeout=30)
    for get, name in ((client.get_queued_resource, created.name), (client.get_node, node.name)):
        with pytest.raises(exceptions.NotFound):
            get(name=name)
    assert list(client.list_queued_resources(parent=PARENT)) == []


def test_vms_inherit_nothing_and_leave_nothing(cloud_tpu: CloudTpu, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TESTERS_SECRET", "1")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "gcloud").write_text("#!/bin/sh\necho stand-in > part; mv part stood-in\n")
    (bin_dir / "gcloud").chmod(0o755)
    strays = "setsid sleep 600 & (env -i /usr/bin/setsid /bin/sleep 600 &) ; trap '' TERM; "
    strays += "env > part; mv part environment; gcloud; wait"
    with running_cloud_tpu(tmp_path / "own", bin_dir=bin_dir, vm_env={"MINE": "a b"}, grace=0.2) as cloud:
        start(cloud, "run-1", strays)
        (environment,) = texts(cloud, "run-1", "environment")
        assert "TESTERS_SECRET" not in environment
        assert "MINE=a b\n" in environment
        assert f"HOME={cloud.vms('run-1')[0].disk}\n" in environment
        assert texts(cloud, "run-1", "stood-in") == ["stand-in\n"]
        cloud.wait_until(lambda: len(cloud.processes("run-1")) == 3, "a shell and two strays")
        first = cloud.processes("run-1")
        delete(cloud, "run-1", force=True)
        cloud.wait("run-1", None)
        assert not alive(first)
        start(cloud, "run-2", strays)
        texts(cloud, "run-2", "environment")
        second = cloud.processes("run-2")
        assert second
    assert not alive(second)


@pytest.fixture(scope="module")
def strict_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudTpu]:
    with running_cloud_tpu(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "upper case": ({"name": "Run"}, "Invalid id"),
    "starts with a digit": ({"name": "1run"}, "Invalid id"),
    "ends with a dash": ({"name": "run-"}, "Invalid id"),
    "too long": ({"name": "a" * 64}, "Invalid id"),
    "too long with the number of the slice": ({"name": "a" * 62, "slices": 2}, "Invalid id"),
    "no runtime version": ({"runtime_version": ""}, "runtime version"),
    "unknown runtime version": ({"runtime_version": "v2-alpha-tpuv9"}, "v2-alpha-tpuv9"),
    "no type": ({"accelerator_type": ""}, "accelerator"),
    "unknown type": ({"accelerator_type": "v5-256"}, "v5-256 was not found in zone us-west4-a"),
    "a value too large": ({"metadata": {"startup-script": "#" * (256 * 1024 + 1)}}, "startup-script"),
    "too large in all": ({"metadata": dict.fromkeys("abc", "#" * 200000)}, "in all"),
    "label": ({"labels": {"Owner": "me"}}, "label"),
    "not a zone": ({"parent": "projects/lab/locations/us-west4"}, "not a zone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_api_refuses(strict_cloud: CloudTpu, case: str) -> None:
    change, word = REFUSED[case]
    with pytest.raises(exceptions.BadRequest, match=word):
        client_of(strict_cloud).create_queued_resource(**request(**{"name": "run", **change}))
    assert strict_cloud.resources() == {}


def test_metadata_of_just_the_largest_size_is_taken(strict_cloud: CloudTpu) -> None:
    strict_cloud.hold("ACCEPTED")
    metadata = {"startup-script": "#" * 256 * 1024, "b": "#" * (256 * 1024 - len("startup-script") - 1)}
    client_of(strict_cloud).create_queued_resource(**request("large", metadata=metadata))
    delete(strict_cloud, "large", force=True).result(timeout=30)
    strict_cloud.hold("ACCEPTED", False)


@pytest.mark.parametrize(
    "spec",
    [
        {"nodeId": "run", "multisliceParams": {"nodeCount": 2}},
        {"multisliceParams": {"nodeCount": 1}},
        {},
        {"nodeId": "run", "parent": "projects/lab/locations/us-west4-b"},
        {"nodeId": "run", "acceleratorTypo": "v5litepod-4"},
    ],
    ids=["a node and slices", "one slice", "no name", "another zone", "unknown field"],
)
def test_requests_that_the_client_would_not_send_are_refused(strict_cloud: CloudTpu, spec: dict[str, Any]) -> None:
    node = {"acceleratorType": "v5litepod-4", "runtimeVersion": "v2-alpha-tpuv5-lite"}
    body = json.dumps({"tpu": {"nodeSpec": [{"parent": PARENT, "node": node, **spec}]}}).encode()
    url = f"{strict_cloud.api_endpoint}/v2/{PARENT}/queuedResources?queuedResourceId=run"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(urllib.request.Request(url, body))
    assert refusal.value.code == 400
    assert json.load(refusal.value)["error"]["status"] == "INVALID_ARGUMENT"
    assert strict_cloud.resources() == {}


def test_names_are_taken_once_and_deletion_needs_force(cloud_tpu: CloudTpu) -> None:
    client = client_of(cloud_tpu)
    cloud_tpu.hold("PROVISIONING")
    client.create_queued_resource(**request("run-1"))
    with pytest.raises(exceptions.Conflict):
        client.create_queued_resource(**request("run-1"))
    other = request("run-2")
    other["queued_resource"].tpu.node_spec[0].node_id = "run-1"
    with pytest.raises(exceptions.Conflict):
        client.create_queued_resource(**other)

    cloud_tpu.wait("run-1", "PROVISIONING")
    assert client.get_node(name=f"{PARENT}/nodes/run-1").state == tpu_v2.Node.State.CREATING
    for state in ("PROVISIONING", "ACTIVE"):
        cloud_tpu.hold("PROVISIONING", state == "PROVISIONING")
        cloud_tpu.wait("run-1", state)
        with pytest.raises(exceptions.BadRequest, match=state):
            delete(cloud_tpu, "run-1")
    assert cloud_tpu.state("run-1") == "ACTIVE"
    with pytest.raises(exceptions.NotFound):
        delete(cloud_tpu, "run-2")
    cloud_tpu.hold("DELETING")
    delete(cloud_tpu, "run-1", force=True)
    with pytest.raises(exceptions.BadRequest, match="DELETING"):
        delete(cloud_tpu, "run-1", force=True)


def test_a_repeated_request_with_the_same_id_creates_once(cloud_tpu: CloudTpu) -> None:
    cloud_tpu.hold("ACCEPTED")
    same = tpu_v2.CreateQueuedResourceRequest(request_id="6f2a6f4e-7b0e-4e0c-8a52-3b5f6d1b0c11", **request("run-1"))
    first, second = (client_of(cloud_tpu).create_queued_resource(request=same) for _ in range(2))
    assert first.operation.name == second.operation.name
    assert len(cloud_tpu.resources()) == 1


def test_lists_have_pages_and_zones(cloud_tpu: CloudTpu) -> None:
    client = client_of(cloud_tpu)
    cloud_tpu.hold("WAITING_FOR_RESOURCES")
    elsewhere = "projects/lab/locations/us-east5-b"
    for name, parent in (("a", PARENT), ("b", PARENT), ("c", PARENT), ("a", elsewhere)):
        client.create_queued_resource(**request(name, parent=parent))

    def listed(parent: str) -> list[str]:
        asked = tpu_v2.ListQueuedResourcesRequest(parent=parent, page_size=2)
        return [resource.name.rpartition("/")[2] for resource in client.list_queued_resources(request=asked)]

    assert listed(PARENT) == ["a", "b", "c"]
    assert listed(elsewhere) == ["a"]
    assert listed("projects/lab/locations/-") == ["a", "b", "c", "a"]
    assert listed("projects/other/locations/-") == []
    cloud_tpu.wait("b", "WAITING_FOR_RESOURCES")
    delete(cloud_tpu, "b").result(timeout=30)  # those that wait need no force
    assert listed(PARENT) == ["a", "c"]


def test_the_launchers_table_of_types_is_the_clouds(strict_cloud: CloudTpu) -> None:
    types = tpu_types()
    assert {name: (one.chips, one.hosts) for name, one in types.items()} == {
        name: size for name, size in ACCELERATOR_TYPES.items() if not name.startswith(("v2-", "v3-"))
    }
    strict_cloud.hold("ACCEPTED")
    for one in {one.generation.name: one for one in types.values()}.values():
        arguments = request("run", accelerator_type=one.name, runtime_version=one.generation.runtime)
        client_of(strict_cloud).create_queued_resource(**arguments)  # the default runtime is one that there is
        delete(strict_cloud, "run", force=True).result(timeout=30)
    strict_cloud.hold("ACCEPTED", False)


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_no_capacity_in_a_zone(cloud_tpu: CloudTpu) -> None:
    cloud_tpu.no_capacity("us-west4-a")
    client = client_of(cloud_tpu)
    client.create_queued_resource(**request("here"))
    client.create_queued_resource(**request("there", parent="projects/lab/locations/us-east5-b"))
    cloud_tpu.wait("there", "ACTIVE")  # was asked for later
    assert cloud_tpu.state("here") == "WAITING_FOR_RESOURCES"
    cloud_tpu.no_capacity("us-west4-a", False)
    cloud_tpu.wait("here", "ACTIVE")


def test_provisioning_fails_with_an_error(cloud_tpu: CloudTpu) -> None:
    cloud_tpu.fail_provisioning("no more v5e in us-west4-a")
    client_of(cloud_tpu).create_queued_resource(**request("run-1"))
    cloud_tpu.wait("run-1", "FAILED")
    error = client_of(cloud_tpu).get_queued_resource(name=f"{PARENT}/queuedResources/run-1").state.failed_data.error
    assert (error.code, error.message) == (8, "no more v5e in us-west4-a")
    delete(cloud_tpu, "run-1").result(timeout=30)
    start(cloud_tpu, "run-1")


def test_errors_in_passing(cloud_tpu: CloudTpu) -> None:
    client = client_of(cloud_tpu)
    cloud_tpu.fail_next(429, 2)
    for _ in range(2):
        with pytest.raises(exceptions.TooManyRequests):
            client.create_queued_resource(**request("run-1"))
    cloud_tpu.fail_next(503, method="POST")
    assert list(client.list_queued_resources(parent=PARENT)) == []
    with pytest.raises(exceptions.ServiceUnavailable):
        client.create_queued_resource(**request("run-1"))
    client.create_queued_resource(**request("run-1"))
    assert [entry["status"] for entry in cloud_tpu.requests] == [429, 429, 200, 503, 200]


def test_a_lost_answer_of_a_creation(cloud_tpu: CloudTpu) -> None:
    client = client_of(cloud_tpu)
    cloud_tpu.lose_next_create()
    with pytest.raises(Exception, match="closed connection without response"):
        client.create_queued_resource(**request("run-1"))
    cloud_tpu.wait("run-1", "ACTIVE")
    with pytest.raises(exceptions.Conflict):
        client.create_queued_resource(**request("run-1"))
    assert len(cloud_tpu.resources()) == 1


def test_answers_can_be_slow(cloud_tpu: CloudTpu) -> None:
    cloud_tpu.latency(0.5)
    begin = time.monotonic()
    list(client_of(cloud_tpu).list_queued_resources(parent=PARENT))
    assert time.monotonic() - begin >= 0.5


def test_preemption_asks_first_and_then_kills(cloud_tpu: CloudTpu) -> None:
    script = """
        setsid bash -c 'trap "" TERM; touch stubborn; while :; do sleep 0.1; done' &
        trap 'echo asked > asked; exit' TERM
        echo ready > ready
        while :; do sleep 0.1; done
    """
    start(cloud_tpu, "run-1", script)
    texts(cloud_tpu, "run-1", "ready")
    texts(cloud_tpu, "run-1", "stubborn")
    (vm,), processes = cloud_tpu.vms("run-1"), cloud_tpu.processes("run-1")
    cloud_tpu.preempt("run-1", grace=6)
    with pytest.raises(exceptions.BadRequest, match="SUSPENDING"):
        delete(cloud_tpu, "run-1", force=True)
    cloud_tpu.wait_until((vm.disk / "asked").exists, "SIGTERM in the VM")
    assert cloud_tpu.state("run-1") == "SUSPENDING"  # one of its processes does not listen
    assert cloud_tpu.processes("run-1")
    cloud_tpu.wait("run-1", "SUSPENDED")
    assert not alive(processes)
    assert cloud_tpu.history("run-1")[-3:] == ["ACTIVE", "SUSPENDING", "SUSPENDED"]

    client = client_of(cloud_tpu)
    state = client.get_queued_resource(name=f"{PARENT}/queuedResources/run-1").state
    assert state.state_initiator == tpu_v2.QueuedResourceState.StateInitiator.SERVICE
    with pytest.raises(exceptions.NotFound):
        client.get_node(name=f"{PARENT}/nodes/run-1")
    delete(cloud_tpu, "run-1").result(timeout=30)
    start(cloud_tpu, "run-1", "ls > found")
    assert "asked" not in texts(cloud_tpu, "run-1", "found")[0]  # another disk


def test_preemption_without_notice(cloud_tpu: CloudTpu) -> None:
    start(cloud_tpu, "run-1", "trap 'touch asked' TERM; touch ready; while :; do sleep 0.1; done")
    texts(cloud_tpu, "run-1", "ready")
    (vm,), processes = cloud_tpu.vms("run-1"), cloud_tpu.processes("run-1")
    cloud_tpu.preempt("run-1", grace=0)
    cloud_tpu.wait("run-1", "SUSPENDED")
    assert not alive(processes)
    assert not (vm.disk / "asked").exists()


def test_a_vm_knows_that_it_is_preempted(cloud_tpu: CloudTpu) -> None:
    ask = f'{CURL} "{METADATA}/preempted?wait_for_change=true&timeout_sec=1"'
    script = f"trap '' TERM; {ask} > before; until [ $({ask}) = TRUE ]; do :; done; touch told; sleep 600"
    start(cloud_tpu, "run-1", script)
    cloud_tpu.wait_until(lambda: texts(cloud_tpu, "run-1", "before") == ["FALSE"], "an answer")
    disk = cloud_tpu.vms("run-1")[0].disk
    cloud_tpu.preempt("run-1")
    cloud_tpu.wait("run-1", "SUSPENDED")
    assert (disk / "told").exists()


def test_a_reboot_runs_the_script_again_on_the_same_disk(cloud_tpu: CloudTpu) -> None:
    script = "echo boot >> boots; test $(wc -l < boots) = 2 && touch again; sleep 600 & setsid sleep 600"
    start(cloud_tpu, "run-1", script, accelerator_type="v5litepod-16")
    cloud_tpu.wait_until(lambda: len(cloud_tpu.processes("run-1")) == 12, "a shell and two sleeps on four VMs")
    before = cloud_tpu.processes("run-1")
    cloud_tpu.reboot("run-1", 2)
    assert len(alive(before)) == 9
    assert texts(cloud_tpu, "run-1", "again", count=1) == [""]
    assert texts(cloud_tpu, "run-1", "boots") == ["boot\n", "boot\n", "boot\nboot\n", "boot\n"]
    assert [vm.boots for vm in cloud_tpu.vms("run-1")] == [1, 1, 2, 1]
    assert cloud_tpu.state("run-1") == "ACTIVE"


def test_a_vm_dies_for_good(cloud_tpu: CloudTpu) -> None:
    start(cloud_tpu, "run-1", "exec sleep 600", accelerator_type="v5litepod-16")
    cloud_tpu.wait_until(lambda: len(cloud_tpu.processes("run-1")) == 4, "four VMs that sleep")
    cloud_tpu.kill_vm("run-1", 1)
    assert [vm.on for vm in cloud_tpu.vms("run-1")] == [True, False, True, True]
    assert len(cloud_tpu.processes("run-1")) == 3
    assert cloud_tpu.state("run-1") == "ACTIVE"
    node = client_of(cloud_tpu).get_node(name=f"{PARENT}/nodes/run-1")
    assert node.health == tpu_v2.Node.Health.TIMEOUT
    delete(cloud_tpu, "run-1", force=True).result(timeout=30)


# --- the process -------------------------------------------------------------------------------------------------------

_STARTER = """
import sys, time
from pathlib import Path
from tests.clusters.cloud_tpu import running_cloud_tpu
with running_cloud_tpu(Path(sys.argv[1])) as cloud:
    print(cloud.api_endpoint, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["starter", "server"])
def test_nothing_is_left_when_it_is_killed(tmp_path: Path, victim: str) -> None:
    command = [sys.executable, "-c", _STARTER] if victim == "starter" else [sys.executable, "-m"]
    command += [str(tmp_path)] if victim == "starter" else ["tests.clusters.cloud_tpu", "--folder", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        cloud = CloudTpu(process.stdout.readline().strip(), tmp_path)
        start(cloud, "run-1", "trap '' TERM; setsid sleep 600 & sleep 600; sleep 600")
        cloud.wait_until(lambda: len(cloud.processes("run-1")) == 3, "a shell and two sleeps")
        pids = cloud.processes("run-1")
        process.kill()
    deadline = time.monotonic() + 20
    while alive(pids):
        assert time.monotonic() < deadline, alive(pids)
        time.sleep(0.05)


def test_it_ends_when_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.clusters.cloud_tpu", "--folder", str(tmp_path), "--grace", "0.2"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        cloud = CloudTpu(process.stdout.readline().strip(), tmp_path)
        start(cloud, "run-1", "trap '' TERM; sleep 600; sleep 600")
        cloud.wait_until(lambda: len(cloud.processes("run-1")) == 2, "a shell and a sleep")
        pids = cloud.processes("run-1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not alive(pids)


# --- what a VM is ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cloud_with_python(tmp_path: Path) -> Iterator[CloudTpu]:
    """A cloud whose VMs have this environment's Python as `python3`."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_dir / "python3").chmod(0o755)
    with running_cloud_tpu(tmp_path / "cloud", bin_dir=bin_dir) as cloud:
        yield cloud


def test_googles_libraries_find_project_and_account(cloud_with_python: CloudTpu) -> None:
    program = """
import json, google.auth, google.auth.transport.requests as transport
credentials, project = google.auth.default()
credentials.refresh(transport.Request())
print(json.dumps([project, credentials.service_account_email, credentials.token]))
"""
    script = f"python3 -c '{program}' > out && mv out result"
    account = tpu_v2.ServiceAccount(email="trainer@lab.iam.gserviceaccount.com")
    start(cloud_with_python, "run-1", script, service_account=account)
    (found,) = texts(cloud_with_python, "run-1", "result")
    assert json.loads(found) == ["lab", "trainer@lab.iam.gserviceaccount.com", "token-of-t1v-n-run-1-w-0"]


_TOTAL = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.distributed.initialize()
n = jax.device_count()
mesh = jax.make_mesh((n,), ("x",))
mine = jax.make_array_from_callback((n,), NamedSharding(mesh, P("x")), lambda i: np.arange(n, dtype=np.float32)[i])
add = jax.jit(jax.shard_map(lambda v: jax.lax.psum(v, "x"), mesh=mesh, in_specs=P("x"), out_specs=P()))
total = float(add(mine).addressable_shards[0].data[0])
where = jax._src.distributed.global_state.coordinator_address
print(json.dumps([jax.process_index(), jax.process_count(), jax.local_device_count(), total, where]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "slices", "processes", "devices"),
    [("v5litepod-16", 1, 4, 4), ("v5litepod-4", 2, 2, 4), ("v4-16", 2, 4, 4), ("v5litepod-8", 1, 1, 8)],
)
def test_stock_jax_finds_its_cluster(
    cloud_with_python: CloudTpu, kind: str, slices: int, processes: int, devices: int
) -> None:
    cloud = cloud_with_python
    runtime = "v2-alpha-tpuv5-lite" if kind.startswith("v5") else "tpu-ubuntu2204-base"
    script = f"python3 -c '{_TOTAL}' > out && mv out result"
    start(cloud, "run-1", script, slices=slices, accelerator_type=kind, runtime_version=runtime)
    nodes = [f"{PARENT}/nodes/run-1-{index}" for index in range(slices)] if slices > 1 else [f"{PARENT}/nodes/run-1"]
    assert [node.name for node in client_of(cloud).list_nodes(parent=PARENT)] == nodes
    results = [json.loads(text.splitlines()[-1]) for text in texts(cloud, "run-1", "result", seconds=180)]
    count = processes * devices
    assert [result[:4] for result in results] == [
        [index, processes, devices, count * (count - 1) / 2] for index in range(processes)
    ]
    (coordinator,) = {result[4] for result in results}
    assert coordinator.partition(":")[0] == cloud.vms("run-1")[0].address


def test_slices_know_each_other(cloud_tpu: CloudTpu) -> None:
    start(cloud_tpu, "run-1", f"{CURL} {METADATA}/attributes/tpu-env > out && mv out tpu-env", slices=2)
    environments = texts(cloud_tpu, "run-1", "tpu-env")
    lines = [dict(line.split(": ", 1) for line in text.splitlines()) for text in environments]
    assert [line["MEGASCALE_SLICE_ID"] for line in lines] == ["'0'", "'1'"]
    assert {line["MEGASCALE_NUM_SLICES"] for line in lines} == {"'2'"}
    (coordinator,) = {line["MEGASCALE_COORDINATOR_ADDRESS"] for line in lines}
    assert coordinator.strip("'").partition(":")[0] == cloud_tpu.vms("run-1")[0].address
