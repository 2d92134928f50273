"""How good frames are, and how they change over a sampled clip. Pure functions; those of frames run under jit.

Videos are float in [0, 1]. A curve holds one number a frame, (S,): what a mean over the clip hides, that samples get worse
the further they are from the prompt, it shows.
"""

import math

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

ROUNDING_ERROR = 1 / (12 * 255**2)
"""Mean squared error of rounding a pixel to 8 bits. A smaller one counts as this one, which caps PSNR at 58.9 dB: a frame met
exactly, as copying has where nothing moves, must not make a mean infinite."""
GENIE_FRAME = 4
"""The generated frame at which Genie reports ΔPSNR."""


def frame_psnr(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each frame in dB, at most 58.9: (B, T) float32."""
    error_BTHWC = jnp.clip(truth_BTHWC, 0, 1) - jnp.clip(guess_BTHWC, 0, 1)
    mse_BT = jnp.square(error_BTHWC.astype(jnp.float32)).mean((-3, -2, -1))
    return -10 * jnp.log10(jnp.maximum(mse_BT, ROUNDING_ERROR))


def frame_ssim(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array) -> jax.Array:
    """Structural similarity of each frame (Wang et al. 2004, "Image quality assessment", section III): (B, T) float32.

    1 is equal. Gaussian window of 11×11 pixels, or as large as fits into smaller frames; mean over colour channels.
    """
    H, W = truth_BTHWC.shape[2:4]
    frames = [jnp.clip(video, 0, 1).reshape(-1, *video.shape[2:]) for video in (truth_BTHWC, guess_BTHWC)]
    return dm_pix.ssim(*frames, filter_size=min(11, H, W)).reshape(truth_BTHWC.shape[:2])


def psnr(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array) -> jax.Array:
    """Mean over frames of the ratio of each frame (not the ratio of the mean error), in dB."""
    return jnp.mean(frame_psnr(truth_BTHWC, guess_BTHWC))


def ssim(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array) -> jax.Array:
    """Mean over frames of `frame_ssim`."""
    return jnp.mean(frame_ssim(truth_BTHWC, guess_BTHWC))


def delta_psnr(psnr_BS: np.ndarray, psnr_random_BS: np.ndarray) -> np.ndarray:
    """Controllability, ΔPSNR (Genie, arXiv 2402.15391, section 3, "Metrics"), of each clip and generated frame, in dB.

    By how much the frames sampled with the clip's own actions are nearer to the truth than those sampled with random
    ones, from the same prompt. 0: the model does not listen to its actions. Genie reports the mean over clips at t = 4.

    Args:
        psnr_BS: `frame_psnr` of the generated frames (no prompt), sampled with true or inferred actions; entry t - 1 is
            the t-th generated frame.
        psnr_random_BS: the same, with actions drawn uniformly.
    """
    return np.asarray(psnr_BS, np.float64) - np.asarray(psnr_random_BS, np.float64)


def drift(value_BS: np.ndarray) -> np.ndarray:
    """What each clip loses over its horizon, in the metric's unit: mean of the first quarter of the generated frames less
    that of the last quarter; (B,) float64.

    Args:
        value_BS: a metric of which more is better, of the generated frames (no prompt).
    """
    value_BS = np.asarray(value_BS, np.float64)
    quarter = max(1, value_BS.shape[1] // 4)
    return value_BS[:, :quarter].mean(1) - value_BS[:, -quarter:].mean(1)


def mean_and_error(value_B: np.ndarray) -> tuple[float, float]:
    """Mean over clips, and its standard error; the error of a single clip is NaN."""
    value_B = np.asarray(value_B, np.float64)
    spread = value_B.std(ddof=1) if len(value_B) > 1 else math.nan
    return float(value_B.mean()), float(spread / math.sqrt(len(value_B)))


def code_usage(index: jax.Array, num_codes: int) -> dict[str, jax.Array]:
    """How a batch uses a codebook.

    Args:
        index: int32 code indices, any shape.

    Returns:
        `codebook_usage`: the share of codes that occur. `codebook_perplexity`: exp of the entropy of their frequencies.
    """
    counts_K = jnp.zeros(num_codes, jnp.float32).at[index.reshape(-1)].add(1.0)
    share_K = counts_K / counts_K.sum()
    entropy = -jnp.sum(jnp.where(share_K > 0, share_K * jnp.log(jnp.maximum(share_K, 1e-12)), 0.0))
    return {"codebook_usage": (counts_K > 0).mean(), "codebook_perplexity": jnp.exp(entropy)}
