"""Every baseline's training step compiles for a TPU that is not there, from its options alone."""

import dataclasses
import importlib
import json
import shlex
import shutil
import subprocess
import sys

import pytest

from jasmine import compile as preflight
from jasmine.errors import UserError
from jasmine.training.runs import baseline_modules
from tests.jobs import BASELINES, FAMILY, REPO, SMALL

pytestmark = pytest.mark.slow
TINY = [option for option in SMALL if option not in ("--dtype", "float32")]  # bfloat16, as on TPUs


@pytest.fixture(scope="module")
def square():
    return preflight.tpu_devices("v5e:2x2")


@pytest.fixture(scope="module")
def described(tiny_data, tmp_path_factory):
    """Runs of the tokenizers and the latent action model that left a config and no weights."""
    root = tmp_path_factory.mktemp("described")
    for name in ("vqvae", "mae", "lam"):
        job, options = FAMILY[name]
        module = importlib.import_module(baseline_modules()[job])
        config = preflight.cli.parse(module.Config, [*TINY, *shlex.split(options), "--data_dir", str(tiny_data)])
        data, _ = preflight.describe_data(config, {})
        (root / name).mkdir()
        record = {"job": job, "config": dataclasses.asdict(config), "data": dataclasses.asdict(data)}
        (root / name / "config.json").write_text(json.dumps(record))
    return root


def arguments(name, described, data_dir):
    options = [str(described / part[1:-1]) if part.startswith("{") else part for part in shlex.split(FAMILY[name][1])]
    return [*TINY, *options, "--data_dir", str(data_dir)]


@pytest.mark.parametrize("name", FAMILY)
def test_every_baseline_compiles_from_configs_alone(name, described, tiny_data, square):
    report = preflight.compile_job(BASELINES[FAMILY[name][0]], arguments(name, described, tiny_data), square)
    assert report.fits
    assert (report.platform, report.devices, report.job) == ("tpu", 4, FAMILY[name][0])
    assert report.assumed == ()
    assert report.frozen_parameters.count > 0 or name in ("vqvae", "mae", "lam")
    # What the chips do is what the model asks for: nothing is left out, nothing computed on all chips alike.
    assert 0.6 < report.flops * 4 / report.model_flops < 1.3
    assert any(one.kind == "all-reduce" and one.bytes > 0 for one in report.collectives)


def test_parameters_are_split(described, tiny_data):
    devices = preflight.tpu_devices("v5e:4x4")
    options = arguments("maskgit", described, tiny_data)
    options += ["--batch_size=16", "--model_dim=64", "--ffn_dim=256", "--lam_dim=64", "--lam_ffn_dim=256"]
    script = BASELINES["train_dynamics_maskgit"]
    whole = preflight.compile_job(script, options, devices)
    split = preflight.compile_job(script, [*options, "--mesh.fsdp=16"], devices)
    for part in ("parameters", "optimizer_state"):
        before, after = getattr(whole, part), getattr(split, part)
        assert before.bytes_per_device == before.bytes == after.bytes
        assert after.bytes_per_device < 1.2 * before.bytes / 16
    assert split.unsplit == {}
    assert split.flops == pytest.approx(whole.flops, rel=0.02)
    assert split.memory.arguments < whole.memory.arguments / 4


@pytest.mark.parametrize(
    "options",
    [
        "--remat=full --ema_decay=0.9",
        "--remat=offload",
        "--quantize=int8",
        "--dtype=float32 --grad_accumulation_steps=2",
    ],
)
def test_options_that_change_the_program(options, tiny_data, square, tmp_path):
    script = tmp_path / "my_lam.py"  # somebody's own, made like a baseline
    shutil.copy(BASELINES["train_lam"], script)
    given = [*TINY, *shlex.split(FAMILY["lam"][1]), "--data_dir", str(tiny_data), *options.split()]
    report = preflight.compile_job(script, given, square)
    assert report.fits
    assert report.job == "my_lam"
    assert (report.average.count > 0) == ("ema_decay" in options)
    assert report.flops * 4 < 1.6 * report.model_flops


def test_two_slices_exchange_over_the_slow_network(tiny_data):
    devices = preflight.tpu_devices("v5e:2x2", slices=2)
    report = preflight.compile_job(
        BASELINES["train_lam"], [*TINY, *shlex.split(FAMILY["lam"][1]), "--data_dir", str(tiny_data)], devices
    )
    assert (report.slices, report.devices, report.mesh["data"]) == (2, 8, 8)
    assert {one.between_slices for one in report.collectives} == {True, False}
    assert report.flops * 8 < 1.02 * report.model_flops


@pytest.mark.parametrize(
    ("topology", "chips_per_host", "devices"),
    [("v4:2x2x2", 4, 8), ("v5p:2x2x1", 4, 4), ("v6e:2x4", 8, 8), ("v5e:1x1", 1, 1)],
)
def test_each_device_is_a_chip(topology, chips_per_host, devices):
    assert len(preflight.tpu_devices(topology, 1, chips_per_host)) == devices


def test_what_is_not_here_is_assumed_and_said(square, described, tmp_path):
    options = ["--data_dir=/of/the/cluster/data", "--use_gt_actions", "--lam_dim=16"]
    shutil.copytree(described / "vqvae", tmp_path / "vqvae")
    config = preflight.load_script(BASELINES["train_dynamics_maskgit"]).Config
    here = preflight.cli.parse(config, [*options, f"--tokenizer_checkpoint={tmp_path / 'vqvae'}"])
    parts, assumed = preflight.describe_parts(here)
    data, more = preflight.describe_data(here, parts)
    assert (data.frame_shape, data.num_actions) == ((16, 16, 3), 4)
    assert assumed == []
    assert (
        "/of/the/cluster/data is not on this machine: taken for frames of 16×16×3 with 4 actions as the tokenizer"
        in more[0]
    )
    away = preflight.cli.parse(config, [*options, "--tokenizer_checkpoint=later", "--num_actions=7"])
    parts, assumed = preflight.describe_parts(away)
    assert assumed == [
        "--tokenizer_checkpoint later is not on this machine: taken for the defaults of train_tokenizer_vqvae"
    ]
    assert parts["tokenizer"].config.num_latents == 1024
    assert preflight.describe_data(away, parts)[0].num_actions == 7


def test_a_bucket_that_this_machine_cannot_read_is_said(square, gcs):
    config = preflight.load_script(BASELINES["train_tokenizer_vqvae"]).Config
    data, assumed = preflight.describe_data(preflight.cli.parse(config, ["--data_dir=gs://elsewhere/data"]), {})
    assert data.frame_shape == (64, 64, 3)
    assert assumed == ["no data at gs://elsewhere/data: no such bucket; correct its name: taken for frames of 64×64×3"]


def test_a_mistake_is_one_line(tiny_data, square):
    script, options = BASELINES["train_lam"], [*TINY, "--patch_size=8", "--data_dir", str(tiny_data)]
    with pytest.raises(UserError, match=r"--batch_size=6 does not split over 4 .* nearest that does: 4 or 8"):
        preflight.compile_job(script, [*options, "--batch_size=6"], square)
    with pytest.raises(UserError, match=r"sizes that do: 1, 2, 4"):
        preflight.compile_job(script, [*options, "--mesh.fsdp=3"], square)
    with pytest.raises(UserError, match="libtpu cannot compile for it"):
        preflight.tpu_devices("v5e:3x5")
    done = subprocess.run(
        [sys.executable, "-m", "jasmine.compile", "--devices=2", str(script), "--", "--data_dri=x"],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "error: unknown option --data_dri; did you mean --data_dir? (--help lists all)"
    )
