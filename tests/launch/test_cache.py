"""What a machine caches is bounded, and nothing that is in use is deleted."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import objects
from launch.cache import DAY, prune, used
from launch.objects import place
from launch.run_dir import RunDir, append
from tests.clusters.gcs import Gcs


def entries(folder: Path, count: int, days: float) -> list[Path]:
    """Directories with a file that were last used so long ago, the first of them longest."""
    made = [folder / f"{index:012d}" for index in range(count)]
    for index, entry in enumerate(made):
        entry.mkdir(parents=True)
        (entry / "file").touch(0o444)
        os.utime(entry, (time.time() - days * DAY + index,) * 2)
    return made


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    old, new = entries(tmp_path / "c", 5, 30), entries(tmp_path / "c" / "n", 0, 1)
    used(old[0])
    prune(tmp_path / "c", keep=3, days=7)
    assert sorted((tmp_path / "c").iterdir()) == [old[0], old[3], old[4]]
    assert not new
    prune(tmp_path / "nowhere", keep=0)


def test_what_was_used_lately_or_is_in_use_stays(tmp_path: Path) -> None:
    prune_days = {"keep": 0, "days": 7.0}
    lately = entries(tmp_path / "c", 2, 3)
    prune(tmp_path / "c", **prune_days)
    assert sorted((tmp_path / "c").iterdir()) == lately
    by_cwd, by_command, by_variable, unused = entries(tmp_path / "d", 4, 30)
    wait = "import sys; print(flush=True); sys.stdin.read()"
    processes = [
        subprocess.Popen([sys.executable, "-c", wait, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        for more, options in (
            ([], {"cwd": by_cwd}),
            ([f"{by_command}/launch/worker.py"], {}),
            ([], {"env": os.environ | {"PYTHONPATH": f"/x:{by_variable}"}}),
        )
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        prune(tmp_path / "d", **prune_days)
        assert sorted((tmp_path / "d").iterdir()) == [by_cwd, by_command, by_variable]
        assert not unused.exists()
    finally:
        for process in processes:
            process.communicate()
    prune(tmp_path / "d", **prune_days)
    assert not list((tmp_path / "d").iterdir())


def test_pieces_of_writers_that_were_killed_go_with_the_next_attempt(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(place("gs://bucket/r"))
    run.begin_attempt(1)
    append(run.root / "events.jsonl", json.dumps({"event": "one"}) + "\n")
    left = [folder / ".pieces" / "0123" for folder in (run.root, run.attempt(1))]
    for piece in left:
        piece.write_bytes(b"half a line")
    run.begin_attempt(2)
    assert all(piece.exists() for piece in left), "they may be a live writer's"
    monkeypatch.setattr(objects, "STALE_PIECE_SECONDS", -1.0)
    run.begin_attempt(3)
    assert not any(piece.exists() for piece in left), "however old their attempt is"
    assert [event["event"] for event in run.events()] == ["one"]
    assert run.attempts() == [1, 2, 3]
