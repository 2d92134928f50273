"""The latent action model: which of a few discrete actions leads from each frame to the next (Genie, arXiv 2402.15391,
section 2.1).

Shape key:
    B: batch  T: frames  H, W, C: height, width, channels  N: patches in a frame  P: pixels of a patch
    L: size of a latent action  M: model width
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.models.layers import Linear, RandomKeys
from jasmine.models.quantizer import Quantized, VectorQuantizer
from jasmine.models.tokenizer import patchify, unpatchify
from jasmine.models.transformer import SpaceTimeTransformer, TransformerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """`video_BTHWC`: float32, the guess of frames 1 to T, not clipped to [0, 1]; `quantized`: the actions, leading axes
    (B, T - 1)."""

    video_BTHWC: jax.Array
    quantized: Quantized


class LatentActionEncoder(nnx.Module):
    """From a video to the latent action between each two frames. An action token is put before each frame's patches; what
    the transformer makes of it at a frame, less what it made of it at the frame before, is quantized. Causal in time.

    The published model quantizes the token itself, which in an untrained model hardly depends on the video: all fall to one
    code, and with the others unused it stays so. The difference, in a transformer that rotates queries and keys instead of
    adding places to tokens, depends on nothing else: several codes are in use from the first step on.
    """

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
        """num_latents: how many actions there are."""
        self.patch_size = patch_size
        patch_dim = patch_size**2 * frame_shape[2]
        action_P = jax.random.normal(rngs.params(), (patch_dim,), jnp.float32)
        self.action_in = nnx.Param(action_P, logical=(None,))
        rotated = dataclasses.replace(transformer, positions="rope")
        self.encoder = SpaceTimeTransformer(patch_dim, latent_dim, rotated, rngs)
        self.vq = VectorQuantizer(num_latents, latent_dim, dropout=codebook_dropout, rngs=rngs)

    def __call__(
        self, video_BTHWC: jax.Array, dropout_key: jax.Array | None = None, codebook_key: jax.Array | None = None
    ) -> Quantized:
        """Float video in [0, 1] -> actions, leading axes (B, T - 1); entry t leads from frame t to frame t + 1."""
        patch_BTNP = patchify(2 * video_BTHWC - 1, self.patch_size)
        action_BT1P = jnp.broadcast_to(self.action_in[...], (*patch_BTNP.shape[:2], 1, patch_BTNP.shape[3]))
        latent_BTNL = self.encoder(jnp.concatenate([action_BT1P, patch_BTNP], axis=2), dropout_key)
        token_BTL = latent_BTNL[:, :, 0].astype(jnp.float32)
        return self.vq(token_BTL[:, 1:] - token_BTL[:, :-1], codebook_key)

    def encode_actions(self, video_BTHWC: jax.Array) -> jax.Array:
        """Int32 action indices, (B, T - 1), of a float video in [0, 1]."""
        return self(video_BTHWC).index_X


class LatentActionModel(nnx.Module):
    """The encoder, and a decoder that has to make each frame from the frames before it and the action alone: what the
    frames before do not tell, the action must.

    The decoder tells the change to the frame before, and begins as no change: most pixels stay as they are, and learning to
    copy them through the transformer takes longer than learning what the action does.
    """

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
        self.frame_shape = frame_shape
        self.patch_size = patch_size
        patch_dim = patch_size**2 * frame_shape[2]
        self.encoder = LatentActionEncoder(
            frame_shape=frame_shape,
            patch_size=patch_size,
            latent_dim=latent_dim,
            num_latents=num_latents,
            codebook_dropout=codebook_dropout,
            transformer=transformer,
            rngs=rngs,
        )
        M = transformer.model_dim
        self.patch_up = Linear((patch_dim,), (M,), logical=(None, "embed"), dtype=transformer.dtype, rngs=rngs)
        self.action_up = Linear((latent_dim,), (M,), logical=(None, "embed"), dtype=transformer.dtype, rngs=rngs)
        self.decoder = SpaceTimeTransformer(None, patch_dim, transformer, rngs)
        kernel = self.decoder.out_linear.kernel
        kernel[...] = jnp.zeros_like(kernel[...])

    @property
    def vq(self) -> VectorQuantizer:
        """The codebook of actions."""
        return self.encoder.vq

    def __call__(self, video_BTHWC: jax.Array, keys: RandomKeys | None = None) -> Transition:
        """
        Args:
            video_BTHWC: float in [0, 1].
            keys: random keys by purpose (`dropout`, `codebook`) for training; None for evaluation.
        """
        dropout_key, codebook_key = (None, None) if keys is None else (keys["dropout"], keys["codebook"])
        encoder_key, decoder_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        quantized = self.encoder(video_BTHWC, encoder_key, codebook_key)
        return Transition(self.decode(video_BTHWC[:, :-1], quantized.straight_XL, decoder_key), quantized)

    def encode_actions(self, video_BTHWC: jax.Array) -> jax.Array:
        """Int32 action indices, (B, T - 1), of a float video in [0, 1]."""
        return self.encoder.encode_actions(video_BTHWC)

    def decode(self, past_BTHWC: jax.Array, action_BTL: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The frame after each of the given ones, (B, T, H, W, C) float32, not clipped to [0, 1].

        Args:
            past_BTHWC: float in [0, 1].
            action_BTL: the latent action that is taken at each frame.
        """
        patch_BTNP = patchify(2 * past_BTHWC - 1, self.patch_size)
        scaled_BTL = action_BTL * action_BTL.shape[-1] ** 0.5  # codes have about unit length; this is unit variance
        x_BTNM = self.patch_up(patch_BTNP) + self.action_up(scaled_BTL)[:, :, None]
        change_BTNP = self.decoder(x_BTNM, key).astype(jnp.float32)
        return past_BTHWC + unpatchify(change_BTNP, self.patch_size, self.frame_shape[0], self.frame_shape[1])
