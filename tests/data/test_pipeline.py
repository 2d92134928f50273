"""The feed: the same batches for every split into processes, threads and workers, from any step; and clean ends."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jasmine.data.opening import open_dataset
from jasmine.data.pipeline import batches, is_labelled, record_ids
from jasmine.data.sampling import WindowSampler
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from tests.data.test_published import write_split

ARGUMENTS = {"seq_len": 4, "batch_size": 8, "seed": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Every frame holds its episode and its number in it, and so does its action."""
    folder = tmp_path_factory.mktemp("data")
    with EpisodeWriter(folder, frame_shape=(8, 8, 3), fps=1, num_actions=10_000, episodes_per_shard=3) as writer:
        for episode, length in enumerate((10, 3, 7, 40, 4, 25, 12)):
            frames = np.zeros((length, 8, 8, 3), np.uint8)
            frames[..., 0], frames[..., 1] = episode, np.arange(length)[:, None, None]
            writer.write(frames, 100 * episode + np.arange(length))
    return open_dataset(folder)


def take(dataset, count, **options):
    with contextlib.closing(batches(dataset, **{**ARGUMENTS, **options})) as iterator:
        return [{key: np.array(value) for key, value in batch.items()} for batch in itertools.islice(iterator, count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def expected(dataset):
    return take(dataset, 30, num_threads=0)


def test_batches_are_the_windows_that_the_sampler_names(dataset, expected):
    sampler = WindowSampler(dataset.lengths, 4, seed=5)
    for step, batch in enumerate(expected):
        episodes, starts = sampler.windows(step, 8)
        assert batch["videos"].shape == (8, 4, 8, 8, 3)
        assert (batch["videos"].dtype, batch["actions"].dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(batch["videos"][:, :, 0, 0, 0], np.repeat(episodes[:, None], 4, axis=1))
        np.testing.assert_array_equal(batch["videos"][:, :, 0, 0, 1], starts[:, None] + np.arange(4))
        np.testing.assert_array_equal(batch["actions"], 100 * episodes[:, None] + starts[:, None] + np.arange(4))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_rows_of_all_processes_make_the_global_batch(dataset, expected, processes):
    share = 8 // processes
    parts = [take(dataset, 30, rows=slice(p * share, (p + 1) * share)) for p in range(processes)]
    joined = [
        {key: np.concatenate([part[key] for part in of_step]) for key in of_step[0]}
        for of_step in zip(*parts, strict=True)
    ]
    assert_equal(joined, expected)


def test_rows_may_be_scattered(dataset, expected):
    rows = np.array([1, 4, 5])
    assert_equal(take(dataset, 30, rows=rows), [{key: value[rows] for key, value in b.items()} for b in expected])


@pytest.mark.parametrize("start_step", [1, 13, 29])
def test_any_first_step(dataset, expected, start_step):
    assert_equal(take(dataset, 30 - start_step, start_step=start_step), expected[start_step:])


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 4), (1, 1), (1, 7), (8, 3), (5, 20)])
def test_threads_and_prefetch_change_nothing(dataset, expected, num_threads, prefetch):
    assert_equal(take(dataset, 30, num_threads=num_threads, prefetch=prefetch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_change_nothing(dataset, expected, num_workers):
    assert_equal(take(dataset, 27, num_workers=num_workers, start_step=3, prefetch=2), expected[3:])


def test_no_more_batches_wait_than_asked_for(dataset, monkeypatch):
    read, steps = type(dataset).read_windows, []
    monkeypatch.setattr(type(dataset), "read_windows", lambda self, *args: steps.append(1) or read(self, *args))
    with contextlib.closing(batches(dataset, **ARGUMENTS, prefetch=3)) as iterator:
        next(iterator)
        deadline = time.monotonic() + 30
        while len(steps) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        next(iterator)
        next(iterator)
    assert len(steps) <= 3 + 3  # three taken, three waiting


def test_published_format_without_actions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    episodes = write_split(tmp_path / "data")
    published = open_dataset(tmp_path / "data")
    [batch] = take(published, 1, seq_len=16, start_step=4)
    windows = record_ids(published, seq_len=16, batch_size=8, seed=5, step=4)
    for row, window in enumerate(windows):
        expected = episodes[window.episode][0][window.start : window.start + 16]
        np.testing.assert_array_equal(batch["videos"][row], expected)


def test_record_ids_say_where_a_batch_came_from(dataset, expected):
    for row, window in enumerate(record_ids(dataset, **ARGUMENTS, step=17)):
        assert expected[17]["videos"][row, 0, 0, 0, 0] == window.episode
        assert expected[17]["videos"][row, 0, 0, 0, 1] == window.start
        assert window.file == f"shard-{window.episode // 3:05d}.array_record"


def test_windows_longer_than_every_episode(dataset):
    with pytest.raises(UserError, match=f"longer than every episode of {dataset.path}: give at most 40"):
        batches(dataset, **{**ARGUMENTS, "seq_len": 41})


def test_a_fraction_of_the_episodes_is_labelled(dataset):
    episodes = np.arange(20_000)
    for fraction in (0.0, 0.01, 0.3, 1.0):
        labelled = is_labelled(dataset, episodes, seed=5, fraction=fraction)
        assert labelled.dtype == bool
        assert abs(labelled.mean() - fraction) < 0.01
        for seed in (4, 6):  # another choice, neither the same nor the opposite
            both = labelled & is_labelled(dataset, episodes, seed=seed, fraction=fraction)
            assert abs(both.mean() - fraction**2) < 0.01
    few, many = (is_labelled(dataset, episodes, seed=5, fraction=fraction) for fraction in (0.1, 0.4))
    assert not (few & ~many).any()


def test_batches_say_which_clips_are_of_labelled_episodes(dataset, expected):
    labelled = is_labelled(dataset, np.arange(7), seed=5, fraction=0.5)
    assert 0 < labelled.sum() < 7
    found = take(dataset, 30, label_fraction=0.5)
    for batch in found:
        np.testing.assert_array_equal(batch.pop("labelled"), labelled[batch["videos"][:, 0, 0, 0, 0]])
    assert_equal(found, expected)  # and nothing else is changed by it
    rows = slice(2, 5)
    [part], [whole] = (
        take(dataset, 1, label_fraction=0.5, start_step=3, **options) for options in ({"rows": rows}, {})
    )
    np.testing.assert_array_equal(part["labelled"], whole["labelled"][rows])


def test_a_fraction_that_is_none(dataset):
    with pytest.raises(UserError, match=r"--label_fraction=1\.5: give a share of the episodes, from 0 to 1"):
        batches(dataset, **ARGUMENTS, label_fraction=1.5)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_damage_found_while_reading_names_the_record(tmp_path, num_workers):
    noise = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), np.uint8)
    with EpisodeWriter(tmp_path, frame_shape=(16, 16, 3), fps=1, encoding="raw") as writer:
        writer.write(noise)
    path = tmp_path / "shard-00000.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000.array_record: record \d+ is corrupt"):
        take(open_dataset(tmp_path), 100, num_workers=num_workers)


TRAIN = """
import os, signal, sys, threading
from jasmine.data.opening import open_dataset
from jasmine.data.pipeline import batches

def main():
    caught = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    iterator = batches(open_dataset(sys.argv[1]), seq_len=4, batch_size=8, seed=5, num_workers=2)
    if sys.argv[2] == "early":
        print("ready", flush=True)
    next(iterator)
    if sys.argv[2] != "early":
        print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(20):
            next(iterator)
        print(len(caught), flush=True)
    if sys.argv[2] == "raise":
        raise RuntimeError("a bug")
    sys.exit(75)

if __name__ == "__main__":
    main()
"""


@contextlib.contextmanager
def training(dataset, folder, how):
    """A process group that reads with two workers, as a cluster starts it."""
    (folder / "train.py").write_text(TRAIN)
    command = [sys.executable, folder / "train.py", dataset.path, how]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def members(group):
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _parent, of_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(of_group) == group and state != "Z":
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["early", "late"])
def test_cluster_signals_to_the_whole_group_leave_the_feed_running(dataset, tmp_path, how):
    with training(dataset, tmp_path, how) as process:
        if how == "early":  # while the workers start
            wait_until(lambda: len(members(process.pid)) >= 3)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.killpg(process.pid, number)
        out, err = process.communicate("go on\n", timeout=120)
        assert out == "4\n", err
        assert process.returncode == 75, err
        wait_until(lambda: not members(process.pid))


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed_or_fails(dataset, tmp_path):
    with training(dataset, tmp_path, "killed") as process:
        assert len(members(process.pid)) >= 3
        process.kill()
        wait_until(lambda: not members(process.pid))
    with training(dataset, tmp_path, "raise") as process:
        _, err = process.communicate("", timeout=120)
        assert process.returncode == 1
        assert "a bug" in err
        wait_until(lambda: not members(process.pid))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
