"""Whatever is in the files that the launcher reads, a user sees one line: no traceback, no hang, nothing executed."""

import contextlib
import functools
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch import jobs, submission
from launch.backends import backend_named
from launch.cluster_files import load_cluster
from launch.errors import UserError
from launch.pipeline import read_pipeline
from launch.plan import Plan, make_plan, masked, show
from launch.record import Attempt, Blame, HostExit, RunRecord, Submission, Supervisor, read_record
from launch.run_dir import RunDir, last_json_lines
from launch.snapshot import Code
from tests.fuzz import altered, damaged, odd_values, tries
from tests.launch.conftest import REPOSITORY

CLUSTERS = {
    "local": b"backend: local\nstorage: runs # here\nprocesses: 2\nenv: {A: 1, B: 'two'}\nmax_failures: 3\n",
    "slurm": b"backend: slurm\npartition: gpu\nnodes: 2\ngpus_per_node: 4\nprocesses_per_node: gpu\ntime_limit: 12:00:00\n"
    b"extra: [--exclusive]\nsetup:\n- module load x\nsecrets: {WANDB_API_KEY: environment}\nenv: &e {A: b}\n",
    "cloud_tpu": b"backend: cloud_tpu\naccelerator_type: v5litepod-16\nzone: [us-west4-a, us-west4-b]\nproject: lab\n"
    b"labels: {team: a}\nslices: 2\nprovisioning: spot\nsecrets: {K: projects/p/secrets/s}\nsetup: ['echo hi']\n",
}
PIPELINE = (
    b"name: world\nstages:\n  tokenizer: {job: train_tokenizer_vqvae, args: --data_dir d}\n  dynamics:\n"
    b"    job: train_dynamics_maskgit\n    args: [--tokenizer_checkpoint, '{tokenizer}']\n    set: [nodes=4]\n    after: []\n"
)


def planned(settings: Any) -> Plan:
    """What a submission with these settings would make."""
    return make_plan(
        run_dir=Path("/nowhere/runs/r"), job="train_lam", script=REPOSITORY / "jasmine/baselines/train_lam.py",
        script_in_code="jasmine/baselines/train_lam.py", arguments=("--num_steps", "7"), cwd=Path("/nowhere"), cluster="c",
        settings=settings, code=Code("0" * 12, 1, 1, None, None), first_attempt=1,
    )  # fmt: skip


def check_is_one_line(error: UserError, names: str = "") -> None:
    """What is wrong is said in one line, which names the file."""
    assert "\n" not in str(error)
    assert names in str(error)
    assert len(str(error)) < 2000


def check_cluster(data: bytes, folder: str) -> None:
    """Read a cluster file, and where that goes well use it as a dry run does."""
    path = Path(folder) / "c.yaml"
    path.write_bytes(data)
    try:
        _, settings = load_cluster(str(path))
        plan = planned(settings)
        show(plan)
        backend_named(settings.backend).preview([masked(plan)])
    except UserError as error:
        check_is_one_line(error)


@pytest.mark.parametrize("backend", CLUSTERS)
def test_cluster_files(backend: str, tmp_path: Path) -> None:
    @tries(120)
    @given(st.one_of(damaged(CLUSTERS[backend]), altered(yaml.safe_load(CLUSTERS[backend])).map(_as_yaml)))
    def test(data: bytes) -> None:
        check_cluster(data, str(tmp_path))

    check_cluster(CLUSTERS[backend], str(tmp_path))
    test()


def _as_yaml(value: Any) -> bytes:
    return json.dumps(value).encode()  # which is YAML too, with whatever a text may hold


@tries(150)
@given(st.one_of(damaged(PIPELINE), altered(yaml.safe_load(PIPELINE)).map(_as_yaml)))
def test_pipeline_files(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_bytes(data)
        try:
            read_pipeline(path)
        except UserError as error:
            check_is_one_line(error)


@tries(100)
@given(st.text(max_size=30), odd_values)
def test_overrides(key: str, value: Any) -> None:
    for text in (f"{key}={value}", f"env.{key}={json.dumps(value)}", f"setup={json.dumps(value)}"):
        with contextlib.suppress(UserError):
            load_cluster("slurm-h100", [text])


def _laughs(depth: int) -> str:
    lines = ["backend: local", "env:", "- &a0 [ha, ha]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join(lines)


def _merges(depth: int) -> str:
    lines = ["backend: local", "env:", "  m0: &m0 {A: b}"]
    lines += [f"  m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, depth)]
    return "\n".join(lines)


BOMBS = {
    "laughs": _laughs(30),
    "laughs of merges": _merges(30),
    "itself": "backend: local\nenv: &e [*e]\n",
    "deep": "env: " + "[" * 50_000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(300)),
    "huge": "backend: local\nstorage: " + "x" * 50_000_000,
    "many keys": "\n".join(f"k{n}: 1" for n in range(7_000)),
    "digits": "backend: local\nprocesses: " + "9" * 60_000,
    "binary digits": "backend: local\nprocesses: 0b" + "1" * 60_000,
    "a billion processes": "backend: local\nprocesses: 1000000000",
    "a billion nodes": "backend: slurm\nnodes: 1000000000",
    "command": "backend: local\nenv: !!python/object/apply:os.system ['touch CANARY']\n",
    "constructor": "backend: local\nenv: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]\n",
    "name": "backend: local\nenv: !!python/name:os.system\n",
    "module": "!!python/module:os {}\n",
}  # fmt: skip


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_commands_in_yaml_end_in_one_line_at_little_cost(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    for arguments in (["--cluster", str(path)], ["--cluster", "local", "--pipeline", str(path)]):
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "launch" / "submit.py"), *arguments, "--dry-run"],
            cwd=tmp_path, capture_output=True, text=True, preexec_fn=_limited,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-2000:]
        assert done.stderr.startswith("error: ")
        assert len(done.stderr) < 2000
    assert os.listdir(tmp_path) == ["bomb.yaml"], "a file of ours was executed"


def test_files_that_are_none_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("fifo.yaml", "zero.yaml"):
        with pytest.raises(UserError, match=r"does not exist|no ordinary file"):
            load_cluster(str(tmp_path / name))
        with pytest.raises(UserError, match="no ordinary file"):
            read_pipeline(tmp_path / name)


# --- the run directory -----------------------------------------------------------------------------------------------


@functools.cache
def stored_record(backend: str) -> dict[str, Any]:
    """A record as a run leaves it that has failed once and runs again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(CLUSTERS[backend])
        plan = masked(planned(load_cluster(str(path))[1]))
    ended = Attempt(
        number=1, processes=2, devices_per_process=1, nodes=["a", "b"], cause="a died", code="0" * 12, started=1.0, ended=9.0,
        outcome="failed", first_failed=0,
        exits=[
            HostExit(host=0, code=137, signal="SIGKILL", node="a", started=2.0, ended=8.0),
            HostExit(host=1, code=1, ended=9.0),
        ],
    )  # fmt: skip
    record = RunRecord(
        name="r", job="train_lam", state="failed", changed=time.time(), reason="budget", exit_code=1,
        supervisor=Supervisor(host="h", pid=1), submissions=[Submission(time=1.0, plan=plan)], attempts=[ended],
        blames=[Blame(node="a", reason="slow", time=1.0)],
    )  # fmt: skip
    return json.loads(record.model_dump_json())


METRICS = b"".join(
    json.dumps({"step": n, "loss": 1 / n, "lr": 1e-3, "step_time": 0.1, "frames_per_second": 9.5}).encode() + b"\n"
    for n in range(1, 5)
)
EVENTS = b"".join(
    json.dumps({"time": 1.5 * n, "event": event, "attempt": 1, "host": 0}).encode() + b"\n"
    for n, event in enumerate(("submitted", "attempt_started", "host_exited", "failed"))
)


@contextlib.contextmanager
def a_run(
    record: bytes, metrics: bytes = METRICS, events: bytes = EVENTS, log: bytes = b"step 1\n"
) -> Iterator[RunDir]:
    """A run directory with these files."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "r")
        run.attempt(1).mkdir(parents=True)
        run.record.write_bytes(record)
        run.metrics.write_bytes(metrics)
        (run.root / "events.jsonl").write_bytes(events)
        run.log(1, 0).write_bytes(log)
        yield run


def shown_of(run: RunDir) -> str:
    """What all commands that show runs print of one; a run that cannot be shown is one line."""
    output = io.StringIO()
    page = run.root.parent / "page.html"
    for command in (["list"], ["status", "r"], ["explain", "r"], ["logs", "r"], ["report", "r", "--out", str(page)]):
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                jobs.main([command[0], "--storage", str(run.root.parent), *command[1:]])
            except UserError as error:
                check_is_one_line(error)
    return output.getvalue()


@pytest.mark.parametrize("backend", CLUSTERS)
def test_records(backend: str) -> None:
    valid = stored_record(backend)

    @tries(80)
    @given(st.one_of(damaged(json.dumps(valid).encode()), altered(valid).map(_as_yaml)))
    def test(data: bytes) -> None:
        with a_run(data) as run:
            try:
                record = read_record(run)
            except UserError as error:
                check_is_one_line(error, names=str(run.record))
            else:
                assert record is not None
                if record.state not in ("submitted", "running"):  # whose scheduler would be asked
                    shown_of(run)

    with a_run(json.dumps(valid).encode()) as run:
        assert "failed" in shown_of(run)
    test()


@tries(60)
@given(
    st.one_of(damaged(METRICS), st.lists(odd_values, max_size=3).map(lambda found: _lines(step=found))),
    st.one_of(damaged(EVENTS), odd_values.map(lambda found: _lines(event=[found]))),
    st.one_of(st.binary(max_size=99), damaged(b"Traceback (most recent call last)\n  x\nValueError: no\n")),
)
def test_metrics_events_and_logs(metrics: bytes, events: bytes, log: bytes) -> None:
    with a_run(json.dumps(stored_record("local")).encode(), metrics, events, log) as run:
        assert "failed" in shown_of(run)
        assert all(isinstance(line, dict) for line in [*run.events(), *last_json_lines(run.metrics, 20)])


def _lines(**values: list[Any]) -> bytes:
    """A line of metrics or an event for each value, which stands for each of its fields in turn."""
    fields = {"step": 1, "loss": 1.0, "step_time": 0.5, "frames_per_second": 1.0, "event": "x", "time": 1.0}
    found = [value for several in values.values() for value in several]
    lines = [json.dumps({**fields, name: value}) for value in found for name in fields] + [json.dumps(v) for v in found]
    return ("\n".join(lines) + "\n").encode()


def test_nothing_that_is_shown_of_a_run_steers_the_terminal() -> None:
    escape = "\x1b]0;owned\x07\x1b[2J\x9b31m"
    record = stored_record("local") | {"reason": escape}
    record["attempts"][0]["cause"] = escape
    record["blames"][0]["reason"] = escape
    fault = {"time": 5.0, "event": "failed", "attempt": 1, "hostname": "h", "cause": f"{escape}\ud800"}
    events = f"{json.dumps(fault)}\n".encode()
    with a_run(json.dumps(record).encode(), events=events, log=f"last words {escape}\n".encode()) as run:
        page = run.root.parent / "page.html"
        for command in (["list"], ["status", "r"], ["report", "r", "--out", str(page)], ["explain", "r"]):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                jobs.main([command[0], "--storage", str(run.root.parent), *command[1:]])
            assert not {"\x1b", "\x07", "\x9b", "\ud800"} & set(output.getvalue()), command
        assert "last words \\x1b]0;owned" in output.getvalue()
        assert "\\x9b31m\\ud800" in page.read_text()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", ["logs", "--wait"])
def test_logs_on_a_terminal_keep_their_colours_and_nothing_else(
    command: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: terminal)
    said = "\x1b[31mred\x1b[0m \x1b]0;owned\x07"
    record = stored_record("local") | {"reason": said}
    with (
        a_run(json.dumps(record).encode(), log=said.encode()) as run,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        if command == "logs":
            jobs.main(["logs", "--storage", str(run.root.parent), "r"])
        else:
            assert (
                submission._wait_for(run, RunRecord.model_validate(record).submissions[-1].plan) == record["exit_code"]
            )
    assert "\x1b" not in errors.getvalue()
    expected = "\x1b[31mred\x1b[0m \\x1b]0;owned\\x07" if terminal else said
    assert output.getvalue() == f"[host-0] {expected}\n"
