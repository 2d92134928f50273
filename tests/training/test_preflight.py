"""What a preflight finds out about the processes of a job, and whom it names; real processes, joined by jax."""

import json
import shutil
import time
from pathlib import Path

import pytest
from etils import epath

from jasmine.errors import ClusterError, UserError
from jasmine.training import preflight, run_files
from tests import jobs
from tests.launch.checkouts import wait_until

JOB = Path(__file__).with_name("preflight_job.py")
PROCESSES = 3


HERE = {"code": "c", "clock": 1.0, "devices": 1, "compute_seconds": 0.1}


def _blame_at(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an attempt, whose first process this is, leaves its blame."""
    (run / "attempts" / "1").mkdir(parents=True)
    monkeypatch.setenv("JASMINE_ATTEMPT", "1")
    return run / "attempts" / "1" / "blame.json"


def test_a_problem_that_all_have_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blame = _blame_at(tmp_path, monkeypatch)
    away, well = HERE | {"problem": "cannot write to gs://b/r: it does not answer"}, HERE | {"problem": ""}
    found = preflight._worst([away, away])
    assert found is not None
    with pytest.raises(ClusterError, match="each process cannot write to gs://b/r"):
        preflight._fail(epath.Path(tmp_path), *found, ["node-0", "node-1"])
    noted = json.loads(blame.read_text())
    assert (noted["host"], noted["node"]) == (None, None)
    assert noted["reason"] == "preflight: each process cannot write to gs://b/r: it does not answer"
    (told,) = jobs.events(tmp_path, "preflight_failed")
    assert "blamed" not in told
    blame.unlink()

    found = preflight._worst([well, away])
    assert found is not None
    with pytest.raises(ClusterError, match="process 1 on node-1 cannot write"):
        preflight._fail(epath.Path(tmp_path), *found, ["node-0", "node-1"])
    assert json.loads(blame.read_text())["node"] == "node-1"
    assert preflight._worst([away]) == (0, away["problem"]), "a process that is alone shares nothing"


def test_a_blame_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blame = _blame_at(tmp_path, monkeypatch)
    (tmp_path / "events.jsonl").mkdir()

    def refuse(path: epath.Path, data: bytes) -> None:
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(run_files, "write_atomically", refuse)
    with pytest.raises(ClusterError, match="process 0 on node-0 has a clock"):
        preflight._fail(epath.Path(tmp_path), 0, "has a clock that is 99 s ahead", ["node-0"])
    assert not blame.exists()


def test_the_code_is_told_by_its_files_wherever_they_lie(tmp_path: Path):
    shutil.copytree(jobs.REPO / "jasmine", tmp_path / "jasmine", ignore=shutil.ignore_patterns("__pycache__"))
    begin = time.process_time()
    mine = preflight._code()
    assert time.process_time() - begin < 1
    assert preflight._code(tmp_path / "jasmine") == mine
    (tmp_path / "jasmine" / "models" / "more.py").touch()
    assert preflight._code(tmp_path / "jasmine") != mine


def _start(run: Path, fault: str, seconds: int) -> jobs.Job:
    (run / "attempts" / "1").mkdir(parents=True)
    env = {"JASMINE_ATTEMPT": "1", "JASMINE_PREFLIGHT": str(seconds), "FAULT": fault}
    return jobs.start([str(run)], processes=PROCESSES, script=JOB, env=env | {"OTHER_CODE": str(run.parent / "other")})


@pytest.mark.slow
def test_processes_that_are_well_pass(tmp_path: Path):
    job = _start(tmp_path / "r", "none@0", 60)
    assert job.finish() == [0] * PROCESSES, "\n".join(map(job.output, range(PROCESSES)))
    for process in range(PROCESSES):
        assert f"preflight passed on node-{process}: 1 device(s), all-reduce of 1 MiB over 3 devices" in job.output(
            process
        )
    (passed,) = jobs.events(tmp_path / "r", "preflight")
    assert passed["bytes_per_second"] > 0
    assert not (tmp_path / "r" / "attempts" / "1" / "blame.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seconds", "problem"),
    [
        ("clock@1", 60, "has a clock that is 100 s ahead"),
        ("code@2", 60, "runs other code than the others (checksums of the files: "),
        ("wrong@1", 60, "got a wrong number from an all-reduce over all devices"),
        ("late@1", 3, "has joined the job but did not report within 3 s"),
        ("late@0", 3, "has joined the job but did not report within 3 s"),
        ("absent@2", 15, "has not come to the all-reduce"),
        ("absent@0", 15, "has not come to the all-reduce"),
        ("stopped@1", 15, "is stopped, or cut off from the others"),
    ],
)
def test_the_one_that_is_not_is_named(tmp_path: Path, fault: str, seconds: int, problem: str):
    run, culprit = tmp_path / "r", int(fault[-1])
    if fault.startswith("code"):
        shutil.copytree(jobs.REPO / "jasmine", tmp_path / "other" / "jasmine")
        with (tmp_path / "other" / "jasmine" / "models" / "layers.py").open("a") as file:
            file.write("# of yesterday\n")
    job = _start(run, fault, seconds)
    others = [process for index, process in enumerate(job.processes) if index != culprit]
    try:
        codes = [process.wait(60) for process in others]
        told = run / "events.jsonl"
        # By the culprit, at times, which is killed next.
        wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
    finally:
        for process in job.processes:
            process.kill()
        job.finish()
    said = "\n".join(map(job.output, range(PROCESSES)))
    assert 0 not in codes, said
    blame = json.loads((run / "attempts" / "1" / "blame.json").read_text())
    node = None if fault.startswith("late") else f"node-{culprit}"
    assert (blame["host"], blame["node"]) == (culprit, node)
    assert blame["reason"].startswith(f"preflight: {problem}")
    assert jobs.events(run, "preflight_failed")[0]["blamed"] == culprit
    place = f" on {node}" if node else ""
    assert f"error: preflight failed: process {culprit}{place} {problem}" in said
