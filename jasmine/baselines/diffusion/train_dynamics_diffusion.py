"""Trains the diffusion dynamics model: the continuous tokens of a frame out of noise, given past frames and an action.

Papers: Diffusion Forcing (Chen et al. 2024, arXiv 2407.01392): each frame has a signal level of its own. Dreamer 4 (Hafner
et al. 2025, arXiv 2509.24527), section 3.2: the model predicts the clean latents, losses are weighed by a ramp, and shortcut
forcing (`--shortcut`; after Frans et al. 2024, arXiv 2410.12557) trains it to take large steps.

    python launch/submit.py --cluster local train_dynamics_diffusion --tokenizer_checkpoint tokenizer_mae \
        --lam_checkpoint lam --data_dir data/coinrun --val_data_dir data/coinrun

Expected: sampled frames become better than the last given frame, held (`val_psnr` above `val_psnr_copy`), and worse with
another clip's actions (`val_delta_psnr` above 0); docs/lab-notes.md holds figures.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.errors import UserError
from jasmine.models.dynamics import DynamicsDiffusion, WorldModel
from jasmine.sampling.samplers import DiffusionSampler
from jasmine.training import cli
from jasmine.training.dynamics_task import DynamicsConfig, DynamicsTask
from jasmine.training.loop import train
from jasmine.training.task import Batch, Keys, Metrics, Modules

JOB = "train_dynamics_diffusion"

# --- config -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(DynamicsConfig):
    """Options of the diffusion dynamics model. Defaults are the published Jasmine's, but for the number of steps, which it
    leaves at 0."""

    max_lr: float = 1e-4
    diffusion_denoise_steps: int = 64
    """Signal levels between noise and data."""
    diffusion_use_ramp_weight: bool = True
    """Weigh the loss of a frame at signal level τ by 0.9 τ + 0.1."""
    diffusion_corrupt_context_factor: float = 0.1
    """Share of noise in the frame before, as each frame is shown it; sampling has as much in all past frames."""
    look_back: bool = True
    """Show each frame the one before, and predict the difference to it."""
    shortcut: bool = False
    """Shortcut forcing: learn steps of all sizes, so that 4 make a frame."""
    shortcut_every: int = 4
    """With shortcut: one in so many clips learns a step from two of half its size; the others learn from data."""

    @staticmethod
    def tokenizer_job() -> str:
        return "train_tokenizer_mae"

    def check(self) -> None:
        super().check()
        levels = self.diffusion_denoise_steps
        if not 0 <= self.diffusion_corrupt_context_factor < 1:
            factor = self.diffusion_corrupt_context_factor
            raise UserError(f"--diffusion_corrupt_context_factor={factor}: a share from 0 up to, not including, 1")
        if levels < 2:
            raise UserError(f"--diffusion_denoise_steps={levels}: must be at least 2")
        if self.shortcut and levels & (levels - 1):
            raise UserError(f"--diffusion_denoise_steps={levels}: a power of two with --shortcut, such as 64")
        if self.shortcut and not 2 <= self.shortcut_every <= self.batch_size // self.grad_accumulation_steps:
            raise UserError(f"--shortcut_every={self.shortcut_every}: from 2 to the batch (of a part, if accumulated)")


# --- model ------------------------------------------------------------------------------------------------------


class Task(DynamicsTask):
    """Tell the clean latents of each frame from noised ones, past frames (each noised as it is) and the action."""

    config: Config

    def build(self, rngs: nnx.Rngs) -> WorldModel:
        dynamics = DynamicsDiffusion(
            latent_dim=self.frozen["tokenizer"].config.latent_dim,
            denoise_steps=self.config.diffusion_denoise_steps,
            shortcut=self.config.shortcut,
            look_back=self.config.look_back,
            transformer=self.config.transformer(),
            rngs=rngs,
        )
        return self.world(dynamics, rngs)

    def encode(self, tokenizer: Any, video_BTHWC: jax.Array) -> jax.Array:
        return tokenizer.encode_latents(video_BTHWC)

    def sampler(self, dynamics: DynamicsDiffusion, **options: Any) -> DiffusionSampler:
        return DiffusionSampler(
            dynamics, **({"context_level": 1 - self.config.diffusion_corrupt_context_factor} | options)
        )

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, model: WorldModel, batch: Batch, keys: Keys) -> tuple[jax.Array, Metrics]:
        action_BTM, extra, metrics = self.action_tokens(model, batch)
        loss, terms = self._denoise(model.dynamics, batch["tokens"], action_BTM, keys, keys["dropout"])
        return loss + extra, terms | metrics

    def _denoise(
        self,
        dynamics: DynamicsDiffusion,
        clean_BTNL: jax.Array,
        action_BTM: jax.Array,
        keys: Keys,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        levels, shape = self.config.diffusion_denoise_steps, clean_BTNL.shape[:2]
        noise_BTNL = jax.random.normal(keys["noise"], clean_BTNL.shape)
        corrupt = self.config.diffusion_corrupt_context_factor
        past_BTNL = (1 - corrupt) * clean_BTNL + corrupt * jax.random.normal(keys["past"], clean_BTNL.shape)
        past_BTNL = jnp.roll(past_BTNL, 1, axis=1).at[:, 0].set(0)
        level_BT = jax.random.randint(keys["level"], shape, 0, levels)
        halvings_BT, taught_B = None, jnp.zeros(shape[:1], bool)
        if self.config.shortcut:
            most = levels.bit_length() - 1
            taught_B = jnp.arange(shape[0]) % self.config.shortcut_every == 0
            shorter_BT = jax.random.randint(keys["step_size"], shape, 0, most)
            halvings_BT = jnp.where(taught_B[:, None], shorter_BT, most)
            stride_BT = levels >> halvings_BT  # a step's size in levels; τ lies on the grid of its steps
            level_BT = level_BT // stride_BT * stride_BT
        tau_BT11 = (level_BT / levels)[..., None, None]
        noised_BTNL = (1 - tau_BT11) * noise_BTNL + tau_BT11 * clean_BTNL
        guess_BTNL = dynamics(noised_BTNL, past_BTNL, action_BTM, level_BT, halvings_BT, dropout_key)
        target_BTNL = clean_BTNL
        if halvings_BT is not None:
            rows = slice(0, None, self.config.shortcut_every)
            target = self._two_half_steps(
                dynamics, noised_BTNL[rows], past_BTNL[rows], action_BTM[rows], level_BT[rows], halvings_BT[rows]
            )
            target_BTNL = target_BTNL.at[rows].set(target)
        mse_BT = jnp.square(guess_BTNL - target_BTNL).mean((2, 3))
        weight_BT = 0.9 * tau_BT11[..., 0, 0] + 0.1 if self.config.diffusion_use_ramp_weight else jnp.ones(shape)
        from_data_BT = jnp.broadcast_to(~taught_B[:, None], shape)
        terms = {"mse": jnp.where(from_data_BT, mse_BT, 0).sum() / jnp.maximum(from_data_BT.sum(), 1)}
        if self.config.shortcut:
            terms["shortcut_mse"] = jnp.where(from_data_BT, 0, mse_BT).sum() / jnp.maximum((~from_data_BT).sum(), 1)
        return (mse_BT * weight_BT).mean(), terms

    def _two_half_steps(
        self,
        dynamics: DynamicsDiffusion,
        noised_BTNL: jax.Array,
        past_BTNL: jax.Array,
        action_BTM: jax.Array,
        level_BT: jax.Array,
        halvings_BT: jax.Array,
    ) -> jax.Array:
        """The clean latents that a step would have to aim at to land where two steps of half its size do (Dreamer 4,
        equation 7, whose loss in velocities, times (1 - τ)², is the squared distance to this)."""
        levels = self.config.diffusion_denoise_steps
        half_BT = (levels >> halvings_BT) // 2

        def velocity(x_BTNL: jax.Array, level_BT: jax.Array) -> jax.Array:
            clean_BTNL = dynamics(x_BTNL, past_BTNL, action_BTM, level_BT, halvings_BT + 1)
            return (clean_BTNL - x_BTNL) / (1 - level_BT / levels)[..., None, None]

        first_BTNL = velocity(noised_BTNL, level_BT)
        between_BTNL = noised_BTNL + first_BTNL * (half_BT / levels)[..., None, None]
        mean_BTNL = (first_BTNL + velocity(between_BTNL, level_BT + half_BT)) / 2
        return jax.lax.stop_gradient(noised_BTNL + (1 - level_BT / levels)[..., None, None] * mean_BTNL)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, model: WorldModel, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        prepared = self.prepare(frozen, batch)
        action_BTM, extra, metrics = self.action_tokens(model, prepared)
        loss, terms = self._denoise(model.dynamics, prepared["tokens"], action_BTM, keys, None)
        metrics |= {"loss": loss + extra, **terms}
        if not self.config.eval_full_frame:
            return metrics, {}
        sampled, pictures = self.sampled_metrics(model, frozen, batch, keys)
        return metrics | sampled, pictures


# --- main -------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    train(Task, config, JOB)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
