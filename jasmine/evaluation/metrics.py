"""How good frames are. Videos are float in [0, 1]; every metric is a mean over the frames of a batch."""

import dm_pix
import jax
import jax.numpy as jnp


def psnr(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB: mean over frames of the ratio of each frame (not the ratio of the mean error)."""
    return jnp.mean(dm_pix.psnr(_frames(truth_BTHWC), _frames(guess_BTHWC)))


def ssim(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004), 11×11 Gaussian window: mean over frames; 1 is equal."""
    return jnp.mean(dm_pix.ssim(_frames(truth_BTHWC), _frames(guess_BTHWC)))


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


def _frames(video_BTHWC: jax.Array) -> jax.Array:
    return jnp.clip(video_BTHWC, 0, 1).reshape(-1, *video_BTHWC.shape[2:])
