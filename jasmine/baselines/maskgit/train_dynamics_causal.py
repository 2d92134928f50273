"""Trains the causal dynamics model: the tokens of a frame one after the other, from past frames and an action.

Causal in space and in time, as in the published Jasmine; unlike there, one block shows each token the whole frame before
(`jasmine.models.dynamics.DynamicsCausal` says why; `--no-look_back` leaves it out).

    python launch/submit.py --cluster local train_dynamics_causal --tokenizer_checkpoint tokenizer --lam_checkpoint lam \
        --data_dir data/coinrun --val_data_dir data/coinrun

Expected: sampled frames become better than the last given frame, held (`val_psnr` above `val_psnr_copy`), and worse with
another clip's actions (`val_delta_psnr` above 0); docs/lab-notes.md holds figures.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jasmine.models.dynamics import DynamicsCausal, WorldModel
from jasmine.sampling.samplers import CausalSampler
from jasmine.training import cli
from jasmine.training.config import check_least
from jasmine.training.dynamics_task import DynamicsConfig, DynamicsTask
from jasmine.training.loop import train
from jasmine.training.losses import copy_accuracy, token_loss, top_k_accuracy
from jasmine.training.task import Batch, Keys, Metrics, Modules

JOB = "train_dynamics_causal"

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(DynamicsConfig):
    """Options of the causal dynamics model. Defaults are the published Jasmine's; `look_back` is ours."""

    look_back: bool = True
    """One block shows each token the whole frame before."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-partition of the logits, which keeps them from growing (PaLM, arXiv 2204.02311)."""
    temperature: float = 1.0
    """Of the draws of tokens when evaluation samples; 0 takes the likeliest, which PSNR favours."""

    def check(self) -> None:
        super().check()
        check_least(self, 0, "temperature", "z_loss_weight")


# --- model ------------------------------------------------------------------------------------------------------


class Task(DynamicsTask):
    """Tell each token from those before it in its frame, past frames and the action."""

    config: Config

    def build(self, rngs: nnx.Rngs) -> WorldModel:
        dynamics = DynamicsCausal(
            num_latents=self.frozen["tokenizer"].config.num_latents,
            look_back=self.config.look_back,
            transformer=self.config.transformer(),
            rngs=rngs,
        )
        return self.world(dynamics, rngs)

    def encode(self, tokenizer: Any, video_BTHWC: jax.Array) -> jax.Array:
        return tokenizer.encode_tokens(video_BTHWC)

    def sampler(self, dynamics: DynamicsCausal, **options: Any) -> CausalSampler:
        return CausalSampler(dynamics, **({"temperature": self.config.temperature} | options))

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: WorldModel, batch: Batch, keys: Keys) -> tuple[jax.Array, Metrics]:
        token_BTN = batch["tokens"]
        action_BTM, extra, metrics = self.action_tokens(model, batch)
        logits_BTNV = model.dynamics(token_BTN, action_BTM, keys["dropout"])
        ce, z_loss = token_loss(logits_BTNV, token_BTN)
        return ce + self.config.z_loss_weight * z_loss + extra, {"ce": ce, "z_loss": z_loss, **metrics}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, model: WorldModel, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        prepared = self.prepare(frozen, batch)
        token_BTN = prepared["tokens"]
        action_BTM, extra, metrics = self.action_tokens(model, prepared)
        logits_BTNV = model.dynamics(token_BTN, action_BTM)
        ce, z_loss = token_loss(logits_BTNV, token_BTN)
        metrics |= {"loss": ce + self.config.z_loss_weight * z_loss + extra, "ce": ce}
        metrics |= top_k_accuracy(logits_BTNV[:, 1:], token_BTN[:, 1:])
        metrics["copy_accuracy"] = copy_accuracy(token_BTN)
        if not self.config.eval_full_frame:
            return metrics, {}
        sampled, pictures = self.sampled_metrics(model, frozen, batch, keys)
        return metrics | sampled, pictures


# --- main -------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    train(Task, config, JOB)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
