"""Every baseline learns: on real CoinRun episodes, in a minute or two each on two cores, by the commands that users type.

Thresholds lie below what was measured (docs/lab-notes.md), by more than seeds differ.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.jobs import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODEL = "--model_dim 128 --ffn_dim 512 --num_heads 4 --batch_size 16 --seq_len 4 --dtype float32 --warmup_steps 20"
TOKENIZER = f"{MODEL} --num_blocks 1 --patch_size 8 --latent_dim 16 --max_lr 3e-3"
DYNAMICS = f"{MODEL} --num_blocks 2 --use_gt_actions --max_lr 2e-3 --no-eval_full_frame"


@pytest.fixture(scope="module")
def coinrun(tmp_path_factory):
    root = tmp_path_factory.mktemp("coinrun") / "data"
    python(
        f"-m jasmine.data.make coinrun --output_dir {root} --num_episodes_train 400 --num_episodes_val 40 "
        "--num_episodes_test 1 --seed 0"
    )
    return root


@pytest.fixture(scope="module")
def vqvae(coinrun, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "vqvae"
    return train(
        "maskgit/train_tokenizer_vqvae", run_dir, coinrun, 400, f"{TOKENIZER} --num_latents 256 --vq_revival 1"
    )


@pytest.fixture(scope="module")
def mae(coinrun, tmp_path_factory):
    return train("diffusion/train_tokenizer_mae", tmp_path_factory.mktemp("runs") / "mae", coinrun, 200, TOKENIZER)


def train(script: str, run_dir: Path, data: Path, steps: int, options: str) -> Path:
    """Trains a baseline, judged on the way ten times on eight batches."""
    places = ["--ckpt_dir", run_dir, "--data_dir", data, "--val_data_dir", data]
    often = f"--num_steps {steps} --val_interval {steps // 10} --val_steps 8 --log_checkpoint_interval {steps}"
    args = [*map(str, places), *shlex.split(options), *often.split()]
    job = jobs.start(args, script=REPO / "jasmine" / "baselines" / f"{script}.py")
    assert job.finish(900) == [0], job.output()
    return run_dir


def python(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=REPO, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def curve(run_dir: Path, name: str) -> list[float]:
    """The values of a validation metric, in order of steps."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record[f"val_{name}"] for record in records if f"val_{name}" in record]


def test_the_vqvae_tokenizer_learns_to_reconstruct(vqvae):
    psnr = curve(vqvae, "psnr")
    assert psnr[-1] > psnr[0] + 2
    assert psnr[-1] > 18
    assert curve(vqvae, "codebook_perplexity")[-1] > 15


def test_the_mae_tokenizer_learns_to_reconstruct(mae):
    psnr = curve(mae, "psnr")
    assert psnr[-1] > psnr[0] + 2
    assert psnr[-1] > 18
    assert curve(mae, "latent_std")[-1] > 0.1
