"""What a checkpoint promises holds for every baseline, and for what it builds on: tokenizers, latent actions, tokens made
beforehand. (`tests/training/test_resume.py` holds the loop itself to it, with the VQ-VAE tokenizer.)"""

import json
import shlex
import shutil

import numpy as np
import pytest

from tests import jobs
from tests.jobs import BASELINES, FAMILY

pytestmark = pytest.mark.slow

NAMES = [name for name in FAMILY if name != "vqvae"]
CLOCK = {"time", "attempt", "step_time", "frames_per_second", "data_wait"}


def train(family, name, run_dir, *more, **options):
    script = BASELINES[FAMILY[name][0]]
    return jobs.run(family.args(name, run_dir, *more), **{"script": script, **options})


def curve(run_dir) -> list[dict]:
    """All that a run logged of its steps, but for when and how fast."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    return [{name: value for name, value in record.items() if name not in CLOCK} for record in records]


def test_runs_differ_from_step_to_step_and_learn(family):
    """Else equal curves would say nothing."""
    for name in NAMES:
        losses = [record["loss"] for record in curve(family[name])]
        assert len(set(losses)) == 6
        checksums = {record["batch_checksum"] for record in curve(family[name])}
        assert len(checksums) == 6
        assert np.mean(losses[3:]) < np.mean(losses[:3]), name


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_is_bit_identical(family, name, tmp_path):
    run_dir = tmp_path / "run"
    fault = {"FAULT": "kill@5", "FAULT_JOB": FAMILY[name][0]}
    train(family, name, run_dir, script=jobs.FAULTY, env=fault, expect=-9)
    assert jobs.checkpoints(run_dir) == [2, 4]
    again = train(family, name, run_dir)
    assert "resumed from the checkpoint of step 4" in again.output()
    assert curve(run_dir) == curve(family[name])


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_with_two_devices_give_the_same_curve(family, name, tmp_path):
    run_dir = tmp_path / "run"
    train(family, name, run_dir, processes=2, devices=2)
    for mine, expected in zip(curve(run_dir), curve(family[name]), strict=True):
        assert mine["batch_checksum"] == expected["batch_checksum"]
        np.testing.assert_allclose(mine["loss"], expected["loss"], rtol=1e-4)


def test_goes_on_exactly_without_the_runs_that_it_builds_on(family, tmp_path):
    run_dir, tokenizer, lam = (tmp_path / name for name in ("run", "vqvae", "lam"))
    shutil.copytree(family["vqvae"], tokenizer)
    shutil.copytree(family["lam"], lam)
    sources = ["--tokenizer_checkpoint", str(tokenizer), "--lam_checkpoint", str(lam)]
    train(family, "causal", run_dir, *sources, "--stop_at_step", "4")
    train(family, "vqvae", tokenizer, "--num_steps", "8")  # trained further: its newest checkpoint is another model
    assert jobs.checkpoints(tokenizer)[-1] == 8
    shutil.rmtree(lam)
    train(family, "causal", run_dir, *sources)
    assert curve(run_dir) == curve(family["causal"])


@pytest.mark.parametrize(
    ("name", "made_with"), [("causal", "--tokenizer {vqvae} --lam {lam}"), ("diffusion", "--tokenizer {mae}")]
)
def test_training_from_tokens_is_training_from_pixels(family, name, made_with, tmp_path):
    tokens, run_dir = tmp_path / "tokens", tmp_path / "run"
    made_with = [str(family[word[1:-1]]) if word.startswith("{") else word for word in made_with.split()]
    options = shlex.split(f"jasmine.data.tokenize --data {family.data} --output_dir {tokens} --seq_len 4 --split train")
    jobs.run([*options, *made_with], script="-m")
    train(family, name, run_dir, "--data_dir", str(tokens), processes=2 if name == "causal" else 1)
    for mine, expected in zip(curve(run_dir), curve(family[name]), strict=True):
        np.testing.assert_allclose(mine["loss"], expected["loss"], rtol=1e-5)
    [flops], [with_tokenizer] = (
        [event["model_flops"] for event in jobs.events(run, "compiled")] for run in (run_dir, family[name])
    )
    assert flops < 0.9 * with_tokenizer
