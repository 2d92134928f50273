"""Converting the published format: nothing is lost, an interruption is made good, nothing finished is overwritten."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from jasmine.data.convert import Config, convert
from jasmine.data.episodes import EpisodeDataset
from jasmine.data.opening import open_dataset
from jasmine.data.published import PublishedDataset
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from tests.data.test_published import make_record, write_file, write_split


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jasmine.data.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_converts_every_split_exactly(tmp_path):
    episodes = {split: write_split(tmp_path / "src" / split) for split in ("train", "val")}
    done = run(tmp_path / "src", tmp_path / "dst")
    assert (done.returncode, done.stderr) == (0, "")
    for split in ("train", "val"):
        dataset = open_dataset(tmp_path / "dst", split)
        assert isinstance(dataset, EpisodeDataset)
        assert dataset.lengths.tolist() == [20, 31, 16]
        for k, (frames, actions) in enumerate(episodes[split]):
            np.testing.assert_array_equal(dataset.read_episode(k)[0], frames)
            np.testing.assert_array_equal(dataset.read_episode(k)[1], actions)
    before = {path: path.read_bytes() for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    again = run(tmp_path / "src", tmp_path / "dst")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {tmp_path}/dst is converted already: choose another folder, or delete it first\n"
    assert {path: path.read_bytes() for path in (tmp_path / "dst").rglob("*") if path.is_file()} == before


def test_options_of_the_command(tmp_path):
    frames, record = make_record(20, shape=(48, 80, 3))
    write_file(tmp_path / "src" / "a.array_record", [record, make_record(0, shape=(48, 80, 3))[1]])
    shape = ["--image_height", "48", "--image_width", "80"]
    done = run(tmp_path / "src", tmp_path / "dst", *shape, "--encoding", "webp-lossless", "--fps", "20")
    assert (done.returncode, done.stderr) == (0, "")
    dataset = open_dataset(tmp_path / "dst")
    assert (dataset.fps, dataset.num_actions, dataset.index.encoding) == (20.0, None, "webp-lossless")
    assert dataset.lengths.tolist() == [20]  # the record without frames is no episode
    np.testing.assert_array_equal(dataset.read_episode(0)[0], frames)


def test_goes_on_after_the_last_finished_shard(tmp_path, monkeypatch):
    write_split(tmp_path / "src", lengths=((16,) * 5,))
    config = Config(str(tmp_path / "src"), str(tmp_path / "dst"))
    monkeypatch.setitem(EpisodeWriter.__init__.__kwdefaults__, "episodes_per_shard", 2)
    read, asked = PublishedDataset.read_episode, []

    def interrupted(self, episode):
        asked.append(episode)
        if asked == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return read(self, episode)

    monkeypatch.setattr(PublishedDataset, "read_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(config)
    asked.append("again")
    convert(config)
    assert asked[:7] == [0, 1, 2, 3, 4, "again", 4]
    assert open_dataset(tmp_path / "dst").lengths.tolist() == [16] * 5


def test_a_copy_that_differs_is_noticed(tmp_path, monkeypatch):
    write_split(tmp_path / "src")
    write = EpisodeWriter.write
    monkeypatch.setattr(EpisodeWriter, "write", lambda self, frames, actions: write(self, frames ^ 1, actions))
    with pytest.raises(UserError, match=r"differs from .*src in episode 0"):
        convert(Config(str(tmp_path / "src"), str(tmp_path / "dst")))


def test_bad_input_is_one_line_and_creates_nothing(tmp_path):
    write_split(tmp_path / "good")
    _, record = make_record()
    write_file(tmp_path / "bad" / "a.array_record", [record, b"garbage"])
    with EpisodeWriter(tmp_path / "ours", frame_shape=(64, 64, 3), fps=1) as writer:
        writer.write(make_record()[0])
    shutil.copytree(tmp_path / "ours", tmp_path / "dataset" / "train")
    cases = [
        (("missing",), "no *.array_record files in"),
        (("bad",), "a.array_record: record 1 cannot be read"),
        (("ours",), "ours is in Jasmine's format already"),
        (("dataset",), "dataset/train is in Jasmine's format already"),
        (("good", "--image_height", "64"), "give both --image_height and --image_width"),
        (("good", "--image_height", "32", "--image_width", "32"), "12288 bytes, not those of (32, 32, 3)"),
        (("good", "--encoding", "png", "--quality", "3"), "png is lossless"),
    ]
    for (source, *options), message in cases:
        done = run(tmp_path / source, tmp_path / "dst", *options)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "dst").exists()
