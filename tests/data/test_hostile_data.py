"""Datasets of strangers: whatever is in their files is data or one line that says which file is wrong, and never runs."""

import dataclasses
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jasmine.data.make.recordings import decode
from jasmine.data.opening import open_dataset
from jasmine.data.tokens import EncoderInfo, Origin, TokenDataset, TokenInfo, TokenMetadata, open_training_data
from jasmine.data.verify import main as verify
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from tests.fuzz import altered, damaged, odd_values, tries

ENCODINGS = ("raw", "zstd", "png", "jpeg", "webp")


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small split in each encoding, of two shards."""
    made = {}
    rng = np.random.default_rng(0)
    for encoding in ENCODINGS:
        folder = tmp_path_factory.mktemp(encoding) / "train"
        with EpisodeWriter(
            folder, frame_shape=(8, 8, 3), fps=15, encoding=encoding, num_actions=4, episodes_per_shard=2, env="x"
        ) as writer:
            for length in (3, 9, 17):
                writer.write(rng.integers(0, 256, (length, 8, 8, 3), np.uint8), rng.integers(0, 4, length))
        made[encoding] = folder
    return made


def read_all(folder: Path) -> None:
    """Open a split and read what it says it has; what is wrong with it is one line that names the folder."""
    try:
        dataset = open_dataset(folder)
        for episode in range(min(4, len(dataset.lengths))):
            dataset.read_episode(episode)
            dataset.read_window(episode, 0, 1)
            dataset.locate(episode, 0)
    except UserError as error:
        check_names(error, folder)


def check_names(error: UserError, folder: Path) -> None:
    assert "\n" not in str(error)
    assert str(folder) in str(error)


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_indices(splits: dict[str, Path], tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "split"
    shutil.copytree(splits[encoding], folder)
    index = (folder / "index.json").read_bytes()

    @tries(120)
    @given(st.one_of(damaged(index), altered(json.loads(index)).map(lambda value: json.dumps(value).encode())))
    def test(data: bytes) -> None:
        (folder / "index.json").write_bytes(data)
        read_all(folder)

    read_all(folder)
    test()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shards(splits: dict[str, Path], tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "split"
    shutil.copytree(splits[encoding], folder)
    shard = folder / "shard-00000.array_record"
    whole = shard.read_bytes()
    index = json.loads((folder / "index.json").read_text())

    @tries(40)
    @given(damaged(whole), st.booleans())
    def test(data: bytes, whole_index: bool) -> None:
        index["shards"][0]["size"] = len(whole) if whole_index else len(data)
        (folder / "index.json").write_text(json.dumps(index))
        shard.write_bytes(data)
        read_all(folder)

    test()


def test_indices_of_tokens(splits: dict[str, Path], tmp_path: Path) -> None:
    encoder = EncoderInfo("runs/tok", "train_tokenizer_vqvae", 6, "0123", {"patch_size": 4})
    tokens = TokenInfo("tokens", "uint8", (4,), 2, 1, (8, 8, 3), (), encoder, None)
    metadata = dataclasses.asdict(TokenMetadata(tokens, Origin("data/train", 29, (1,), 100)))
    folder = tmp_path / "split"
    with EpisodeWriter(folder, frame_shape=tokens.window_shape, fps=15, encoding="raw", metadata=metadata) as writer:
        for windows in (2, 16):
            writer.write(np.zeros((windows, *tokens.window_shape), np.uint8))
    index = json.loads((folder / "index.json").read_text())

    def read() -> None:
        try:
            dataset = open_training_data(folder)
            dataset.read_windows([0, 1], [0, 0], 2)
            dataset.locate(1, 0)
        except UserError as error:
            check_names(error, folder)

    @tries(120)
    @given(altered(index["metadata"]))
    def test(metadata: object) -> None:
        (folder / "index.json").write_text(json.dumps(index | {"metadata": metadata}))
        read()

    assert isinstance(open_training_data(folder), TokenDataset)
    read()
    for path, value in {
        "tokens.dtype": "x", "tokens.shape": [-2, -2], "tokens.stride": 2**64, "origin.skipped_episodes": [10**30],
    }.items():  # fmt: skip
        part, key = path.split(".")
        wrong = index["metadata"] | {part: index["metadata"][part] | {key: value}}
        (folder / "index.json").write_text(json.dumps(index | {"metadata": wrong}))
        with pytest.raises(UserError, match=f"index.json: metadata.{path} = "):
            open_training_data(folder)
    test()


def test_an_index_reads_no_files_of_others_and_reserves_no_memory(splits: dict[str, Path], tmp_path: Path) -> None:
    for key, value in {
        "file": "../../etc/passwd", "size": 0, "lengths": [10**15], "frame_shape": [10**6, 10**6, 3], "frames_per_record": 0,
        "num_actions": -1, "action_shape": [10**9, 10**9], "fps": 1e400,
    }.items():  # fmt: skip
        folder = tmp_path / key
        shutil.copytree(splits["raw"], folder)
        index = json.loads((folder / "index.json").read_text())
        (index["shards"][0] if key in ("file", "size", "lengths") else index)[key] = value
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="index"):
            open_dataset(folder).read_episode(0)


def split_of_images(folder: Path, image: bytes) -> Path:
    """A split whose only frame is this, whatever it is."""
    with EpisodeWriter(folder, frame_shape=(8, 8, 3), fps=15, encoding="png") as writer:
        writer.write(np.zeros((1, 8, 8, 3), np.uint8))
    shard = folder / "shard-00000.array_record"
    records = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    records.write(np.array([len(image)], "<u4").tobytes() + image)
    records.close()
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["size"] = shard.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_images_in_records_are_no_programs_and_no_bombs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = tmp_path / "canary"
    program = (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n({canary}) (w) file closefile\nshowpage\n"
    )
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for name, image in {"eps": program.encode(), "bomb": bomb.getvalue(), "nothing": b""}.items():
        folder = split_of_images(tmp_path / name, image)
        with pytest.raises(UserError, match="record 0 is corrupt"):
            open_dataset(folder).read_episode(0)
        assert verify([str(folder)]) != 0
    assert not canary.exists()


def test_a_video_is_not_a_list_of_other_files(tmp_path: Path) -> None:
    real = tmp_path / "real.mp4"
    with av.open(str(real), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        for _ in range(5):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    assert len(decode(str(real), 5.0, 16, 16)) == 5
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.mp4\n#EXT-X-ENDLIST\n"
    for name, text in {"hls": playlist, "concat": "ffconcat version 1.0\nfile real.mp4\n"}.items():
        (tmp_path / f"{name}.mp4").write_text(text)
        with pytest.raises(UserError, match=r"cannot be decoded"):
            decode(str(tmp_path / f"{name}.mp4"), 5.0, 16, 16)


@tries(60)
@given(odd_values)
def test_verify_takes_any_index(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "index.json").write_text(json.dumps(value))
        assert verify([folder]) != 0
    assert not os.path.exists(folder)
