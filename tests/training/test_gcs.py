"""A run whose directory, or whose data, is in Cloud Storage is the run that it would be on a disk."""

import json
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from jasmine.training import objects, run_files
from jasmine.training.config import MeshConfig
from jasmine.training.mesh import make_mesh
from jasmine.training.runs import load_run, pin
from jasmine.training.sharding import ShardingRules
from launch.objects import place
from tests import jobs
from tests.clusters.gcs import Gcs
from tests.jobs import TINY

pytestmark = pytest.mark.slow

SHORT = [*TINY, "--num_steps", "20", "--log_checkpoint_interval", "5"]
RUN = "gs://bucket/runs/r"


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory):
    """20 steps on a disk, without a stop."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    jobs.run([*SHORT, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)])
    return run_dir


def args(tiny_data, *more: str) -> list[str]:
    return [*SHORT, "--data_dir", str(tiny_data), "--ckpt_dir", RUN, *more]


def assert_same(straight, *, exactly: bool) -> None:
    run = place(RUN)
    assert jobs.metrics(run, "batch_checksum") == jobs.metrics(straight, "batch_checksum")
    here, there = jobs.metrics(run, "loss"), jobs.metrics(straight, "loss")
    assert here == there if exactly else here == pytest.approx(there, rel=1e-4)


def test_killed_and_resumed_on_other_topologies_it_is_the_same_run(straight, tiny_data, gcs: Gcs):
    jobs.run(args(tiny_data), script=jobs.FAULTY, env={"FAULT": "kill@13"}, expect=-9)
    two = jobs.run(args(tiny_data, "--stop_at_step", "15"), processes=2, devices=2)
    assert "resumed from the checkpoint of step 10" in two.output()
    one = jobs.run(args(tiny_data))
    assert "resumed from the checkpoint of step 15" in one.output()
    assert_same(straight, exactly=False)
    assert [event["step"] for event in jobs.events(place(RUN), "resumed")] == [10, 15]
    assert json.loads((place(RUN) / "config.json").read_text())["job"] == "train_tokenizer_vqvae"
    pieces = [name for name in gcs.objects() if ".pieces/" in name and "superseded" not in name]
    assert len(pieces) <= 2, "a process that is killed leaves a piece of what it was appending: metrics, events"


def test_a_checkpoint_that_was_half_deleted_or_damaged_is_passed_over(straight, tiny_data, gcs: Gcs):
    jobs.run(args(tiny_data, "--stop_at_step", "15", "--keep_checkpoints", "9"))
    for path in gcs.objects("runs/r/checkpoints/15/"):
        if path != "runs/r/checkpoints/15/commit_success.txt":
            place(f"gs://bucket/{path}").unlink()
    for path in gcs.objects("runs/r/checkpoints/10/state/"):
        if "/d/" in path:
            place(f"gs://bucket/{path}").write_bytes(b"not what it was")
    opened = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from jasmine.training.runs import load_run; print(load_run({RUN!r}, option='r').step)",
        ],
        cwd=jobs.REPO,
        capture_output=True,
        text=True,
    )
    assert opened.stdout.strip() == "5", opened.stderr
    assert (
        "warning: step 5 is the newest in gs://bucket/runs/r/checkpoints that can be read (step 10: " in opened.stderr
    )
    assert len(gcs.objects("runs/r/checkpoints/15/")) == 1, "who only reads has deleted something"
    again = jobs.run(args(tiny_data))
    assert "resumed from the checkpoint of step 5" in again.output()
    assert_same(straight, exactly=True)


def test_killed_in_mid_save_it_goes_on_from_the_checkpoint_before(straight, tiny_data, gcs: Gcs):
    jobs.run(args(tiny_data), script=jobs.FAULTY, env={"FAULT": "kill_in_save@10"}, expect=-9)
    # Beside what it had written of step 10 by then, as much of a step that nobody saves again.
    for path in gcs.objects("runs/r/checkpoints/5/"):
        if not path.endswith("/commit_success.txt"):
            place(f"gs://bucket/{path.replace('/5/', '/7/', 1)}").write_bytes(place(f"gs://bucket/{path}").read_bytes())
    assert "runs/r/checkpoints/5/commit_success.txt" in gcs.objects()
    assert "runs/r/checkpoints/10/commit_success.txt" not in gcs.objects()
    assert gcs.objects("runs/r/checkpoints/7/")
    assert load_run(RUN, option="r").step == 5
    assert gcs.objects("runs/r/checkpoints/7/"), "who only reads has deleted something"
    again = jobs.run(args(tiny_data))
    assert "resumed from the checkpoint of step 5" in again.output()
    assert not gcs.objects("runs/r/checkpoints/7/")
    assert_same(straight, exactly=True)


def test_a_frozen_copy_in_a_bucket_is_opened_again_and_checked(straight, gcs: Gcs):
    source = load_run(str(straight), option="r")
    pin(epath.Path(RUN), "tokenizer", source, make_mesh(MeshConfig()), ShardingRules())
    copy = load_run(f"{RUN}/frozen/tokenizer", option="r")
    assert (copy.step, copy.fingerprint()) == (20, source.fingerprint())
    meta = place(f"{RUN}/frozen/tokenizer/checkpoints/20/meta/metadata")
    record = json.loads(meta.read_text())
    record["checksums"]["params"] ^= 1  # as if the arrays were others
    meta.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read .*step 20: its contents are not those"):
        _ = load_run(f"{RUN}/frozen/tokenizer", option="r").params


def test_lines_of_one_file_that_cannot_be_written_hold_up_no_others(gcs: Gcs, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.1)
    monkeypatch.setattr(objects, "SECONDS", 0.1)
    outbox, paths = objects._Outbox(), [f"{RUN}/{name}.jsonl" for name in ("bad", "good")]
    gcs.fail_next(403, count=10**6, contains="bad.jsonl")
    for path in paths:
        outbox.put(path, b"1\n", lambda: None)
    jobs.wait_until(lambda: place(paths[1]).exists(), timeout=30, what="the other file")
    jobs.wait_until(lambda: outbox.problem is not None, timeout=30, what="a problem")
    assert not outbox.flush(0.5)
    assert "403" in str(outbox.problem)
    gcs.heal()
    assert outbox.flush(30)
    assert [place(path).read_text() for path in paths] == ["1\n", "1\n"]


def test_training_outlasts_storage_that_fails_for_a_while(straight, tiny_data, gcs: Gcs):
    job = jobs.start(args(tiny_data))
    jobs.wait_until(lambda: any("step 3/" in line for line in job.outputs[0]), what="step 3")
    gcs.fail_next(503, count=30, method="POST")
    gcs.lose_next(count=3, method="POST")
    jobs.wait_until(lambda: any("step 8/" in line for line in job.outputs[0]), what="step 8")
    gcs.kill()
    gcs.start()
    assert job.finish() == [0], job.output()
    assert_same(straight, exactly=True)
    steps = {name.split("/")[3] for name in gcs.objects("runs/r/checkpoints/") if name.endswith("/commit_success.txt")}
    assert "20" in steps


def test_metrics_that_storage_did_not_take_before_a_kill_are_in_the_checkpoint(straight, tiny_data, gcs: Gcs):
    job = jobs.start(args(tiny_data), script=jobs.FAULTY, env={"FAULT": "kill@11"})
    jobs.wait_until(lambda: any("step 3/" in line for line in job.outputs[0]), what="step 3")
    gcs.fail_next(503, count=10**6, contains="metrics.jsonl")
    assert job.finish() == [-9]
    gcs.heal()
    metrics = place(RUN) / "metrics.jsonl"
    assert not metrics.exists() or len(metrics.read_text().splitlines()) < 10
    again = jobs.run(args(tiny_data))
    assert "resumed from the checkpoint of step 10" in again.output()
    assert_same(straight, exactly=True)


def test_lines_that_are_taken_out_of_the_metrics_are_kept_before_they_are_taken_out(gcs: Gcs):
    metrics = place(RUN) / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    gcs.fail_next(503, count=2, contains="superseded")
    run_files.rewind_metrics(epath.Path(RUN), 3)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    kept = (place(RUN) / "metrics.superseded.jsonl").read_text()
    assert [json.loads(line)["step"] for line in kept.splitlines()] == [4, 5]


def test_a_bucket_that_is_not_there_is_one_line(tiny_data, gcs: Gcs):
    job = jobs.run([*SHORT, "--data_dir", str(tiny_data), "--ckpt_dir", "gs://nobody/r"], expect=2)
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert "cannot write to the run directory gs://nobody/r" in line


def test_under_the_launcher_it_is_stopped_and_goes_on_with_other_processes(
    straight, tiny_data, gcs, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JASMINE_STORAGE", "gs://bucket/runs")

    def launch(script: str, *arguments: str) -> str:
        command = [sys.executable, str(jobs.REPO / "launch" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run, job = place(RUN), ["train_tokenizer_vqvae", *TINY, "--num_steps", "5000", "--data_dir", str(tiny_data)]
    launch("submit.py", "--cluster", "local", "--name", "r", "--set", "processes=2", *job)
    jobs.wait_until(lambda: run.is_dir() and "step" in launch("jobs.py", "list").splitlines()[0], what="a run")
    log = run / "attempts" / "1" / "host-1.log"
    metrics = run / "metrics.jsonl"
    jobs.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 10, what="ten steps")
    assert json.loads((run / "attempts" / "1" / "host-1.beat.json").read_text())["step"] >= 0
    assert "r: cancelled" in launch("jobs.py", "cancel", "r")
    saved = max(jobs.metrics(run, "loss"))
    assert jobs.events(run, "saved")[-1]["step"] == saved
    assert log.exists()
    more = ["--set", "processes=1", "--set", "devices_per_process=2", "--wait", "--stop_at_step", str(saved + 5)]
    assert f"step {saved + 5}/5000" in launch("jobs.py", "resume", "r", *more)
    checksums, expected = jobs.metrics(run, "batch_checksum"), jobs.metrics(straight, "batch_checksum")
    assert list(checksums) == list(range(1, saved + 6))
    assert {step: checksums[step] for step in range(1, 16)} == {step: expected[step] for step in range(1, 16)}
    assert f"step {saved + 5} of {saved + 5}" in launch("jobs.py", "status", "r")


def test_saves_that_fail_are_told_of_and_survived_but_not_for_ever(straight, tiny_data, gcs: Gcs):
    gcs.fail_next(403, count=10**6, method="POST", contains="/checkpoints/5")
    job = jobs.run(args(tiny_data))
    assert "warning: the checkpoint of step 5 could not be saved in gs://bucket/runs/r/checkpoints" in job.output()
    assert_same(straight, exactly=True)
    again = jobs.run(args(tiny_data))  # nothing is left to do, and what the failed save left is in nobody's way
    assert "resumed from the checkpoint of step 20" in again.output()

    place(RUN).rmtree()  # type: ignore[attr-defined]
    gcs.fail_next(403, count=10**6, method="POST", contains="/checkpoints/")
    # A save's failure is noticed with a later one: enough of them for that before the last step.
    job = jobs.run([*args(tiny_data), "--log_checkpoint_interval", "2"], expect=2)
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert "3 saves in a row failed. The last good one: none yet" in line


def test_data_in_a_bucket_give_the_batches_of_data_on_a_disk(straight, tiny_data, gcs: Gcs, tmp_path, monkeypatch):
    from google.cloud.storage import Client

    cache = tmp_path / "cache"
    monkeypatch.setenv("JASMINE_DATA_CACHE_DIR", str(cache))
    there = Client(project="test").bucket("bucket")
    for path in tiny_data.rglob("*"):
        if path.is_file():
            there.blob(f"tiny/{path.relative_to(tiny_data)}").upload_from_filename(str(path))
    gcs.fail_next(503, count=3, contains="shard-")
    options = ["--data_dir", "gs://bucket/tiny", "--val_data_dir", "gs://bucket/tiny", "--val_interval", "10"]
    args = [*SHORT, *options, "--ckpt_dir", str(tmp_path / "run")]
    two = jobs.run([*args, "--stop_at_step", "10"], processes=2)
    assert f"in 1 shards, staged in {cache}" in two.output()
    gcs.fail_next(403, count=10**6, contains="shard-")  # all is here
    one = jobs.run(args, devices=2)
    assert "resumed from the checkpoint of step 10" in one.output()
    assert jobs.metrics(tmp_path / "run", "batch_checksum") == jobs.metrics(straight, "batch_checksum")
    assert jobs.metrics(tmp_path / "run", "loss") == pytest.approx(jobs.metrics(straight, "loss"), rel=1e-4)
    shards = [one for one in gcs.requests if one["status"] == 200 and one["path"].endswith(".array_record")]
    assert len(shards) == 2  # one of each split, for two attempts and three processes


def test_a_job_that_waits_for_its_bucket_says_so_to_whoever_looks_for_hangs(gcs: Gcs, tmp_path, monkeypatch):
    from google.cloud.storage import Client

    rng = np.random.default_rng(3)
    with EpisodeWriter(
        tmp_path / "data" / "train", frame_shape=(16, 16, 3), fps=1, encoding="raw", episodes_per_shard=1
    ) as writer:
        for _ in range(12):
            writer.write(rng.integers(0, 256, (8, 16, 16, 3), np.uint8))
    there = Client(project="test").bucket("bucket")
    for path in (tmp_path / "data" / "train").iterdir():
        there.blob(f"data/train/{path.name}").upload_from_filename(str(path))
    monkeypatch.setenv("JASMINE_DATA_CACHE_DIR", str(tmp_path / "cache"))
    attempt = tmp_path / "run" / "attempts" / "1"
    attempt.mkdir(parents=True)
    beat = attempt / "host-0.beat.json"

    def says() -> dict:
        return json.loads(beat.read_text()) if beat.exists() else {}

    gcs.fail_next(503, count=10**6, contains="shard-00007")
    options = ["--data_dir", "gs://bucket/data", "--batch_size", "1", "--ckpt_dir", str(tmp_path / "run")]
    job = jobs.start([*SHORT, *options], env={"JASMINE_ATTEMPT": "1", "JASMINE_RUN_DIR": str(tmp_path / "run")})
    jobs.wait_until(lambda: says().get("doing") == "fetching data", what="a wait")
    assert 0 < says()["step"] < 20
    gcs.heal()
    assert job.finish() == [0]
    assert jobs.metrics(tmp_path / "run", "data_wait")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--data_dir gs://nobody/tiny", "no data at gs://nobody/tiny: no such bucket"),
        ("--data_dir gs://bucket/tiny", "no data at gs://bucket/tiny (no such folder): upload the data first"),
        ("--data_dir gs://bucket/tiny --data_cache_gib 0", "--data_cache_gib=0.0: must be more than 0"),
    ],
)
def test_data_that_a_bucket_does_not_have_are_one_line(gcs: Gcs, tmp_path, options, says):
    job = jobs.run([*SHORT, *options.split(), "--ckpt_dir", str(tmp_path / "run")], expect=2)
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert says in line
    assert not (tmp_path / "run").exists()
