"""The cluster files that are shipped, their schema for editors, and what a user is told who gets a Slurm one wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from launch.cluster_files import CLUSTER_DIR, cluster_names, load_cluster
from launch.config import CloudTpuCluster, SlurmCluster, json_schema
from launch.errors import UserError


def test_the_schema_is_that_of_the_models() -> None:
    shipped = json.loads((CLUSTER_DIR / "schema.json").read_text())
    assert shipped == json_schema(), "remake it: python -m launch.config > cluster_configs/schema.json"
    command = [sys.executable, "-m", "launch.config"]
    made = subprocess.run(command, cwd=CLUSTER_DIR.parent, capture_output=True, text=True, check=True)
    assert made.stdout == (CLUSTER_DIR / "schema.json").read_text()


@pytest.mark.parametrize("name", cluster_names())
def test_every_shipped_file_is_valid_and_names_the_schema(name: str) -> None:
    load_cluster(name)
    assert (CLUSTER_DIR / f"{name}.yaml").read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize(("template", "schema"), [("slurm", SlurmCluster), ("tpu", CloudTpuCluster)])
def test_the_template_has_every_key(template: str, schema: type[BaseModel]) -> None:
    text = (CLUSTER_DIR / f"{template}-template.yaml").read_text()
    keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    assert keys == set(schema.model_fields)


@pytest.mark.parametrize(
    ("name", "chips", "vms"),
    [
        ("tpu-v5-256", 256, 64), ("tpu-v5-16", 16, 4), ("tpu-v5p-128", 64, 16), ("tpu-v4-64", 32, 8),
        ("tpu-v6-256", 256, 64), ("tpu-v5-2x256", 512, 128),
    ],
)  # fmt: skip
def test_tpu_files_are_what_their_names_say(name: str, chips: int, vms: int) -> None:
    _, settings = load_cluster(name)
    assert isinstance(settings, CloudTpuCluster)
    assert (settings.slices * settings.tpu.chips, settings.slices * settings.tpu.hosts) == (chips, vms)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accelerator_type: v5-256", "v5-256' could be two things: write v5litepod-256 (256 v5e chips on 64 VMs) or"),
        ("accelerator_type: v5litpod-16", "did you mean 'v5litepod-16'?"),
        ("accelerator_type: v4-4", "v4 counts TensorCores, two on each chip"),
        ("accelerator_type: tpu7x-64", "rented through GKE"),
        ("reservation: ours", "provisioning: reserved and reservation: NAME belong together"),
        ("secrets: {WANDB_API_KEY: environment}", "does not reach a VM without being stored on the way"),
        ("env: {WANDB_API_KEY: abc}", "WANDB_API_KEY looks like a secret"),
        ("labels: {Team: World}", "labels are lower-case letters"),
        ("provisioning: cheap", "expected 'on-demand', 'spot' or 'reserved'"),
        ("zone: []", "zone is []; expected a zone such as us-west4-a"),
        ("zone: uswest", "zone: 'uswest' is no zone of Google Cloud; write one such as us-west4-a"),
        ("zone: us-west4", "zone: 'us-west4' is no zone"),
        ("zone: [us-west4-a, us_west4_b]", "zone: 'us_west4_b' is no zone"),
    ],
)
def test_mistakes_in_tpu_files_are_told_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    values = {"backend": "cloud_tpu", "accelerator_type": "v5litepod-16", "zone": "us-west4-a", "project": "p"}
    key, _, value = text.partition(": ")
    lines = [f"{k}: {v}" for k, v in {**values, key: value}.items()]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as refused:
        load_cluster(str(tmp_path / "c.yaml"))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cluster", "loaded"), [("local", []), ("slurm-h100", ["submitit"]), ("tpu-v5-256", ["google.cloud.tpu_v2"])]
)
def test_only_what_the_cluster_needs_is_loaded(tmp_path: Path, cluster: str, loaded: list[str]) -> None:
    program = """
import sys
from launch.submit import main
main(["--cluster", sys.argv[1], "--dry-run"])
print([name for name in ("jax", "xmanager", "submitit", "google.cloud.tpu_v2") if name in sys.modules])
"""
    env = {"PYTHONPATH": str(CLUSTER_DIR.parent), "HOME": str(tmp_path), "PATH": os.defpath}
    command = [sys.executable, "-c", program, cluster]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [str(loaded)], done.stderr


@pytest.mark.parametrize("zone", ["us-west4-a", "northamerica-northeast1-b", "us-central1-ai1a"])
def test_real_zones_are_taken(zone: str) -> None:
    _, settings = load_cluster("tpu-v5-16", [f"zone={zone}"])
    assert isinstance(settings, CloudTpuCluster)
    assert settings.zone == [zone]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "accelerator_type=tpu-v5e-16",
            "--set accelerator_type: 'tpu-v5e-16': the Cloud TPU API calls it v5litepod-16",
        ),
        ("zone=uswest", "--set zone: 'uswest' is no zone"),
        ("backend=slrum", "--set backend: unknown value 'slrum'; did you mean 'slurm'?"),
    ],
)
def test_a_wrong_override_names_its_key_once(override: str, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        load_cluster("tpu-v5-16", [override])
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpus_per_node: 8\nprocesses_per_node: 3\n", "gpus_per_node 8 is not a multiple of processes_per_node 3"),
        ("processes_per_node: gpu\n", "processes_per_node is 'gpu' but gpus_per_node is 0"),
        ("partiton: gpu\n", "unknown key 'partiton'; did you mean 'partition'?"),
        ("time_limit: tomorrow\n", "c.yaml:2: time_limit: 'tomorrow' is no time as sbatch takes it"),
        (
            "env: {WANDB_API_KEY: abc}\n",
            "WANDB_API_KEY looks like a secret, and would be stored: name it under secrets",
        ),
        ("env: {JAX_PROCESS_ID: 1}\n", "JAX_PROCESS_ID is set by the launcher"),
        ("extra: [exclusive]\n", "'exclusive' is no option of sbatch"),
        ('partition: "a\\nb"\n', "partition: 'a\\nb' is more than one line"),
        ("nodes: 0\n", "c.yaml:2: nodes is 0; expected a whole number, at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "c.yaml").write_text("backend: slurm\n" + text)
    with pytest.raises(UserError) as refused:
        load_cluster(str(tmp_path / "c.yaml"))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_times_are_written_as_slurm_writes_them(tmp_path: Path) -> None:
    for typed, meant in (("12:00:00", "12:00:00"), ("90", "90"), ('"2-00:00:00"', "2-00:00:00"), ("1:30", "1:30")):
        (tmp_path / "c.yaml").write_text(f"backend: slurm\ntime_limit: {typed}\nenv: {{TOKENIZERS_PARALLELISM: 0}}\n")
        _, settings = load_cluster(str(tmp_path / "c.yaml"))
        assert isinstance(settings, SlurmCluster)
        assert settings.time_limit == meant
