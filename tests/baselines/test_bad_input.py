"""A user's mistake costs one line and an exit code, and harms nothing."""

import fcntl
import importlib
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from jasmine.data.tokenize import Options, load_encoder, tokenize
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from jasmine.training import cli
from jasmine.training.runs import baseline_modules
from tests import jobs
from tests.jobs import FAMILY, TINY

pytestmark = pytest.mark.slow  # each starts a process that imports jax


def refused(args, run_dir=None, **options) -> str:
    """The one error line of a job that is refused; nothing may have been made in `run_dir`."""
    before = sorted(run_dir.rglob("*")) if run_dir and run_dir.exists() else None
    job = jobs.run(args, expect=2, **options)
    assert "Traceback" not in job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error:")]
    if run_dir is not None:
        assert (sorted(run_dir.rglob("*")) if run_dir.exists() else None) == before
    return line


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--batch_size", "6", "--mesh.data", "4"], "nearest that does: 4 or 8"),
        (["--patch_size", "5"], "--patch_size=5 does not divide the 16×16 frames; these do: 2, 4, 8, 16"),
        (["--seq_len", "40"], "longer than every episode"),
        (["--num_heads", "3"], "--model_dim=16 is not a multiple of --num_heads=3"),
        (["--batchsize", "8"], "unknown option --batchsize; did you mean --batch_size?"),
        (["--stop_at_step", "50"], "--stop_at_step=50 is not between 0 and the end, --num_steps=40"),
        (["--mesh.fsdp", "3"], "3 does not divide the 4 devices"),
        (["--profile_steps", "9"], "expected a:b with a < b"),
        (["--lr_schedule", "cos", "--warmup_steps", "40"], "leaves none of --num_steps=40 for the cosine"),
        (["--log_interval", "0"], "--log_interval=0: must be at least 1"),
        (["--batch_size", "abc"], "--batch_size=abc: expected a whole number"),
        (["--keep_best", "2"], "--keep_best=2 goes by --best_metric=val_loss, but --val_data_dir is not set"),
        (["--save_every_minutes", "-1"], "--save_every_minutes=-1.0: must be 0 (none) or more"),
        (["--max_rollbacks", "0"], "--max_rollbacks=0: must be at least 1"),
        (["--replay_step", "41"], "--replay_step=41 is not a step of the run: from 1 to --num_steps=40"),
        (["--replay_step", "4", "--no-restore_ckpt"], "which --no-restore_ckpt forbids"),
        (["--replay_step", "4"], "is not the directory of a run that has trained"),
    ],
)
def test_options_that_cannot_work(tiny_data, tmp_path, extra, says):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir), *extra]
    assert says in refused(args, run_dir, devices=4)
    assert not run_dir.exists()


def test_data_that_is_missing_empty_or_corrupt(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    missing = tmp_path / "no-such-data"
    line = refused([*TINY, "--data_dir", str(missing), "--ckpt_dir", str(run_dir)], run_dir)
    assert line.startswith(f"error: --data_dir: no data at {missing} (no such folder)")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused([*TINY, "--data_dir", str(empty), "--ckpt_dir", str(run_dir)], run_dir)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data, broken)
    (shard,) = (broken / "train").glob("*.array_record")
    content = bytearray(shard.read_bytes())
    for place in range(len(content) // 4, len(content), 97):
        content[place] ^= 0xFF
    shard.chmod(shard.stat().st_mode | stat.S_IWUSR)
    shard.write_bytes(content)
    line = refused([*TINY, "--data_dir", str(broken), "--ckpt_dir", str(run_dir)])
    assert shard.name in line
    assert "record" in line


def test_data_and_folder_must_be_named(tiny_data):
    assert "--data_dir is not set" in refused(TINY)
    assert "--ckpt_dir is not set" in refused([*TINY, "--data_dir", str(tiny_data)])


def test_folder_that_cannot_be_written(tiny_data, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    line = refused([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(blocked / "run")])
    assert f"cannot write to the run directory {blocked / 'run'}" in line
    assert blocked.read_text() == "a file, not a folder"


def test_resume_with_another_model_names_the_parameter_and_both_shapes(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir), "--stop_at_step", "10"]
    jobs.run(args)
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    line = refused([*args, "--stop_at_step", "20", "--ffn_dim", "64"])
    assert (
        "params.decoder.blocks.ffn.linear_in.kernel has shape (1, 16, 32) in the checkpoint, shape (1, 16, 64)" in line
    )
    assert "--ffn_dim is 64 but was 32" in line
    assert "--no-restore_ckpt would train over them" in refused([*args, "--no-restore_ckpt"])
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert jobs.checkpoints(run_dir) == [10]
    changed = jobs.run([*args, "--stop_at_step", "11", "--seed", "5"])
    assert "warning: --seed is 5 but was 0" in changed.output()


def test_folder_in_which_another_job_trains(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".training.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused([*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)], run_dir)
    assert f"another job is training in {run_dir}" in line


def test_incomplete_rendezvous_is_named(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    env = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2"}
    assert "JAX_PROCESS_ID not set" in refused(args, env=env)


def test_coordinator_that_does_not_answer_is_a_failure_worth_a_retry(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{jobs.free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    job = jobs.run(args, env={**env, "JASMINE_INIT_TIMEOUT": "3", "PATH": os.environ["PATH"]}, expect=1)
    assert "could not join the job" in job.output()
    assert "Traceback" not in job.output()


# --- runs that build on others ----------------------------------------------------------------------------------
# What the entry point makes of a UserError is tested above and once below; these are raised in this process.


def refused_here(family, name: str, run_dir: Path, *more: str) -> str:
    """The message that a run like `family[name]`, but for some options, is refused with. It may make nothing."""
    args = family.args(name, run_dir, *map(str, more))
    module = importlib.import_module(baseline_modules()[FAMILY[name][0]])
    with pytest.raises(UserError) as caught:
        module.main(cli.parse(module.Config, args))
    assert not run_dir.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def wide(tmp_path) -> Path:
    """Data of frames that no run was trained on."""
    with EpisodeWriter(tmp_path / "wide" / "train", frame_shape=(16, 32, 3), fps=None, num_actions=4) as writer:
        writer.write(np.zeros((30, 16, 32, 3), np.uint8), np.zeros(30, np.int32))
    return tmp_path / "wide"


def test_a_tokenizer_that_cannot_be_had(family, tmp_path, monkeypatch):
    run_dir, empty, begun = tmp_path / "run", tmp_path / "empty", tmp_path / "begun"
    monkeypatch.chdir(tmp_path)
    empty.mkdir()
    begun.mkdir()
    shutil.copy(family["vqvae"] / "config.json", begun)
    args = [*jobs.SMALL, "--data_dir", str(family.data), "--ckpt_dir", str(run_dir)]
    line = refused(args, run_dir, script=jobs.BASELINES["train_dynamics_maskgit"])
    assert line == ("error: --tokenizer_checkpoint is not set: name a run directory, or a run under the storage root")
    for option, says in (
        ("no-such-run", "--tokenizer_checkpoint=no-such-run: there is no such run (looked for "),
        (tmp_path / "nothing", f"there is no such run (looked for {tmp_path / 'nothing'})"),
        (empty, f"{empty} has no config.json, so it is not the directory of a run that has trained"),
        (begun, f"{begun / 'checkpoints'} holds no finished checkpoint"),
        (family["mae"], "was made by train_tokenizer_mae; expected train_tokenizer_vqvae"),
        (family["lam"], "was made by train_lam; expected train_tokenizer_vqvae"),
    ):
        assert says in refused_here(family, "maskgit", run_dir, "--tokenizer_checkpoint", option)
    says = "was made by train_tokenizer_vqvae; expected train_tokenizer_mae"
    assert says in refused_here(family, "diffusion", run_dir, "--tokenizer_checkpoint", family["vqvae"])
    says = f"--lam_checkpoint={family['vqvae']} was made by train_tokenizer_vqvae; expected train_lam"
    assert says in refused_here(family, "causal", run_dir, "--lam_checkpoint", family["vqvae"])


def test_a_config_that_is_damaged(family, tmp_path):
    run_dir, damaged = tmp_path / "run", tmp_path / "damaged"
    shutil.copytree(family["vqvae"], damaged)
    (damaged / "config.json").write_text('{"job": "train_tok')
    line = refused_here(family, "maskgit", run_dir, "--tokenizer_checkpoint", damaged)
    assert f"{damaged / 'config.json'} is damaged or of an old version" in line


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("maskgit", "--patch_size 4", "--patch_size=4, but the tokenizer {vqvae} has patches of 8; leave the option out"),
        ("maskgit", "--lam_patch_size 5", "--lam_patch_size=5 does not divide the 16×16 frames; these do: 2, 4, 8, 16"),
        ("maskgit", "--lam_num_heads 3", "--lam_dim=16 is not a multiple of --lam_num_heads=3"),
        ("maskgit", "--label_fraction 0.5", "--label_fraction is about true actions: give --use_gt_actions too"),
        ("maskgit", "--mask_limit 1", "--mask_limit=1.0: a chance from 0 up to, not including, 1"),
        ("maskgit", "--seq_len 1", "--seq_len=1: dynamics lie between two frames; give at least 2"),
        ("causal", "--use_gt_actions", "--use_gt_actions and --lam_checkpoint exclude each other"),
        ("causal", "--num_blocks 3 --time_every 2", "--num_blocks=3 is not a multiple of --time_every=2"),
        ("causal", "--num_heads 4 --num_kv_heads 3", "--num_kv_heads=3 does not divide --num_heads=4"),
        ("causal", "--positions rope --num_heads 16", "rotary positions need heads of an even size"),
        ("diffusion", "--label_fraction 0", "--label_fraction=0.0: a share above 0, up to 1"),
        ("diffusion", "--num_actions 3", "--num_actions=3, but the data has actions up to 3"),
        ("diffusion", "--diffusion_denoise_steps 1", "--diffusion_denoise_steps=1: must be at least 2"),
        ("dreamer", "--diffusion_denoise_steps 12", "--diffusion_denoise_steps=12: a power of two with --shortcut"),
        ("dreamer", "--shortcut_every 9", "--shortcut_every=9: from 2 to the batch"),
        ("lam", "--seq_len 1", "--seq_len=1: an action lies between two frames; give at least 2"),
        ("mae", "--max_mask_ratio 1.5", "--max_mask_ratio=1.5: a share from 0 to 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_together(family, tmp_path, name, more, says):
    line = refused_here(family, name, tmp_path / "run", *more.split())
    assert says.format(vqvae=family["vqvae"]) in line


def test_data_that_the_frozen_parts_were_not_trained_on(family, wide, tmp_path):
    line = refused_here(family, "causal", tmp_path / "run", "--data_dir", wide)
    assert line == (
        f"--tokenizer_checkpoint={family['vqvae']}: it was trained on frames of 16×16×3, and --data_dir has 16×32×3"
    )


def test_true_actions_that_are_not_there(family, tmp_path):
    with EpisodeWriter(tmp_path / "silent" / "train", frame_shape=(16, 16, 3), fps=None) as writer:
        writer.write(np.zeros((30, 16, 16, 3), np.uint8))
    for more in ([], ["--num_actions", "4"]):
        line = refused_here(family, "diffusion", tmp_path / "run", "--data_dir", tmp_path / "silent", *more)
        assert "--use_gt_actions: --data_dir has no actions" in line


def test_tokens_where_frames_or_other_tokens_are_needed(family, tmp_path):
    tokens, run_dir, other = tmp_path / "tokens", tmp_path / "run", tmp_path / "other"
    options = Options(tokenizer=str(family["vqvae"]), data=str(family.data), output_dir=str(tokens), seq_len=4)
    tokenize(options, load_encoder(options))
    for name in ("vqvae", "mae", "lam"):
        line = refused_here(family, name, run_dir, "--data_dir", tokens)
        assert line.endswith("trains on frames; name the dataset they were made from")
    shutil.copytree(family["vqvae"], other)
    shutil.rmtree(other / "checkpoints" / "6")  # leaves step 4: the same shape, other weights
    for name, more, says in (
        ("maskgit", [], "a latent action model that is trained along needs frames"),
        ("causal", [], "--lam_checkpoint: the tokens in --data_dir were made without --lam; tokenize them with it"),
        ("causal", ["--seq_len", "3"], "holds the tokens of windows of 4 frames; train with --seq_len=4"),
        (
            "maskgit",
            ["--tokenizer_checkpoint", other, "--use_gt_actions"],
            (
                f"--tokenizer_checkpoint={other} (step 4) is not what made the tokens in --data_dir: that was step 6 of "
                f"{family['vqvae']}"
            ),
        ),
    ):
        assert says in refused_here(family, name, run_dir, "--data_dir", tokens, *more)
