"""Token datasets whose windows say where they come from, made without a trained model."""

from pathlib import Path

import numpy as np

from jasmine.data.tokenize import Encoder, Options, tokenize
from jasmine.data.tokens import EncoderInfo
from jasmine.data.writer import EpisodeWriter

SEQ_LEN = 4
LENGTHS = (10, 3, 7, 40, 4, 2, 25)  # two are shorter than a window


def write_source(root: Path, lengths=LENGTHS, *, split: str = "train", actions: bool = True) -> Path:
    """Every frame holds its episode and its number in it, and so does its action."""
    options = {"num_actions": 10_000} if actions else {}
    with EpisodeWriter(root / split, frame_shape=(8, 8, 3), fps=1, encoding="raw", **options) as writer:
        for episode, length in enumerate(lengths):
            frames = np.zeros((length, 8, 8, 3), np.uint8)
            frames[..., 0], frames[..., 1] = episode, np.arange(length)[:, None, None]
            writer.write(frames, 100 * episode + np.arange(length) if actions else None)
    return root


def info(job: str, fingerprint: str = "f00d") -> EncoderInfo:
    return EncoderInfo(f"/runs/{job}", job, 10, fingerprint, {"num_latents": 1024})


def tokens_of(videos: np.ndarray) -> np.ndarray:
    """(B, T, 3): the frame's episode and number, and its place in the window, as a tokenizer counts time."""
    places = np.broadcast_to(np.arange(videos.shape[1]), videos.shape[:2])
    return np.stack([videos[:, :, 0, 0, 0], videos[:, :, 0, 0, 1] + np.int32(300), places], -1).astype(np.int32)


def encoder(kind: str = "tokens", *, lam: bool = False, batch_size: int = 8, fingerprint: str = "f00d") -> Encoder:
    def encode(videos: np.ndarray):
        assert len(videos) == batch_size
        values = tokens_of(videos)
        if kind == "latents":
            values = np.stack([values, -values], -1).astype(np.float32) / 7
        return values, videos[:, 1:, 0, 0, 1] % 6 if lam else None

    describe = {
        "kind": kind,
        "dtype": "uint16" if kind == "tokens" else "float32",
        "shape": (3,) if kind == "tokens" else (3, 2),
        "frame_shape": (8, 8, 3),
        "tokenizer": info("train_tokenizer_vqvae" if kind == "tokens" else "train_tokenizer_mae", fingerprint),
        "lam": info("train_lam") if lam else None,
    }
    return Encoder(encode, batch_size, describe)


def write_tokens(source: Path, target: Path, made_by: Encoder | None = None, **options) -> Path:
    options = {"seq_len": SEQ_LEN, "windows_per_shard": 16, **options}
    tokenize(Options(data=str(source), output_dir=str(target), **options), made_by or encoder())
    return target
