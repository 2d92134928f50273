"""Processes of an attempt that a newer one has replaced, as after a network partition, write nothing beside it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jasmine.errors import EXIT_FAILED
from launch.run_dir import RunDir
from tests import jobs
from tests.jobs import REPO, TINY

WRITERS = {
    "metrics.jsonl": "run_files.JsonLines(run, 'metrics.jsonl').write({'step': 7})",
    "events.jsonl": "run_files.log_event(run, 'saved', step=7, spent={})",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_line_of_an_attempt_that_is_over_is_not_written(name: str, tmp_path: Path) -> None:
    code = f"from etils import epath\nfrom jasmine.training import run_files\nrun = epath.Path({str(tmp_path)!r})\n"
    env = os.environ | {"JASMINE_ATTEMPT": "1", "PYTHONPATH": str(REPO)}

    def write() -> int:
        return subprocess.run([sys.executable, "-c", code + WRITERS[name]], env=env, capture_output=True).returncode

    (tmp_path / "attempt").write_text("1\n")
    assert write() == 0
    before = (tmp_path / name).read_bytes()
    assert before.count(b"\n") == 1
    (tmp_path / "attempt").write_text("2\n")
    assert write() == EXIT_FAILED
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.slow
def test_a_job_that_trains_leaves_when_it_is_replaced(tmp_path: Path, tiny_data: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    run.fence.write_text("1\n")
    options = ["--num_steps", "1000000", "--log_checkpoint_interval", "20", "--keep_checkpoints", "100000"]
    paths = ["--data_dir", str(tiny_data), "--ckpt_dir", str(run.root)]
    job = jobs.start([*TINY, *options, *paths], env={"JASMINE_ATTEMPT": "1"})
    jobs.wait_until(lambda: (run.root / "checkpoints" / "20").exists(), what="the first checkpoint")
    run.fence_off_earlier_attempts()
    replaced = time.time()
    assert job.finish(30) == [EXIT_FAILED]
    assert time.time() - replaced < 10
    assert "attempt 2 of this run has begun; attempt 1 leaves" in job.output()
