"""Every baseline learns CoinRun, in a minute or two each on two cores, by the commands that users type.

One level, which all episodes play, and every fourth frame: a world that is small enough for that, and moves enough for
actions to show (docs/lab-notes.md has what is learned of 400 levels in the same time). Thresholds lie well below what
was measured there.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.jobs import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COMMON = "--model_dim 128 --ffn_dim 512 --num_heads 4 --batch_size 8 --seq_len 8 --val_steps 8"
TOKENIZER = f"{COMMON} --num_blocks 1 --patch_size 16 --latent_dim 32 --max_lr 3e-3"
LAM = f"{COMMON} --num_blocks 2 --patch_size 16 --latent_dim 16 --max_lr 2e-3"
DYNAMICS = f"{COMMON} --num_blocks 2 --use_gt_actions --max_lr 2e-3"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run and its validation metrics, each a list in order of steps."""

    run_dir: Path
    curves: dict[str, list[float]]

    def start(self, metric: str) -> float:
        """After a quarter of the steps."""
        return self.curves[metric][0]

    def end(self, metric: str) -> float:
        return self.curves[metric][-1]


def train(run_dir: Path, data: Path, script: str, options: str, steps: int) -> Trained:
    """Trains a baseline, judged after each quarter of the steps."""
    often = f"--num_steps {steps} --val_interval {steps // 4} --log_checkpoint_interval {steps}"
    places = ["--ckpt_dir", run_dir, "--data_dir", data, "--val_data_dir", data]
    args = [*map(str, places), *shlex.split(f"--dtype float32 --warmup_steps 20 {options} {often}")]
    job = jobs.start(args, script=REPO / "jasmine" / "baselines" / f"{script}.py", env={"XLA_FLAGS": ""})
    assert job.finish(900) == [0], job.output()
    records = list(map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()))
    judged = [record for record in records if "val_loss" in record]
    names = [name.removeprefix("val_") for name in judged[0] if name.startswith("val_")]
    return Trained(run_dir, {name: [record[f"val_{name}"] for record in judged] for name in names})


@pytest.fixture(scope="module")
def coinrun(tmp_path_factory):
    root = tmp_path_factory.mktemp("coinrun") / "data"
    episodes = "--num_levels 1 --frame_skip 4 --num_episodes_train 600 --num_episodes_val 60 --num_episodes_test 1"
    command = [sys.executable, "-m", "jasmine.data.make", "coinrun", "--output_dir", str(root), *episodes.split()]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope="module")
def vqvae(coinrun, tmp_path_factory):
    options = f"{TOKENIZER} --num_latents 512 --vq_revival 1"
    return train(tmp_path_factory.mktemp("vqvae") / "run", coinrun, "maskgit/train_tokenizer_vqvae", options, 400)


@pytest.fixture(scope="module")
def mae(coinrun, tmp_path_factory):
    return train(tmp_path_factory.mktemp("mae") / "run", coinrun, "diffusion/train_tokenizer_mae", TOKENIZER, 400)


@pytest.mark.parametrize("kind", ["vqvae", "mae"])
def test_tokenizers_learn_to_reconstruct(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.end("psnr") > tokenizer.start("psnr") + 1
    assert tokenizer.end("psnr") > 20


def test_the_latent_action_model_finds_actions(coinrun, tmp_path):
    lam = train(tmp_path / "run", coinrun, "train_lam", f"{LAM} --num_latents 6", 300)
    assert lam.end("delta_psnr") > 0.4
    assert lam.end("psnr") > lam.end("psnr_copy") + 1
    assert lam.end("codebook_perplexity") > 1.5  # it has not fallen to one action


@pytest.mark.parametrize(
    ("script", "tokenizer", "options"),
    [
        ("maskgit/train_dynamics_maskgit", "vqvae", "--maskgit_steps 8 --temperature 0"),
        ("maskgit/train_dynamics_causal", "vqvae", "--temperature 0"),
        ("diffusion/train_dynamics_diffusion", "mae", "--diffusion_denoise_steps 8"),
        ("diffusion/train_dynamics_diffusion", "mae", "--diffusion_denoise_steps 8 --shortcut"),
    ],
    ids=["maskgit", "causal", "diffusion", "shortcut"],
)
def test_dynamics_learn_to_move_as_they_are_told(script, tokenizer, options, coinrun, tmp_path, request):
    frozen = request.getfixturevalue(tokenizer).run_dir
    world = train(tmp_path / "run", coinrun, script, f"{DYNAMICS} --tokenizer_checkpoint {frozen} {options}", 280)
    assert world.end("loss") < 0.9 * world.start("loss")
    assert world.end("psnr") > world.end("psnr_copy") + 0.3
    assert world.end("delta_psnr") > 0.1
