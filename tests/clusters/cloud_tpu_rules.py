"""What the fake Cloud TPU refuses, and what its VMs' metadata servers show.

Nothing here is shared with the launcher under test: its table of accelerator types and its limits are held against these.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

_RUNTIME_VERSIONS = (
    "tpu-ubuntu2204-base", "tpu-vm-base", "v2-alpha-tpuv4", "v2-alpha-tpuv4-pod", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv5",
    "v2-alpha-tpuv6e",
)  # fmt: skip
PCI_IDS = {"v2": "0x0027", "v3": "0x0027", "v4": "0x005e", "v5p": "0x0062", "v5litepod": "0x0063", "v6e": "0x006f"}

_ID = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_LABEL = re.compile(r"[a-z][-_a-z0-9]{0,62}=[-_a-z0-9]{0,63}")


def _accelerator_types() -> dict[str, tuple[int, int]]:
    """Return the chips and VMs of every type of up to 128 VMs."""
    types: dict[str, tuple[int, int]] = {}
    for generation, sizes in {
        "v2": (8, 32, 128, 256, 512),
        "v3": (8, 32, 64, 128, 256, 512, 1024),
        "v4": (8, 16, 32, 64, 128, 256, 512, 1024),
        "v5p": (8, 16, 32, 64, 128, 256, 512, 1024),
    }.items():
        types |= {f"{generation}-{cores}": (cores // 2, cores // 8) for cores in sizes}
    for generation in ("v5litepod", "v6e"):
        types |= {f"{generation}-{chips}": (chips, 1) for chips in (1, 4, 8)}
        types |= {f"{generation}-{chips}": (chips, chips // 4) for chips in (16, 32, 64, 128, 256)}
    return types


ACCELERATOR_TYPES = _accelerator_types()


class Refusal(Exception):
    """A request that the API answers with an error."""

    def __init__(self, http: int, status: str, message: str) -> None:
        super().__init__(message)
        self.http, self.status, self.message = http, status, message


def invalid(message: str) -> Refusal:
    return Refusal(400, "INVALID_ARGUMENT", message)


def check(parent: str, identity: str, pb: Any) -> list[str]:
    """Return the ids of a resource's nodes; raise what the API refuses it with."""
    if _ZONE.fullmatch(parent.rpartition("/")[2]) is None:
        raise invalid(f"Location {parent.rpartition('/')[2]!r} is not a zone")
    if len(pb.tpu.node_spec) != 1:
        raise invalid(f"tpu.node_spec has {len(pb.tpu.node_spec)} entries, not one")
    spec = pb.tpu.node_spec[0]
    strategy = spec.WhichOneof("name_strategy")
    if strategy is None:
        raise invalid("Either node_id or multislice_params must be set")
    nodes = [spec.node_id]
    if strategy == "multislice_params":
        if spec.multislice_params.node_count < 2:
            raise invalid("multislice_params.node_count must be > 1")
        prefix = spec.multislice_params.node_id_prefix or identity
        nodes = [f"{prefix}-{index}" for index in range(spec.multislice_params.node_count)]
    for name in (identity, *nodes):
        if _ID.fullmatch(name) is None:
            raise invalid(f"Invalid id {name!r}: it must match {_ID.pattern}")
    if spec.parent != parent:
        raise invalid(f"node_spec.parent is {spec.parent!r}, not {parent!r}")
    node = spec.node
    if node.accelerator_type not in ACCELERATOR_TYPES:
        zone = parent.rpartition("/")[2]
        raise invalid(f"the accelerator {node.accelerator_type} was not found in zone {zone}")
    if node.runtime_version not in _RUNTIME_VERSIONS:
        raise invalid(f"Invalid runtime version {node.runtime_version!r}")
    for key, value in node.metadata.items():
        if len(value.encode()) > 256 * 1024:
            raise invalid(f"Value for metadata key {key!r} is larger than the limit of 262144 bytes")
    if sum(len(key.encode()) + len(value.encode()) for key, value in node.metadata.items()) > 512 * 1024:
        raise invalid("Metadata is larger in all than the limit of 524288 bytes")
    for key, value in node.labels.items():
        if _LABEL.fullmatch(f"{key}={value}") is None:
            raise invalid(f"Invalid label {key}={value}")
    return nodes


def vm_metadata(
    pb: Any, node_id: str, worker: int, addresses: Sequence[str], megascale: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the metadata server of a VM shows; `addresses` are those of its slice's workers."""
    project, zone = pb.name.split("/")[1], pb.name.split("/")[3]
    node = pb.tpu.node_spec[0].node
    name = f"t1v-n-{node_id}-w-{worker}"
    tpu_env = {
        "ACCELERATOR_TYPE": node.accelerator_type,
        "CONSUMER_PROJECT_ID": project,
        "NODE_ID": node_id,
        "RUNTIME_VERSION": node.runtime_version,
        "WORKER_ID": worker,
        "ZONE": zone,
        **megascale,
    }
    account = node.service_account.email or "1234567890-compute@developer.gserviceaccount.com"
    scopes = ["https://www.googleapis.com/auth/cloud-platform"]
    token = {"access_token": f"token-of-{name}", "expires_in": 3599, "token_type": "Bearer"}
    identity = {"aliases": ["default"], "email": account, "scopes": scopes, "token": token}
    spot = pb.WhichOneof("tier") == "spot"
    return {
        "instance": {
            "attributes": {
                **node.metadata,
                "accelerator-type": node.accelerator_type,
                "agent-worker-number": str(worker),
                "worker-network-endpoints": ",".join(f"unknown:unknown:{address}" for address in addresses),
                "tpu-env": "".join(f"{key}: '{value}'\n" for key, value in tpu_env.items()),
            },
            "hostname": f"{name}.{zone}.c.{project}.internal",
            "id": str(random.randrange(10**17, 10**18)),
            "maintenance-event": "NONE",
            "name": name,
            "network-interfaces": {"0": {"ip": addresses[worker]}},
            "preempted": "FALSE",
            "scheduling": {"preemptible": "TRUE" if spot else "FALSE"},
            "service-accounts": {"default": identity, account: identity},
            "zone": f"projects/1234567890/zones/{zone}",
        },
        "project": {"numeric-project-id": "1234567890", "project-id": project},
    }
