"""The schema of `cluster_configs/*.yaml`: which keys a cluster of each backend has, and what each may be.

A key that the schema does not know is an error, never ignored: a misspelt limit that silently does not apply costs more
than a refused submission. The description of a key is what its error message says was expected.
"""

import json
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from launch.text import shown
from launch.topology import TpuType, find_tpu
from launch.values import (
    Duration,
    Folder,
    Image,
    Labels,
    PlainVariables,
    Project,
    SbatchText,
    Secrets,
    SecretsOfVms,
    SlurmOptions,
    Text,
    TpuName,
    Variables,
    Zones,
)

ENVIRONMENT = "environment"

# With these in its environment a job may see other devices than its cluster has.
_CHANGES_DEVICES = {"JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS", "CUDA_VISIBLE_DEVICES"}


class Cluster(BaseModel):
    """The keys that every backend has. Each description is what an error message says was expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    storage: str = Field(
        "runs", min_length=1, description="a directory (text) or gs://BUCKET/FOLDER for run directories"
    )
    env: Variables = Field(
        default_factory=dict, description="variables for the job, NAME: text (quote true, false, yes and no)"
    )
    python: str | None = Field(None, description="the path (text) of the job's Python interpreter")
    max_failures: int = Field(3, ge=0, description="a whole number, 0 or more")
    grace_seconds: int = Field(120, ge=1, description="a whole number of seconds, at least 1")
    compilation_cache: str = Field("~/.cache/jasmine/xla", description="a directory (text) for compiled programs")


class LocalCluster(Cluster):
    """This machine, as `processes` hosts that have `devices_per_process` CPU devices each."""

    backend: Literal["local"] = Field(description="the text 'local'")
    max_preemptions: int = Field(100, ge=0, description="a whole number, 0 or more")
    processes: int = Field(1, ge=1, le=1000, description="a whole number, at least 1 and at most 1000")
    devices_per_process: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        1, description="a whole number of CPU devices, 1 to 4096, or 'auto' for whatever devices this machine has"
    )
    hang_timeout: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="a whole number of seconds without a step, or 'auto' for ten steps and at least 120 s"
    )

    @property
    def devices(self) -> int | None:
        """How many devices the job will have, where that is certain."""
        each = self.devices_per_process
        return None if each == "auto" or _CHANGES_DEVICES & self.env.keys() else self.processes * each

    @model_validator(mode="after")
    def _one_owner_of_real_devices(self) -> "LocalCluster":
        if self.devices_per_process == "auto" and self.processes > 1:
            raise ValueError(f"devices_per_process 'auto' is for 1 process, not {self.processes}; give a number")
        return self


class SlurmCluster(Cluster):
    """A Slurm cluster, by what one job asks of it. Every key but `backend` may be left out."""

    backend: Literal["slurm"] = Field(description="the text 'slurm'")
    env: PlainVariables = Field(
        default_factory=dict, description="variables for the job, NAME: text (quote true, false, yes and no)"
    )
    secrets: Secrets = Field(
        default_factory=dict,
        description=f"NAME: '{ENVIRONMENT}' (of the shell that submits) or the path of a file that holds the value",
    )
    max_preemptions: int | None = Field(None, ge=0, description="a whole number, 0 or more, or null for no limit")

    partition: SbatchText | None = Field(None, description="a partition's name (text)")
    account: SbatchText | None = Field(None, description="an account's name (text)")
    qos: SbatchText | None = Field(None, description="the name of a quality of service (text)")
    nodes: int = Field(1, ge=1, le=20_000, description="a whole number, at least 1 and at most 20000")
    gpus_per_node: int = Field(0, ge=0, le=256, description="a whole number, 0 or more and at most 256")
    gpu_type: SbatchText | None = Field(None, description="a type as in the cluster's gres, such as h100")
    cpus_per_node: int | None = Field(None, ge=1, description="a whole number, at least 1, or null for the default")
    processes_per_node: Annotated[int, Field(ge=1, le=256)] | Literal["gpu"] = Field(
        1, description="a whole number, 1 to 256, or 'gpu' for one process for each GPU"
    )
    memory: SbatchText | None = Field(None, description="text such as '500G', or '0' for all of a node's")
    time_limit: Duration | None = Field(
        None, description="a time as sbatch takes it: 90 (minutes), 12:00:00 or 2-00:00:00"
    )
    constraint: SbatchText | None = Field(None, description="features that nodes must have (text)")
    reservation: SbatchText | None = Field(None, description="a reservation's name (text)")
    exclude: SbatchText | None = Field(None, description="nodes to stay away from, as in node[01-03]")
    mail: SbatchText | None = Field(
        None, description="an address (text) that Slurm writes to when the job ends or fails"
    )
    extra: SlurmOptions = Field(default_factory=list, description="a list of options for sbatch, as in ['--exclusive']")
    setup: list[str] = Field(
        default_factory=list, description="a list of shell lines, run on the first node before the job"
    )
    container: Image | None = Field(None, description="an image (text): a path or what the runtime can fetch")
    container_runtime: Literal["apptainer", "pyxis"] = Field("apptainer", description="'apptainer' or 'pyxis'")
    container_mounts: list[Text] = Field(
        default_factory=list, description="a list of paths that the container sees, as in ['/data', '/a:/b']"
    )
    init_timeout: int = Field(600, ge=1, description="a whole number of seconds, at least 1")
    heartbeat_timeout: int = Field(60, ge=1, description="a whole number of seconds, at least 1")
    preflight_seconds: int = Field(300, ge=0, description="a whole number of seconds, or 0 for no preflight")
    hang_timeout: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="a whole number of seconds without a step, or 'auto' for ten steps and at least 120 s"
    )
    exclude_hours: float = Field(24.0, ge=0, description="a number of hours, 0 or more")

    @model_validator(mode="after")
    def _a_share_for_each_process(self) -> "SlurmCluster":
        if self.processes_per_node == "gpu" and not self.gpus_per_node:
            raise ValueError("processes_per_node is 'gpu' but gpus_per_node is 0; give both, or a number of processes")
        if self.gpus_per_node % self.processes_on_a_node and self.gpus_per_node:
            raise ValueError(
                f"gpus_per_node {self.gpus_per_node} is not a multiple of processes_per_node {self.processes_per_node}; "
                "each process needs the same number of GPUs"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError(f"gpu_type is {shown(self.gpu_type)} but gpus_per_node is 0; say how many")
        return self

    @property
    def devices(self) -> int | None:
        """How many devices the job will have, where that is certain: the GPUs, unless jax is told to take others."""
        changed = _CHANGES_DEVICES & (self.env.keys() | os.environ.keys())
        return self.nodes * self.gpus_per_node if self.gpus_per_node and not changed else None

    @property
    def processes_on_a_node(self) -> int:
        """How many processes of the job each node runs."""
        return self.gpus_per_node if self.processes_per_node == "gpu" else self.processes_per_node


class CloudTpuCluster(Cluster):
    """A slice of Cloud TPU, or several, rented for one run as a queued resource."""

    backend: Literal["cloud_tpu"] = Field(description="the text 'cloud_tpu'")
    env: PlainVariables = Field(
        default_factory=dict, description="variables for the job, NAME: text (quote true, false, yes and no)"
    )
    secrets: SecretsOfVms = Field(
        default_factory=dict,
        description="NAME: 'projects/PROJECT/secrets/NAME' (Secret Manager), or the path of a file on the VMs",
    )
    max_preemptions: int | None = Field(None, ge=0, description="a whole number, 0 or more, or null for no limit")

    accelerator_type: TpuName = Field(description="the exact type as the Cloud TPU API calls it, such as v5litepod-256")
    slices: int = Field(1, ge=1, le=256, description="a whole number, at least 1 and at most 256")
    project: Project = Field(
        "$GOOGLE_CLOUD_PROJECT", description="the Google Cloud project (text); $VARIABLES are filled in"
    )
    zone: Zones = Field(description="a zone such as us-west4-a, or a list of zones, tried one after the other")
    zone_patience: int = Field(
        3600, ge=1, description="a whole number of seconds to wait for capacity in one zone of several"
    )
    runtime_version: Text | None = Field(
        None, description="an image of the Cloud TPU API, or null for the type's default"
    )
    provisioning: Literal["on-demand", "spot", "reserved"] = Field(
        "on-demand", description="'on-demand', 'spot' or 'reserved'"
    )
    reservation: Text | None = Field(None, description="the name of a reservation, with provisioning: reserved")
    network: Text | None = Field(None, description="the name of a network (text), or null for the default one")
    subnetwork: Text | None = Field(None, description="the name of a subnetwork (text), or null")
    external_ips: bool = Field(True, description="true or false")
    service_account: Text | None = Field(
        None, description="the e-mail address of the VMs' account, or null for the project's default"
    )
    labels: Labels = Field(default_factory=dict, description="labels for the resource, NAME: text")
    setup: list[str] = Field(default_factory=list, description="a list of shell lines, run on every VM before the job")
    vm_dir: Folder = Field("/var/lib/jasmine", description="a directory (text) on the VMs for code and environment")
    init_timeout: int = Field(1800, ge=1, description="a whole number of seconds, at least 1")
    heartbeat_timeout: int = Field(100, ge=1, description="a whole number of seconds, at least 1")
    preflight_seconds: int = Field(300, ge=0, description="a whole number of seconds, or 0 for no preflight")
    hang_timeout: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="a whole number of seconds without a step, or 'auto' for ten steps and at least 120 s"
    )
    boot_timeout: int = Field(
        1800, ge=1, description="a whole number of seconds that the VMs have to boot and install, at least 1"
    )
    silent_timeout: int = Field(
        180, ge=1, description="a whole number of seconds without a sign of a VM after which it counts as lost"
    )

    @model_validator(mode="after")
    def _a_reservation_where_reserved(self) -> "CloudTpuCluster":
        if (self.provisioning == "reserved") != (self.reservation is not None):
            raise ValueError("provisioning: reserved and reservation: NAME belong together; give both or neither")
        return self

    @property
    def devices(self) -> int | None:
        """How many devices the job will have, where that is certain: the chips of all slices."""
        return None if _CHANGES_DEVICES & self.env.keys() else self.slices * self.tpu.chips

    @property
    def tpu(self) -> TpuType:
        """What one slice is."""
        return find_tpu(self.accelerator_type)


AnyCluster = LocalCluster | SlurmCluster | CloudTpuCluster
BACKENDS: dict[str, type[AnyCluster]] = {"local": LocalCluster, "slurm": SlurmCluster, "cloud_tpu": CloudTpuCluster}


def json_schema() -> dict[str, Any]:
    """Return the schema of a cluster file, for editors; `cluster_configs/schema.json` holds it."""
    schema = TypeAdapter(Annotated[AnyCluster, Field(discriminator="backend")]).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A Jasmine cluster", **schema}


def check_stored(settings: Any) -> None:
    """Raise ValueError for settings of a run's record that this launcher could not have written; keys that it does not
    know, because they are of another version, say nothing."""
    schema = BACKENDS[settings["backend"]]
    schema.model_validate({key: value for key, value in settings.items() if key in schema.model_fields})


if __name__ == "__main__":  # python -m launch.config > cluster_configs/schema.json
    print(json.dumps(json_schema(), indent=1))
