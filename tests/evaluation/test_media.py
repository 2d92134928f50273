import io
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jasmine.errors import UserError
from jasmine.evaluation.media import (
    ACTION_COLOURS,
    BACKGROUND,
    Column,
    comparison,
    curve_plot,
    gif,
    side_by_side,
    to_uint8,
    write_gif,
    write_mp4,
)

RNG = np.random.default_rng(0)
CLIPS = RNG.integers(0, 256, (3, 5, 16, 20, 3), dtype=np.uint8)


def find(picture: np.ndarray, frame: np.ndarray, scale: int) -> list[tuple[int, int]]:
    """Where a frame stands, whole and enlarged by `scale`, in a picture."""
    wanted = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = wanted.shape[:2]
    corners = np.argwhere((picture[: -height + 1, : -width + 1] == wanted[0, 0]).all(-1))
    return [(y, x) for y, x in corners if (picture[y : y + height, x : x + width] == wanted).all()]


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def test_comparison_shows_truth_above_guess():
    image = np.asarray(comparison(jnp.ones((3, 5, 8, 8, 3)), jnp.zeros((3, 5, 8, 8, 3)), clips=2, frames=4))
    assert image.shape == (2 * 2 * 10 * 16, 4 * 10 * 16, 3)
    assert image[80, 80].tolist() == [1, 1, 1]
    assert image[240, 80].tolist() == [0, 0, 0]
    assert comparison(jnp.ones((1, 2, 8, 8, 1)), jnp.ones((1, 2, 8, 8, 1))).shape[-1] == 3


def test_side_by_side_covers_no_pixel_of_any_frame():
    guess = CLIPS[::-1]
    pictures = side_by_side(
        [Column("truth", CLIPS), Column("generated", guess)],
        actions_BT=np.full((3, 5), 2),
        action_names=["a", "b", "a very long name of an action that does not fit"],
        prompt_frames=1,
        tile=64,
    )
    assert pictures.shape[0] == 5
    for t in range(5):
        for clip in range(3):
            assert len(find(pictures[t], CLIPS[clip, t], 4)) == 2  # once as the truth, once as another's guess


def test_actions_are_drawn_in_their_colour_on_the_frame_they_are_taken_at():
    actions = np.array([[0, 1, 2, 1, -1]])
    pictures = side_by_side([Column("truth", np.zeros_like(CLIPS[:1]))], actions_BT=actions, action_names=["left"])
    for t, action in enumerate(actions[0]):
        drawn = colours(pictures[t]) & set(ACTION_COLOURS)
        assert drawn == ({ACTION_COLOURS[action]} if action >= 0 else set())


def test_float_and_grey_videos():
    grey = RNG.random((1, 2, 16, 16, 1)).astype(np.float32)
    picture = side_by_side([Column("truth", grey)], tile=16)[0]
    assert find(picture, np.repeat(to_uint8(grey)[0, 0], 3, axis=-1), 1)
    assert to_uint8(np.array([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]


def test_gif_plays_all_frames_at_the_speed_of_the_data_in_their_colours(tmp_path: Path):
    clips = np.broadcast_to(np.arange(5, dtype=np.uint8).reshape(1, 5, 1, 1, 1) * 50, (1, 5, 16, 16, 3))
    pictures = side_by_side([Column("truth", clips)], actions_BT=np.array([[0, 1, 2, 3, -1]]))
    write_gif(tmp_path / "clip.gif", pictures, fps=20)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (5, 50, 0)
        for t in range(5):
            image.seek(t)
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - pictures[t]).max() < 30
            assert np.abs(shown - pictures[t]).mean() < 3
            assert np.abs(shown[0, 0] - BACKGROUND).max() <= 8


def test_gif_keeps_the_few_pixels_of_an_action_true_to_their_colour():
    noise = RNG.integers(0, 256, (1, 2, 64, 64, 3), dtype=np.uint8)
    pictures = side_by_side([Column("truth", noise)], actions_BT=np.array([[0, 1]]))
    with Image.open(io.BytesIO(gif(pictures))) as image:
        assert ACTION_COLOURS[0] in colours(np.asarray(image.convert("RGB")))


def test_mp4_plays_all_frames_and_pads_odd_sides(tmp_path: Path):
    pictures = np.broadcast_to(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * 50, (5, 33, 47, 3))
    write_mp4(tmp_path / "clip.mp4", pictures, fps=7.5)
    with av.open(str(tmp_path / "clip.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 7.5)
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(34, 48, 3)] * 5
    for shown, true in zip(frames, pictures, strict=True):
        assert np.abs(shown[:33, :47].astype(int) - true).max() <= 8


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="cannot write"):
        write_gif(tmp_path / "no" / "clip.gif", CLIPS[0])


def test_curve_plot_draws_curves_and_passes_over_missing_frames():
    curve = np.array([np.nan, 3.0, 2.0, 1.0])
    image = np.asarray(
        Image.open(io.BytesIO(curve_plot({"sampled": curve, "copied": curve - 1}, "PSNR", 1))).convert("RGB")
    )
    assert ACTION_COLOURS[0] in colours(image)
    assert ACTION_COLOURS[1] in colours(image)
