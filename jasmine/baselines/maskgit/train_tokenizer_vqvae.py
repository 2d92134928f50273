"""Trains the VQ-VAE video tokenizer: frames to a grid of discrete tokens in each frame, and back.

Paper: Genie (Bruce et al. 2024, arXiv 2402.15391), section 2.1: ST-ViViT encoder and decoder, causal in time. Unlike the
published Jasmine, no LayerNorm touches the pixels of a patch: it takes the brightness out of patches of one colour.

    python -m jasmine.data.make coinrun --output_dir data/coinrun
    python launch/submit.py --cluster local train_tokenizer_vqvae --data_dir data/coinrun --val_data_dir data/coinrun

Expected: `make demo` runs a small one (patch 4, dim 64, 1 block) on two CPU cores and passes 21 dB validation PSNR in 500
steps, about four minutes; docs/lab-notes.md holds figures. The published shape (the defaults) is for accelerators.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.errors import UserError
from jasmine.evaluation.media import comparison
from jasmine.evaluation.metrics import code_usage, psnr, ssim
from jasmine.models.tokenizer import VideoTokenizerVQVAE
from jasmine.models.transformer import TransformerConfig
from jasmine.training import cli
from jasmine.training.config import TrainConfig
from jasmine.training.loop import train
from jasmine.training.task import Batch, Keys, Metrics

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Options of the VQ-VAE tokenizer. Defaults are the published Jasmine's; `vq_revival` is ours."""

    model_dim: int = 512
    """Width of the transformers."""
    ffn_dim: int = 2048
    """Width of their feed-forward layers."""
    latent_dim: int = 32
    """Size of a code."""
    num_latents: int = 1024
    """Codes in the codebook."""
    patch_size: int = 16
    """Side of a patch in pixels; each patch of each frame becomes one token."""
    num_blocks: int = 4
    """Blocks of the encoder, and of the decoder."""
    num_heads: int = 8
    dropout: float = 0.0
    codebook_dropout: float = 0.01
    """Chance of each code to sit a step out, so that a few codes do not take all."""
    vq_beta: float = 0.25
    """Weight of the commitment term."""
    vq_revival: float = 0.0
    """Weight of a term that pulls codes that a batch leaves unused towards its encoder outputs; 0: none."""


# --- model ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Reconstruct each clip through the bottleneck of one code a patch."""

    config: Config
    frame_shape: tuple[int, int, int]

    def check(self) -> None:
        config, (height, width, _) = self.config, self.frame_shape
        if height % config.patch_size or width % config.patch_size:
            fits = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]
            raise UserError(
                f"--patch_size={config.patch_size} does not divide the {height}×{width} frames; "
                f"these do: {', '.join(map(str, fits)) or 'none but 1'}"
            )
        if config.model_dim % config.num_heads:
            raise UserError(f"--model_dim={config.model_dim} is not a multiple of --num_heads={config.num_heads}")

    def build(self, rngs: nnx.Rngs) -> VideoTokenizerVQVAE:
        config = self.config
        return VideoTokenizerVQVAE(
            frame_shape=self.frame_shape,
            patch_size=config.patch_size,
            latent_dim=config.latent_dim,
            num_latents=config.num_latents,
            codebook_dropout=config.codebook_dropout,
            transformer=TransformerConfig(
                model_dim=config.model_dim,
                ffn_dim=config.ffn_dim,
                num_blocks=config.num_blocks,
                num_heads=config.num_heads,
                dropout=config.dropout,
                dtype=jnp.dtype(config.dtype),
                flash_attention=config.use_flash_attention,
                remat=config.remat,
            ),
            rngs=rngs,
        )

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: VideoTokenizerVQVAE, batch: Batch, keys: Keys | None) -> tuple[jax.Array, Metrics]:
        return self._reconstruct(model, batch, keys)[:2]

    def _reconstruct(
        self, model: VideoTokenizerVQVAE, batch: Batch, keys: Keys | None
    ) -> tuple[jax.Array, Metrics, jax.Array, jax.Array]:
        """Loss, its terms, the reconstruction (float32 in [0, 1]) and its token indices (B, T, N)."""
        video_BTHWC = batch["videos"].astype(jnp.float32) / 255
        out = model(video_BTHWC, keys)
        code, encoded = out.quantized.code_XL, out.quantized.encoded_XL
        mse = jnp.square(video_BTHWC - out.video_BTHWC).mean()
        q_loss = jnp.square(jax.lax.stop_gradient(encoded) - code).mean()
        commitment_loss = jnp.square(encoded - jax.lax.stop_gradient(code)).mean()
        loss = mse + q_loss + self.config.vq_beta * commitment_loss
        terms = {"mse": mse, "q_loss": q_loss, "commitment_loss": commitment_loss}
        if self.config.vq_revival > 0 and keys is not None:
            loss = loss + self.config.vq_revival * model.vq.revival_loss(out.quantized)
        return loss, terms, out.video_BTHWC, out.quantized.index_X

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, model: VideoTokenizerVQVAE, batch: Batch, keys: Keys) -> tuple[Metrics, dict[str, jax.Array]]:
        loss, terms, recon_BTHWC, index_BTN = self._reconstruct(model, batch, None)
        video_BTHWC = batch["videos"].astype(jnp.float32) / 255
        metrics = {
            "loss": loss,
            **terms,
            "psnr": psnr(video_BTHWC, recon_BTHWC),
            "ssim": ssim(video_BTHWC, recon_BTHWC),
            **code_usage(index_BTN, self.config.num_latents),
        }
        return metrics, {"reconstruction": comparison(video_BTHWC, recon_BTHWC)}


# --- main -------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    train(TokenizerTask, config, job="train_tokenizer_vqvae")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
