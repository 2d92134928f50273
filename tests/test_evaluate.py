"""`python -m jasmine.evaluate` on runs that were really trained, if briefly."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jasmine.data.episodes import EpisodeWriter
from tests import jobs

pytestmark = pytest.mark.slow


def evaluate(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jasmine.evaluate", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=jobs.REPO, timeout=300)


def refused(*args: str | Path) -> str:
    """The one line that a user's mistake is answered with."""
    done = evaluate(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


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


def test_mistakes_are_answered_with_a_line(vqvae: Path, tiny_data: Path, tmp_path: Path):
    assert "--data is not set" in refused(vqvae)
    assert "no such run" in refused(tmp_path / "nothing", "--data", tiny_data)
    assert "did you mean --num_clips" in refused(vqvae, "--data", tiny_data, "--num_clip", "4")
    assert "give at most 22" in refused(vqvae, "--data", tiny_data, "--horizon", "40")
    assert "different clips of 4 frames" in refused(vqvae, "--data", tiny_data, "--num_clips", "1000")
    assert "must be at least 2" in refused(vqvae, "--data", tiny_data, "--num_clips", "1")
    assert "expected train_tokenizer_mae" in refused(vqvae, "--data", tiny_data, "--features", vqvae)
    with EpisodeWriter(tmp_path / "wide" / "val", frame_shape=(16, 32, 3), fps=None) as writer:
        writer.write(np.zeros((9, 16, 32, 3), np.uint8))
    assert "16×32×3" in refused(vqvae, "--data", tmp_path / "wide")
    assert "name a run first" in refused("--data", tiny_data)
    assert not (vqvae / "evaluation" / "nothing").exists()
