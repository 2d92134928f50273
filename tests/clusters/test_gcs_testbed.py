"""The fake Cloud Storage is one to the clients that talk to the real one, and misbehaves when told to."""

import subprocess
import sys
import textwrap

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.clusters.gcs import BUCKET, Gcs
from tests.jobs import REPO


def python(code: str, *, ok: bool = True) -> str:
    """Run Python with the environment that the storage asks for: some clients read it only once."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def bucket(gcs: Gcs):
    from google.cloud import storage

    client = storage.Client(project="test")
    yield client.bucket(BUCKET)
    client.close()


def test_objects_have_generations_and_every_write_can_be_made_conditional(bucket) -> None:
    from google.api_core.exceptions import NotFound, PreconditionFailed

    blob = bucket.blob("a/b c+d%.txt")
    blob.upload_from_string(b"one", if_generation_match=0)
    first = blob.generation
    with pytest.raises(PreconditionFailed):
        bucket.blob("a/b c+d%.txt").upload_from_string(b"again", if_generation_match=0)
    blob.upload_from_string(b"two", if_generation_match=first)
    assert blob.generation > first
    with pytest.raises(PreconditionFailed):
        blob.delete(if_generation_match=first)
    assert blob.download_as_bytes() == b"two"
    assert blob.download_as_bytes(start=1, end=1) == b"w"
    with pytest.raises(NotFound):
        bucket.blob("none").download_as_bytes()
    blob.metadata = {"k": "v"}
    blob.patch()
    assert bucket.get_blob("a/b c+d%.txt").metadata == {"k": "v"}
    blob.delete(if_generation_match=blob.generation)
    assert bucket.get_blob("a/b c+d%.txt") is None


def test_composing_copying_and_moving(bucket) -> None:
    from google.api_core.exceptions import NotFound, PreconditionFailed

    whole, piece = bucket.blob("whole"), bucket.blob("piece")
    whole.upload_from_string(b"1\n")
    piece.upload_from_string(b"2\n")
    generation = whole.generation
    whole.compose([whole, piece], if_generation_match=generation)
    assert whole.download_as_bytes() == b"1\n2\n"
    with pytest.raises(PreconditionFailed):
        bucket.blob("whole").compose([whole, piece], if_generation_match=generation)
    with pytest.raises(NotFound):
        bucket.blob("whole").compose([whole, bucket.blob("none")])
    bucket.copy_blob(piece, bucket, "copy")
    assert bucket.blob("copy").rewrite(whole)[0] is None
    bucket.move_blob(bucket.blob("copy"), "moved")
    assert sorted(blob.name for blob in bucket.list_blobs()) == ["moved", "piece", "whole"]
    assert bucket.blob("moved").download_as_bytes() == b"1\n2\n"


def test_large_objects_go_up_in_pieces_and_come_back_whole(bucket) -> None:
    contents = bytes(range(256)) * 4096 * 3
    blob = bucket.blob("large", chunk_size=1 << 20)
    blob.upload_from_string(contents)
    assert bucket.get_blob("large").size == len(contents)
    assert bucket.blob("large").download_as_bytes() == contents


def test_listings_have_prefixes_offsets_and_pages(bucket) -> None:
    for name in ("a/1", "a/2", "a/b/3", "c", "d/4"):
        bucket.blob(name).upload_from_string(name)
    listing = bucket.list_blobs(delimiter="/")
    assert [blob.name for blob in listing] == ["c"]
    assert sorted(listing.prefixes) == ["a/", "d/"]
    assert [blob.name for blob in bucket.list_blobs(prefix="a/", page_size=2)] == ["a/1", "a/2", "a/b/3"]
    assert [blob.name for blob in bucket.list_blobs(start_offset="a/2", end_offset="d")] == ["a/2", "a/b/3", "c"]


@pytest.mark.slow
def test_gcsfs_and_epath_work_unmodified(gcs: Gcs) -> None:
    print(
        python(f"""
        from etils import epath
        import gcsfs
        root = epath.Path("{gcs.root}/tree")
        (root / "a").mkdir(parents=True)
        (root / "a" / "x.txt").write_text("one")
        (root / "a" / "b").mkdir()
        (root / "a" / "b" / "y.bin").write_bytes(b"0" * (6 << 20))
        assert sorted(p.name for p in (root / "a").iterdir()) == ["b", "x.txt"], list((root / "a").iterdir())
        assert (root / "a").is_dir() and not (root / "a").is_file() and not (root / "none").exists()
        assert (root / "a" / "x.txt").read_text() == "one"
        assert [p.name for p in root.glob("*/*.txt")] == ["x.txt"]
        (root / "a" / "x.txt").rename(root / "z.txt")
        (root / "z.txt").copy(root / "w.txt")
        assert sorted(p.name for p in root.iterdir()) == ["a", "w.txt", "z.txt"]
        fs = gcsfs.GCSFileSystem()
        with fs.open("{BUCKET}/tree/a/b/y.bin", "rb") as f:
            f.seek(100)
            assert f.read(4) == b"0000"
        root.rmtree()
        assert not root.exists()
        """)
    )
    assert gcs.objects() == {}


@pytest.mark.slow
def test_array_record_reads_a_shard_unmodified(gcs: Gcs, tmp_path, bucket) -> None:
    shard = tmp_path / "shard.array_record"
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for index in range(50):
        writer.write(bytes([index]) * 10_000)
    writer.close()
    bucket.blob("data/shard.array_record").upload_from_filename(str(shard))
    python(f"""
        from array_record.python.array_record_module import ArrayRecordReader
        reader = ArrayRecordReader("{gcs.root}/data/shard.array_record")
        assert reader.num_records() == 50
        assert reader.read([7, 49]) == [bytes([7]) * 10_000, bytes([49]) * 10_000]
    """)
    assert [one for one in gcs.requests if one["method"] == "GET" and one["path"].endswith("/data/shard.array_record")]


@pytest.mark.slow
def test_what_imports_jasmine_sees_at_once_what_others_write(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients' caches of listings are off in production: nothing of the environment here says so."""
    for name in ("FSSPEC_GCS_USE_LISTINGS_CACHE", "EPATH_USE_TF"):
        monkeypatch.delenv(name, raising=False)

    def sees(first: str, folder: str) -> str:
        return python(f"""
        {first}
        import os
        from etils import epath
        from google.cloud import storage
        folder, bucket = epath.Path("{gcs.root}/{folder}"), storage.Client(project="test").bucket("{BUCKET}")
        seen = []
        for step in (1, 2):
            bucket.blob(f"{folder}/{{step}}/commit_success.txt").upload_from_string(b"")
            seen.append(len(list(folder.iterdir())))
        print(seen, os.environ.get("EPATH_USE_TF"))
        """).strip()

    assert sees("", "a") == "[1, 1] None", "gcsfs has no cache any more, and this test no sense"
    assert sees("import jasmine", "b") == "[1, 2] false"


@pytest.mark.slow
def test_tensorstore_reads_what_it_wrote_through_503s(gcs: Gcs) -> None:
    code = f"""
        import numpy as np, tensorstore as ts
        spec = {{"driver": "zarr3", "kvstore": "{gcs.root}/array/"}}
        array = ts.open(spec, create=True, dtype=ts.float32, shape=[64, 64]).result()
        array.write(np.arange(4096, dtype=np.float32).reshape(64, 64)).result()
        again = ts.open(spec).result().read().result()
        assert again[63, 63] == 4095
        store = ts.KvStore.open({{"driver": "ocdbt", "base": "{gcs.root}/ocdbt/"}}).result()
        store.write("k", b"v").result()
        store.write("k", b"w").result()
        assert ts.KvStore.open({{"driver": "ocdbt", "base": "{gcs.root}/ocdbt/"}}).result().read("k").result().value == b"w"
    """
    gcs.fail_next(503, count=2, method="POST", contains="/upload/")
    python(code)
    assert [one["status"] for one in gcs.requests].count(503) == 2


def test_a_killed_storage_comes_back_with_what_it_had(gcs: Gcs, bucket) -> None:
    bucket.blob("kept").upload_from_string(b"before")
    blob = bucket.blob("kept")
    blob.upload_from_string(b"after")
    url = gcs.url
    gcs.kill()
    gcs.start()
    assert gcs.url == url
    assert bucket.blob("kept").download_as_bytes() == b"after"
    blob.upload_from_string(b"later", if_generation_match=blob.generation)


def test_what_goes_wrong_when_told(gcs: Gcs, bucket) -> None:
    from google.api_core.exceptions import PreconditionFailed, ServiceUnavailable, TooManyRequests

    blob = bucket.blob("x")
    gcs.fail_next(503, method="POST")
    with pytest.raises(ServiceUnavailable):
        blob.upload_from_string(b"x" * 1000, retry=None)
    gcs.lose_next(method="POST")  # done, but the client is not told: its own retry finds that out
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"x" * 1000, if_generation_match=0)
    gcs.break_bodies()
    assert bucket.blob("x").download_as_bytes() == b"x" * 1000
    assert [one["status"] for one in gcs.requests if one["query"].get("alt") == "media"] != [200]
    gcs.limit_writes(60)
    bucket.blob("y").upload_from_string(b"1", retry=None)
    with pytest.raises(TooManyRequests):
        bucket.blob("y").upload_from_string(b"2", retry=None)
    gcs.heal()
    bucket.blob("y").upload_from_string(b"2", retry=None)
