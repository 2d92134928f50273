"""Verify finds what is damaged and says which file and record; it finds nothing in sound data."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jasmine.data.index import Encoding, read_index, write_index
from jasmine.data.opening import open_dataset
from jasmine.data.verify import main, problems
from jasmine.data.writer import EpisodeWriter

RNG = np.random.default_rng(0)


def write_split(folder: Path, encoding: Encoding = "raw") -> Path:
    """Three shards of two episodes of 20 frames, 8 frames a record: six records a shard."""
    with EpisodeWriter(
        folder, frame_shape=(16, 16, 3), fps=10, encoding=encoding, num_actions=4, episodes_per_shard=2
    ) as writer:
        for _ in range(6):
            writer.write(RNG.integers(0, 255, (20, 16, 16, 3), dtype=np.uint8), RNG.integers(0, 4, 20))
    return folder


def published_file(path: Path, payloads: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()


def record(frames: int = 5) -> bytes:
    return pickle.dumps({"raw_video": RNG.bytes(frames * 64 * 64 * 3), "sequence_length": frames})


def flip_bit_of(path: Path, stored: bytes) -> None:
    """Flips one bit in the middle of `stored`, wherever that lies in the file."""
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("encoding", ["raw", "zstd", "png", "webp-lossless", "webp", "jpeg"])
def test_sound_data_has_no_problems(tmp_path: Path, encoding: Encoding, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "train", encoding)
    write_split(tmp_path / "val", encoding)
    assert list(problems(str(tmp_path / "train"))) == []
    assert main([str(tmp_path)]) == 0
    assert "sound; 6 files in train, val" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["raw", "zstd", "png"])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, encoding: Encoding) -> None:
    """Files have padding, where a flipped bit is harmless; anywhere else it must be found."""
    folder = write_split(tmp_path / "train", encoding)
    dataset = open_dataset(folder)
    true = [dataset.read_episode(e) for e in (2, 3)]
    path = folder / "shard-00001.array_record"
    content = path.read_bytes()
    found = 0
    for place in np.random.default_rng(1).integers(0, len(content), 150).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        lines = list(problems(str(folder)))
        assert all(line.startswith(str(path)) for line in lines)
        found += bool(lines)
        if not lines:
            damaged = open_dataset(folder)
            for episode, (frames, actions) in zip((2, 3), true, strict=True):
                np.testing.assert_array_equal(damaged.read_episode(episode)[0], frames)
                np.testing.assert_array_equal(damaged.read_episode(episode)[1], actions)
    assert found > 15


def test_every_damaged_record_is_named(tmp_path: Path) -> None:
    folder = write_split(tmp_path)
    path = folder / "shard-00002.array_record"
    dataset = open_dataset(folder)
    flip_bit_of(path, dataset.read_window(4, 0, 1)[0].tobytes())  # in record 0
    flip_bit_of(path, dataset.read_window(5, 3, 1)[0].tobytes())  # in record 3
    flip_bit_of(path, dataset.read_window(5, 19, 1)[0].tobytes())  # in record 5
    found = list(problems(str(folder)))
    assert [line.split(" is corrupt")[0] for line in found] == [f"{path}: record {k}" for k in (0, 3, 5)]


def damage_truncate(folder: Path) -> str:
    path = folder / "shard-00000.array_record"
    path.write_bytes(path.read_bytes()[:-1000])
    return f"{path} is truncated"


def damage_remove(folder: Path) -> str:
    path = folder / "shard-00001.array_record"
    path.unlink()
    return f"{path} is missing"


def damage_foreign(folder: Path) -> str:
    path = folder / "shard-00009.array_record"
    path.write_bytes((folder / "shard-00000.array_record").read_bytes())
    return f"{path} is not in index.json"


def damage_index_lengths(folder: Path) -> str:
    index = read_index(folder)
    write_index(folder, replace(index, shards=(replace(index.shards[0], lengths=(20, 19)), *index.shards[1:])))
    return f"{folder / 'shard-00000.array_record'}: record 5 is not as index.json says"


def damage_index_count(folder: Path) -> str:
    index = read_index(folder)
    write_index(folder, replace(index, shards=(replace(index.shards[0], lengths=(20,)), *index.shards[1:])))
    return f"{folder / 'shard-00000.array_record'} is corrupt (6 records where the index says 3)"


def damage_index_actions(folder: Path) -> str:
    write_index(folder, replace(read_index(folder), num_actions=2))
    return f"{folder / 'shard-00000.array_record'}: record 0 is not as index.json says: actions"


def damage_index_json(folder: Path) -> str:
    (folder / "index.json").write_text('{"frame_shape": [16')
    return f"{folder / 'index.json'} is not a valid index"


def damage_unfinished(folder: Path) -> str:
    write_index(folder, replace(read_index(folder), complete=False))
    return f"{folder} is unfinished"


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_remove,
        damage_foreign,
        damage_index_lengths,
        damage_index_count,
        damage_index_actions,
        damage_index_json,
        damage_unfinished,
    ],
)
def test_damage_is_found_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    folder = write_split(tmp_path / "train")
    expected = damage(folder)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith(expected)


def test_image_that_does_not_decode_or_has_another_size(tmp_path: Path) -> None:
    folder = write_split(tmp_path, "png")
    write_index(folder, replace(read_index(folder), frame_shape=(16, 17, 3)))
    found = list(problems(str(folder)))
    assert len(found) == 18
    assert "image 0: 16×16, not 16×17" in found[0]


def test_published_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_file(tmp_path / "train" / "a.array_record", [record(), record(), record()])
    records = [record() for _ in range(4)]
    published_file(tmp_path / "train" / "b.array_record", records)
    assert main([str(tmp_path)]) == 0
    flip_bit_of(tmp_path / "train" / "b.array_record", records[2][1000:2000])
    truncated = tmp_path / "train" / "a.array_record"
    truncated.write_bytes(truncated.read_bytes()[:-70_000])
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{truncated} is corrupt")
    assert lines[1].startswith(f"{tmp_path / 'train' / 'b.array_record'}: record 2")
    assert len(lines) == 3


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.write_text, (self.path, "executed"))


def test_malicious_and_wrong_published_records_are_named_and_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train" / "a.array_record"
    proof = tmp_path / "proof"
    evil = pickle.dumps({"raw_video": Evil(proof), "sequence_length": 1})
    uneven = pickle.dumps({"raw_video": b"12345", "sequence_length": 2})
    published_file(path, [record(), evil, uneven, b"not a pickle"])
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[2] for line in lines[:3]] == ["1", "2", "3"]
    assert all(line.startswith(f"{path}: record ") for line in lines[:3])
    assert not proof.exists()


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
