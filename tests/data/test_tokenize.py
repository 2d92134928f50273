"""The command that makes token datasets: the same files from any number of processes, after any interruption."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jasmine.data.index import read_index
from jasmine.data.tokenize import Options, load_encoder
from jasmine.data.tokens import open_training_data
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from tests import jobs
from tests.data.test_pipeline import take
from tests.data.token_windows import encoder, write_source, write_tokens

COMMAND = Path("-m")  # by path, the script's folder would hide modules of the standard library


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without(options: list[str], name: str) -> list[str]:
    place = options.index(name)
    return options[:place] + options[place + 2 :]


def unfinish(split: Path) -> None:
    """Makes a split look as if its shards were not put in their place yet."""
    path = split / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False, "shards": []}))


@pytest.fixture(scope="module")
def tokenizer(tiny_data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("tokenizer")
    jobs.run(["--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir), *jobs.TINY, "--num_steps", "5"])
    return run_dir


def arguments(tokenizer, data, target, *more):
    options = ["--tokenizer", tokenizer, "--data", data, "--output_dir", target, "--seq_len", "4", *more]
    return ["jasmine.data.tokenize", *map(str, options)]


@pytest.mark.slow
def test_tokens_are_what_the_tokenizer_makes_of_the_windows(tokenizer, tiny_data, tmp_path):
    job = jobs.run(arguments(tokenizer, tiny_data, tmp_path / "out"), script=COMMAND, devices=2)
    assert "train: 270 of 270 windows" in job.output()
    options = Options(tokenizer=str(tokenizer), seq_len=4, batch_size=8)
    model = load_encoder(options)
    assert model.describe["dtype"] == "uint8"  # 16 codes
    for split in ("train", "val"):
        pixels, tokens = (open_training_data(root, split) for root in (tiny_data, tmp_path / "out"))
        for left, right in zip(take(pixels, 8), take(tokens, 8), strict=True):
            expected = jax.device_get(model.encode(left["videos"])[0])
            assert expected.shape == (8, 4, 4)
            assert np.mean(right["tokens"] == expected) > 0.999  # another batch may round a tie differently
            np.testing.assert_array_equal(right["actions"], left["actions"])


@pytest.mark.slow
def test_latents_and_latent_actions_are_what_the_models_make_of_the_windows(tiny_data, tmp_path):
    baselines = jobs.REPO / "jasmine" / "baselines"
    for name, script in (
        ("mae", baselines / "diffusion" / "train_tokenizer_mae.py"),
        ("lam", baselines / "train_lam.py"),
    ):
        options = ["--data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / name), *jobs.TINY, "--num_steps", "5"]
        if name == "mae":
            options = [*options[:4], *without(options[4:], "--num_latents")]
        jobs.run(options, script=script)
    jobs.run(
        arguments(tmp_path / "mae", tiny_data, tmp_path / "out", "--lam", tmp_path / "lam", "--split", "val"),
        script=COMMAND,
    )
    options = Options(tokenizer=str(tmp_path / "mae"), lam=str(tmp_path / "lam"), seq_len=4, batch_size=8)
    model = load_encoder(options)
    pixels, tokens = (open_training_data(root, "val") for root in (tiny_data, tmp_path / "out"))
    assert tokens.tokens.lam.job == "train_lam"
    for left, right in zip(take(pixels, 8), take(tokens, 8), strict=True):
        latents, actions = jax.device_get(model.encode(left["videos"]))
        assert right["latents"].shape == latents.shape == (8, 4, 4, 8)
        np.testing.assert_allclose(right["latents"], latents, atol=1e-5)
        assert np.mean(right["latent_actions"][:, :-1] == actions) > 0.99
        np.testing.assert_array_equal(right["actions"], left["actions"])


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tokenizer, tiny_data, tmp_path):
    for processes in (1, 3):
        target = tmp_path / str(processes)
        more = ["--windows_per_shard", "32", "--batch_size", "8"]
        jobs.run(arguments(tokenizer, tiny_data, target, *more), script=COMMAND, processes=processes)
    assert len(read_index(tmp_path / "1" / "train").shards) > 3
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    with EpisodeWriter(root / "train", frame_shape=(16, 16, 3), fps=1, encoding="raw") as writer:
        for _ in range(40):
            writer.write(rng.integers(0, 256, (90, 16, 16, 3), np.uint8))
    return root


SMALL_SHARDS = ("--windows_per_shard", "64", "--batch_size", "4")


@pytest.fixture(scope="module")
def uninterrupted(tokenizer, long_data, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "out"
    jobs.run(arguments(tokenizer, long_data, target, *SMALL_SHARDS), script=COMMAND)
    return contents(target)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_command_goes_on(tokenizer, long_data, uninterrupted, tmp_path, how):
    command = arguments(tokenizer, long_data, tmp_path, *SMALL_SHARDS)
    job = jobs.start(command, script=COMMAND)
    parts = tmp_path / "train" / "parts"
    jobs.wait_until((parts / "00002").exists, what="the third shard")
    job.processes[0].send_signal(how)
    assert job.finish() == [75 if how == signal.SIGTERM else -signal.SIGKILL]
    assert not read_index(tmp_path / "train").complete
    with pytest.raises(UserError, match="is unfinished: run the command that makes it again"):
        open_training_data(tmp_path)
    kept = (parts / "00001" / "shard-00000.array_record").stat().st_mtime_ns
    job = jobs.run(command, script=COMMAND)
    assert "going on after" in job.output()
    assert (tmp_path / "train" / "shard-00001.array_record").stat().st_mtime_ns == kept
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("moment", ["while shards move", "before the parts' folder is gone"])
def test_interrupted_while_shards_are_put_in_their_place(tmp_path, monkeypatch, moment):
    source = write_source(tmp_path / "source")
    expected = contents(write_tokens(source, tmp_path / "whole"))
    replace = os.replace

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def interrupt_second(old, new):
        interrupt() if Path(new) == tmp_path / "out" / "train" / "shard-00001.array_record" else replace(old, new)

    with monkeypatch.context() as patch:
        if moment == "while shards move":
            patch.setattr("os.replace", interrupt_second)
        else:
            patch.setattr("shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_tokens(source, tmp_path / "out")
    assert contents(tmp_path / "out") != expected
    unused = dataclasses.replace(encoder(), encode=lambda videos: pytest.fail("a finished shard was made again"))
    assert contents(write_tokens(source, tmp_path / "out", unused)) == expected


def test_a_finished_dataset_is_left_alone(tmp_path):
    source = write_source(write_source(tmp_path / "source"), split="val")
    write_tokens(source, tmp_path / "out", split=("val",))
    assert not (tmp_path / "out" / "train").exists()
    before = contents(tmp_path / "out")
    write_tokens(source, tmp_path / "out")
    assert (tmp_path / "out" / "train").exists()
    assert {name: data for name, data in contents(tmp_path / "out").items() if name.startswith("val")} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("options", "made_by", "message"),
    [
        ({"seq_len": 3}, {}, "seq_len 4, not 3"),
        ({"stride": 2}, {}, "stride 1, not 2"),
        ({"windows_per_shard": 17}, {}, "windows_per_shard 16, not 17"),
        ({}, {"fingerprint": "beef"}, r"tokenizer /runs/train_tokenizer_vqvae \(step 10, f00d\), not .*beef"),
        ({}, {"kind": "latents"}, "kind tokens, not latents"),
        ({}, {"lam": True}, "lam none, not /runs/train_lam"),
    ],
)
def test_an_output_with_other_tokens_is_refused(tmp_path, options, made_by, message, finished):
    source = write_source(tmp_path / "source")
    target = write_tokens(source, tmp_path / "out")
    if not finished:
        unfinish(target / "train")
    before = contents(target)
    with pytest.raises(
        UserError, match=f"{target}/train holds windows with {message}.*: repeat the first command, or choose another"
    ):
        write_tokens(source, target, encoder(**made_by), **options)
    assert contents(target) == before


def test_an_output_with_other_data_is_refused(tmp_path):
    source = write_source(tmp_path / "source")
    before = contents(source)
    with pytest.raises(UserError, match=r"source/train holds other data \(frames\): choose another --output_dir"):
        write_tokens(source, source)
    target = write_tokens(write_source(tmp_path / "changed", (9, 9)), tmp_path / "out")
    with pytest.raises(UserError, match="holds windows with source"):
        write_tokens(source, target)
    assert contents(source) == before


def test_a_run_that_has_moved_goes_on(tmp_path):
    source = write_source(tmp_path / "source")
    expected = contents(write_tokens(source, tmp_path / "out"))
    unfinish(tmp_path / "out" / "train")
    moved = encoder()
    moved.describe["tokenizer"] = dataclasses.replace(moved.describe["tokenizer"], path="/elsewhere")
    assert contents(write_tokens(source, tmp_path / "out", moved)).keys() == expected.keys()
    assert open_training_data(tmp_path / "out").tokens.tokenizer.path == "/runs/train_tokenizer_vqvae"


def test_data_that_cannot_be_encoded_is_refused(tmp_path):
    source = write_source(tmp_path / "source")
    wide = encoder()
    wide.describe["frame_shape"] = (16, 8, 3)
    with pytest.raises(UserError, match=r"frames of \(8, 8, 3\), but the tokenizer was trained on \(16, 8, 3\)"):
        write_tokens(source, tmp_path / "out", wide)
    with pytest.raises(UserError, match="shorter than --seq_len=41: give at most 40"):
        write_tokens(source, tmp_path / "out", seq_len=41)
    with pytest.raises(UserError, match=r"--split vla: .* has train"):
        write_tokens(source, tmp_path / "out", split=("vla",))
    with pytest.raises(UserError, match="no data at"):
        write_tokens(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "--data is not set"),
        ({"stride": 0}, r"--stride=0: give 1 \(every window\) to 16"),
        ({"stride": 17}, "--stride=17: give 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"lam": "b", "seq_len": 1}, "--lam needs windows of two frames"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Options(**{"tokenizer": "a", "data": "b", "output_dir": "c"} | options).check()


@pytest.mark.slow
def test_a_users_mistake_is_one_line(tmp_path):
    source = write_source(tmp_path / "source")
    command = arguments(tmp_path / "nowhere", source, tmp_path / "out")
    job = jobs.run(command, script=COMMAND, expect=2)
    assert (
        job.output() == f"error: --tokenizer={tmp_path}/nowhere: there is no such run (looked for {tmp_path}/nowhere)\n"
    )


def test_shards_hold_whole_episodes(tmp_path):
    source = write_source(tmp_path / "source")
    target = write_tokens(source, tmp_path / "out", windows_per_shard=8)
    assert [shard.lengths for shard in read_index(target / "train").shards] == [(7, 4), (37,), (1, 22)]
