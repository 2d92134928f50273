"""The published format: read exactly, from every kind of pickle its writers made, and never executed."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from jasmine.data import published
from jasmine.data.opening import open_dataset
from jasmine.data.published import BadRecordError, PublishedDataset, parse_record
from jasmine.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jasmine" / "published"


def make_record(length=20, shape=(64, 64, 3), seed=0, **extra):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (length, *shape), np.uint8)
    return frames, {"raw_video": frames.tobytes(), "sequence_length": length, **extra}


def write_file(path, payloads):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload if isinstance(payload, bytes) else pickle.dumps(payload))
    writer.close()


def write_split(folder, lengths=((20, 31), (16,)), **options):
    """Files of records with actions; returns all frames and actions in order."""
    episodes, number = [], 0
    for file, of_file in enumerate(lengths):
        records = []
        for length in of_file:
            actions = np.random.default_rng(number).integers(0, 15, length).astype(np.int64)
            frames, record = make_record(length, seed=number, actions=actions, **options)
            episodes.append((frames, actions))
            records.append(record)
            number += 1
        write_file(folder / f"data_{file:04d}.array_record", records)
    return episodes


def test_reads_every_window_exactly(tmp_path):
    episodes = write_split(tmp_path / "data" / "train", video_file_name="a.mp4")
    dataset = open_dataset(tmp_path / "data")
    assert isinstance(dataset, PublishedDataset)
    assert dataset.lengths.tolist() == [20, 31, 16]
    assert (dataset.frame_shape, dataset.fps, dataset.num_frames) == ((64, 64, 3), None, 67)
    assert dataset.num_actions == 1 + max(actions.max() for _, actions in episodes)
    windows, actions = dataset.read_windows([2, 1, 0, 1], [0, 15, 4, 3], 16)
    for row, (episode, start) in enumerate([(2, 0), (1, 15), (0, 4), (1, 3)]):
        np.testing.assert_array_equal(windows[row], episodes[episode][0][start : start + 16])
        np.testing.assert_array_equal(actions[row], episodes[episode][1][start : start + 16])
    np.testing.assert_array_equal(dataset.read_episode(1)[0], episodes[1][0])
    assert (windows.dtype, actions.dtype) == (np.uint8, np.int32)
    assert dataset.locate(2, 5).file == "data_0001.array_record"
    assert dataset.locate(1, 5).record == 1


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "actions",
    [
        np.arange(20, dtype=np.int32),
        np.arange(20, dtype=">i8"),
        np.arange(20, dtype=np.uint8),
        np.arange(40, dtype=np.int64)[::2],
        np.asfortranarray(np.arange(60).reshape(20, 3)),
        np.arange(20) % 2 == 0,
        list(range(20)),
        [np.int64(k) for k in range(20)],
        None,
    ],
    ids=["i4", "big-endian", "u1", "strided", "fortran", "bool", "list", "numpy scalars", "none"],
)
def test_every_kind_of_action(actions, protocol):
    frames, fields = make_record(sequence_length=np.int64(20), actions=actions)
    record = parse_record(pickle.dumps(fields, protocol=protocol))
    assert record.length == 20
    assert bytes(record.video) == frames.tobytes()
    if actions is None:
        assert record.actions is None
    else:
        np.testing.assert_array_equal(record.actions, actions)
        assert record.actions.dtype == np.int32


class Malicious:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(marker):
    """Pickles that would create `marker`, each by another way into the interpreter."""
    command = f"touch {marker}"
    _, fields = make_record()
    for function in (os.system, eval, exec, subprocess.check_call):
        argument = command if function is os.system else f"__import__('os').system({command!r})"
        argument = command.split() if function is subprocess.check_call else argument
        yield pickle.dumps({**fields, "actions": Malicious(function, argument)})
        yield pickle.dumps(Malicious(function, argument))
        yield pickle.dumps({**fields, "other key": [Malicious(function, argument)]}, protocol=2)
    yield f"cos\nsystem\n(S'{command}'\ntR.".encode()
    yield f"(S'{command}'\nios\nsystem\n.".encode()
    yield f"cnumpy\nf2py.os.system\n(S'{command}'\ntR.".encode()
    yield f"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93(\x8c{chr(len(command))}{command}tR.".encode("latin1")
    yield pickle.dumps({**fields, "actions": np.array([Malicious(os.system, command)], dtype=object)})


def test_malicious_pickles_raise_and_never_execute(tmp_path):
    marker = tmp_path / "executed"
    for number, payload in enumerate(attacks(marker)):
        with pytest.raises(BadRecordError):
            parse_record(payload)
        assert not marker.exists(), f"attack {number}"
    # They are attacks: the ordinary unpickler falls for them.
    for payload in attacks(marker):
        subprocess.run(
            [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
            input=payload,
            stderr=subprocess.DEVNULL,
        )
        if "f2py" not in repr(payload):
            assert marker.exists(), payload
            marker.unlink()


def test_malicious_record_in_a_dataset_names_file_record_and_function(tmp_path):
    marker = tmp_path / "executed"
    _, good = make_record()
    write_file(
        tmp_path / "train" / "data_0000.array_record",
        [good, good, {**good, "x": Malicious(os.system, f"touch {marker}")}],
    )
    with pytest.raises(UserError, match=r"data_0000.array_record: record 2 .*posix.system") as caught:
        open_dataset(tmp_path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)


def globals_of(payload):
    names = []

    class Names(pickle.Unpickler):
        def find_class(self, module, name):
            names.append((module, name))
            return super().find_class(module, name)

    Names(io.BytesIO(payload)).load()
    return names


def test_the_admitted_names_are_those_that_numpy_writes():
    _, fields = make_record(actions=np.arange(20), sequence_length=np.int64(20))
    used = {name for protocol in (3, 4, 5) for name in globals_of(pickle.dumps(fields, protocol=protocol))}
    assert used <= published._NAMES.keys()
    assert {name for _, name in published._NAMES} == {name for _, name in used}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_pickles_raise_only_what_is_expected(data):
    _, fields = make_record(length=3, shape=(2, 2, 3), actions=np.arange(3), sequence_length=np.int64(3))
    payload = bytearray(pickle.dumps(fields, protocol=data.draw(st.sampled_from([3, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadRecordError):
        parse_record(bytes(payload[: data.draw(st.integers(1, len(payload)))]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1, 2], "not a dict"),
        ({"raw_video": b""}, "not a dict with raw_video and sequence_length"),
        ({"raw_video": "text", "sequence_length": 1}, "raw_video is not bytes"),
        ({"raw_video": bytes(12), "sequence_length": -1}, "not a count"),
        ({"raw_video": bytes(12), "sequence_length": 1, "actions": np.array([0.5])}, "not integers"),
        ({"raw_video": bytes(12), "sequence_length": 1, "actions": np.array([-1])}, "not integers"),
        ({"raw_video": bytes(12), "sequence_length": 1, "actions": [1, 2]}, r"shape \(2,\) for 1 frames"),
        ({"raw_video": bytes(12), "sequence_length": 1, "actions": np.array(["a"])}, "dtype 'U1'"),
    ],
)
def test_records_of_another_kind(fields, message):
    with pytest.raises(BadRecordError, match=message):
        parse_record(pickle.dumps(fields))


def test_lengths_are_read_once_and_again_when_a_file_changes(tmp_path, cache, monkeypatch):
    split = tmp_path / "data"
    write_split(split)
    before = sorted(os.listdir(split))
    scanned = []
    scan_file = published._scan_file
    monkeypatch.setattr(published, "_scan_file", lambda path: scanned.append(os.path.basename(path)) or scan_file(path))
    open_dataset(split)
    assert sorted(scanned) == ["data_0000.array_record", "data_0001.array_record"]
    assert sorted(os.listdir(split)) == before
    scanned.clear()
    assert open_dataset(split).lengths.tolist() == [20, 31, 16]
    assert scanned == []
    write_file(split / "data_0001.array_record", [make_record(40, actions=np.zeros(40, int))[1]])
    assert open_dataset(split).lengths.tolist() == [20, 31, 40]
    assert scanned == ["data_0001.array_record"]
    [stored] = cache.glob("*.json")
    stored.write_text('{"data_0000.array_record": 3}')
    assert open_dataset(split).lengths.tolist() == [20, 31, 40]


def test_works_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    write_split(tmp_path / "data")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_dataset(tmp_path / "data").lengths.tolist() == [20, 31, 16]


def test_number_of_actions_comes_from_metadata_where_there_is_some(tmp_path):
    write_split(tmp_path / "train")
    (tmp_path / "metadata.json").write_text(json.dumps({"env": "coinrun", "num_actions": 18}))
    assert open_dataset(tmp_path).num_actions == 18


def test_frame_shape_is_asked_for_where_it_cannot_be_known(tmp_path):
    frames, record = make_record(20, shape=(90, 160, 3))
    write_file(tmp_path / "data_0000.array_record", [record])
    with pytest.raises(UserError, match="frames of 43200 bytes: give --image_height, --image_width"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"43200 bytes, not those of \(90, 90, 3\): correct --image_height"):
        open_dataset(tmp_path, frame_shape=(90, 90, 3))
    np.testing.assert_array_equal(
        open_dataset(tmp_path, frame_shape=(90, 160, 3)).read_window(0, 4, 16)[0], frames[4:20]
    )


def test_damaged_and_mixed_files_are_named(tmp_path):
    _, good = make_record(actions=np.zeros(20, int))
    cases = {
        "truncated": (b"x" * 100, "a.array_record is corrupt .not a whole"),
        "empty": ([], "a.array_record holds no frames"),
        "pixels": ([good, {**good, "raw_video": good["raw_video"][:-1]}], "record 1 is corrupt .*bytes of pixels"),
        "mixed": ([good, make_record()[1]], "record 1 is corrupt .*another shape"),
        "garbage": ([good, b"not a pickle"], "record 1 cannot be read: not a pickled record"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name / "a.array_record"
        if isinstance(content, bytes):
            path.parent.mkdir()
            path.write_bytes(content)
        else:
            write_file(path, content)
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / name)
    write_file(tmp_path / "shapes" / "a.array_record", [good])
    write_file(tmp_path / "shapes" / "b.array_record", [make_record(shape=(32, 32, 3), actions=np.zeros(20, int))[1]])
    with pytest.raises(UserError, match=r"b.array_record holds frames of 3072 bytes, .*a.array_record of 12288"):
        open_dataset(tmp_path / "shapes")


def test_a_file_replaced_after_opening_is_noticed(tmp_path):
    split = tmp_path / "data"
    write_split(split, lengths=((20,),))
    dataset = open_dataset(split)
    write_file(split / "data_0000.array_record", [make_record(25, actions=np.zeros(25, int))[1]])
    with pytest.raises(UserError, match="changed since its length was read"):
        dataset.read_window(0, 0, 16)
