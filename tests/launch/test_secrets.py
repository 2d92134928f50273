"""A secret reaches the job's environment and nothing else: no file of the run, no request, no command line, no message.

Each test runs a real job, looks at all processes of this machine while it runs, and at all files and messages afterwards.
"""

import contextlib
import hashlib
import json
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cluster_files import load_cluster
from launch.errors import UserError
from tests.clusters.cloud_tpu import CloudTpu
from tests.clusters.gcs import Gcs
from tests.clusters.slurm import SlurmCluster as Slurm
from tests.launch.checkouts import Checkout, wait_until
from tests.launch.slurm_login import end_all_jobs, login

SHOW = """\
import hashlib, os, pathlib, sys, time
home = pathlib.Path(sys.argv[1])
(home / "begun").touch()
deadline = time.monotonic() + 60
while not (home / "go").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
for name in sys.argv[2:]:
    print(name, hashlib.sha256(os.environ[name].encode()).hexdigest(), flush=True)
raise SystemExit(0 if (home / "go").exists() else 1)
"""


class Secrets:
    """A value that is looked for, the file that holds it, and what commands have printed."""

    def __init__(self, checkout: Checkout) -> None:
        self.checkout = checkout
        self.value = f"hunter2-{secrets.token_hex(8)}"
        self.root = checkout.home.parent
        self.file = self.root / "held"
        self.file.write_text(f"{self.value}\n")
        # What people have lying in a checkout.
        self.holders = {self.file, checkout.root / ".env", checkout.root / "deploy.pem"}
        for path in self.holders:
            path.write_text(f"{self.value}\n")
        self.said: list[str] = []

    def command(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.checkout.run(*arguments)
        assert done.returncode == code, done.stderr
        self.said += [done.stdout, done.stderr]
        return done

    def run(self, cluster: dict[str, Any], names: Sequence[str], cluster_holds: bool = False) -> None:
        """Run a job that has the secret in these variables, and look everywhere."""
        home = self.checkout.home
        (home / "show.py").write_text(SHOW)
        (home / "c.yaml").write_text(yaml.safe_dump(cluster))
        if cluster_holds:
            self.holders.add(home / "c.yaml")
        job = ["--cluster", "./c.yaml", "--name", "r", "./show.py", str(home), *names]
        self.command("submit", *job[:2], "--dry-run", *job[2:])
        self.command("submit", *job)
        wait_until((home / "begun").exists, 60)
        for command in ("status", "explain"):
            self.command("jobs", command, "r")
        assert not self.on_command_lines()
        (home / "go").touch()
        assert self.checkout.end(seconds=60).state == "finished"
        told = self.command("jobs", "logs", "r").stdout
        assert told.count(hashlib.sha256(self.value.encode()).hexdigest()) >= len(names), "the job did not get it"
        for command in (["list"], ["status", "r"], ["explain", "r"]):
            self.command("jobs", *command)
        assert not [text for text in self.said if self.value in text]
        assert not self.in_files()

    def on_command_lines(self) -> list[bytes]:
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = process.read_bytes()
            except OSError:
                continue
            if self.value.encode() in line:
                found.append(line)
        return found

    def in_files(self) -> list[Path]:
        found = []
        for path in self.root.rglob("*"):
            if (
                path.is_file()
                and not path.is_symlink()
                and path not in self.holders
                and self.value.encode() in path.read_bytes()
            ):
                found.append(path)
        return found


@pytest.fixture
def kept(checkout: Checkout) -> Secrets:
    return Secrets(checkout)


def test_on_this_machine(kept: Secrets) -> None:
    kept.checkout.env["API_TOKEN"] = kept.value
    kept.run({"backend": "local", "env": {"MY_KEY": kept.value}}, ["API_TOKEN", "MY_KEY"], cluster_holds=True)
    refused = kept.command("jobs", "resume", "r", "--cluster", "./c.yaml", "--set", "env.MY_KEY=[1", code=2)
    assert "MY_KEY" in refused.stderr


def test_with_the_run_in_a_bucket(kept: Secrets, gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.root / "cache"))
    kept.checkout.env |= {
        **gcs.env, "JASMINE_STORAGE": f"{gcs.root}/runs", "XDG_CACHE_HOME": str(kept.root / "cache"), "API_TOKEN": kept.value
    }  # fmt: skip
    kept.run({"backend": "local"}, ["API_TOKEN"])
    assert kept.value not in json.dumps(gcs.requests)


def test_on_slurm(kept: Secrets, slurm: Slurm) -> None:
    login(kept.checkout, slurm)
    kept.checkout.env["API_TOKEN"] = kept.value
    cluster = {"backend": "slurm", "partition": "main", "cpus_per_node": 1, "time_limit": "10", "nodes": 2,
               "secrets": {"API_TOKEN": "environment", "WANDB_API_KEY": str(kept.file)}}  # fmt: skip
    try:
        kept.run(cluster, ["API_TOKEN", "WANDB_API_KEY"])
        kept.command("submit", "--cluster", "./c.yaml", "--name", "x", "--export-sbatch", "x.sbatch", "./show.py")
        assert not kept.in_files()
    finally:
        end_all_jobs(slurm)


@pytest.mark.slow
def test_on_cloud_tpu(kept: Secrets, cloud_tpu: CloudTpu) -> None:
    kept.checkout.env |= cloud_tpu.env | {"JASMINE_WATCH_SECONDS": "0.3", "API_TOKEN": kept.value}
    cluster = {"backend": "cloud_tpu", "accelerator_type": "v5litepod-4", "zone": "us-west4-a", "project": "lab",
               "vm_dir": "~/j", "python": sys.executable, "boot_timeout": 60, "silent_timeout": 8,
               "secrets": {"WANDB_API_KEY": str(kept.file)}}  # fmt: skip
    kept.run(cluster, ["WANDB_API_KEY"])
    assert kept.value not in json.dumps(cloud_tpu.requests), "in a request to the cloud"
    assert not [
        path for path in cloud_tpu.folder.rglob("*") if path.is_file() and kept.value.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True), ("HF_TOKEN", True), ("GITHUB_PAT", True), ("DB_PASS", True), ("AWS_CREDENTIALS", True),
        ("AZURE_CREDENTIAL", True), ("DATABASE_URL", True), ("smtp_password", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", False), ("AWS_SHARED_CREDENTIALS_FILE", False), ("PATH", False),
        ("LD_LIBRARY_PATH", False), ("COMPASS", False), ("NUM_PASSES", False), ("TOKENIZERS_PARALLELISM", False),
    ],
)  # fmt: skip
def test_which_names_are_secrets(tmp_path: Path, name: str, secret: bool) -> None:
    (tmp_path / "c.yaml").write_text(f"backend: slurm\nenv: {{{name}: abc}}\n")
    refused = pytest.raises(UserError, match=f"{name} looks like a secret") if secret else contextlib.nullcontext()
    with refused:
        load_cluster(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "backend: slurm\nsecrets: {API_KEY: VALUE}\n",
        "backend: slurm\nenv: {API_KEY: VALUE}\n",
        "backend: slurm\nsecrets: [API_KEY=VALUE]\n",
        "backend: slurm\nsecrets: VALUE\n",
        "backend: local\nenv: [API_KEY=VALUE]\n",
        "backend: local\nenv: {API_KEY: [VALUE]}\n",
        "backend: local\nenv: {API_KEY: {a: VALUE}}\n",
        "backend: cloud_tpu\naccelerator_type: v5litepod-4\nzone: z\nproject: lab\nsecrets: {API_KEY: VALUE}\n",
        "backend: local\nenv: {API_KEY: \"VALUE\\0\"}\n",
    ],
)  # fmt: skip
def test_a_mistake_with_a_secret_does_not_print_it(checkout: Checkout, text: str) -> None:
    (checkout.home / "c.yaml").write_text(text.replace("VALUE", "hunter2"))
    checkout.env["PATH"] = f"{checkout.home}:/usr/bin:/bin"
    (checkout.home / "srun").touch(0o755)
    done = checkout.run("submit", "--cluster", "./c.yaml", "--name", "r", "train_lam")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hunter2" not in done.stderr
    for override in ("env.API_KEY=hunter2: [", "env.API_KEY=[hunter2]", "env=[API_KEY=hunter2]"):
        done = checkout.run("submit", "--cluster", "local", "--set", override, "train_lam")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "hunter2" not in done.stderr
