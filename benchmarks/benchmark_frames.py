"""Frames for the data benchmarks: compressibility and copying costs depend on the pixels, so they must be realistic."""

import numpy as np

FRAME_SHAPE = (64, 64, 3)
NUM_ACTIONS = 15


def episodes(count: int, length: int, seed: int = 0) -> tuple[str, np.ndarray, np.ndarray]:
    """Episodes of CoinRun, or of a scrolling texture with a sprite where procgen is not installed.

    Returns:
        the name of what was rendered, frames uint8 (count, length, 64, 64, 3), actions int32 (count, length).
    """
    rng = np.random.default_rng(seed)
    actions = np.repeat(rng.integers(0, NUM_ACTIONS, (count, length // 4 + 1)), 4, axis=1)[:, :length].astype(np.int32)
    actions[rng.random(actions.shape) < 0.5] = 7  # to the right, where there is more to see
    try:
        from procgen import ProcgenGym3Env
    except ImportError:
        return "synthetic", _scrolling(rng, count, length), actions
    environment = ProcgenGym3Env(num=count, env_name="coinrun", start_level=seed, rand_seed=seed)
    frames = np.empty((count, length, *FRAME_SHAPE), np.uint8)
    for step in range(length):
        frames[:, step] = environment.observe()[1]["rgb"]
        environment.act(actions[:, step])
    environment.close()
    return "coinrun", frames, actions


def _scrolling(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    height, width, channels = FRAME_SHAPE
    blocks = rng.integers(0, 256, (count, height // 8, (width + length) // 8 + 1, channels), dtype=np.uint8)
    world = blocks.repeat(8, axis=1).repeat(8, axis=2) ^ rng.integers(0, 4, (count, height, 1, channels), np.uint8)
    frames = np.stack([world[:, :, step : step + width] for step in range(length)], axis=1)
    frames[:, :, 28:36, 28:36] = 255
    return frames
