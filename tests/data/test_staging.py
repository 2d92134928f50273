"""Data in a bucket: the same batches as on a disk, each shard fetched once for a host, whatever the storage does."""

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jasmine.data import bucket
from jasmine.data.opening import open_dataset
from jasmine.data.pipeline import batches
from jasmine.data.staging import DataCache, StagedFiles
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import ChangedDataError, ClusterError, UserError
from tests.clusters.gcs import BUCKET, Gcs, running_gcs
from tests.jobs import REPO, wait_until

ARGUMENTS = {"seq_len": 4, "batch_size": 8, "seed": 5}
URL = f"gs://{BUCKET}/data"
SHARDS = 10


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A dataset whose split `train` has ten shards, and which has a `val` of one."""
    root = tmp_path_factory.mktemp("data")
    for split, episodes in (("train", 2 * SHARDS), ("val", 2)):
        rng = np.random.default_rng([5, episodes])
        with EpisodeWriter(
            root / split, frame_shape=(16, 16, 3), fps=1, encoding="raw", num_actions=9, episodes_per_shard=2
        ) as writer:
            for _ in range(episodes):
                writer.write(rng.integers(0, 256, (30, 16, 16, 3), np.uint8), rng.integers(0, 9, 30))
    return root


@pytest.fixture(scope="module")
def storage(local, tmp_path_factory):
    with running_gcs(tmp_path_factory.mktemp("gcs")) as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.env.items():
            patch.setenv(name, value)
        upload(local, "data")
        yield gcs


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("JASMINE_DATA_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def gcs(storage):
    """The storage with the dataset, doing nothing wrong yet."""
    yield storage
    storage.heal()


def upload(folder: Path, name: str) -> None:
    from google.cloud.storage import Client

    there = Client(project="test").bucket(BUCKET)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            there.blob(f"{name}/{path.relative_to(folder)}").upload_from_filename(str(path))


def take(dataset, count, **options):
    with contextlib.closing(batches(dataset, **{**ARGUMENTS, **options})) as iterator:
        return [{key: np.array(value) for key, value in batch.items()} for batch in itertools.islice(iterator, count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


class Fetches:
    """The contents of shards that were asked for since this was made: how often each, and how each was answered."""

    def __init__(self, gcs: Gcs) -> None:
        self._gcs, self._before = gcs, len(gcs.requests)

    @property
    def all(self) -> list[tuple[str, int]]:
        requests = self._gcs.requests[self._before :]
        fetches = [one for one in requests if one["query"].get("alt") == "media" and "shard-" in one["path"]]
        return [(one["path"].rpartition("/")[2], one["status"]) for one in fetches]

    @property
    def counts(self) -> dict[str, int]:
        names = [name for name, _ in self.all]
        return {name: names.count(name) for name in names}


def staged_files(split="train", **options) -> StagedFiles:
    dataset = open_dataset(URL, split, **options)
    assert dataset.staged is not None
    return dataset.staged


def files_in(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending))


def size_of(folder: Path) -> int:
    """Bytes in a cache, at a moment at which nobody adds or removes a file."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        size = 0
        for path in folder.glob("*-*"):
            with contextlib.suppress(FileNotFoundError):  # a part that has just become whole
                size += path.stat().st_size
        return size


def contents(cache: DataCache, item) -> bytes:
    file = cache.stage(item)
    try:
        return Path(file.path).read_bytes()
    finally:
        file.close()


def small_cache(folder: Path, shards: float, **options) -> DataCache:
    return DataCache(str(folder), int(shards * 131072), **options)  # shards have 128 KiB


# --- the same data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(local):
    return take(open_dataset(local), 25, num_threads=0)


@pytest.mark.parametrize("shards_in_cache", [None, 1, 2.5, 9])
def test_batches_are_those_of_the_same_data_on_a_disk(gcs, expected, cache_folder, shards_in_cache):
    cache = None if shards_in_cache is None else small_cache(cache_folder, shards_in_cache)
    dataset = open_dataset(URL, cache=cache)
    assert_equal(take(dataset, 25), expected)
    assert_equal(take(dataset, 10, start_step=15), expected[15:])
    parts = [take(dataset, 10, rows=rows, num_threads=2) for rows in (slice(0, 4), np.array([4, 6]), np.array([5, 7]))]
    for step, (first, even, odd) in enumerate(zip(*parts, strict=True)):
        np.testing.assert_array_equal(first["videos"], expected[step]["videos"][:4])
        np.testing.assert_array_equal(even["videos"], expected[step]["videos"][[4, 6]])
        np.testing.assert_array_equal(odd["actions"], expected[step]["actions"][[5, 7]])
    assert size_of(cache_folder) <= (cache or DataCache.of_host()).limit


@pytest.mark.slow
def test_worker_processes_read_the_same(gcs, expected, cache_folder):
    fetches = Fetches(gcs)
    assert_equal(take(open_dataset(URL), 25, num_workers=2, prefetch=2), expected)
    assert set(fetches.counts.values()) == {1}


def test_where_there_is_room_every_shard_is_fetched_once_and_then_read_locally(gcs, expected, cache_folder):
    fetches = Fetches(gcs)
    dataset = open_dataset(URL)
    take(dataset, 25)
    assert sorted(fetches.counts) == [f"shard-{number:05d}.array_record" for number in range(SHARDS)]
    assert set(fetches.counts.values()) == {1}
    gcs.fail_next(503, count=10**6, contains="shard-")  # from now on nothing can be fetched
    assert_equal(take(dataset, 25), expected)
    assert len(files_in(cache_folder, ".array_record")) == SHARDS
    assert not files_in(cache_folder, ".part")


def test_the_val_split_and_a_folder_that_is_a_split(gcs, local):
    assert open_dataset(URL, "val").num_frames == 60
    for split in (f"{URL}/train", f"{URL}/train/"):
        frames, actions = open_dataset(split).read_episode(7)
        expected_frames, expected_actions = open_dataset(local).read_episode(7)
        np.testing.assert_array_equal(frames, expected_frames)
        np.testing.assert_array_equal(actions, expected_actions)


# --- one host ------------------------------------------------------------------------------------------------------------

READ = f"""
import contextlib, itertools, sys, zlib
from jasmine.data.opening import open_dataset
from jasmine.data.pipeline import batches
rows = slice(int(sys.argv[1]), int(sys.argv[1]) + 4)
with contextlib.closing(batches(open_dataset({URL!r}), seq_len=4, batch_size=8, seed=5, rows=rows)) as iterator:
    print([zlib.crc32(batch["videos"].tobytes()) for batch in itertools.islice(iterator, 25)])
"""
STAGE = f"""
import sys
from jasmine.data.opening import open_dataset
print("begins", flush=True)
open_dataset({URL!r}).staged.stage(int(sys.argv[1]))
"""


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_share_what_either_fetches(gcs, expected):
    import zlib

    fetches = Fetches(gcs)
    gcs.latency(0.05)
    processes = [python(READ, first) for first in ("0", "4")]
    outputs = [process.communicate(timeout=120) for process in processes]
    for first, (out, err) in zip((0, 4), outputs, strict=True):
        checksums = [zlib.crc32(batch["videos"][first : first + 4].tobytes()) for batch in expected]
        assert out.strip() == str(checksums), err
    assert len(fetches.counts) == SHARDS
    assert set(fetches.counts.values()) == {1}


def test_who_waits_for_another_takes_over_when_that_is_killed(gcs, cache_folder, local):
    gcs.slow_bodies(20_000, contains="shard-00003")
    fetches = Fetches(gcs)
    first = python(STAGE, "3")
    wait_until(lambda: any(p.stat().st_size for p in files_in(cache_folder, ".part")))
    got: list[bytes] = []
    files = staged_files()
    waiting = threading.Thread(target=lambda: got.append(contents(files.cache, files.items[3])))
    waiting.start()
    first.kill()
    first.communicate()
    waiting.join(60)
    assert got == [(local / "train" / "shard-00003.array_record").read_bytes()]
    assert [status for _, status in fetches.all] == [200, 206]  # it went on where the other had got to
    assert not files_in(cache_folder, ".part")


def test_what_a_killed_process_left_may_be_garbage(gcs, cache_folder, local):
    files = staged_files()
    part = Path(files.cache.path(files.items[2])).with_suffix(".part")
    for left in (b"x" * 1000, b"x" * 131072, b"x" * 200_000):
        part.write_bytes(left)
        assert contents(files.cache, files.items[2]) == (local / "train" / "shard-00002.array_record").read_bytes()
        assert not part.exists()
        Path(files.cache.path(files.items[2])).unlink()


def test_parts_that_nobody_comes_back_for_are_removed(gcs, cache_folder):
    files = staged_files()
    old, new = cache_folder / f"{'0' * 32}-1-5.part", cache_folder / f"{'1' * 32}-1-5.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    files.stage(0).close()
    assert not old.exists()
    assert new.exists()


def test_a_copy_that_the_disk_spoilt_is_fetched_again(gcs, cache_folder, expected):
    dataset = open_dataset(URL)
    take(dataset, 25)
    for path in files_in(cache_folder, ".array_record"):
        content = bytearray(path.read_bytes())
        content[20_000:110_000:97] = bytes(len(content[20_000:110_000:97]))
        path.write_bytes(content)
    assert_equal(take(open_dataset(URL), 25), expected)
    files_in(cache_folder, ".array_record")[0].write_bytes(b"short")
    assert_equal(take(open_dataset(URL), 25), expected)


# --- room ----------------------------------------------------------------------------------------------------------------


def test_the_longest_unused_is_removed_but_nothing_that_is_read(gcs, cache_folder):
    files = staged_files(cache=small_cache(cache_folder, 2))
    one, two, three, four = files.items[:4]
    first = files.cache.stage(one)
    files.cache.stage(two).close()
    files.cache.stage(three).close()
    assert [files.cache.has(item) for item in (one, two, three)] == [True, False, True]
    first.release()
    files.cache.stage(two).close()  # one was read last, when it was released
    assert [files.cache.has(item) for item in (one, two, three)] == [True, True, False]
    assert first.acquire()
    first.release()
    files.cache.stage(three).close()
    files.cache.stage(four).close()
    assert not files.cache.has(one)
    assert not first.acquire()
    assert os.fstat(first._fd).st_blocks == 0  # its space is free although this process has it open
    first.close()


def test_who_finds_no_room_waits_for_it_and_not_for_ever(gcs, cache_folder):
    files = staged_files(cache=small_cache(cache_folder, 1, patience=1.0))
    held = files.stage(0)
    with pytest.raises(
        ClusterError, match=r"shard-00001.array_record cannot be read: nothing for \d+ s \(all that is in"
    ):
        files.stage(1)
    threading.Timer(0.3, held.close).start()
    staged_files(cache=small_cache(cache_folder, 1, patience=30.0)).stage(1).close()


def test_a_lock_that_was_kept_is_given_back_to_those_who_need_room(gcs, cache_folder):
    roomy, tight = staged_files(), staged_files(cache=small_cache(cache_folder, 1, patience=10.0))
    assert roomy.fits
    file = roomy.stage(0)
    began = time.monotonic()
    file.release()
    tight.stage(1).close()
    assert time.monotonic() - began > 0.5
    assert not file.acquire()
    file.close()


def test_a_cache_that_cannot_hold_a_shard_is_refused_when_the_data_is_opened(gcs, cache_folder):
    with pytest.raises(UserError, match=r"has 0.125 MiB, and the data cache .* may have 0.112 MiB: .*--data_cache_gib"):
        open_dataset(URL, cache=small_cache(cache_folder, 0.9))


def test_the_limit_follows_the_disk_unless_it_is_given(gcs, cache_folder):
    import shutil

    limit, free = DataCache.of_host().limit, shutil.disk_usage(cache_folder).free
    assert 0.5 * free < limit < 0.9 * free
    assert DataCache.of_host(0.5).limit == 2**29


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here (that needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_made_room_on_or_told_of(gcs, local, small_disk):
    files = staged_files(cache=DataCache(str(small_disk), 2**30, patience=2.0))
    for number, item in enumerate(files.items):
        assert contents(files.cache, item) == (local / "train" / f"shard-{number:05d}.array_record").read_bytes()
    for path in files_in(small_disk, ".array_record"):
        path.unlink()
    (small_disk / "of somebody else").write_bytes(bytes(330_000))
    with pytest.raises(UserError, match=r"data cache .*/disk cannot be written \(No space left on device\): make room"):
        files.stage(0)


CROWD = """
import os, random, sys
from pathlib import Path
from jasmine.data.opening import open_dataset
from jasmine.data.staging import DataCache
folder, limit, whole, seed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
files = open_dataset(sys.argv[5], cache=DataCache(folder, limit)).staged
there = [(whole / item.name.rpartition("/")[2]).read_bytes() for item in files.items]
random.seed(seed)
open_files = {}
for _ in range(60):
    shard = random.randrange(len(files.items))
    file = open_files.pop(shard, None)
    if file is None or not file.acquire():
        file = files.stage(shard)
    fd = os.open(file.path, os.O_RDONLY)
    assert os.pread(fd, 200_000, 0) == there[shard]
    os.close(fd)
    file.release()
    open_files[shard] = file
"""


@pytest.mark.slow
def test_a_crowd_in_a_small_cache_reads_the_truth_and_keeps_to_the_limit(gcs, cache_folder, local):
    limit = int(3.5 * 131072)
    arguments = [str(cache_folder), str(limit), str(local / "train")]
    crowd = [python(CROWD, *arguments, str(seed), URL) for seed in range(3)]
    most = 0
    while any(process.poll() is None for process in crowd):
        most = max(most, size_of(cache_folder))
        time.sleep(0.002)
    for process in crowd:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert 131072 < most <= limit


# --- ahead ---------------------------------------------------------------------------------------------------------------


def test_coming_shards_are_fetched_before_anybody_reads_them(gcs, cache_folder):
    with contextlib.closing(batches(open_dataset(URL), **ARGUMENTS, num_threads=0)) as iterator:
        next(iterator)
        wait_until(lambda: len(files_in(cache_folder, ".array_record")) == SHARDS)


def test_only_what_the_process_will_read_is_fetched(gcs, cache_folder):
    dataset = open_dataset(URL)
    rows = slice(0, 2)
    needed = {window for step in range(3) for window in shards_of_step(dataset, step, rows)}
    assert len(needed) < SHARDS
    fetches = Fetches(gcs)
    with contextlib.closing(batches(dataset, **ARGUMENTS, rows=rows, num_threads=0, stop_step=3)) as iterator:
        wait_until(lambda: len(files_in(cache_folder, ".array_record")) == len(needed))
        for _ in range(3):
            next(iterator)
    assert set(fetches.counts) == {f"shard-{shard:05d}.array_record" for shard in needed}


def shards_of_step(dataset, step, rows):
    from jasmine.data.sampling import WindowSampler

    episodes, _ = WindowSampler(dataset.lengths, 4, seed=5).windows(step, 8)
    return dataset.shards_of(episodes[rows])


def test_no_more_than_a_quarter_of_a_small_cache_is_filled_ahead(gcs, cache_folder):
    dataset = open_dataset(URL, cache=small_cache(cache_folder, 8.5))
    fetches = Fetches(gcs)
    with contextlib.closing(batches(dataset, **ARGUMENTS, num_threads=0)) as iterator:
        wait_until(lambda: len(files_in(cache_folder, ".array_record")) == 2)
        next(iterator)
        assert len(fetches.all) <= 2 + len(shards_of_step(dataset, 0, slice(None))) + 2


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def test_errors_and_broken_answers_change_nothing(gcs, expected):
    gcs.fail_next(503, count=4, contains="shard-")
    gcs.fail_next(429, count=2, contains="shard-")
    gcs.lose_next(count=3, contains="shard-")
    gcs.break_bodies(count=5, contains="shard-")
    assert_equal(take(open_dataset(URL), 25), expected)


def test_a_connection_that_crawls_is_given_up_for_another(gcs, cache_folder, local):
    gcs.slow_bodies(8000, contains="shard-00004")
    fetches = Fetches(gcs)
    files = staged_files(cache=DataCache(str(cache_folder), 2**30, slow=0.5))
    assert contents(files.cache, files.items[4]) == (local / "train" / "shard-00004.array_record").read_bytes()
    first, *others = [status for _, status in fetches.all]
    assert (first, set(others)) == (200, {206})


def test_a_listing_that_fails_for_a_moment_is_asked_for_again(gcs):
    gcs.fail_next(503, count=2)
    assert open_dataset(URL).num_frames == 600


def test_storage_that_is_away_for_a_while_or_for_good(tmp_path, local, cache_folder, monkeypatch):
    with running_gcs(tmp_path / "mortal") as gcs:
        for name, value in gcs.env.items():
            monkeypatch.setenv(name, value)
        upload(local, "data")
        files = staged_files(cache=DataCache(str(cache_folder), 2**30, patience=60.0))
        impatient = staged_files(cache=DataCache(str(cache_folder), 2**30, patience=1.0))
        gcs.kill()
        with pytest.raises(ClusterError, match=r"cannot be read: nothing for \d s \(.*refused\); run the same command"):
            impatient.stage(1)
        got: list[bytes] = []
        reading = threading.Thread(target=lambda: got.append(contents(files.cache, files.items[1])))
        reading.start()
        reading.join(1)
        assert reading.is_alive()
        gcs.start()
        reading.join(30)
        assert got == [(local / "train" / "shard-00001.array_record").read_bytes()]


LEAVE = f"""
import concurrent.futures, sys, time
from jasmine.data.opening import open_dataset
dataset = open_dataset({URL!r})
print("opened", flush=True)
sys.stdin.readline()
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(dataset.read_episode, 0)
sys.exit(75)
"""


def test_a_program_that_ends_does_not_wait_for_storage(tmp_path, local, monkeypatch):
    with running_gcs(tmp_path / "mortal") as gcs:
        for name, value in gcs.env.items():
            monkeypatch.setenv(name, value)
        upload(local, "data")
        command = [sys.executable, "-c", LEAVE]
        with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "opened\n"
                gcs.kill()
                process.communicate("\n", timeout=60)  # it would be patient for five minutes
                assert process.returncode == 75
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)


def test_data_that_changes_under_a_run_is_an_error_and_never_read(gcs, local, tmp_path, cache_folder):
    upload(local / "train", "changing")
    url = f"gs://{BUCKET}/changing"
    before = open_dataset(url)
    assert before.staged is not None
    frames, _ = before.read_episode(0)
    other = tmp_path / "other"
    with EpisodeWriter(other, frame_shape=(16, 16, 3), fps=1, encoding="raw", num_actions=9, episodes_per_shard=2) as w:
        for _ in range(2 * SHARDS):
            w.write(np.zeros((30, 16, 16, 3), np.uint8), np.zeros(30, np.int64))
    upload(other, "changing")
    np.testing.assert_array_equal(before.read_episode(0)[0], frames)  # staged before
    with pytest.raises(ChangedDataError, match=r"changing/shard-00004.array_record is no longer what it was when"):
        before.read_episode(9)
    after = open_dataset(url)
    assert not after.read_episode(0)[0].any()
    assert len(files_in(cache_folder, ".array_record")) == 2  # both generations


def delete(name: str) -> None:
    from google.cloud.storage import Client

    Client(project="test").bucket(BUCKET).blob(name).delete()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://nobody/data", r"no data at gs://nobody/data: no such bucket"),
        (f"gs://{BUCKET}/nowhere/at/all", r"no data at .*/at/all \(no such folder\): upload the data first"),
        (
            f"gs://{BUCKET}/data/trian",
            rf"no data at .*/trian \(no such folder\): did you mean gs://{BUCKET}/data/train\?",
        ),
        ("gs://", r"gs:// names no bucket"),
        (f"gs://{BUCKET}x", rf"no data at gs://{BUCKET}x: no such bucket"),
    ],
)
def test_data_that_is_not_there(gcs, url, says):
    with pytest.raises(UserError, match=says):
        open_dataset(url)


def test_data_that_is_not_whole_or_not_ours(gcs, local):
    with pytest.raises(UserError, match=rf"no split test in {URL}: it has train, val"):
        open_dataset(URL, "test")
    upload(local / "val", "half")
    delete("half/shard-00000.array_record")
    with pytest.raises(UserError, match=r"half/shard-00000.array_record is not there, but the index lists it"):
        open_dataset(f"gs://{BUCKET}/half")
    bucket_path = local / "val" / "index.json"
    from google.cloud.storage import Client

    there = Client(project="test").bucket(BUCKET)
    there.blob("half/shard-00000.array_record").upload_from_string(b"short")
    with pytest.raises(UserError, match=r"half/shard-00000.array_record is corrupt \(5 bytes where the index says"):
        open_dataset(f"gs://{BUCKET}/half")
    there.blob("half/index.json").upload_from_string(bucket_path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"half/index.json is not a valid index"):
        open_dataset(f"gs://{BUCKET}/half")
    there.blob("published/train/data_0.array_record").upload_from_string(b"x")
    with pytest.raises(UserError, match=r"holds the published format, which is read off disks only"):
        open_dataset(f"gs://{BUCKET}/published")
    there.blob("docs/readme.txt").upload_from_string(b"x")
    with pytest.raises(UserError, match=r"no data in .*docs: no index.json there or in train/"):
        open_dataset(f"gs://{BUCKET}/docs")


def test_no_permission_no_credentials_and_no_place_for_the_cache(gcs, monkeypatch, tmp_path):
    gcs.fail_next(403)
    with pytest.raises(UserError, match=r"no permission \(403 Forbidden\)"):
        open_dataset(URL)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JASMINE_DATA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data cache .*/file/cache cannot be written .*JASMINE_DATA_CACHE_DIR"):
        open_dataset(URL)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no credentials; run `gcloud auth application-default login`"):
        bucket.list_folder(URL)


def test_the_tools_that_look_at_data_read_it_from_buckets_too(gcs, local, capsys):
    from jasmine.data.inspect import main as inspect
    from jasmine.data.splits import find_splits
    from jasmine.data.verify import main as verify

    assert find_splits(URL) == {"train": f"{URL}/train", "val": f"{URL}/val"}
    assert find_splits(f"{URL}/val/") == {"val": f"{URL}/val"}
    assert inspect([URL]) == 0
    from_bucket = capsys.readouterr().out
    assert inspect([str(local)]) == 0
    assert from_bucket == capsys.readouterr().out
    assert verify([URL]) == 2
    assert "is in a bucket" in capsys.readouterr().err
