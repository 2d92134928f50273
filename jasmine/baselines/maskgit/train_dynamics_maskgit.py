"""Trains the MaskGIT dynamics model: the tokens of a frame, unmasked in a few rounds, from past frames and an action.

Paper: Genie (Bruce et al. 2024, arXiv 2402.15391), section 2.1; MaskGIT (Chang et al. 2022, arXiv 2202.04200). Actions are
prepended to the tokens, as the published Jasmine found to be better than adding them.

    python launch/submit.py --cluster local train_dynamics_maskgit --tokenizer_checkpoint tokenizer --lam_checkpoint lam \
        --data_dir data/coinrun --val_data_dir data/coinrun

Expected: sampled frames become better than the last given frame, held (`val_psnr` above `val_psnr_copy`), and worse with
another clip's actions (`val_delta_psnr` above 0); docs/lab-notes.md holds figures.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jasmine.errors import UserError
from jasmine.models.dynamics import DynamicsMaskGIT, WorldModel, random_mask
from jasmine.sampling.samplers import MaskGITSampler
from jasmine.training import cli
from jasmine.training.config import check_least
from jasmine.training.dynamics_task import DynamicsConfig, DynamicsTask
from jasmine.training.loop import train
from jasmine.training.losses import copy_accuracy, token_loss, top_k_accuracy
from jasmine.training.task import Batch, Keys, Metrics, Modules

JOB = "train_dynamics_maskgit"

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(DynamicsConfig):
    """Options of the MaskGIT dynamics model. Defaults are the published Jasmine's."""

    look_back: bool = True
    """Masked places show the token that stood there in the frame before."""
    mask_limit: float = 0.5
    """Each clip's tokens are masked with a chance drawn between this and 1."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-partition of the logits, which keeps them from growing (PaLM, arXiv 2204.02311)."""
    maskgit_steps: int = 25
    """Rounds in which evaluation samples a frame."""
    temperature: float = 1.0
    """Of the draws of tokens when evaluation samples; 0 takes the likeliest, which PSNR favours."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.mask_limit < 1:
            raise UserError(f"--mask_limit={self.mask_limit}: a chance from 0 up to, not including, 1")
        if self.maskgit_steps < 1:
            raise UserError(f"--maskgit_steps={self.maskgit_steps}: must be at least 1")
        check_least(self, 0, "temperature", "z_loss_weight")


# --- model ------------------------------------------------------------------------------------------------------


class Task(DynamicsTask):
    """Tell masked tokens from the others, past frames and the action."""

    config: Config

    def build(self, rngs: nnx.Rngs) -> WorldModel:
        num_latents = self.frozen["tokenizer"].config.num_latents
        dynamics = DynamicsMaskGIT(
            num_latents=num_latents, look_back=self.config.look_back, transformer=self.config.transformer(), rngs=rngs
        )
        return self.world(dynamics, rngs)

    def encode(self, tokenizer: Any, video_BTHWC: jax.Array) -> jax.Array:
        return tokenizer.encode_tokens(video_BTHWC)

    def sampler(self, dynamics: DynamicsMaskGIT, **options: Any) -> MaskGITSampler:
        defaults = {"steps": self.config.maskgit_steps, "temperature": self.config.temperature}
        return MaskGITSampler(dynamics, **(defaults | options))

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: WorldModel, batch: Batch, keys: Keys) -> tuple[jax.Array, Metrics]:
        token_BTN = batch["tokens"]
        action_BTM, extra, metrics = self.action_tokens(model, batch)
        masked_BTN = random_mask(keys["mask"], token_BTN.shape, self.config.mask_limit)
        logits_BTNV = model.dynamics(token_BTN, action_BTM, masked_BTN, keys["dropout"])
        ce, z_loss = token_loss(logits_BTNV, token_BTN, masked_BTN)
        return ce + self.config.z_loss_weight * z_loss + extra, {"ce": ce, "z_loss": z_loss, **metrics}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, model: WorldModel, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        prepared = self.prepare(frozen, batch)
        token_BTN = prepared["tokens"]
        action_BTM, extra, metrics = self.action_tokens(model, prepared)
        masked_BTN = random_mask(keys["mask"], token_BTN.shape, self.config.mask_limit)
        logits_BTNV = model.dynamics(token_BTN, action_BTM, masked_BTN)
        ce, z_loss = token_loss(logits_BTNV, token_BTN, masked_BTN)
        metrics |= {"loss": ce + self.config.z_loss_weight * z_loss + extra, "ce": ce}
        metrics |= top_k_accuracy(logits_BTNV, token_BTN, masked_BTN)
        metrics["copy_accuracy"] = copy_accuracy(token_BTN, masked_BTN)
        if not self.config.eval_full_frame:
            return metrics, {}
        sampled, pictures = self.sampled_metrics(model, frozen, batch, keys)
        return metrics | sampled, pictures


# --- main -------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    train(Task, config, JOB)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
