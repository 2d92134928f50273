"""The bytes of one record: consecutive frames of an episode and their actions, encoded and decoded.

Record payload, n frames (n is smaller than `frames_per_record` only at an episode's end):
    raw, zstd:    uint8 pixels (n, H, W, C) · int32 little-endian actions (n, *action_shape)
    image codecs: uint32 little-endian sizes (n) · n encoded images · the same actions
"zstd" is ArrayRecord's own chunk compression (lossless); the others leave the file uncompressed.

Invariant: a payload whose length differs from what the index implies is an error, never garbage.
"""

import io

import numpy as np
from PIL import Image

from jasmine.data.images import IMAGE_ERRORS, open_image
from jasmine.data.index import IMAGE_MODES, Index


class BadPayloadError(Exception):
    """The bytes are not those of such a record."""


def encode(index: Index, frames: np.ndarray, actions: np.ndarray | None) -> bytes:
    """The payload of frames uint8 (n, H, W, C) and their actions, `ACTION_DTYPE` (n, *action_shape)."""
    tail = b"" if actions is None else actions.tobytes()
    if index.encoding in ("raw", "zstd"):
        return frames.tobytes() + tail
    images = [_encode_image(index, frame) for frame in frames]
    sizes = np.array([len(image) for image in images], "<u4")
    return b"".join([sizes.tobytes(), *images, tail])


def decode_frames(index: Index, payload: bytes, held: int, low: int, frames: np.ndarray) -> int:
    """Decodes into `frames` those from `low` on, of a record that holds `held`; returns the offset of the actions.

    Raises:
        BadPayloadError: it is not the payload of so many frames.
    """
    if index.encoding in ("raw", "zstd"):
        frame_bytes = index.frame_bytes
        actions_at = held * frame_bytes
        expected = actions_at + held * index.action_bytes
        if len(payload) != expected:
            raise BadPayloadError(f"{len(payload)} bytes, not {expected}")
        pixels = np.frombuffer(payload, np.uint8, len(frames) * frame_bytes, low * frame_bytes)
        frames[:] = pixels.reshape(frames.shape)
        return actions_at
    if len(payload) < 4 * held:
        raise BadPayloadError(f"{len(payload)} bytes cannot hold {held} images")
    ends = 4 * held + np.cumsum(np.frombuffer(payload, "<u4", held), dtype=np.int64)
    starts = [4 * held, *ends[:-1]]
    if len(payload) != ends[-1] + held * index.action_bytes:
        raise BadPayloadError(f"{len(payload)} bytes, not the {ends[-1] + held * index.action_bytes} of its images")
    for k, frame in enumerate(frames, low):
        _decode_image(index, payload[starts[k] : ends[k]], frame)
    return int(ends[-1])


def _encode_image(index: Index, frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(frame[..., 0] if index.frame_shape[2] == 1 else frame)
    match index.encoding:
        case "png":
            image.save(buffer, "PNG")
        case "webp-lossless":
            image.save(buffer, "WEBP", lossless=True)
        case "webp":
            image.save(buffer, "WEBP", quality=index.quality)
        case "jpeg":
            image.save(buffer, "JPEG", quality=index.quality)
    return buffer.getvalue()


def _decode_image(index: Index, encoded: bytes, frame: np.ndarray) -> None:
    try:
        with open_image(encoded) as image:
            if (size := (image.height, image.width)) != frame.shape[:2]:  # before its pixels take memory
                raise BadPayloadError(f"image of {size}, not of {frame.shape[:2]}")
            pixels = np.asarray(image.convert(IMAGE_MODES[index.frame_shape[2]]))
    except IMAGE_ERRORS as error:
        raise BadPayloadError(f"image: {error}") from error
    frame[:] = pixels.reshape(frame.shape)
