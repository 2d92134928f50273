"""The masked autoencoder: what it hides in training, and that it hides nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.models.tokenizer import VideoTokenizerMAE
from jasmine.models.transformer import TransformerConfig

SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=2, num_heads=2, dtype=jnp.float32)


def make(max_mask_ratio: float, transformer: TransformerConfig = SMALL) -> VideoTokenizerMAE:
    return VideoTokenizerMAE(
        frame_shape=(32, 32, 3), patch_size=4, latent_dim=6, max_mask_ratio=max_mask_ratio, transformer=transformer,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def hidden(model: VideoTokenizerMAE, keys: dict | None, frames: int = 3) -> np.ndarray:
    """Which patches have no say in the reconstruction: bool (B, T, 8, 8)."""
    video = jax.random.uniform(jax.random.key(0), (32, frames, 32, 32, 3))
    gradient = jax.jit(jax.grad(lambda video: jnp.square(model(video, keys)[0] - 0.7).sum()))(video)
    return np.asarray(jnp.abs(gradient).reshape(32, frames, 8, 4, 8, 4, 3).max((3, 5, 6)) == 0)


def test_each_frame_has_a_share_of_its_own_hidden():
    keys = {"mask": jax.random.key(1), "dropout": jax.random.key(2)}
    share = hidden(make(0.8), keys).mean((2, 3))
    assert share.mean() == pytest.approx(0.4, abs=0.05)
    assert share.std() == pytest.approx(0.8 / 12**0.5, rel=0.2)
    assert share.max() < 0.95
    assert np.abs(share[:, 0] - share[:, 1]).mean() > 0.1  # drawn for each frame, not for each clip
    assert not hidden(make(0.0), keys).any()


def test_evaluation_hides_nothing():
    assert not hidden(make(0.8), None).any()
    model = make(0.8)
    video = jax.random.uniform(jax.random.key(0), (2, 3, 32, 32, 3))
    recon, latents = model(video)
    np.testing.assert_allclose(latents, model.encode_latents(video), atol=1e-6)
    np.testing.assert_allclose(recon, model.decode(latents), atol=1e-6)
    assert np.abs(latents).max() < 1
    assert latents.shape == (2, 3, 64, 6)


def test_latents_of_a_frame_do_not_depend_on_later_frames():
    model = make(0.8)
    video = jax.random.uniform(jax.random.key(0), (2, 3, 32, 32, 3))
    changed = video.at[:, 2].set(0.5)
    np.testing.assert_allclose(model.encode_latents(changed)[:, :2], model.encode_latents(video)[:, :2], atol=1e-6)
    assert (np.abs(model.encode_latents(changed) - model.encode_latents(video))[:, 2] > 1e-3).any()
