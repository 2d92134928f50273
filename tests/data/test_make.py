"""The maker: what is made is what was asked for, always the same, and an interrupted dataset ends up the same too."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jasmine.data.make import procgen_games
from jasmine.data.make.__main__ import main
from jasmine.data.make.maker import make_dataset
from jasmine.data.make.source import Episode, Skipped
from jasmine.data.opening import open_dataset

COINRUN = ["coinrun", "--num_episodes_train", "3", "--num_episodes_val", "2", "--num_episodes_test", "1"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def test_same_seed_makes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert main([*COINRUN, "--output_dir", str(tmp_path / name), *more]) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    a, c = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "c")
    assert not np.array_equal(a.read_window(0, 0, 1)[0], c.read_window(0, 0, 1)[0])


def test_lengths_and_counts_are_as_asked(tmp_path: Path) -> None:
    asked = ["--min_episode_length", "30", "--max_episode_length", "40", "--encoding", "raw"]
    assert main([*COINRUN, *asked, "--output_dir", str(tmp_path)]) == 0
    for split, episodes in (("train", 3), ("val", 2), ("test", 1)):
        dataset = open_dataset(tmp_path, split)
        assert len(dataset.lengths) == episodes
        assert all(30 <= length <= 40 for length in dataset.lengths)
        assert (dataset.frame_shape, dataset.fps, dataset.num_actions) == ((64, 64, 3), 15.0, 15)


def test_a_split_of_no_episodes_is_not_made(tmp_path: Path) -> None:
    asked = ["maze", "--num_episodes_train", "1", "--num_episodes_val", "0", "--num_episodes_test", "0"]
    assert main([*asked, "--max_episode_length", "20", "--output_dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["make.json", "train"]


def test_finished_dataset_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COINRUN, "--output_dir", str(tmp_path)]) == 0
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main([*COINRUN, "--output_dir", str(tmp_path)]) == 0
    assert "complete already" in capsys.readouterr().err
    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--policy", "random"], "policy hold, not random"),
        (["--num_episodes_val", "5"], "num_episodes_val 2, not 5"),
    ],
)
def test_going_on_with_other_options_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], named: str
) -> None:
    assert main([*COINRUN, "--output_dir", str(tmp_path)]) == 0
    before = tree(tmp_path)
    capsys.readouterr()
    assert main([*COINRUN, *more, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert error.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--min_episode_length", "50", "--max_episode_length", "40"], "--min_episode_length 50"),
        (["--min_episode_length", "0"], "--min_episode_length 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "first"], "--seed=first: expected a whole number"),
        (["--num_workers", "-1"], "--num_workers -1 must not be negative"),
        (["--num_episodes_train", "-3"], "--num_episodes_train -3 must not be negative"),
        (["--policy", "hodl"], "--policy=hodl: expected one of hold, random"),
        (["--polcy", "hold"], "unknown option --polcy; did you mean --policy?"),
        (["stray"], "unexpected argument 'stray'"),
        (["--quality", "90"], "--quality 90"),
        (["--encoding", "jpeg", "--quality", "101"], "--quality 101"),
        (["--frames_per_record", "0"], "--frames_per_record 0"),
        (["--num_episodes_train", "0", "--num_episodes_val", "0", "--num_episodes_test", "0"], "nothing to make"),
    ],
)
def test_impossible_options_create_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main([*COINRUN, *arguments, "--output_dir", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["coinru"], "nothing to make is called 'coinru'; did you mean coinrun? (there are: bigfish,"),
        ([], "say first what to make: python -m jasmine.data.make KIND"),
        (["--seed", "3", "coinrun"], "say first what to make"),
        (["video"], "--input_path: missing"),
    ],
)
def test_what_to_make_is_named_first(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1


def test_a_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([*COINRUN, "--output_dir", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_length_that_no_game_reaches_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bossfight", "--min_episode_length", "900", "--num_episodes_train", "1", "--output_dir", str(tmp_path)]
    assert main(asked) == 2  # the boss wins long before
    assert "--min_episode_length 900" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_and_run_again_is_the_same_as_never_killed(tmp_path: Path, num_workers: int) -> None:
    asked = ["coinrun", "--num_episodes_train", "200", "--num_episodes_val", "10", "--num_episodes_test", "0"]
    asked += ["--max_episode_length", "40", "--episodes_per_shard", "8"]
    command = [*asked, "--output_dir", str(tmp_path / "killed"), "--num_workers", str(num_workers)]
    maker = subprocess.Popen([sys.executable, "-m", "jasmine.data.make", *command], stderr=subprocess.DEVNULL)
    train = tmp_path / "killed" / "train"
    wait_for(lambda: len(list(train.glob("*.array_record"))) >= 3 or maker.poll() is not None)
    children = Path(f"/proc/{maker.pid}/task/{maker.pid}/children").read_text().split()
    os.kill(maker.pid, signal.SIGKILL)
    assert maker.wait() == -signal.SIGKILL
    assert not json.loads((train / "index.json").read_text())["complete"]
    assert len(children) >= num_workers
    wait_for(lambda: not any(_is_running(child) for child in children))

    assert main([*command, "--num_workers", "0"]) == 0
    assert main([*asked, "--output_dir", str(tmp_path / "straight")]) == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "straight")


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_skipped_items_are_remembered_when_gone_on_with(tmp_path: Path) -> None:
    options = procgen_games.Procgen(
        num_episodes_train=9, num_episodes_val=0, num_episodes_test=0, max_episode_length=20, episodes_per_shard=2
    )
    source = procgen_games.source(options)
    recorded: list[int] = []
    stop_at = 6

    def every_third_is_bad(split: str, item: int) -> Episode | Skipped:
        if item == stop_at:
            raise KeyboardInterrupt
        recorded.append(item)
        return Skipped("bad") if item % 3 == 1 else source.record(split, item)

    patchy = dataclasses.replace(source, record=every_third_is_bad)
    quiet = Console(quiet=True)
    interrupted = dataclasses.replace(options, output_dir=str(tmp_path / "interrupted"))
    with pytest.raises(KeyboardInterrupt):
        make_dataset("coinrun", interrupted, patchy, quiet)
    assert recorded == [0, 1, 2, 3, 4, 5]
    recorded.clear()
    stop_at = -1
    make_dataset("coinrun", interrupted, patchy, quiet)
    assert recorded == [6, 7, 8]  # episodes 0, 2, 3, 5 fill two shards
    make_dataset("coinrun", dataclasses.replace(options, output_dir=str(tmp_path / "straight")), patchy, quiet)
    assert tree(tmp_path / "interrupted") == tree(tmp_path / "straight")


def test_importing_is_quiet() -> None:
    command = "from jasmine.data.make import procgen_games as p; p.source(p.Procgen())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == ""
