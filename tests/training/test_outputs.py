"""What a run leaves behind besides checkpoints: metrics in all sinks, pictures, events, a profile."""

import json
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jasmine.training import objects, run_files
from jasmine.training.run_files import JsonLines, read_lines, rewind_metrics, seconds
from tests import jobs
from tests.jobs import TINY


@pytest.fixture(scope="module")
def full_run(tiny_data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("full") / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--val_data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    args += ["--num_steps", "12", "--val_interval", "5", "--val_steps", "2", "--log_checkpoint_interval", "4"]
    args += ["--keep_checkpoints", "1", "--log_checkpoint_keep_period", "8", "--profile_steps", "3:5"]
    args += ["--log", "--tensorboard", "--log_gradients", "--log_interval", "3"]
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "FAULT": "mark@0"}
    job = jobs.run(args, script=jobs.FAULTY, env=env)
    return run_dir, job.output()


@pytest.mark.slow
def test_metrics_hold_what_the_contract_names(full_run):
    run_dir, output = full_run
    records = {record["step"]: record for record in read_lines(run_dir / "metrics.jsonl")}
    assert list(records) == [3, 5, 6, 9, 10, 12]
    for record in records.values():
        assert {"step", "loss", "lr", "step_time", "frames_per_second", "batch_checksum"} <= record.keys()
        assert np.isfinite([record["loss"], record["frames_per_second"]]).all()
        assert 0 <= record["batch_checksum"] < 2**32
        assert record["gradient_std/encoder"] > 0
    for step in (5, 10, 12):
        assert {"val_loss", "val_psnr", "val_ssim", "val_codebook_usage"} <= records[step].keys()
    assert "val_psnr" not in records[3]
    assert "step 12/12  loss" in output
    assert re.search(r"parameters: decoder [\d,]+  encoder [\d,]+  vq 128  total", output)


@pytest.mark.slow
def test_retention_keeps_the_newest_and_every_kth(full_run):
    assert jobs.checkpoints(full_run[0]) == [8, 12]


@pytest.mark.slow
def test_pictures_of_evaluations(full_run):
    run_dir, _ = full_run
    assert sorted(path.name for path in (run_dir / "media").iterdir()) == [
        f"reconstruction_{step:07d}.png" for step in (5, 10, 12)
    ]
    image = np.asarray(Image.open(run_dir / "reconstruction.png"))
    assert image.shape == (4 * 2 * 18 * 8, 4 * 18 * 8, 3)  # 16-pixel frames with a border, enlarged 8 times
    assert (run_dir / "reconstruction.png").read_bytes() == (run_dir / "media/reconstruction_0000012.png").read_bytes()


@pytest.mark.slow
def test_wandb_offline_and_tensorboard_hold_the_curve(full_run):
    run_dir, _ = full_run
    (offline,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert b"val_psnr" in offline.read_bytes()
    (tensorboard,) = run_dir.glob("tensorboard/events.out.tfevents.*")
    assert b"frames_per_second" in tensorboard.read_bytes()


@pytest.mark.slow
def test_profile_and_events(full_run):
    run_dir, _ = full_run
    assert list(run_dir.glob("profile/**/*.xplane.pb"))
    for name in ("init", "started", "compiled"):
        assert len(jobs.events(run_dir, name)) == 1
    for name, steps in {
        "first_step": [1], "step_mark": list(range(1, 13)), "evaluated": [5, 10, 12], "checkpoint": [4, 8, 12],
        "checkpoint_committed": [4, 8, 12], "finished": [12],
    }.items():  # fmt: skip
        assert [event["step"] for event in jobs.events(run_dir, name)] == steps, name
    spent = [event["spent"] for event in jobs.events(run_dir, "step_mark")]
    for what in ("data", "compile", "evaluation", "checkpoint"):
        assert [one[what] for one in spent] == sorted(one[what] for one in spent)
        assert spent[-1][what] > 0 or what == "data"  # batches may all be there before they are asked for
    config = json.loads((run_dir / "config.json").read_text())
    assert config["job"] == "train_tokenizer_vqvae"
    assert config["config"]["mesh"] == {"data": -1, "fsdp": 1, "tensor": 1}


@pytest.mark.slow
def test_profile_window_that_a_stop_falls_into(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run"), "--profile_steps", "3:6"]
    jobs.run([*args, "--stop_at_step", "4"])
    resumed = jobs.run([*args, "--stop_at_step", "8"])
    assert "profiler trace of steps 3 to 6" in resumed.output()


@pytest.mark.slow
def test_curves_are_drawn(full_run, tmp_path):
    from jasmine.evaluation.curves import draw

    draw(epath.Path(full_run[0]), epath.Path(tmp_path / "loss.png"))
    assert Image.open(tmp_path / "loss.png").size == (1080, 540)


def test_rewinding_keeps_what_it_takes_out(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    rewind_metrics(epath.Path(tmp_path), 3)
    assert [record["step"] for record in read_lines(epath.Path(tmp_path / "metrics.jsonl"))] == [1, 2, 3]
    assert [record["step"] for record in read_lines(epath.Path(tmp_path / "metrics.superseded.jsonl"))] == [4, 5]
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    rewind_metrics(epath.Path(tmp_path), 3)
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_torn_line_spoils_no_other(tmp_path):
    path = epath.Path(tmp_path / "events.jsonl")
    lines = JsonLines(epath.Path(tmp_path), path.name)
    for step, torn in ((1, b""), (2, b'{"st'), (3, b"\xff\xfe")):
        lines.write({"step": step})
        with open(path, "ab") as file:
            file.write(torn)
    lines.write({"step": 4})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]


def test_each_line_asks_whether_the_run_not_the_folder_it_goes_to_has_a_newer_attempt(tmp_path, monkeypatch):
    asked, sent = [], []
    monkeypatch.setattr(run_files, "leave_if_replaced", asked.append)
    monkeypatch.setattr(objects, "append", lambda path, data, tried: sent.append((str(path), len(asked))))
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    JsonLines(epath.Path(tmp_path), "attempts/1/host-0.steps.jsonl").write({})
    assert asked == [epath.Path(tmp_path)]
    runs = [epath.Path("gs://bucket/r"), epath.Path("gs://bucket/other")]
    for run in runs:
        JsonLines(run, "attempts/1/host-0.steps.jsonl").write({})
    assert not objects.flush(30)
    assert asked[1:] == runs
    assert sent == [(f"{run}/attempts/1/host-0.steps.jsonl", 2 + place) for place, run in enumerate(runs)]


def test_durations_for_people():
    assert [seconds(value) for value in (5, 190, 7500, 273600, float("inf"))] == ["5s", "3m10s", "2h05m", "3d04h", "?"]
