"""A user's mistake costs one line and an exit code, and harms nothing."""

import fcntl
import os
import shutil
import stat

import pytest

from tests import jobs
from tests.jobs import TINY

pytestmark = pytest.mark.slow  # each starts a process that imports jax


def refused(args, run_dir=None, **options) -> str:
    """The one error line of a job that is refused; nothing may have been made in `run_dir`."""
    before = sorted(run_dir.rglob("*")) if run_dir and run_dir.exists() else None
    job = jobs.run(args, expect=2, **options)
    assert "Traceback" not in job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error:")]
    if run_dir is not None:
        assert (sorted(run_dir.rglob("*")) if run_dir.exists() else None) == before
    return line


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--batch_size", "6", "--mesh.data", "4"], "nearest that does: 4 or 8"),
        (["--patch_size", "5"], "--patch_size=5 does not divide the 16×16 frames; these do: 2, 4, 8, 16"),
        (["--seq_len", "40"], "longer than every episode"),
        (["--num_heads", "3"], "--model_dim=16 is not a multiple of --num_heads=3"),
        (["--batchsize", "8"], "unknown option --batchsize; did you mean --batch_size?"),
        (["--stop_at_step", "50"], "--stop_at_step=50 is not between 0 and the end, --num_steps=40"),
        (["--mesh.fsdp", "3"], "3 does not divide the 4 devices"),
        (["--profile_steps", "9"], "expected a:b with a < b"),
        (["--lr_schedule", "cos", "--warmup_steps", "40"], "leaves none of --num_steps=40 for the cosine"),
        (["--log_interval", "0"], "--log_interval=0: must be at least 1"),
    ],
)
def test_options_that_cannot_work(tiny_data, tmp_path, extra, says):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir), *extra]
    assert says in refused(args, run_dir, devices=4)
    assert not run_dir.exists()


def test_data_that_is_missing_empty_or_corrupt(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    missing = tmp_path / "no-such-data"
    assert str(missing) in refused([*TINY, "--data_dir", str(missing), "--ckpt_dir", str(run_dir)], run_dir)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused([*TINY, "--data_dir", str(empty), "--ckpt_dir", str(run_dir)], run_dir)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data, broken)
    (shard,) = (broken / "train").glob("*.array_record")
    content = bytearray(shard.read_bytes())
    for place in range(len(content) // 4, len(content), 97):
        content[place] ^= 0xFF
    shard.chmod(shard.stat().st_mode | stat.S_IWUSR)
    shard.write_bytes(content)
    line = refused([*TINY, "--data_dir", str(broken), "--ckpt_dir", str(run_dir)])
    assert shard.name in line
    assert "record" in line


def test_data_and_folder_must_be_named(tiny_data):
    assert "--data_dir is not set" in refused(TINY)
    assert "--ckpt_dir is not set" in refused([*TINY, "--data_dir", str(tiny_data)])


def test_folder_that_cannot_be_written(tiny_data, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    line = refused([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(blocked / "run")])
    assert f"cannot write to the run directory {blocked / 'run'}" in line
    assert blocked.read_text() == "a file, not a folder"


def test_resume_with_another_model_names_the_parameter_and_both_shapes(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir), "--stop_at_step", "10"]
    jobs.run(args)
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    line = refused([*args, "--stop_at_step", "20", "--ffn_dim", "64"])
    assert "params.decoder.blocks.ffn.linear_in.bias has shape (1, 32) in the checkpoint, shape (1, 64)" in line
    assert "--no-restore_ckpt would train over them" in refused([*args, "--no-restore_ckpt"])
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert jobs.checkpoints(run_dir) == [10]
    changed = jobs.run([*args, "--stop_at_step", "11", "--seed", "5"])
    assert "warning: --seed is 5 but was 0" in changed.output()


def test_folder_in_which_another_job_trains(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".training.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)], run_dir)
    assert f"another job is training in {run_dir}" in line


def test_incomplete_rendezvous_is_named(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    env = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2"}
    assert "JAX_PROCESS_ID not set" in refused(args, env=env)


def test_coordinator_that_does_not_answer_is_a_failure_worth_a_retry(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{jobs.free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    job = jobs.run(args, env={**env, "JASMINE_INIT_TIMEOUT": "3", "PATH": os.environ["PATH"]}, expect=1)
    assert "could not join the job" in job.output()
    assert "Traceback" not in job.output()
