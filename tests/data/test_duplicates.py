"""Duplicates finds episodes that occur twice, within a split and across splits, and only those."""

from pathlib import Path

import numpy as np
import pytest

from jasmine.data.duplicates import EpisodeId, duplicates, main
from jasmine.data.index import Encoding
from jasmine.data.opening import open_dataset
from jasmine.data.writer import EpisodeWriter

RNG = np.random.default_rng(0)
A, B, C, D = (RNG.integers(0, 255, (length, 8, 8, 3), dtype=np.uint8) for length in (20, 30, 20, 600))


def write(folder: Path, episodes: list[np.ndarray], encoding: Encoding = "zstd") -> None:
    with EpisodeWriter(folder, frame_shape=(8, 8, 3), fps=10, encoding=encoding) as writer:
        for frames in episodes:
            writer.write(frames)


def test_different_episodes_are_no_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    almost = A.copy()
    almost[-1, 7, 7, 2] ^= 1
    almost_long = D.copy()
    almost_long[-1, 7, 7, 2] ^= 1
    write(tmp_path / "train", [A, B, C, D, B[:29]])
    write(tmp_path / "val", [almost, almost_long])
    assert main([str(tmp_path)]) == 0
    assert "0 repeated episodes, 0 of them across splits; read train, val" in capsys.readouterr().out


def test_repeats_within_a_split_are_told_but_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train", [A, B, A, C, A])
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "train episode 2 is the same as train episode 0 (20 frames)",
        "train episode 4 is the same as train episode 0 (20 frames)",
    ]


def test_repeats_across_splits_fail_whatever_the_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train", [A, D, B])
    write(tmp_path / "val", [C, D], "raw")
    write(tmp_path / "test", [B], "png")
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "val episode 1 is the same as train episode 1 (600 frames)",
        "test episode 0 is the same as train episode 2 (30 frames)",
    ]
    assert "2 repeated episodes, 2 of them across splits" in lines[2]


def test_first_frames_finds_the_same_recording_cut_off_differently(tmp_path: Path) -> None:
    write(tmp_path / "train", [B, A])
    write(tmp_path / "val", [B[:25], A[:9]])
    datasets = {split: open_dataset(tmp_path, split) for split in ("train", "val")}
    assert duplicates(datasets) == []
    assert duplicates(datasets, first_frames=10) == [[EpisodeId("train", 0), EpisodeId("val", 0)]]
    assert main([str(tmp_path), "--first_frames", "10"]) == 1
    assert main([str(tmp_path), "--first_frames", "26"]) == 0


def test_a_repeat_within_another_split_than_the_first_counts_as_across(tmp_path: Path) -> None:
    write(tmp_path / "train", [A])
    write(tmp_path / "val", [A, A])
    assert main([str(tmp_path)]) == 1


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
