"""Trains the latent action model: which of a few actions leads from each frame to the next, learned without labels.

Paper: Genie (Bruce et al. 2024, arXiv 2402.15391), section 2.1. An action token goes before each frame's patches; what the
encoder makes of it is quantized; the decoder has to make each frame from the frames before it and that code alone.

    python -m jasmine.data.make coinrun --output_dir data/coinrun
    python launch/submit.py --cluster local train_lam --data_dir data/coinrun --val_data_dir data/coinrun

Expected: the guess of the next frame is better with its action than with another clip's (`val_delta_psnr` above 0) and better
than the frame before it (`val_psnr` above `val_psnr_copy`); docs/lab-notes.md holds figures.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.errors import UserError
from jasmine.evaluation.media import comparison
from jasmine.evaluation.metrics import code_usage, psnr, ssim
from jasmine.models.latent_action import LatentActionModel, Transition
from jasmine.training import cli
from jasmine.training.config import check_chance, check_least
from jasmine.training.loop import train
from jasmine.training.model_config import ModelConfig, check_even_heads, check_patch, check_pixels
from jasmine.training.task import BaseTask, Batch, Keys, Metrics, Modules

JOB = "train_lam"

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Options of the latent action model. Defaults are the published Jasmine's; `vq_revival` is ours."""

    num_steps: int = 200_000
    batch_size: int = 36
    max_lr: float = 3e-5
    latent_dim: int = 32
    """Size of a latent action."""
    num_latents: int = 6
    """How many latent actions there are."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    codebook_dropout: float = 0.0
    """Chance of each action to sit a step out."""
    vq_beta: float = 0.25
    """Weight of the commitment term."""
    vq_revival: float = 0.1
    """Weight of a term that pulls actions that a batch leaves unused towards its encoder outputs; 0: none. It takes the
    place of the published `vq_reset_thresh`, which resets such codes by counts that no checkpoint holds."""

    def check(self) -> None:
        super().check()
        check_least(self, 1, "latent_dim", "num_latents")
        check_least(self, 0, "vq_beta", "vq_revival")
        check_chance(self, "codebook_dropout")


# --- model ------------------------------------------------------------------------------------------------------


class Task(BaseTask):
    """Tell each frame from the frames before it, through the bottleneck of one action."""

    config: Config

    def check(self) -> None:
        check_pixels(self.data, JOB)
        check_patch("patch_size", self.config.patch_size, self.data.frame_shape)
        check_even_heads("model_dim", self.config.model_dim, "num_heads", self.config.num_heads)
        if self.config.seq_len < 2:
            raise UserError(f"--seq_len={self.config.seq_len}: an action lies between two frames; give at least 2")

    def build(self, rngs: nnx.Rngs) -> LatentActionModel:
        config = self.config
        return LatentActionModel(
            frame_shape=self.data.frame_shape,
            patch_size=config.patch_size,
            latent_dim=config.latent_dim,
            num_latents=config.num_latents,
            codebook_dropout=config.codebook_dropout,
            transformer=config.transformer(),
            rngs=rngs,
        )

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: LatentActionModel, batch: Batch, keys: Keys | None) -> tuple[jax.Array, Metrics]:
        return self._predict(model, batch, keys)[:2]

    def _predict(
        self, model: LatentActionModel, batch: Batch, keys: Keys | None
    ) -> tuple[jax.Array, Metrics, Transition]:
        video_BTHWC = batch["videos"].astype(jnp.float32) / 255
        out = model(video_BTHWC, keys)
        mse = jnp.square(video_BTHWC[:, 1:] - out.video_BTHWC).mean()
        q_loss, commitment_loss = out.quantized.losses()
        loss = mse + q_loss + self.config.vq_beta * commitment_loss
        terms = {"mse": mse, "q_loss": q_loss, "commitment_loss": commitment_loss}
        terms |= code_usage(out.quantized.index_X, self.config.num_latents)
        if self.config.vq_revival > 0 and keys is not None:
            loss = loss + self.config.vq_revival * model.vq.revival_loss(out.quantized)
        return loss, terms, out

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, model: LatentActionModel, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        loss, terms, out = self._predict(model, batch, None)
        video_BTHWC = batch["videos"].astype(jnp.float32) / 255
        future_BTHWC = video_BTHWC[:, 1:]
        # Another clip's actions, and not random ones: a decoder is worse with codes that it has never met, even if it
        # has learned to listen to none.
        other_BT = jnp.roll(out.quantized.index_X, 1, axis=0)
        without_BTHWC = model.decode(video_BTHWC[:, :-1], model.vq.lookup(other_BT))
        with_action = psnr(future_BTHWC, out.video_BTHWC)
        metrics = {
            "loss": loss,
            **terms,
            "psnr": with_action,
            "ssim": ssim(future_BTHWC, out.video_BTHWC),
            "psnr_copy": psnr(future_BTHWC, video_BTHWC[:, :-1]),
            "delta_psnr": with_action - psnr(future_BTHWC, without_BTHWC),
        }
        return metrics, {"prediction": comparison(future_BTHWC, out.video_BTHWC)}


# --- main -------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    train(Task, config, JOB)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
