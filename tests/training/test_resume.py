"""What a checkpoint promises: a run is a function of its config, wherever and however often it is stopped."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from tests import jobs
from tests.jobs import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory):
    """40 steps without a stop, on one process with one device."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    jobs.run([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)])
    losses = jobs.metrics(run_dir, "loss")
    assert list(losses) == list(range(1, 41))
    assert losses[40] < losses[1]
    return run_dir


def resume(tiny_data, run_dir, stop=0, more=(), **options):
    stops = ["--stop_at_step", str(stop)] if stop else []
    return jobs.run([*TINY, *stops, *more, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)], **options)


def test_killed_and_resumed_is_bit_identical(straight, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    jobs.run(args, script=jobs.FAULTY, env={"FAULT": "kill@25"}, expect=-9)
    assert max(jobs.metrics(run_dir, "loss")) == 24
    assert jobs.checkpoints(run_dir) == [10, 20]
    again = resume(tiny_data, run_dir)
    assert "resumed from the checkpoint of step 20" in again.output()
    for key in ("loss", "grad_norm", "batch_checksum", "lr"):
        assert jobs.metrics(run_dir, key) == jobs.metrics(straight, key)
    superseded = [json.loads(line)["step"] for line in (run_dir / "metrics.superseded.jsonl").read_text().splitlines()]
    assert superseded == [21, 22, 23, 24]


def test_two_processes_killed_and_resumed_are_bit_identical(tiny_data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    jobs.run([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(whole)], processes=2)
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(cut)]
    killed = jobs.start(args, script=jobs.FAULTY, env={"FAULT": "kill@25"}, processes=2)
    codes = killed.finish()
    assert -9 in codes
    assert 0 not in codes  # one may have lost the other before its own kill
    jobs.run(args, processes=2)
    assert jobs.metrics(cut, "loss") == jobs.metrics(whole, "loss")


TOPOLOGIES = [(1, 1), (1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize(("processes", "devices"), TOPOLOGIES[1:])
def test_same_run_on_every_topology(straight, tiny_data, tmp_path, processes, devices):
    run_dir = tmp_path / "run"
    resume(tiny_data, run_dir, processes=processes, devices=devices)
    same_curve(run_dir, straight)


def test_one_run_walks_through_all_topologies(straight, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    for stop, (processes, devices) in zip((10, 20, 30, 40), [(2, 2), (1, 1), (4, 1), (1, 4)], strict=True):
        args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir), "--stop_at_step", str(stop)]
        jobs.run(args, processes=processes, devices=devices)
    assert len(jobs.events(run_dir, "resumed")) == 3
    same_curve(run_dir, straight)


def same_curve(run_dir, straight):
    assert jobs.metrics(run_dir, "batch_checksum") == jobs.metrics(straight, "batch_checksum")
    losses, expected = jobs.metrics(run_dir, "loss"), jobs.metrics(straight, "loss")
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-4)


def test_killed_in_mid_save_resumes_from_the_checkpoint_before(straight, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    jobs.run(args, script=jobs.FAULTY, env={"FAULT": "kill_in_save@20"}, expect=-9)
    left = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert jobs.checkpoints(run_dir) == [10]
    assert any(name.startswith("20.") for name in left), f"the save was not under way: {left}"
    again = resume(tiny_data, run_dir)
    assert "resumed from the checkpoint of step 10" in again.output()
    assert jobs.metrics(run_dir, "loss") == jobs.metrics(straight, "loss")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["20", "30", "40"]


def test_unreadable_newest_checkpoint_is_set_aside(straight, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    for path in (run_dir / "checkpoints" / "40" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = resume(tiny_data, run_dir)
    assert "warning: checkpoint 40" in again.output()
    assert "resumed from the checkpoint of step 30" in again.output()
    assert (run_dir / "unreadable_checkpoints" / "40").is_dir()
    assert jobs.metrics(run_dir, "loss") == jobs.metrics(straight, "loss")


def test_an_error_that_one_process_reads_a_checkpoint_with_once_costs_nothing(straight, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    again = resume(tiny_data, run_dir, processes=2, script=jobs.FAULTY, env={"FAULT": "eio@40@1"})
    assert "cannot be read now (Input/output error); trying again in 1 s" in again.output(1)
    assert "cannot be read now (on another process); trying again in 1 s" in again.output(0)
    assert "resumed from the checkpoint of step 40" in again.output()
    assert not (run_dir / "unreadable_checkpoints").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_with_one_wrong_bit_is_set_aside(tiny_data, tmp_path, processes):
    args = [*TINY, *jobs.WIDE, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    jobs.run([*args, "--stop_at_step", "2", "--log_checkpoint_interval", "1"])
    jobs.flip_a_bit(tmp_path / "run" / "checkpoints" / "2" / "state")
    again = jobs.run([*args, "--stop_at_step", "3"], processes=processes)
    assert "warning: checkpoint 2" in again.output()
    assert "its contents are not those that were saved" in again.output()
    assert "resumed from the checkpoint of step 1" in again.output()
    assert (tmp_path / "run" / "unreadable_checkpoints" / "2").is_dir()


def test_an_old_checkpoint_that_cannot_be_deleted_costs_no_new_one(straight, tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    resume(tiny_data, run_dir, stop=10)
    stuck = run_dir / "checkpoints" / "10" / "state" / "stuck"
    stuck.mkdir()
    mount(stuck, "4k")
    try:
        job = resume(tiny_data, run_dir, more=["--keep_checkpoints", "1", "--log_checkpoint_interval", "5"])
    finally:
        subprocess.run(["umount", str(stuck)], check=True)
    assert "warning: after the checkpoint of step 15" in job.output()
    assert "Device or resource busy" in job.output()
    assert jobs.metrics(run_dir, "loss") == jobs.metrics(straight, "loss")
    assert "resumed from the checkpoint of step 40" in resume(tiny_data, run_dir).output()


def mount(folder, size):
    """An empty file system on a folder, for tests that need one; a laptop may skip them."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        assert not os.environ.get("CI"), f"CI must run this test: {done.stderr}"
        pytest.skip(f"this needs the right to mount a file system: {done.stderr.strip()}")


@pytest.fixture
def small_disk(straight, tmp_path):
    """A file system with room for one checkpoint of the tiny model, not for two."""
    checkpoint = straight / "checkpoints" / "40"
    blocks = sum(path.stat().st_blocks for path in checkpoint.rglob("*"))  # of 512 bytes
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, f"{3 * blocks // 4}k")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("stop", ["several_saves_fail", "last_save_fails"])
def test_full_disk_keeps_the_last_good_checkpoint(straight, tiny_data, small_disk, tmp_path, stop):
    run_dir = small_disk / "run"
    options = ["--stop_at_step", "20"] if stop == "last_save_fails" else []
    full = jobs.run([*TINY, *options, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)], expect=1)
    (error,) = [line for line in full.output().splitlines() if line.startswith("error:")]
    assert "No space left on device" in error
    # While a save fills the disk, the line of metrics may be what fails first.
    assert "The last good one: step 10" in error or "metrics.jsonl" in error
    assert "Traceback" not in full.output()
    assert jobs.checkpoints(run_dir) == [10]
    elsewhere = tmp_path / "run"
    shutil.copytree(run_dir, elsewhere)
    resume(tiny_data, elsewhere)
    assert jobs.metrics(elsewhere, "loss") == jobs.metrics(straight, "loss")


@pytest.mark.parametrize("fault", ["folder@20@0", "record@20@0", "write@20@0", "write@20@1", "commit@20@0"])
def test_a_save_that_fails_on_one_of_two_processes_fails_on_both_at_once(straight, tiny_data, tmp_path, fault):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    # Orbax would wait for ten minutes.
    job = jobs.run(args, script=jobs.FAULTY, env={"FAULT": f"full_{fault}"}, processes=2)
    for process in (0, 1):
        (warning,) = [line for line in job.output(process).splitlines() if line.startswith("warning:")]
        where = "" if fault.endswith(f"@{process}") else f" (on process {fault[-1]})"
        assert warning.endswith(f": No space left on device{where}. The last good one: step 10")
    assert [event["step"] for event in jobs.events(run_dir, "checkpoint_committed")] == [10, 30, 40]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["10", "30", "40"]
    same_curve(run_dir, straight)


def test_a_disk_that_is_full_from_the_start_is_nobodys_mistake(tiny_data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "64k")
    try:
        (disk / "rest").write_bytes(bytes(64 * 1024))
        job = jobs.run([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(disk / "run")], expect=1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    (error,) = [line for line in job.output().splitlines() if line.startswith("error:")]
    assert error.endswith("No space left on device")
    assert "Traceback" not in job.output()


@pytest.mark.parametrize("fault", ["term@15@1", "usr1@15@0"])
def test_signal_to_one_of_two_processes_stops_both_at_one_step(tiny_data, tmp_path, straight, fault):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    job = jobs.run(args, script=jobs.FAULTY, env={"FAULT": fault}, processes=2, expect=75)
    (saved,) = jobs.events(run_dir, "saved")
    assert jobs.checkpoints(run_dir)[-1] == saved["step"]
    assert 15 <= saved["step"] < 40
    assert f"saved step {saved['step']}" in job.output()
    resume(tiny_data, run_dir, processes=2)
    same_curve(run_dir, straight)


def test_signal_at_a_step_that_is_being_saved_anyway(tiny_data, tmp_path, straight):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    jobs.run(args, script=jobs.FAULTY, env={"FAULT": "term@20"}, expect=75)
    assert jobs.checkpoints(run_dir) == [10, 20]
    resume(tiny_data, run_dir)
    assert jobs.metrics(run_dir, "loss") == jobs.metrics(straight, "loss")


def test_exception_on_one_process_ends_it_at_once_with_its_traceback(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    job = jobs.start(args, script=jobs.FAULTY, env={"FAULT": "raise@5@1"}, processes=2)
    job.processes[1].wait(120)
    jobs.wait_until(lambda: "injected failure" in job.output(1), 10)
    assert job.processes[1].returncode == 1
    assert "Traceback" in job.output(1)
    job.processes[0].kill()
