"""Real training on a fake Cloud TPU: stock jax finds the pod by itself, and the run goes on wherever it is moved to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.backends.cloud_tpu import read_resource, watched_by
from launch.record import RunRecord
from launch.run_dir import RunDir
from launch.standing import Watch, read_standing
from tests import jobs
from tests.clusters.cloud_tpu import CloudTpu
from tests.jobs import REPO, TINY
from tests.launch.checkouts import check_events, wait_until
from tests.launch.reports import read_report

pytestmark = pytest.mark.slow

CLUSTER = f"""\
backend: cloud_tpu
accelerator_type: v5litepod-16
zone: us-west4-a
project: lab
vm_dir: ~/jasmine
python: {sys.executable}
grace_seconds: 30
heartbeat_timeout: 20
silent_timeout: 20
boot_timeout: 60
compilation_cache: CACHE
env: {{XLA_FLAGS: --xla_backend_optimization_level=0}}
"""


class Laptop:
    """A shell from which runs go to the TPU."""

    def __init__(self, home: Path, data: Path, cloud: CloudTpu) -> None:
        self.home, self.data, self.cloud = home, data, cloud
        (home / "tpu.yaml").write_text(CLUSTER.replace("CACHE", str(home / "cache")))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | cloud.env
        self.env |= {"JASMINE_STORAGE": str(home / "ru'ns"), "JASMINE_WATCH_SECONDS": "0.5"}

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(REPO / "launch" / f"{arguments[0]}.py"), *arguments[1:]],
            cwd=self.home, env=self.env, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def submit(self, *arguments: str, cluster: str = "tpu.yaml") -> RunDir:
        launcher, job = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
        options = [*TINY, "--data_dir", str(self.data), *job]
        self.command("submit", "--cluster", cluster, "--name", "r", *launcher, "train_tokenizer_vqvae", *options)
        return RunDir(self.home / "ru'ns" / "r")

    def at_step(self, run: RunDir, step: int) -> None:
        wait_until(lambda: run.metrics.exists() and f'"step": {step},' in run.metrics.read_text(), 300)

    def end(self, run: RunDir) -> RunRecord:
        lives = Watch(run, seconds=0.5)
        wait_until(lambda: not lives(), 400)
        check_events(run)
        read_report(run)
        record = read_standing(run).record
        logs = "\n".join(path.read_text()[-1500:] for path in run.root.glob("attempts/*/*.log"))
        assert record.state == "finished", f"{record.state} {record.reason}\n{run.supervisor_log.read_text()}\n{logs}"
        return record


@pytest.fixture
def laptop(tmp_path: Path, tiny_data: Path, cloud_tpu: CloudTpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laptop]:
    home = tmp_path / 'it\'s "here"'
    home.mkdir()
    for name, value in cloud_tpu.env.items():  # `launch.standing` asks the API from this process
        monkeypatch.setenv(name, value)
    yield Laptop(home, tiny_data, cloud_tpu)
    for directory in (home / "ru'ns").glob("*"):
        run = RunDir(directory)
        run.cancel_request.touch()
        wait_until(lambda run=run: watched_by(run) is None, 60)  # type: ignore[misc]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    jobs.run([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)])
    return run_dir


def _resource(run: RunDir) -> str:
    rented = read_resource(run)
    assert rented is not None
    return rented.id


def test_four_vms_preempted_twice_are_as_if_never_stopped(laptop: Laptop, uninterrupted: Path) -> None:
    run = laptop.submit("--", "--num_steps", "40", "--mesh.tensor", "2")
    for step in (3, 20):
        laptop.at_step(run, step)
        rented = _resource(run)
        laptop.cloud.preempt(rented)
        wait_until(lambda before=rented: _resource(run) != before, 180)  # type: ignore[misc]
    record = laptop.end(run)
    assert [attempt.outcome for attempt in record.attempts] == ["preempted", "preempted", "finished"]
    assert jobs.metrics(run.root, "batch_checksum") == jobs.metrics(uninterrupted, "batch_checksum")
    assert jobs.metrics(run.root, "loss") == pytest.approx(jobs.metrics(uninterrupted, "loss"), rel=1e-4)
    log = run.log(1, 0).read_text()
    assert "4 process(es) × 4 CPU device(s) = 16 devices" in log
    assert "(Cloud TPU)" in log
    passed = jobs.events(run.root, "preflight")
    assert [(one["attempt"], one["processes"]) for one in passed] == [(1, 4), (2, 4), (3, 4)]


def test_one_run_on_four_chips_and_here_and_on_two_slices_of_four(laptop: Laptop, uninterrupted: Path) -> None:
    run = laptop.submit("--set", "accelerator_type=v5litepod-4", "--", "--stop_at_step", "10")
    laptop.end(run)
    laptop.submit("--set", "devices_per_process=2", "--", "--stop_at_step", "20", cluster="local")
    laptop.end(run)
    two = ["--set", "slices=2", "--set", "accelerator_type=v5litepod-4"]
    laptop.submit(*two, "--", "--stop_at_step", "40")
    record = laptop.end(run)
    assert [attempt.processes for attempt in record.attempts] == [1, 1, 2]
    assert [event["devices"] for event in jobs.events(run.root, "init")] == [4, 2, 8]
    assert jobs.metrics(run.root, "batch_checksum") == jobs.metrics(uninterrupted, "batch_checksum")
    assert jobs.metrics(run.root, "loss") == pytest.approx(jobs.metrics(uninterrupted, "loss"), rel=1e-4)
    wait_until(lambda: not laptop.cloud.resources(), 60)
