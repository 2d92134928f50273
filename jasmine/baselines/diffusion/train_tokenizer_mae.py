"""Trains the MAE video tokenizer: frames to a grid of continuous tokens in each frame, and back.

Paper: Dreamer 4 (Hafner et al. 2025, arXiv 2509.24527), section 3.1: a masked autoencoder, each frame with a share of
patches masked that is drawn between 0 and a maximum, and a tanh bottleneck. Causal in time.

    python -m jasmine.data.make coinrun --output_dir data/coinrun
    python launch/submit.py --cluster local train_tokenizer_mae --data_dir data/coinrun --val_data_dir data/coinrun

Expected: validation PSNR (nothing masked) rises as with the VQ-VAE, and ends higher: nothing is quantized;
docs/lab-notes.md holds figures.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.errors import UserError
from jasmine.evaluation.media import comparison
from jasmine.evaluation.metrics import psnr, ssim
from jasmine.models.tokenizer import VideoTokenizerMAE
from jasmine.training import cli
from jasmine.training.config import check_least
from jasmine.training.loop import train
from jasmine.training.model_config import ModelConfig, check_patch, check_pixels
from jasmine.training.task import BaseTask, Batch, Keys, Metrics, Modules

JOB = "train_tokenizer_mae"

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Options of the MAE tokenizer. Defaults are the published Jasmine's."""

    latent_dim: int = 32
    """Size of a token."""
    patch_size: int = 16
    """Side of a patch in pixels; each patch of each frame becomes one token."""
    max_mask_ratio: float = 0.9
    """In training each frame has a share of its patches masked that is drawn between 0 and this."""

    def check(self) -> None:
        super().check()
        check_least(self, 1, "latent_dim")
        if not 0 <= self.max_mask_ratio <= 1:
            raise UserError(f"--max_mask_ratio={self.max_mask_ratio}: a share from 0 to 1")


# --- model ------------------------------------------------------------------------------------------------------


class Task(BaseTask):
    """Paint all patches of each frame from those that are not masked."""

    config: Config

    def check(self) -> None:
        check_pixels(self.data, JOB)
        check_patch("patch_size", self.config.patch_size, self.data.frame_shape)

    def build(self, rngs: nnx.Rngs) -> VideoTokenizerMAE:
        config = self.config
        return VideoTokenizerMAE(
            frame_shape=self.data.frame_shape,
            patch_size=config.patch_size,
            latent_dim=config.latent_dim,
            max_mask_ratio=config.max_mask_ratio,
            transformer=config.transformer(),
            rngs=rngs,
        )

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: VideoTokenizerMAE, batch: Batch, keys: Keys) -> tuple[jax.Array, Metrics]:
        video_BTHWC = batch["videos"].astype(jnp.float32) / 255
        recon_BTHWC, _ = model(video_BTHWC, keys)
        mse = jnp.square(video_BTHWC - recon_BTHWC).mean()
        return mse, {"mse": mse}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, model: VideoTokenizerMAE, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        video_BTHWC = batch["videos"].astype(jnp.float32) / 255
        recon_BTHWC, latent_BTNL = model(video_BTHWC)
        masked_BTHWC, _ = model(video_BTHWC, keys)
        metrics = {
            "loss": jnp.square(video_BTHWC - recon_BTHWC).mean(),
            "psnr": psnr(video_BTHWC, recon_BTHWC),
            "ssim": ssim(video_BTHWC, recon_BTHWC),
            "psnr_masked": psnr(video_BTHWC, masked_BTHWC),
            "latent_std": latent_BTNL.std(),
        }
        pictures = {"reconstruction": recon_BTHWC, "reconstruction_masked": masked_BTHWC}
        return metrics, {name: comparison(video_BTHWC, video) for name, video in pictures.items()}


# --- main -------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    train(Task, config, JOB)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
