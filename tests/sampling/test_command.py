"""The sampler commands: from a run to a video that people can look at, and a line where that cannot be."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from PIL import Image

from jasmine.errors import UserError
from jasmine.sampling import command
from jasmine.sampling.world import load_world
from tests import jobs
from tests.data.token_windows import write_source, write_tokens
from tests.jobs import FAMILY

pytestmark = pytest.mark.slow

SAMPLERS = {
    "maskgit": "maskgit/sample_maskgit.py",
    "causal": "maskgit/sample_causal.py",
    "diffusion": "diffusion/sample_diffusion.py",
    "dreamer": "diffusion/sample_diffusion.py",
}
HORIZON = 11  # the runs were trained on windows of 4


def sample_here(name: str, run_dir: Path, *options: str | Path) -> Path:
    """Samples from a run in this process, as `python sample_*.py RUN OPTIONS` does; returns the folder."""
    module = importlib.import_module("jasmine.baselines." + SAMPLERS[name].removesuffix(".py").replace("/", "."))
    command.run(module.Config, FAMILY[name][0], [str(run_dir), *map(str, options)], "")
    return run_dir / "samples" / "6"


def refused(name: str, run_dir: Path, *options: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        sample_here(name, run_dir, *options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def frames_of(folder: Path) -> list[np.ndarray]:
    """The pictures of sample.gif; sample.mp4 has as many, of the same size."""
    with Image.open(folder / "sample.gif") as gif:
        pictures = []
        for index in range(gif.n_frames):
            gif.seek(index)
            pictures.append(np.asarray(gif.convert("RGB")))
    with av.open(str(folder / "sample.mp4")) as mp4:
        shown = [frame.to_ndarray(format="rgb24") for frame in mp4.decode(video=0)]
    assert len(shown) == len(pictures)
    for mine, theirs in zip(shown, pictures, strict=True):
        height, width, _ = theirs.shape
        assert abs(mine.shape[0] - height) <= 1
        assert abs(mine.shape[1] - width) <= 1
    return pictures


@pytest.fixture(params=SAMPLERS)
def run_dir(request, family, tmp_path) -> Path:
    """A run of each dynamics model, to itself."""
    shutil.copytree(family[request.param], tmp_path / request.param)
    return tmp_path / request.param


def test_a_video_longer_than_the_window_with_recorded_actions(run_dir):
    folder = sample_here(
        run_dir.name, run_dir, "--num_frames", str(HORIZON), "--num_clips", "2", "--prompt_frames", "2"
    )
    assert len(frames_of(folder)) == HORIZON
    record = json.loads((folder / "sample.json").read_text())
    assert (record["run"], record["step"]) == (str(run_dir), 6)
    assert record["frames_per_second"] > 0
    assert np.shape(record["actions"]) == (2, HORIZON - 1)
    assert len(record["psnr"]) == len(record["ssim"]) == HORIZON
    assert all(0 < value < 60 for value in record["psnr"])
    assert all(-1 <= value <= 1 for value in record["ssim"])
    for name in ("psnr.png", "ssim.png"):
        assert np.asarray(Image.open(folder / name)).std() > 0


@pytest.fixture
def diffusion(family, tmp_path) -> Path:
    """A run that takes true actions, unknown ones too."""
    shutil.copytree(family["diffusion"], tmp_path / "diffusion")
    return tmp_path / "diffusion"


def test_typed_actions_lead_the_video_and_the_last_goes_on(diffusion):
    options = ["--num_frames", "8", "--num_clips", "2"]
    folder = sample_here("diffusion", diffusion, *options, "--actions", "1x3,2,?")
    record = json.loads((folder / "sample.json").read_text())
    assert record["actions"] == [[1, 1, 1, 2, -1, -1, -1]] * 2
    assert "psnr" not in record  # nobody knows what frames would have followed
    video = frames_of(folder)
    again = frames_of(sample_here("diffusion", diffusion, *options, "--actions", "1x3,2,?"))
    np.testing.assert_array_equal(video, again)


def test_an_action_shows_from_the_frame_that_it_leads_to_on(diffusion):
    world = load_world(str(diffusion), steps=2)
    prompt = np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), dtype=np.uint8)
    actions = np.array([[1, 1, 1, 2, 0, 0, 0, 0]])
    video, other, unknown = (
        np.asarray(world.generate(prompt, np.where(np.arange(8) == 3, action, actions), key=jax.random.key(0)))
        for action in (2, 3, -1)
    )
    for changed in (other, unknown):
        same = np.abs(changed - video).max((0, 2, 3, 4)) == 0
        assert same.tolist() == [True] * 4 + [False] * 4


def test_a_picture_to_start_from_and_random_actions(diffusion, tmp_path):
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "start.png")
    options = ["--start_image", tmp_path / "start.png", "--actions", "random", "--num_frames", "5", "--output_dir"]
    sample_here("diffusion", diffusion, *options, tmp_path / "here")
    assert len(frames_of(tmp_path / "here")) == 5
    actions = json.loads((tmp_path / "here" / "sample.json").read_text())["actions"]
    assert len({tuple(clip) for clip in actions}) > 1
    assert {action for clip in actions for action in clip} <= set(range(4))


def test_the_command_itself(family, tmp_path):
    script = jobs.REPO / "jasmine" / "baselines" / SAMPLERS["diffusion"]

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=300)

    options = ["--num_frames", "5", "--num_clips", "1", "--output_dir", tmp_path / "out"]
    done = run(family["diffusion"], *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "sample.gif")
    assert len(frames_of(tmp_path / "out")) == 5
    wrong = run(tmp_path / "nothing", *options)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith(f"error: RUN={tmp_path / 'nothing'}: there is no such run")
    assert "Traceback" not in wrong.stderr


def test_runs_that_are_not_the_sampler_s(family, diffusion):
    assert "was made by train_tokenizer_vqvae; expected train_dynamics_maskgit" in refused("maskgit", family["vqvae"])
    line = refused("causal", diffusion)
    assert f"{diffusion} was made by train_dynamics_diffusion; this samples train_dynamics_causal" in line
    assert "name the run to sample from first" in refused("causal", Path("--num_frames"))
    assert not (diffusion / "samples").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--actions", "7"], "--actions=7: the model knows actions 0 to 3, not 7"),
        (["--actions", "left"], "'left' is no action; give recorded, random, or a list such as 0,3x5,?"),
        (["--actions", "1,,2"], "'' is no action"),
        (["--actions", "1x"], None),
        (["--prompt_frames", "16"], "--prompt_frames=16 leaves none of --num_frames=16 to make"),
        (["--prompt_frames", "0"], "--prompt_frames=0: must be at least 1"),
        (["--num_frames", "500"], "--num_frames=500 is longer than every episode"),
        (
            ["--num_frames", "500", "--actions", "random", "--prompt_frames", "400"],
            "--prompt_frames=400 is longer than every",
        ),
        (["--start_image", "no-such.png", "--actions", "0"], "--start_image=no-such.png cannot be read"),
        (["--start_image", "x.png"], "--start_image has no recorded actions: give --actions"),
        (["--start_image", "x.png", "--actions", "0", "--prompt_frames", "2"], "--start_image is one frame"),
        (["--data_dir", "no-such-data"], "no-such-data"),
        (["--diffusion_steps", "3"], "3 diffusion steps do not divide the model's 8 levels; these do: [1, 2, 4, 8]"),
        (["--diffusion_steps", "-1"], "--diffusion_steps=-1"),
        (["--diffusion_corrupt_context_factor", "2"], "--diffusion_corrupt_context_factor=2"),
        (["--diffusion_step", "3"], "did you mean --diffusion_steps?"),
    ],
)
def test_options_that_cannot_work(diffusion, options, says):
    if says is None:  # one time, as without the x
        sample_here("diffusion", diffusion, *options, "--num_frames", "3", "--num_clips", "1")
        return
    assert says in refused("diffusion", diffusion, *options)
    assert not (diffusion / "samples").exists()


def test_options_of_the_token_samplers(family):
    for name, option, value in (
        ("maskgit", "--maskgit_steps", "0"),
        ("maskgit", "--temperature", "-1"),
        ("causal", "--temperature", "-1"),
        ("causal", "--top_k", "-1"),
        ("causal", "--top_p", "0"),
    ):
        assert f"{option}={value}" in refused(name, family[name], option, value)


def test_data_to_start_from_that_does_not_fit(family, diffusion, tmp_path):
    tokens = write_tokens(write_source(tmp_path / "source"), tmp_path / "tokens")
    assert "holds tokens, and a video starts from frames" in refused(
        "diffusion", diffusion, "--data_dir", tokens / "train"
    )
    line = refused("diffusion", diffusion, "--data_dir", tmp_path / "source" / "train")
    assert "has frames of (8, 8, 3)" in line
    assert "makes (16, 16, 3)" in line
