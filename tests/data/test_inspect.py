"""Inspect prints what a dataset holds and its pictures show its frames."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jasmine.data.inspect import LABEL_WIDTH, MARGIN, animation, choose, contact_sheet, main
from jasmine.data.opening import open_dataset
from jasmine.data.writer import EpisodeWriter


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Episode e has 10 + e frames of 32×64; frame t of it is red t·10, green e·50, blue 7."""
    for split, episodes in (("train", 5), ("val", 2)):
        with EpisodeWriter(
            tmp_path / "data" / split,
            frame_shape=(32, 64, 3),
            fps=20,
            num_actions=3,
            env="colours",
            metadata={"action_names": ["left", "stay", "right"]},
        ) as writer:
            for e in range(episodes):
                frames = np.zeros((10 + e, 32, 64, 3), np.uint8)
                frames[..., 0] = (np.arange(10 + e) * 10)[:, None, None]
                frames[..., 1:] = (e * 50, 7)
                writer.write(frames, np.where(np.arange(10 + e) < 3, 2, 0))
    return tmp_path / "data"


def test_prints_counts_shapes_lengths_and_actions(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(dataset)]) == 0
    train, val = capsys.readouterr().out.split("val: ")
    assert train.startswith("train: 5 episodes, 60 frames, 0.1 minutes at 20 fps")
    assert "32×64×3 uint8" in train
    assert "min 10, median 12, max 14 frames" in train
    assert "colours; zstd" in train
    assert "0 left          75.0%" in train
    assert "1 stay           0.0%" in train
    assert "2 right         25.0%" in train
    assert val.startswith("2 episodes, 21 frames")
    size = (dataset / "train" / "shard-00000.array_record").stat().st_size
    assert f"{size / 60:,.0f} bytes a frame" in train


def test_contact_sheet_has_a_row_per_episode_and_time_runs_to_the_right(dataset: Path) -> None:
    sheet = np.asarray(contact_sheet(open_dataset(dataset), [1, 4], columns=3))
    tile_height, tile_width = 64 + MARGIN, 128 + MARGIN  # enlarged by two
    for row, (episode, last) in enumerate(((1, 10), (4, 13))):
        for column, time in enumerate((0, last / 2, last)):
            pixel = sheet[MARGIN + row * tile_height + 30, LABEL_WIDTH + column * tile_width + 60]
            assert tuple(pixel) == (round(time) * 10, episode * 50, 7)
    assert (sheet[:MARGIN] == 255).all()


def test_animation_shows_episodes_side_by_side_for_some_seconds(dataset: Path) -> None:
    pictures = animation(open_dataset(dataset), [0, 4], seconds=0.6)
    assert len(pictures) == 12
    assert pictures[0].size == (2 * 128 + MARGIN, 64)
    for time, picture in enumerate(pictures):
        assert picture.getpixel((10, 10)) == (min(time, 9) * 10, 0, 7)  # ended after 10 frames
        assert picture.getpixel((200, 10)) == (time * 10, 200, 7)


def test_out_writes_the_pictures_and_nothing_goes_into_the_data(dataset: Path, tmp_path: Path) -> None:
    before = sorted(dataset.rglob("*"))
    assert main([str(dataset), "--out", str(tmp_path / "pictures"), "--rows", "2", "--split", "val"]) == 0
    with Image.open(tmp_path / "pictures" / "contact_sheet.png") as sheet:
        assert sheet.height == 2 * (64 + MARGIN) + MARGIN
    with Image.open(tmp_path / "pictures" / "sample.gif") as gif:
        assert gif.n_frames == 11  # type: ignore[attr-defined]
        assert gif.info["duration"] == 50
    assert sorted(dataset.rglob("*")) == before


def test_chosen_episodes_differ_and_depend_on_the_seed_alone() -> None:
    assert choose(100, 8, 0) == choose(100, 8, 0) == sorted(set(choose(100, 8, 0)))
    assert choose(100, 8, 0) != choose(100, 8, 1)
    assert choose(3, 8, 0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--split", "vall"], "--split vall"),
        (["--rows", "0"], "--rows"),
        (["--image_height", "64"], "--image_width"),
    ],
)
def test_mistakes_are_one_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main([str(dataset), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert error.count("\n") == 1


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
