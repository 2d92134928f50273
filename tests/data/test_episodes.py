"""The episode format: what is written is what is read, from any window, after any interruption, or an error says why."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jasmine.data import records
from jasmine.data.episodes import EpisodeDataset
from jasmine.data.index import LOSSLESS, LOSSY, read_index
from jasmine.data.opening import open_dataset
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError

SHAPE = (24, 32, 3)
LENGTHS = (5, 8, 33, 160, 1)


def make_episodes(lengths=LENGTHS, shape=SHAPE, seed=0):
    """Smooth moving frames, so that lossy codecs can do well, and actions."""
    rng = np.random.default_rng(seed)
    y, x, c = np.meshgrid(*map(np.arange, shape), indexing="ij")
    result = []
    for length in lengths:
        phase = rng.uniform(0, 6)
        frames = [127 + 120 * np.sin(phase + (x + t) / 9 + y / 7 + c) for t in range(length)]
        result.append((np.stack(frames).astype(np.uint8), rng.integers(0, 15, length)))
    return result


def write(split_dir, episodes, **options):
    options = {"frame_shape": SHAPE, "fps": 15, "num_actions": 15, "encoding": "raw", **options}
    with EpisodeWriter(split_dir, **options) as writer:
        for frames, actions in episodes:
            writer.write(frames, actions)


@pytest.mark.parametrize("encoding", LOSSLESS)
def test_lossless_encodings_return_every_window_exactly(tmp_path, encoding):
    episodes = make_episodes()
    write(tmp_path / "train", episodes, encoding=encoding, episodes_per_shard=2)
    dataset = open_dataset(tmp_path)
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert (dataset.frame_shape, dataset.fps, dataset.num_actions) == (SHAPE, 15.0, 15)
    assert dataset.num_frames == sum(LENGTHS)
    assert len(dataset.index.shards) == 3
    for k, (frames, actions) in enumerate(episodes):
        read_frames, read_actions = dataset.read_episode(k)
        np.testing.assert_array_equal(read_frames, frames)
        np.testing.assert_array_equal(read_actions, actions)
        assert (read_frames.dtype, read_actions.dtype) == (np.uint8, np.int32)
    starts = np.arange(LENGTHS[2] - 16 + 1)
    windows, window_actions = dataset.read_windows(np.full(len(starts), 2), starts, 16)
    for start in starts:
        np.testing.assert_array_equal(windows[start], episodes[2][0][start : start + 16])
        np.testing.assert_array_equal(window_actions[start], episodes[2][1][start : start + 16])


@pytest.mark.parametrize("encoding", LOSSY)
def test_lossy_encodings_are_close_and_keep_actions(tmp_path, encoding):
    episodes = make_episodes()
    write(tmp_path, episodes, encoding=encoding)
    dataset = open_dataset(tmp_path)
    frames, actions = dataset.read_window(3, 77, 16)
    error = np.mean((frames.astype(float) - episodes[3][0][77:93]) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    np.testing.assert_array_equal(actions, episodes[3][1][77:93])


@pytest.mark.parametrize("encoding", LOSSLESS)
def test_grey_frames(tmp_path, encoding):
    episodes = make_episodes(lengths=(20,), shape=(16, 16, 1))
    write(tmp_path, episodes, frame_shape=(16, 16, 1), encoding=encoding)
    np.testing.assert_array_equal(open_dataset(tmp_path).read_episode(0)[0], episodes[0][0])


def test_without_actions_and_with_vector_actions(tmp_path):
    frames = make_episodes(lengths=(20,))[0][0]
    write(tmp_path / "none", [(frames, None)], num_actions=None)
    assert open_dataset(tmp_path / "none").read_window(0, 2, 9)[1] is None
    vectors = np.arange(40).reshape(20, 2) % 7
    write(tmp_path / "vector", [(frames, vectors)], num_actions=7, action_shape=(2,))
    np.testing.assert_array_equal(open_dataset(tmp_path / "vector").read_window(0, 2, 9)[1], vectors[2:11])


def test_a_window_reads_only_the_records_that_hold_it(tmp_path, monkeypatch):
    write(tmp_path, make_episodes(lengths=(160, 160)))
    dataset = EpisodeDataset(tmp_path)
    reads = []
    read = records.ShardReaders.read
    monkeypatch.setattr(records.ShardReaders, "read", lambda self, *args: reads.append(args) or read(self, *args))
    dataset.read_window(1, 20, 16)
    assert reads == [(0, 22, 3)]  # frames 16 to 40 of the second episode
    assert dataset.locate(1, 20).record == 22


def test_windows_outside_an_episode_are_refused(tmp_path):
    write(tmp_path, make_episodes())
    dataset = open_dataset(tmp_path)
    for start in (-1, LENGTHS[2] - 15):
        with pytest.raises(IndexError):
            dataset.read_window(2, start, 16)


def test_slow_storage_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SLOW_SECONDS", -1.0)
    episodes = make_episodes()
    write(tmp_path, episodes)
    np.testing.assert_array_equal(open_dataset(tmp_path).read_window(3, 5, 30)[0], episodes[3][0][5:35])
    flip_bytes(tmp_path / "shard-00000.array_record", 200_000)
    with pytest.raises(UserError, match=r"shard-00000.array_record: record \d+ is corrupt"):
        [open_dataset(tmp_path).read_episode(k) for k in range(5)]


def test_many_shards_with_few_open_files(tmp_path):
    episodes = make_episodes(lengths=(9,) * 12)
    write(tmp_path, episodes, episodes_per_shard=1)
    dataset = pickle.loads(pickle.dumps(open_dataset(tmp_path)))
    dataset._readers._max_idle = 3
    for k in [*range(12), *range(12)]:
        np.testing.assert_array_equal(dataset.read_episode(k)[0], episodes[k][0])
    assert dataset._readers._num_idle == 3 == sum(map(len, dataset._readers._idle.values()))


def test_what_the_writer_refuses(tmp_path):
    frames, actions = make_episodes(lengths=(10,))[0]
    with EpisodeWriter(tmp_path, frame_shape=SHAPE, fps=15, num_actions=15) as writer:
        for bad in [
            (frames.astype(np.float32), actions),
            (frames[:, :-1], actions),
            (frames[:0], actions[:0]),
            (frames, None),
            (frames, actions[:-1]),
            (frames, actions.astype(float)),
            (frames, actions + 15),
        ]:
            with pytest.raises(ValueError, match=r"frames|actions"):
                writer.write(*bad)
        writer.write(frames, actions)
    assert open_dataset(tmp_path).lengths.tolist() == [10]


WRITE_AS_TOLD = """
import sys
import numpy as np
from jasmine.data.writer import EpisodeWriter
with EpisodeWriter(sys.argv[1], frame_shape=(8, 8, 3), fps=1, episodes_per_shard=3) as writer:
    print(writer.num_episodes, flush=True)
    for line in sys.stdin:
        writer.write(np.full((20, 8, 8, 3), int(line), np.uint8))
        print(line, end="", flush=True)
"""


def test_killed_writer_is_resumed_after_the_last_finished_shard(tmp_path):
    split = tmp_path / "train"
    command = [sys.executable, "-c", WRITE_AS_TOLD, str(split)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(f"{k}\n" for k in range(8)))
        process.stdin.flush()
        while process.stdout.readline() != "7\n":
            pass
        process.kill()
    assert list(split.glob("*.tmp"))
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(tmp_path)
    assert len(EpisodeDataset(split, allow_unfinished=True).lengths) == 6

    told = "".join(f"{k}\n" for k in range(6, 10))
    out = subprocess.run(command, input=told, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert out[0] == "6"
    dataset = open_dataset(tmp_path)
    assert [int(dataset.read_episode(k)[0].max()) for k in range(len(dataset.lengths))] == list(range(10))
    assert not list(split.glob("*.tmp"))


def test_an_exception_leaves_only_finished_shards(tmp_path):
    episodes = make_episodes(lengths=(10,) * 5)
    options = {"frame_shape": SHAPE, "fps": 15, "num_actions": 15, "episodes_per_shard": 2}

    def interrupted():
        with EpisodeWriter(tmp_path, **options) as writer:
            for episode in episodes:
                writer.write(*episode)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(os.listdir(tmp_path)) == ["index.json", "shard-00000.array_record", "shard-00001.array_record"]
    with EpisodeWriter(tmp_path, **options) as writer:
        assert writer.num_episodes == 4
        writer.write(*episodes[4])
        assert writer.num_episodes == 5
    np.testing.assert_array_equal(open_dataset(tmp_path).read_episode(4)[0], episodes[4][0])


def test_resuming_with_other_settings_names_the_setting(tmp_path):
    options = {"frame_shape": SHAPE, "fps": 15, "metadata": {"seed": 1}}
    with pytest.raises(KeyboardInterrupt), EpisodeWriter(tmp_path, **options):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"begun with metadata \{'seed': 1\}, not \{'seed': 2\}"):
        EpisodeWriter(tmp_path, **{**options, "metadata": {"seed": 2}})
    with EpisodeWriter(tmp_path, **options) as writer:
        with pytest.raises(UserError, match="being written by another process"):
            EpisodeWriter(tmp_path, **options)
        writer.write(make_episodes(lengths=(3,))[0][0])
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(UserError, match="finished split"):
        EpisodeWriter(tmp_path, **options)
    assert (tmp_path / "index.json").read_bytes() == before


def test_full_disk_keeps_finished_shards(tmp_path):
    """A file size limit stands in for a full disk: both fail the write."""
    script = """
import resource, signal, sys
import numpy as np
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with EpisodeWriter(sys.argv[1], frame_shape=(64, 64, 3), fps=1, encoding="raw", episodes_per_shard=1) as writer:
        writer.write(np.zeros((10, 64, 64, 3), np.uint8))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        writer.write(np.zeros((500, 64, 64, 3), np.uint8))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert "1 finished shards are kept" in done.stdout
    assert EpisodeDataset(tmp_path, allow_unfinished=True).lengths.tolist() == [10]
    assert not list(tmp_path.glob("*.tmp"))


def flip_bytes(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 64] = bytes(byte ^ 0xFF for byte in data[at : at + 64])
    path.write_bytes(data)


@pytest.mark.parametrize("encoding", ["raw", "zstd", "png"])
def test_a_flipped_byte_names_file_and_record_and_spares_the_others(tmp_path, encoding):
    rng = np.random.default_rng(0)
    noise = [(rng.integers(0, 256, (40, *SHAPE), np.uint8), rng.integers(0, 15, 40)) for _ in range(6)]
    write(tmp_path, noise, encoding=encoding)
    path = tmp_path / "shard-00000.array_record"
    flip_bytes(path, path.stat().st_size // 2)
    dataset = open_dataset(tmp_path)
    failed = []
    for k in range(6):
        try:
            np.testing.assert_array_equal(dataset.read_episode(k)[0], noise[k][0])
        except UserError as error:
            failed.append(str(error))
    assert len(failed) in (1, 2)
    assert all(str(path) in message and "record " in message and "\n" not in message for message in failed)


def damage_missing(split: Path) -> str:
    (split / "shard-00001.array_record").unlink()
    return "shard-00001.array_record.*cannot be read"


def damage_truncated(split: Path) -> str:
    path = split / "shard-00001.array_record"
    path.write_bytes(path.read_bytes()[:-1000])
    return "shard-00001.array_record is corrupt.*bytes where the index says"


def damage_zeroed(split: Path) -> str:
    path = split / "shard-00001.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    return "shard-00001.array_record is corrupt.*not a whole ArrayRecord file"


def damage_index_lengths(split: Path) -> str:
    index = json.loads((split / "index.json").read_text())
    index["shards"][0]["lengths"][0] = 7
    (split / "index.json").write_text(json.dumps(index))
    return "shard-00000.array_record: record 0 is corrupt.*bytes, not"


def damage_index_json(split: Path) -> str:
    (split / "index.json").write_text('{"frame_shape": [24')
    return "index.json is not a valid index"


def damage_index_key(split: Path) -> str:
    index = json.loads((split / "index.json").read_text())
    index["frames_per_record"] = "many"
    (split / "index.json").write_text(json.dumps(index))
    return "index.json is not a valid index .frames_per_record: "


def damage_index_version(split: Path) -> str:
    index = json.loads((split / "index.json").read_text())
    index["version"] = 99
    (split / "index.json").write_text(json.dumps(index))
    return "index.json is not a valid index .version: "


def damage_no_episodes(split: Path) -> str:
    index = json.loads((split / "index.json").read_text())
    index["shards"] = []
    (split / "index.json").write_text(json.dumps(index))
    return "holds no episodes"


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_damaged_data_is_one_clear_line(tmp_path, damage):
    write(tmp_path, make_episodes(), episodes_per_shard=2)
    message = damage(tmp_path)

    def read_all():
        dataset = open_dataset(tmp_path)
        for k in range(len(dataset.lengths)):
            dataset.read_episode(k)

    with pytest.raises(UserError, match=message) as caught:
        read_all()
    assert "\n" not in str(caught.value)


def test_what_is_not_there_comes_with_a_hint(tmp_path):
    write(tmp_path / "coinrun" / "train", make_episodes(lengths=(3,)))
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "coinrum", "train", f"did you mean {tmp_path}/coinrun"),
        (tmp_path / "empty", "train", "neither index.json nor"),
        (tmp_path / "coinrun", "val", "no split val in .*: it has train"),
        (tmp_path, "train", f"did you mean {tmp_path}/coinrun"),
        (tmp_path / "coinrun" / "train" / "index.json", "train", "a file"),
    ]
    for path, split, message in cases:
        with pytest.raises(UserError, match=message):
            open_dataset(path, split)
    assert open_dataset(tmp_path / "coinrun").path == open_dataset(tmp_path / "coinrun" / "train").path


def test_other_frame_shape_than_stored_is_refused(tmp_path):
    write(tmp_path, make_episodes(lengths=(3,)))
    with pytest.raises(UserError, match=r"frames of \(24, 32, 3\), not of \(64, 64, 3\)"):
        open_dataset(tmp_path, frame_shape=(64, 64, 3))


def test_index_remembers_how_it_was_made(tmp_path):
    write(tmp_path, make_episodes(lengths=(3,)), env="coinrun", metadata={"maker": "test", "options": {"seed": 3}})
    index = read_index(tmp_path)
    assert (index.env, index.metadata, index.complete) == ("coinrun", {"maker": "test", "options": {"seed": 3}}, True)
    assert index.shards[0].lengths == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "gif"}, "unknown encoding gif: choose one of raw"),
        ({"encoding": "png", "quality": 90}, "png is lossless"),
        ({"encoding": "jpeg", "quality": 0}, "quality 0 is not between"),
        ({"encoding": "jpeg", "frame_shape": (8, 8, 4)}, "1 or 3 channels, not 4"),
    ],
)
def test_impossible_encodings(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        EpisodeWriter(tmp_path / "new", **{"frame_shape": SHAPE, "fps": 1, **options})
    assert not (tmp_path / "new").exists()
