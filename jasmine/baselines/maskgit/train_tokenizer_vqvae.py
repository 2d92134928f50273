"""Trains the VQ-VAE video tokenizer: frames to a grid of discrete tokens in each frame, and back.

Paper: Genie (Bruce et al. 2024, arXiv 2402.15391), section 2.1: ST-ViViT encoder and decoder, causal in time. Unlike the
published Jasmine, no LayerNorm touches the pixels of a patch: it takes the brightness out of patches of one colour.

    python -m jasmine.data.make coinrun --output_dir data/coinrun
    python launch/submit.py --cluster local train_tokenizer_vqvae --data_dir data/coinrun --val_data_dir data/coinrun

Expected: `make demo` runs a small one (patch 4, dim 64, 1 block) on two CPU cores and passes 21 dB validation PSNR in 800
steps, about six minutes; docs/lab-notes.md holds figures. The published shape (the defaults) is for accelerators.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.evaluation.media import comparison
from jasmine.evaluation.metrics import code_usage, psnr, ssim
from jasmine.models.tokenizer import VideoTokenizerVQVAE
from jasmine.training import cli
from jasmine.training.config import check_chance, check_least
from jasmine.training.loop import train
from jasmine.training.model_config import ModelConfig, check_patch, check_pixels
from jasmine.training.task import BaseTask, Batch, Keys, Metrics, Modules

JOB = "train_tokenizer_vqvae"

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Options of the VQ-VAE tokenizer. Defaults are the published Jasmine's; `vq_revival` is ours."""

    latent_dim: int = 32
    """Size of a code."""
    num_latents: int = 1024
    """Codes in the codebook."""
    patch_size: int = 16
    """Side of a patch in pixels; each patch of each frame becomes one token."""
    codebook_dropout: float = 0.01
    """Chance of each code to sit a step out, so that a few codes do not take all."""
    vq_beta: float = 0.25
    """Weight of the commitment term."""
    vq_revival: float = 0.0
    """Weight of a term that pulls codes that a batch leaves unused towards its encoder outputs; 0: none."""

    def check(self) -> None:
        super().check()
        check_least(self, 1, "latent_dim", "num_latents")
        check_least(self, 0, "vq_beta", "vq_revival")
        check_chance(self, "codebook_dropout")


# --- model ------------------------------------------------------------------------------------------------------


class Task(BaseTask):
    """Reconstruct each clip through the bottleneck of one code a patch."""

    config: Config

    def check(self) -> None:
        check_pixels(self.data, JOB)
        check_patch("patch_size", self.config.patch_size, self.data.frame_shape)

    def build(self, rngs: nnx.Rngs) -> VideoTokenizerVQVAE:
        config = self.config
        return VideoTokenizerVQVAE(
            frame_shape=self.data.frame_shape,
            patch_size=config.patch_size,
            latent_dim=config.latent_dim,
            num_latents=config.num_latents,
            codebook_dropout=config.codebook_dropout,
            transformer=config.transformer(),
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
        mse = jnp.square(video_BTHWC - out.video_BTHWC).mean()
        q_loss, commitment_loss = out.quantized.losses()
        loss = mse + q_loss + self.config.vq_beta * commitment_loss
        terms = {"mse": mse, "q_loss": q_loss, "commitment_loss": commitment_loss}
        if self.config.vq_revival > 0 and keys is not None:
            loss = loss + self.config.vq_revival * model.vq.revival_loss(out.quantized)
        return loss, terms, out.video_BTHWC, out.quantized.index_X

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, model: VideoTokenizerVQVAE, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
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
    train(Task, config, JOB)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
