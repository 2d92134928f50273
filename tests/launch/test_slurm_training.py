"""Real training on a real Slurm cluster: several jax processes on several nodes, stopped and moved in every way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.record import RunRecord
from launch.run_dir import RunDir
from launch.standing import Watch, read_standing
from tests import jobs
from tests.clusters.slurm import SlurmCluster, networks_allowed, running_cluster
from tests.jobs import REPO, TINY
from tests.launch.checkouts import check_events, is_alive, wait_until
from tests.launch.reports import read_report
from tests.launch.slurm_login import end_all_jobs

pytestmark = pytest.mark.slow

CLUSTER = """\
backend: slurm
nodes: 2
processes_per_node: 2
cpus_per_node: 4
time_limit: 10
grace_seconds: 30
heartbeat_timeout: 20
env: {JAX_PLATFORMS: cpu, JAX_NUM_CPU_DEVICES: 1, XLA_FLAGS: --xla_backend_optimization_level=0}
"""


STEPS = ["--num_steps", "60"]  # so many that the last ones are some seconds away when the run is preempted


class Login:
    """A shell on the login node, in a directory whose name is hostile to quoting."""

    def __init__(self, home: Path, data: Path, slurm: SlurmCluster) -> None:
        self.home, self.data, self.slurm = home, data, slurm
        (home / "slurm.yaml").write_text(CLUSTER)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "XLA_"))} | slurm.env
        self.env["JASMINE_STORAGE"] = str(home / "ru'ns")

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(REPO / "launch" / f"{arguments[0]}.py"), *arguments[1:]],
            cwd=self.home, env=self.env, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def submit(self, *arguments: str, name: str = "r") -> RunDir:
        launcher, job = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
        options = [*TINY, "--data_dir", str(self.data), *job]
        cluster = [] if "--cluster" in launcher else ["--cluster", "slurm.yaml"]
        self.command("submit", *cluster, "--name", name, *launcher, "train_tokenizer_vqvae", *options)
        return RunDir(self.home / "ru'ns" / name)

    def at_step(self, run: RunDir, step: int) -> None:
        wait_until(lambda: run.metrics.exists() and f'"step": {step},' in run.metrics.read_text(), 240)

    def end(self, run: RunDir, seconds: float = 300) -> RunRecord:
        lives = Watch(run, seconds=0.5)
        wait_until(lambda: not lives(), seconds)
        check_events(run)
        read_report(run)
        record = read_standing(run).record
        logs = "\n".join(path.read_text()[-1500:] for path in run.root.glob("attempts/*/*.log"))
        assert record.state == "finished", f"{record.state} {record.reason}\n{run.supervisor_log.read_text()}\n{logs}"
        return record


@pytest.fixture
def login(tmp_path: Path, tiny_data: Path, slurm: SlurmCluster) -> Iterator[Login]:
    home = tmp_path / 'it\'s "here"'
    home.mkdir()
    os.environ |= slurm.env  # `launch.standing` asks Slurm from this process
    yield Login(home, tiny_data, slurm)
    end_all_jobs(slurm)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    jobs.run([*TINY, *STEPS, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)])
    return run_dir


def test_one_run_here_and_on_slurm_grows_is_preempted_and_is_as_if_never_stopped(
    login: Login, uninterrupted: Path
) -> None:
    run = login.submit("--set", "nodes=1", "--set", "processes_per_node=1", "--", *STEPS, "--stop_at_step", "5")
    login.end(run)
    login.submit("--cluster", "local", "--set", "devices_per_process=2", "--", *STEPS, "--stop_at_step", "10")
    login.end(run)
    login.submit("--set", "nodes=2", "--set", "processes_per_node=2", "--", *STEPS, "--stop_at_step", "15")
    login.end(run)
    four = ["--set", "nodes=4", "--set", "processes_per_node=1", "--set", "extra=['--exclusive']"]
    login.submit(*four, "--", *STEPS)
    login.at_step(run, 16)
    login.slurm.command("sbatch", "-p", "high", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    record = login.end(run)
    assert [attempt.processes for attempt in record.attempts] == [1, 1, 4, 4, 4]
    assert [len(set(attempt.nodes)) for attempt in record.attempts] == [1, 0, 2, 4, 4]
    assert [attempt.outcome for attempt in record.attempts][3:] == ["preempted", "finished"]
    assert jobs.metrics(run.root, "batch_checksum") == jobs.metrics(uninterrupted, "batch_checksum")
    assert jobs.metrics(run.root, "loss") == pytest.approx(jobs.metrics(uninterrupted, "loss"), rel=1e-4)
    passed = [(event["attempt"], event["processes"]) for event in jobs.events(run.root, "preflight")]
    assert passed == [(1, 1), (3, 4), (4, 4), (5, 4)]
    assert jobs.events(run.root, "saved")


def test_a_stopped_process_is_named_and_outlived(login: Login) -> None:
    settings = ["processes_per_node=1", "hang_timeout=6", "heartbeat_timeout=100"]
    # Without checkpoints: a process that is stopped while another one saves has ten times as long.
    steps = ["--num_steps", "3000", "--log_checkpoint_interval", "3000"]
    run = login.submit(*(part for key in settings for part in ("--set", key)), "--", *steps)
    login.at_step(run, 3)
    wait_until(
        lambda: (run.beat(1, 1) or {}).get("doing") == "stepping"
    )  # one that compiles has ten times as long, too
    os.kill(int(run.pid_file(1, 1).read_text()), signal.SIGSTOP)
    wait_until(lambda: len(jobs.events(run.root, "preflight")) == 2, 240)
    (hang,) = jobs.events(run.root, "hang")
    assert (hang["host"], hang["node"]) == (1, "127.0.0.12")
    assert "is stopped (SIGSTOP)" in run.stacks(1, 1).read_text()
    assert "loop.py" in run.stacks(1, 0).read_text()


def test_a_machine_without_its_devices_is_named_and_left_out(login: Login) -> None:
    python = login.home / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" != 127.0.0.12 ] || export JASMINE_LOCAL_DEVICES=2\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    run = login.submit("--set", f"python={json.dumps(str(python))}", "--", "--num_steps", "5")
    record = login.end(run)
    first, second = record.attempts
    assert first.cause == "preflight: sees 1 cpu device(s) instead of 2"
    assert [(blame.node, blame.certain) for blame in record.blames] == [("127.0.0.12", True)]
    assert "127.0.0.12" in first.nodes
    assert "127.0.0.12" not in second.nodes
    assert "left out of the next attempts, for 24 h: 127.0.0.12" in login.command("jobs", "explain", "r")
    (left_out,) = jobs.events(run.root, "excluded")
    assert left_out["nodes"] == ["127.0.0.12"]


def test_what_is_wrong_everywhere_is_no_machines_fault(login: Login) -> None:
    wrong = "--set", "env.JASMINE_LOCAL_DEVICES=2"
    run = login.submit(*wrong, "--set", "max_failures=0", "--", "--num_steps", "5")
    lives = Watch(run, seconds=0.5)
    wait_until(lambda: not lives(), 240)
    record = read_standing(run).record
    assert record.state == "failed"
    assert record.attempts[0].cause == "preflight: each process sees 1 cpu device(s) instead of 2"
    assert record.blames == []
    assert "each process sees 1 cpu device(s) instead of 2" in login.command("jobs", "explain", "r")
    assert not run.metrics.exists()


def test_one_that_does_not_come_is_named_and_not_the_one_that_waits_for_it(login: Login) -> None:
    """Jax ends the process that waits, by SIGABRT."""
    python = login.home / "python"
    absent = f'[ "$SLURMD_NODENAME" = 127.0.0.12 ] && sleep 600;; esac\nexec "{sys.executable}" "$@"\n'
    python.write_text(f'#!/bin/sh\ncase "$1" in *train_*) {absent}')
    python.chmod(0o755)
    keys = [f"python={json.dumps(str(python))}", "processes_per_node=1", "init_timeout=10", "max_failures=0"]
    run = login.submit(*(part for key in keys for part in ("--set", key)), "--", "--num_steps", "5")
    lives = Watch(run, seconds=0.5)
    wait_until(lambda: not lives(), 120)
    record = read_standing(run).record
    assert record.state == "failed"
    (attempt,) = record.attempts
    assert attempt.cause == "process 1 on 127.0.0.12 has not joined the others"
    assert [blame.node for blame in record.blames] == ["127.0.0.12"]
    assert "host 1 of 2 on 127.0.0.12" in login.command("jobs", "explain", "r")


def test_a_node_that_is_lost_before_slurm_knows_costs_no_failure_and_its_process_writes_nothing(
    tmp_path: Path, tiny_data: Path, needs_slurm: None
) -> None:
    """Jax gives up a silent process long before Slurm gives up its node."""
    if not networks_allowed():
        pytest.skip("network namespaces cannot be made here (they need root)")
    with running_cluster(nodes=3, slurmd_timeout=45, message_timeout=4, own_networks=True) as slurm:
        os.environ |= slurm.env
        login = Login(tmp_path, tiny_data, slurm)
        keys = ["processes_per_node=1", "max_failures=0", "grace_seconds=10", "heartbeat_timeout=15"]
        steps = ["--num_steps", "100000", "--log_checkpoint_interval", "5", "--keep_checkpoints", "100000"]
        run = login.submit(*(part for key in keys for part in ("--set", key)), "--", *steps)
        login.at_step(run, 8)
        zombie, lost = int(run.pid_file(1, 1).read_text()), slurm.nodes[1]
        slurm.pull_cable(lost)
        wait_until(lambda: run.attempts() == [1, 2], 180)
        wait_until(lambda: not is_alive(zombie), 10)
        wait_until(lambda: '"attempt": 2' in run.metrics.read_text(), 240)
        login.command("jobs", "cancel", "r")
        record = read_standing(run).record
        assert (record.attempts[0].outcome, record.attempts[0].cause) == ("preempted", f"lost its node {lost}")
        assert [blame.node for blame in record.blames] == [lost]
        assert lost not in record.attempts[1].nodes
        losses = jobs.metrics(run.root, "loss")
        assert list(losses) == list(range(1, max(losses) + 1))
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert [line["attempt"] for line in lines] == sorted(line["attempt"] for line in lines)


def test_scripts_that_need_no_launcher_train_and_survive_preemption(login: Login) -> None:
    """An exported script and the shipped one, both on two nodes."""
    home, slurm = login.home, login.slurm
    (home / "jasmine").symlink_to(REPO / "jasmine")
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (home / ".venv" / "bin" / "python").chmod(0o755)
    steps = ["--num_steps", "400", "--data_dir", str(login.data)]
    shape = ["--cluster", "slurm.yaml", "--set", "processes_per_node=1"]
    export = ["--name", "exported", "--export-sbatch", "job.sbatch"]
    login.command("submit", *shape, *export, "train_tokenizer_vqvae", *TINY, *steps)
    shipped = ["--gpus-per-node=1", "--cpus-per-task=1", "--signal=TERM@30"]
    shipped += [str(REPO / "launch" / "sbatch" / "multi_node_requeue.sbatch")]
    shipped += ["jasmine/baselines/maskgit/train_tokenizer_vqvae.py", *TINY, *steps, "--ckpt_dir", "shipped"]
    few = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    ids = {}
    for name, words in {"exported": ["job.sbatch"], "shipped": shipped}.items():
        done = subprocess.run(
            ["sbatch", "--parsable", *words], cwd=home, env=login.env | few, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ids[name] = done.stdout.strip()
    runs = {"exported": RunDir(home / "ru'ns" / "exported"), "shipped": RunDir(home / "shipped")}
    for run in runs.values():
        login.at_step(run, 3)
    slurm.command("sbatch", "-p", "high", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    for name, run in runs.items():
        wait_until(lambda name=name: slurm.job_state(ids[name]) == "COMPLETED", 300)  # type: ignore[misc]
        assert list(jobs.metrics(run.root, "loss")) == list(range(1, 401))
        assert [event["processes"] for event in jobs.events(run.root, "init")] == [2, 2]
        assert jobs.events(run.root, "resumed")[0]["step"] >= 3
