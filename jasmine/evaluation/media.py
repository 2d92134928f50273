"""Pictures of videos, as arrays; pure functions that run under jit."""

import jax
import jax.numpy as jnp
from einops import rearrange


def comparison(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array, *, clips: int = 4, frames: int = 8) -> jax.Array:
    """True frames above guessed ones, clip below clip, small frames enlarged: (H', W', 3) float in [0, 1].

    Args:
        truth_BTHWC, guess_BTHWC: float in [0, 1].
        clips: how many of the batch at most.
        frames: how many of each clip at most, evenly spaced.
    """
    B, T = truth_BTHWC.shape[:2]
    chosen = jnp.linspace(0, T - 1, min(frames, T)).round().astype(jnp.int32)
    pairs = jnp.stack([truth_BTHWC, guess_BTHWC], axis=1)[: min(clips, B), :, chosen]
    pairs = jnp.pad(pairs, ((0, 0),) * 3 + ((1, 1), (1, 1), (0, 0)), constant_values=1.0)
    image = rearrange(jnp.clip(pairs, 0, 1), "b two t h w c -> (b two h) (t w) c")
    enlarge = max(1, 128 // truth_BTHWC.shape[2])  # game frames are small; a person looks at this
    image = image.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    return jnp.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[-1] == 1 else image
