"""Videos and image folders: the right picture at the right time, files dealt to splits, bad files named."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jasmine.data.make.__main__ import main
from jasmine.data.make.recordings import deal, decode, natural_key
from jasmine.data.opening import open_dataset
from jasmine.errors import UserError

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8)
CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


def colour_frames(indices: list[int]) -> np.ndarray:
    return np.broadcast_to(COLOURS[indices][:, None, None], (len(indices), 48, 64, 3)).copy()


def write_video(path: Path, frames: np.ndarray, fps: int, milliseconds: list[int] | None = None) -> None:
    codec = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown_colours(frames: np.ndarray) -> list[int]:
    """The index of the colour that each frame shows everywhere; fails if it shows none clearly."""
    distances = np.abs(frames.reshape(len(frames), -1, 1, 3).astype(int) - COLOURS).max((1, 3))
    assert (distances.min(1) < 24).all()
    return distances.argmin(1).tolist()


@pytest.mark.parametrize("suffix", [*CODECS, "gif"])
@pytest.mark.parametrize("fps", [30, 10, 7.5, 60])
def test_frame_k_is_what_is_shown_k_over_fps_seconds_in(tmp_path: Path, suffix: str, fps: float) -> None:
    """Two seconds at 30 fps, another colour every tenth of a second."""
    path = tmp_path / f"clip.{suffix}"
    if suffix == "gif":
        first, *others = [Image.fromarray(frame) for frame in colour_frames([k % 6 for k in range(20)])]
        first.save(path, save_all=True, append_images=others, duration=100)
    else:
        write_video(path, colour_frames([k // 3 % 6 for k in range(60)]), 30)
    frames = decode(str(path), fps, 24, 32)
    assert frames.shape == (round(2 * fps), 24, 32, 3)
    assert shown_colours(frames) == [int(k * 10 / fps + 1e-6) % 6 for k in range(len(frames))]


def test_variable_frame_rate_is_converted_by_time_stamps(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_video(path, colour_frames([0, 1, 2, 3, 4]), 25, milliseconds=[0, 40, 80, 1000, 2000])
    colours = shown_colours(decode(str(path), 10, 24, 32))
    assert colours[:20] == [0] + [2] * 9 + [3] * 10
    assert set(colours[20:]) == {4}


def test_a_video_held_sideways_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = colour_frames([0] * 5)
    frames[:, 24:] = COLOURS[2]  # red above blue
    write_video(path, frames, 10)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[matrix : matrix + 36])[0] == 65536
    # "Turn clockwise by 90 degrees", as phones held upright note it.
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 1 << 30)
    path.write_bytes(content)
    turned = decode(str(path), 10, 64, 48)
    assert turned.shape == (5, 64, 48, 3)
    assert shown_colours(turned[:, :, :20]) == [2] * 5  # what was below is now on the left
    assert shown_colours(turned[:, :, 28:]) == [0] * 5


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos, each of one colour pattern of its own, in a folder and a subfolder."""
    root = tmp_path_factory.mktemp("clips")
    (root / "more").mkdir()
    for number in range(12):
        pattern = [number % 6, number // 6, *([5 - number % 6] * 38)]
        folder = root / "more" if number % 2 else root
        write_video(folder / f"clip{number}.mp4", colour_frames(pattern), 20)
    (root / "notes.txt").write_text("not a video")
    return root


def test_video_dataset_holds_every_file_once(clips: Path, tmp_path: Path) -> None:
    asked = ["video", "--input_path", str(clips), "--output_path", str(tmp_path / "a"), "--target_fps", "20"]
    size = ["--target_width", "32", "--target_height", "24"]
    assert main([*asked, *size]) == 0
    found = []
    for split, count in (("train", 10), ("val", 1), ("test", 1)):
        dataset = open_dataset(tmp_path / "a", split)
        assert (dataset.frame_shape, dataset.fps, dataset.num_actions) == ((24, 32, 3), 20.0, None)
        assert dataset.lengths.tolist() == [40] * count
        found += [tuple(shown_colours(dataset.read_episode(e)[0])[:3]) for e in range(count)]
    assert sorted(found) == sorted((n % 6, n // 6, 5 - n % 6) for n in range(12))
    assert main([*asked[:3], "--output_path", str(tmp_path / "b"), *asked[5:], *size]) == 0
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_corrupt_video_is_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        write_video(videos / f"{number}.mp4", colour_frames([number] * 40), 20)
    whole = (videos / "2.mp4").read_bytes()
    (videos / "2.mp4").write_bytes(whole[: len(whole) // 2])
    asked = ["video", "--input_path", str(videos), "--output_dir", str(tmp_path / "d"), "--min_episode_length", "1"]
    asked += ["--train_ratio", "1", "--val_ratio", "0", "--test_ratio", "0"]
    assert main(asked) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {videos / '2.mp4'}: cannot be decoded")
    assert main([*asked, "--skip_bad"]) == 0
    assert f"left out: {videos / '2.mp4'}" in capsys.readouterr().err
    dataset = open_dataset(tmp_path / "d")
    assert sorted(shown_colours(dataset.read_episode(e)[0])[0] for e in range(len(dataset.lengths))) == [0, 1, 3]


def test_video_that_ends_early_and_no_video_at_all(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    noise = np.random.default_rng(0).integers(0, 255, (90, 48, 64, 3), dtype=np.uint8)
    write_video(path, noise, 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"clip\.mkv: pictures end after 1\.\d s of 3\.0 s"):
        decode(str(path), 10, 24, 32)
    for content in (b"", b"hello world" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"clip\.mkv: cannot be decoded"):
            decode(str(path), 10, 24, 32)


def test_short_recordings_are_left_out_and_nothing_left_is_an_error(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["video", "--input_path", str(clips), "--output_dir", str(tmp_path / "d"), "--target_fps", "10"]
    assert main([*asked, "--min_episode_length", "21"]) == 2
    error = capsys.readouterr().err
    assert "20 frames at 10 fps, fewer than --min_episode_length 21" in error
    assert "every recording was left out" in error.splitlines()[-1]


def test_other_files_since_the_dataset_was_begun(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for source in clips.glob("*.mp4"):
        (videos / source.name).write_bytes(source.read_bytes())
    asked = ["video", "--input_path", str(videos), "--output_dir", str(tmp_path / "d")]
    assert main(asked) == 0
    (videos / "clip0.mp4").unlink()
    assert main(asked) == 2
    assert "other files at --input_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--input_path", "nowhere"], "--input_path nowhere does not exist"),
        (["--train_ratio", "0.9"], "add up to 1.1"),
        (["--target_fps", "0"], "--target_fps 0"),
        (["--target_width", "0"], "--target_width"),
    ],
)
def test_impossible_recording_options(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    asked = ["video", "--input_path", str(clips), "--output_dir", str(tmp_path / "d"), *arguments]
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_folder_without_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video", "--input_path", str(tmp_path), "--output_dir", str(tmp_path / "d")]) == 2
    assert "no video files" in capsys.readouterr().err


def test_image_folders_become_episodes_in_natural_order(tmp_path: Path) -> None:
    for name in ("take2", "take10", "take1"):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        for number in range(1, 121):  # frame 9 comes before frame 10; 60 a second, another colour every sixth
            image = Image.fromarray(colour_frames([((number - 1) // 6 + int(name[4:])) % 6])[0])
            image.save(folder / f"frame{number}.png")
    asked = ["pngs", "--input_path", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    asked += ["--target_width", "32", "--original_fps", "60", "--target_fps", "10"]
    assert main(asked) == 0
    firsts = set()
    for split in ("train", "val", "test"):
        dataset = open_dataset(tmp_path / "out", split)
        assert (dataset.frame_shape, dataset.fps, dataset.num_actions) == ((24, 32, 3), 10.0, None)
        colours = shown_colours(dataset.read_episode(0)[0])
        assert colours == [(colours[0] + k) % 6 for k in range(20)]
        firsts.add(colours[0])
    assert firsts == {1, 2, 4}  # of take1, take2, take10


def test_truncated_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in" / "take"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    bad = folder / "7.png"
    bad.write_bytes(bad.read_bytes()[:500])
    asked = ["pngs", "--input_path", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert main([*asked, "--target_fps", "60"]) == 2
    assert f"error: {bad}: not a whole image" in capsys.readouterr().err


def test_deal_is_seeded_complete_and_leaves_no_split_empty() -> None:
    names = [f"{number}.mp4" for number in range(50)]
    dealt = deal(names, (0.8, 0.1, 0.1), seed=0)
    assert [len(part) for part in dealt.values()] == [40, 5, 5]
    assert sorted(name for part in dealt.values() for name in part) == sorted(names)
    assert dealt == deal(names, (0.8, 0.1, 0.1), seed=0)
    assert dealt != deal(names, (0.8, 0.1, 0.1), seed=1)
    assert [len(part) for part in deal(names[:3], (0.8, 0.1, 0.1), 0).values()] == [1, 1, 1]
    assert [len(part) for part in deal(names[:2], (0.8, 0.1, 0.1), 0).values()] == [2, 0, 0]
    assert [len(part) for part in deal(names[:5], (0.0, 0.5, 0.5), 0).values()] == [0, 2, 3]
    assert [len(part) for part in deal(names[:1], (0.8, 0.1, 0.1), 0).values()] == [1, 0, 0]


def test_natural_order() -> None:
    assert sorted(["f10", "f9", "f09", "a", "2b", "10b"], key=natural_key) == ["2b", "10b", "a", "f09", "f9", "f10"]
