"""Video tokenizers: frames to a grid of tokens in each frame, and back.

Shape key:
    B: batch  T: frames  H, W, C: height, width, channels  N: patches in a frame  P: pixels of a patch (size * size * C)
    L: size of a latent code
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jasmine.models.layers import RandomKeys
from jasmine.models.quantizer import Quantized, VectorQuantizer
from jasmine.models.transformer import SpaceTimeTransformer, TransformerConfig


def patchify(video_BTHWC: jax.Array, size: int) -> jax.Array:
    """Cuts frames into square patches: (B, T, N, P), row by row. H and W must be multiples of `size`."""
    return rearrange(video_BTHWC, "b t (h p) (w q) c -> b t (h w) (p q c)", p=size, q=size)


def unpatchify(patch_BTNP: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: (B, T, H, W, C)."""
    h, w = height // size, width // size
    return rearrange(patch_BTNP, "b t (h w) (p q c) -> b t (h p) (w q) c", h=h, w=w, p=size, q=size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """`video_BTHWC`: float32 in [0, 1]; `quantized`: what passed through the bottleneck, leading axes (B, T, N)."""

    video_BTHWC: jax.Array
    quantized: Quantized


class VideoTokenizerVQVAE(nnx.Module):
    """ST-ViViT VQ-VAE, causal in time (Genie, arXiv 2402.15391, section 2.1)."""

    def __init__(
        self,
        *,
        frame_shape: tuple[int, int, int],
        patch_size: int,
        latent_dim: int,
        num_latents: int,
        codebook_dropout: float,
        transformer: TransformerConfig,
        rngs: nnx.Rngs,
    ):
        """frame_shape: (height, width, channels); height and width multiples of `patch_size`."""
        self.frame_shape = frame_shape
        self.patch_size = patch_size
        patch_dim = patch_size**2 * frame_shape[2]
        self.encoder = SpaceTimeTransformer(patch_dim, latent_dim, transformer, rngs)
        self.vq = VectorQuantizer(num_latents, latent_dim, dropout=codebook_dropout, rngs=rngs)
        self.decoder = SpaceTimeTransformer(latent_dim, patch_dim, transformer, rngs)

    def __call__(self, video_BTHWC: jax.Array, keys: RandomKeys | None = None) -> Reconstruction:
        """
        Args:
            video_BTHWC: float in [0, 1].
            keys: random keys by purpose (`dropout`, `codebook`) for training; None for evaluation.
        """
        dropout_key, codebook_key = (None, None) if keys is None else (keys["dropout"], keys["codebook"])
        encoder_key, decoder_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        quantized = self.encode(video_BTHWC, encoder_key, codebook_key)
        return Reconstruction(self.decode_latents(quantized.straight_XL, decoder_key), quantized)

    def encode(
        self, video_BTHWC: jax.Array, dropout_key: jax.Array | None = None, codebook_key: jax.Array | None = None
    ) -> Quantized:
        """Tokens of a video; indices are (B, T, N) int32."""
        patch_BTNP = patchify(2 * video_BTHWC - 1, self.patch_size)
        return self.vq(self.encoder(patch_BTNP, dropout_key), codebook_key)

    def encode_tokens(self, video_BTHWC: jax.Array) -> jax.Array:
        """Int32 token indices, (B, T, N), of a float video in [0, 1]."""
        return self.encode(video_BTHWC).index_X

    def decode(self, index_BTN: jax.Array) -> jax.Array:
        """Video of token indices: (B, T, H, W, C) float32 in [0, 1]."""
        return self.decode_latents(self.vq.lookup(index_BTN))

    def decode_latents(self, latent_BTNL: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Video of latent vectors: (B, T, H, W, C) float32 in [0, 1]."""
        scaled_BTNL = latent_BTNL * latent_BTNL.shape[-1] ** 0.5  # codes have about unit length; this is unit variance
        patch_BTNP = jax.nn.sigmoid(self.decoder(scaled_BTNL, key).astype(jnp.float32))
        return unpatchify(patch_BTNP, self.patch_size, self.frame_shape[0], self.frame_shape[1])


class VideoTokenizerMAE(nnx.Module):
    """Masked autoencoder with continuous tokens between -1 and 1 (Dreamer 4, arXiv 2509.24527, section 3.1).

    In training a share of each frame's patches, drawn anew for each frame, is replaced by a learned patch; the decoder has
    to paint all of them. That makes tokens which a dynamics model predicts more easily.
    """

    def __init__(
        self,
        *,
        frame_shape: tuple[int, int, int],
        patch_size: int,
        latent_dim: int,
        max_mask_ratio: float,
        transformer: TransformerConfig,
        rngs: nnx.Rngs,
    ):
        """frame_shape: (height, width, channels); height and width multiples of `patch_size`."""
        self.frame_shape = frame_shape
        self.patch_size = patch_size
        self.max_mask_ratio = max_mask_ratio
        patch_dim = patch_size**2 * frame_shape[2]
        mask_P = 0.5 * jax.random.normal(rngs.params(), (patch_dim,), jnp.float32)
        self.mask_patch = nnx.Param(mask_P, logical=(None,))
        self.encoder = SpaceTimeTransformer(patch_dim, latent_dim, transformer, rngs)
        self.decoder = SpaceTimeTransformer(latent_dim, patch_dim, transformer, rngs)

    def __call__(self, video_BTHWC: jax.Array, keys: RandomKeys | None = None) -> tuple[jax.Array, jax.Array]:
        """
        Args:
            video_BTHWC: float in [0, 1].
            keys: random keys by purpose (`dropout`, `mask`) for training; None for evaluation, which masks nothing.

        Returns:
            the reconstruction, float32 in [0, 1], and the latents (B, T, N, L).
        """
        patch_BTNP = patchify(2 * video_BTHWC - 1, self.patch_size)
        encoder_key = decoder_key = None
        if keys is not None:
            encoder_key, decoder_key = jax.random.split(keys["dropout"])
            ratio_key, mask_key = jax.random.split(keys["mask"])
            ratio_BT1 = jax.random.uniform(ratio_key, (*patch_BTNP.shape[:2], 1), maxval=self.max_mask_ratio)
            masked_BTN = jax.random.bernoulli(mask_key, ratio_BT1, patch_BTNP.shape[:3])
            patch_BTNP = jnp.where(masked_BTN[..., None], self.mask_patch[...], patch_BTNP)
        latent_BTNL = jnp.tanh(self.encoder(patch_BTNP, encoder_key).astype(jnp.float32))
        return self.decode(latent_BTNL, decoder_key), latent_BTNL

    def encode_latents(self, video_BTHWC: jax.Array) -> jax.Array:
        """Latents of a float video in [0, 1], nothing masked: (B, T, N, L) float32 in (-1, 1)."""
        return jnp.tanh(self.encoder(patchify(2 * video_BTHWC - 1, self.patch_size)).astype(jnp.float32))

    def decode(self, latent_BTNL: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Video of latents: (B, T, H, W, C) float32 in [0, 1]."""
        patch_BTNP = jax.nn.sigmoid(self.decoder(latent_BTNL, key).astype(jnp.float32))
        return unpatchify(patch_BTNP, self.patch_size, self.frame_shape[0], self.frame_shape[1])
