"""`python -m jasmine.evaluate` on runs that were really trained, if briefly."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from jasmine.evaluate import main
from tests import jobs

pytestmark = pytest.mark.slow


def evaluate(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jasmine.evaluate", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=jobs.REPO, timeout=300)


def refused(*args: str | Path) -> str:
    """The line that a user's mistake is answered with."""
    done = evaluate(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def train(script: str, args: str) -> None:
    size = "--model_dim 16 --ffn_dim 32 --num_blocks 1 --num_heads 2 --dtype float32 --seq_len 4 --batch_size 8"
    jobs.run(shlex.split(f"{size} --num_steps 20 {args}"), script=jobs.REPO / "jasmine" / "baselines" / script)


@pytest.fixture(scope="module")
def vqvae(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "vqvae"
    jobs.run([*jobs.TINY, *shlex.split(f"--data_dir {tiny_data} --ckpt_dir {run_dir} --num_steps 20")])
    return run_dir


@pytest.fixture(scope="module")
def evaluated(vqvae: Path, tiny_data: Path) -> Path:
    """The folder of an evaluation with 16 clips."""
    done = evaluate(vqvae, "--data", tiny_data, "--num_clips", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PSNR" in done.stdout
    assert done.stdout.rstrip().endswith("evaluation.html")
    return vqvae / "evaluation" / "20"


def test_a_tokenizer(evaluated: Path, vqvae: Path):
    record = json.loads((evaluated / "evaluation.json").read_text())
    assert (record["job"], record["step"], record["run"]) == ("train_tokenizer_vqvae", 20, str(vqvae))
    assert 5 < record["metrics"]["psnr"] < 40
    assert 0 < record["metrics"]["codebook_usage"] <= 100
    assert record["standard_errors"]["psnr"] > 0
    assert len(record["curves"]["psnr"]) == 4  # the run's --seq_len
    assert record["options"]["horizon"] == 4
    assert "data:image/gif;base64," in (evaluated / "evaluation.html").read_text()


def test_the_same_options_give_the_same_files_again_and_others_are_refused(
    evaluated: Path, vqvae: Path, tiny_data: Path
):
    before = {path.name: path.read_bytes() for path in evaluated.iterdir()}
    assert set(before) == {"evaluation.json", "evaluation.html"}
    (evaluated / "evaluation.html").write_text("torn")
    assert evaluate(vqvae, "--data", tiny_data, "--num_clips", "16").returncode == 0
    assert {path.name: path.read_bytes() for path in evaluated.iterdir()} == before
    line = refused(vqvae, "--data", tiny_data, "--num_clips", "15")
    assert "num_clips 16, not 15" in line
    assert "--output_dir" in line
    assert {path.name: path.read_bytes() for path in evaluated.iterdir()} == before


def test_another_folder(vqvae: Path, tiny_data: Path, tmp_path: Path):
    done = evaluate(
        vqvae, "--data", tiny_data / "train", "--num_clips", "4", "--horizon", "6", "--output_dir", tmp_path / "x/y"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x" / "y" / "evaluation.json").read_text())
    assert len(record["curves"]["psnr"]) == 6


def test_mistakes_are_named_before_anything_is_written(vqvae: Path, tiny_data: Path, tmp_path: Path):
    def mistake(*args: str | Path) -> str:
        with pytest.raises(UserError) as raised:
            main([*map(str, args), "--output_dir", str(tmp_path / "out")])
        return str(raised.value)

    with EpisodeWriter(tmp_path / "wide" / "val", frame_shape=(16, 32, 3), fps=None) as writer:
        writer.write(np.zeros((9, 16, 32, 3), np.uint8))
    assert "name a run first" in mistake("--data", tiny_data)
    assert "no such run" in mistake(tmp_path / "nothing", "--data", tiny_data)
    assert "--data is not set" in mistake(vqvae)
    assert "16×32×3" in mistake(vqvae, "--data", tmp_path / "wide")
    assert "did you mean --num_clips" in mistake(vqvae, "--data", tiny_data, "--num_clip", "4")
    assert "must be at least 2" in mistake(vqvae, "--data", tiny_data, "--num_clips", "1")
    assert "54 different clips of 4 frames" in mistake(vqvae, "--data", tiny_data, "--num_clips", "55")
    assert "give at most 22" in mistake(vqvae, "--data", tiny_data, "--horizon", "40")
    few = ["--num_clips", "8"]
    assert "expected train_tokenizer_mae" in mistake(vqvae, "--data", tiny_data, *few, "--features", vqvae)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def mae(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "mae"
    train(
        "diffusion/train_tokenizer_mae.py", f"--data_dir {tiny_data} --ckpt_dir {run_dir} --patch_size 8 --latent_dim 4"
    )
    return run_dir


@pytest.fixture(scope="module")
def lam(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "lam"
    train("train_lam.py", f"--data_dir {tiny_data} --ckpt_dir {run_dir} --patch_size 8 --latent_dim 4")
    return run_dir


def test_a_latent_action_model(lam: Path, tiny_data: Path):
    assert evaluate(lam, "--data", tiny_data, "--num_clips", "12").returncode == 0
    record = json.loads((lam / "evaluation" / "20" / "evaluation.json").read_text())
    metrics = record["metrics"]
    assert {"psnr", "psnr_copy", "delta_psnr", "delta_psnr_other", "codebook_usage", "action_information"} <= set(
        metrics
    )
    counts = np.array(record["tables"]["actions"]["counts"])
    assert counts.sum() == 12 * 3
    assert len(record["tables"]["actions"]["rows"]) == 6


def test_a_dynamics_model_beyond_its_window(vqvae: Path, lam: Path, mae: Path, tiny_data: Path, tmp_path: Path):
    run_dir = tmp_path / "dynamics"
    train(
        "maskgit/train_dynamics_maskgit.py",
        f"--data_dir {tiny_data} --ckpt_dir {run_dir} --tokenizer_checkpoint {vqvae} --lam_checkpoint {lam} "
        "--maskgit_steps 2",
    )
    options = ["--data", tiny_data, "--num_clips", "6", "--horizon", "10", "--prompt_frames", "2", "--features", mae]
    done = evaluate(run_dir, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((run_dir / "evaluation" / "20" / "evaluation.json").read_text())
    metrics = record["metrics"]
    assert len(record["curves"]["psnr_generated"]) == 10
    assert record["curves"]["delta_psnr"][:2] == [None, None]
    assert metrics["psnr"] < metrics["psnr_reconstruction"]
    assert metrics["frechet_mae"] > 0
    assert "action_information" in metrics
    assert "psnr_gain" in record["standard_errors"]
