"""What a submission, a sweep, a pipeline or a script of XManager's sends to Cloud TPU, and what becomes of refusals: the real
client, real startup scripts, VMs that are processes, and a stand-in for the baseline."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.record import read_record
from tests.clusters.cloud_tpu import CloudTpu
from tests.launch.checkouts import Checkout, wait_until
from tests.launch.conftest import REPOSITORY
from tests.launch.tpu_laptop import creations, laptop, steps, submit


@pytest.fixture
def here(checkout: Checkout, cloud_tpu: CloudTpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    with laptop(checkout, cloud_tpu, monkeypatch):
        yield checkout


@pytest.mark.slow
def test_an_api_that_stumbles_leads_to_one_tpu(here: Checkout, cloud_tpu: CloudTpu) -> None:
    cloud_tpu.lose_next_create()
    cloud_tpu.fail_next(503, 2, "GET")
    submit(here, "train_tokenizer_vqvae", "--num_steps", "3")
    assert len(cloud_tpu.resources()) == 1
    assert here.end().state == "finished"
    cloud_tpu.fail_next(429, 3)
    submit(here, "train_tokenizer_vqvae", "--num_steps", "3", name="other")
    assert here.end("other").state == "finished"
    wait_until(lambda: not cloud_tpu.resources())


def test_what_the_api_refuses_leaves_nothing_behind(here: Checkout, cloud_tpu: CloudTpu) -> None:
    done = here.run(
        "submit", "--cluster", "tpu.yaml", "--name", "r", "--set", "runtime_version=v9", "train_tokenizer_vqvae"
    )
    assert done.returncode == 2
    assert "Cloud TPU refuses j-r-" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not here.directory().root.exists()
    assert not cloud_tpu.resources()


def test_a_project_that_is_not_set_is_shown_and_refused(here: Checkout) -> None:
    arguments = ["--cluster", "tpu-v5-256", "--name", "r", "--set", f"storage={here.home}/runs"]
    shown = here.run("submit", *arguments, "--dry-run", "train_tokenizer_vqvae")
    assert "/v2/projects/$GOOGLE_CLOUD_PROJECT/locations/" in shown.stdout
    refused = here.run("submit", *arguments, "train_tokenizer_vqvae")
    assert refused.returncode == 2
    assert "project: $GOOGLE_CLOUD_PROJECT is not set" in refused.stderr


@pytest.mark.slow
def test_a_dry_run_shows_what_is_sent(here: Checkout, cloud_tpu: CloudTpu) -> None:
    shown = yaml.safe_load(
        here.submit("--dry-run", "train_tokenizer_vqvae", "--num_steps", "1", cluster="tpu.yaml").stdout
    )
    assert not cloud_tpu.requests
    assert not here.directory().root.exists()
    submit(here, "train_tokenizer_vqvae", "--num_steps", "1")
    sent = next(one for one in cloud_tpu.requests if one["method"] == "POST")
    assert shown["POST"].startswith("/" + sent["path"])
    assert json.loads(sent["body"]) == shown["body"]
    assert here.end().state == "finished"


@pytest.mark.slow
def test_a_launcher_killed_before_it_asked_for_the_tpu_asks_when_watched_again(
    here: Checkout, cloud_tpu: CloudTpu
) -> None:
    cloud_tpu.latency(2)
    command = here.argv("submit", "--cluster", "tpu.yaml", "--name", "r", "train_tokenizer_vqvae", "--num_steps", "3")
    with subprocess.Popen(command, cwd=here.home, env=here.env) as submission:
        wait_until(here.directory().tpu_resource.exists)
        submission.kill()
    cloud_tpu.latency(0)
    assert here.jobs("watch", "r").returncode == 0
    assert here.end().state == "finished"
    assert len(set(creations(cloud_tpu))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("noted", [True, False])
def test_a_tpu_that_is_refused_to_the_watcher_ends_the_run(here: Checkout, cloud_tpu: CloudTpu, noted: bool) -> None:
    cloud_tpu.fail_next(403, 9, "POST")
    cloud_tpu.latency(2)
    command = here.argv("submit", "--cluster", "tpu.yaml", "--name", "r", "train_tokenizer_vqvae")
    with subprocess.Popen(command, cwd=here.home, env=here.env) as submission:
        wait_until(here.directory().tpu_resource.exists)
        submission.kill()
    cloud_tpu.latency(0)
    if not noted:
        here.directory().tpu_resource.unlink()
    assert here.jobs("watch", "r").returncode == 0
    record = here.end()
    assert record.state == "failed"
    assert "Cloud TPU refuses j-r-" in (record.reason or "")


@pytest.mark.slow
def test_a_sweep_is_an_experiment_of_work_units(here: Checkout, cloud_tpu: CloudTpu) -> None:
    told = here.submit("--sweep", "num_steps=3,4", "train_tokenizer_vqvae", name="s", cluster="tpu.yaml").stdout
    assert "2 runs submitted" in told
    for element, count in (("s.0", 3), ("s.1", 4)):
        assert here.end(element, seconds=180).state == "finished"
        assert steps(here, element) == list(range(1, count + 1))
    table = here.jobs("status", "s").stdout
    assert table.count("finished") == 2


@pytest.mark.slow
def test_an_xmanager_script_launches_work_units(here: Checkout, cloud_tpu: CloudTpu) -> None:
    shutil.copytree(REPOSITORY / "examples", here.root / "examples")
    script = [sys.executable, str(here.root / "examples" / "xmanager_sweep.py"), "--cluster", "tpu.yaml"]
    rates = ["--max_lr", "1e-3", "--max_lr", "3e-4"]
    done = subprocess.run(
        [*script, "--title", "lr", *rates, "--topology", "2x4", "--wait", "--", "--num_steps", "4"],
        cwd=here.home, env=here.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "work unit 2: run lr.2, submitted" in done.stdout
    assert "work unit 2: finished" in done.stdout
    for unit, rate in ((1, "0.001"), (2, "0.0003")):
        record = read_record(here.directory(f"lr.{unit}"))
        assert record is not None
        plan = record.submissions[-1].plan
        assert plan.arguments == ("--num_steps", "4", f"--max_lr={rate}")
        assert plan.settings["accelerator_type"] == "v5litepod-8"
        assert plan.settings["provisioning"] == "spot"
    assert here.jobs("status", "lr").stdout.count("finished") == 2

    refused = subprocess.run(
        [*script, "--title", "lr", *rates, "--", "--num_stps", "4"],
        cwd=here.home,
        env=here.env,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "has no option --num_stps; did you mean '--num_steps'?" in refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr


@pytest.mark.slow
def test_a_pipeline_rents_each_tpu_when_it_is_needed(here: Checkout, cloud_tpu: CloudTpu) -> None:
    (here.home / "world.yaml").write_text(
        "name: w\n"
        "stages:\n"
        "  first: {job: train_tokenizer_vqvae, args: --num_steps 150, set: [accelerator_type=v5litepod-4]}\n"
        '  second: {job: train_lam, args: "--num_steps 3 --data_dir {first}", set: [accelerator_type=v5litepod-8]}\n'
    )
    done = here.run("submit", "--cluster", "tpu.yaml", "--pipeline", "world.yaml")
    assert done.returncode == 0, done.stderr
    assert "a TPU once w-first has finished" in done.stdout
    assert "waiting for w-first to finish" in here.jobs("explain", "w-second").stdout
    assert len(creations(cloud_tpu)) == 1
    assert here.end("w-second", seconds=180).state == "finished"
    assert here.end("w-first").state == "finished"
    assert len(creations(cloud_tpu)) == 2
    after = here.run(
        "submit", "--cluster", "tpu.yaml", "--name", "x", "--after", "w-first", "train_lam", "--num_steps", "2"
    )
    assert after.returncode == 0, after.stderr
    assert here.end("x", seconds=180).state == "finished"


@pytest.mark.slow
def test_secrets_reach_the_job_and_nothing_else(here: Checkout, cloud_tpu: CloudTpu, tmp_path: Path) -> None:
    script = here.home / "show.py"
    script.write_text("import os, hashlib\nprint(hashlib.sha256(os.environ['API_KEY'].encode()).hexdigest())\n")
    held = tmp_path / "held"
    held.write_text("hunter2-hunter2\n")
    done = here.run(
        "submit", "--cluster", "tpu.yaml", "--name", "r", "--set", f"secrets.API_KEY={held}", "--set",
        "accelerator_type=v5litepod-4", str(script),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert here.end().state == "finished"
    assert hashlib.sha256(b"hunter2-hunter2").hexdigest() in here.directory().log(1, 0).read_text()
    assert "hunter2" not in json.dumps(cloud_tpu.requests)
    for path in here.directory().root.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
