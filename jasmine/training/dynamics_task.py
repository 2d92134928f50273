"""What the three dynamics baselines share: where tokens and actions come from, and how a model is judged.

Tokens come from a frozen tokenizer, run in the step or beforehand (`python -m jasmine.data.tokenize`). Actions are true
ones, of all clips or of a share of the episodes, or those of a latent action model, frozen or trained along.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.errors import UserError
from jasmine.evaluation.media import comparison
from jasmine.evaluation.metrics import code_usage, psnr, ssim
from jasmine.models.dynamics import ActionTokens, WorldModel
from jasmine.models.latent_action import LatentActionEncoder
from jasmine.sampling.samplers import FrameSampler, rollout
from jasmine.training.config import FrozenRun, check_least
from jasmine.training.model_config import ModelConfig, check_even_heads, check_heads, check_patch
from jasmine.training.task import BaseTask, Batch, Keys, Metrics, Modules

LAM_JOB = "train_lam"
PUBLISHED_NUM_ACTIONS = 6
LAM_REVIVAL = 0.1  # the default of train_lam's vq_revival


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(ModelConfig):
    """Options of every dynamics baseline. Defaults are the published Jasmine's; `model_dim`, `ffn_dim`, `num_blocks` and
    `num_heads` are the dynamics model's."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("data_dir", "tokenizer_checkpoint")

    num_steps: int = 200_000
    batch_size: int = 36
    max_lr: float = 3e-5
    num_blocks: int = 6
    tokenizer_checkpoint: str = ""
    """Run directory, or name, of the tokenizer; its architecture is read from there."""
    patch_size: int | None = None
    """The tokenizer's, which is read from its run; given here, it is only compared with that."""

    # --- actions ---
    use_gt_actions: bool = False
    """Condition on the data's true actions."""
    label_fraction: float = 1.0
    """With use_gt_actions: the share of the episodes whose actions may be seen; the others show a learned unknown one."""
    lam_checkpoint: str = ""
    """Run of a latent action model to take actions from. Without it and without use_gt_actions one is trained along."""
    num_actions: int | None = None
    """Of true actions: how many the data has, where it does not say so itself. Of the latent action model that is trained
    along: how many it may use, 6 by default."""
    latent_action_dim: int = 32
    """Size of an action's code; a frozen latent action model brings its own."""
    lam_dim: int = 512
    """Width of the latent action model that is trained along; likewise below."""
    lam_ffn_dim: int = 2048
    lam_patch_size: int = 16
    lam_num_blocks: int = 4
    lam_num_heads: int = 8
    vq_beta: float = 0.25
    """Weight of its commitment term."""

    eval_full_frame: bool = True
    """At evaluation sample frames too, and not only predict tokens."""

    @property
    def action_kind(self) -> Literal["true", "frozen", "trained"]:
        """Where actions come from: the data, a frozen latent action model, or one that is trained along."""
        if self.use_gt_actions:
            return "true"
        return "frozen" if self.lam_checkpoint else "trained"

    def labelled_share(self) -> float:
        return self.label_fraction

    @staticmethod
    def tokenizer_job() -> str:
        """The job that trains the tokenizers for this model."""
        return "train_tokenizer_vqvae"

    def frozen_runs(self) -> dict[str, FrozenRun]:
        runs = {"tokenizer": FrozenRun("--tokenizer_checkpoint", self.tokenizer_checkpoint, (self.tokenizer_job(),))}
        if self.lam_checkpoint:
            runs["lam"] = FrozenRun("--lam_checkpoint", self.lam_checkpoint, (LAM_JOB,))
        return runs

    def check(self) -> None:
        super().check()
        if self.seq_len < 2:
            raise UserError(f"--seq_len={self.seq_len}: dynamics lie between two frames; give at least 2")
        if self.use_gt_actions and self.lam_checkpoint:
            raise UserError("--use_gt_actions and --lam_checkpoint exclude each other: actions come from one of them")
        if not 0 < self.label_fraction <= 1:
            raise UserError(f"--label_fraction={self.label_fraction}: a share above 0, up to 1")
        if self.label_fraction < 1 and not self.use_gt_actions:
            raise UserError("--label_fraction is about true actions: give --use_gt_actions too, or leave it out")
        check_least(
            self, 1, "num_actions", "latent_action_dim", "lam_dim", "lam_ffn_dim", "lam_num_blocks", "lam_num_heads"
        )
        check_least(self, 0, "vq_beta")
        if self.action_kind == "trained":
            check_heads("lam_dim", self.lam_dim, "lam_num_heads", self.lam_num_heads)
            check_even_heads("lam_dim", self.lam_dim, "lam_num_heads", self.lam_num_heads)


class DynamicsTask(BaseTask):
    """Predict the tokens of each frame from the frames before it and the action that leads to it."""

    config: Any

    def check(self) -> None:
        config, data, tokenizer = self.config, self.data, self.frozen["tokenizer"]
        if tokenizer.data.frame_shape != data.frame_shape:
            raise UserError(
                f"--tokenizer_checkpoint={tokenizer.path}: it was trained on frames of {_shape(tokenizer.data.frame_shape)}, "
                f"and --data_dir has {_shape(data.frame_shape)}"
            )
        if config.patch_size is not None and config.patch_size != tokenizer.config.patch_size:
            raise UserError(
                f"--patch_size={config.patch_size}, but the tokenizer {tokenizer.path} has patches of "
                f"{tokenizer.config.patch_size}; leave the option out"
            )
        if config.action_kind == "true":
            if data.num_actions is None:
                raise UserError(
                    "--use_gt_actions: --data_dir has no actions, or not one whole number a frame; leave the option out to "
                    "learn latent ones"
                )
            if config.num_actions is not None and config.num_actions < data.num_actions:
                raise UserError(
                    f"--num_actions={config.num_actions}, but the data has actions up to {data.num_actions - 1}"
                )
        if config.action_kind == "frozen" and self.frozen["lam"].data.frame_shape != data.frame_shape:
            raise UserError(
                f"--lam_checkpoint={self.frozen['lam'].path}: it was trained on frames of "
                f"{_shape(self.frozen['lam'].data.frame_shape)}, and --data_dir has {_shape(data.frame_shape)}"
            )
        if config.action_kind == "trained":
            check_patch("lam_patch_size", config.lam_patch_size, data.frame_shape)
        if data.tokens is not None:
            self._check_tokens()

    def _check_tokens(self) -> None:
        tokens = self.data.tokens
        assert tokens is not None
        if self.config.action_kind == "trained":
            raise UserError(
                "--data_dir holds tokens, and a latent action model that is trained along needs frames; give "
                "--use_gt_actions or --lam_checkpoint, or name the dataset the tokens were made from"
            )
        if "lam" in self.frozen and tokens.lam is None:
            raise UserError("--lam_checkpoint: the tokens in --data_dir were made without --lam; tokenize them with it")

    def check_weights(self) -> None:
        tokens = self.data.tokens
        if tokens is None:
            return
        for name, maker in (("tokenizer", tokens.tokenizer), ("lam", tokens.lam)):
            run = self.frozen.get(name)
            if run is not None and maker is not None and run.step and maker.fingerprint != run.fingerprint():
                raise UserError(
                    f"--{name}_checkpoint={run.path} (step {run.step}) is not what made the tokens in --data_dir: that was "
                    f"step {maker.step} of {maker.path}; tokenize the data with this one, or name that one"
                )

    @property
    def num_actions(self) -> int | None:
        """How many actions the model is conditioned on; None where true ones are asked for and nobody knows."""
        kind = self.config.action_kind
        if kind == "true":
            return self.config.num_actions or self.data.num_actions
        return (
            self.frozen["lam"].config.num_latents
            if kind == "frozen"
            else self.config.num_actions or PUBLISHED_NUM_ACTIONS
        )

    def world(self, dynamics: nnx.Module, rngs: nnx.Rngs) -> WorldModel:
        """The trained model around a dynamics model."""
        config, kind = self.config, self.config.action_kind
        lam = None
        if kind == "trained":
            lam = LatentActionEncoder(
                frame_shape=self.data.frame_shape,
                patch_size=config.lam_patch_size,
                latent_dim=config.latent_action_dim,
                num_latents=self.num_actions or PUBLISHED_NUM_ACTIONS,
                codebook_dropout=0.0,
                transformer=config.transformer(
                    model_dim=config.lam_dim,
                    ffn_dim=config.lam_ffn_dim,
                    num_blocks=config.lam_num_blocks,
                    num_heads=config.lam_num_heads,
                    num_kv_heads=None,
                    time_every=1,
                ),
                rngs=rngs,
            )
        actions = ActionTokens(
            num_actions=self.num_actions if kind == "true" else None,
            latent_action_dim=self.frozen["lam"].config.latent_dim if kind == "frozen" else config.latent_action_dim,
            model=config.transformer(),
            rngs=rngs,
        )
        return WorldModel(dynamics, actions, lam)

    # --- tokens and actions -------------------------------------------------------------------------------------

    def tokens(self, frozen: Modules, batch: Batch) -> jax.Array:
        """Tokens (B, T, N) int32, or latents (B, T, N, L) float32, of a batch of either kind."""
        for stored in ("tokens", "latents"):
            if stored in batch:
                return batch[stored]
        return self.encode(frozen["tokenizer"], batch["videos"].astype(jnp.float32) / 255)

    @abc.abstractmethod
    def encode(self, tokenizer: Any, video_BTHWC: jax.Array) -> jax.Array:
        """Tokens or latents of a float video in [0, 1]."""

    def prepare(self, frozen: Modules, batch: Batch) -> Batch:
        """`tokens`, whichever kind, and of a frozen latent action model `action_index` (B, T - 1) and `action_code`."""
        prepared: Batch = {name: batch[name] for name in ("actions", "labelled") if name in batch}
        prepared["tokens"] = self.tokens(frozen, batch)
        if self.config.action_kind == "frozen":
            prepared["action_index"] = self.action_index(None, frozen, batch)
            prepared["action_code"] = scaled(frozen["lam"].vq.lookup(prepared["action_index"]))
        if self.config.action_kind == "trained":
            prepared["videos"] = batch["videos"]
        return jax.lax.stop_gradient(prepared)

    def action_index(self, model: WorldModel | None, frozen: Modules, batch: Batch) -> jax.Array:
        """Int32 (B, T - 1): which action leads from each frame to the next; `model` only where its LAM is trained along."""
        kind = self.config.action_kind
        if kind == "true":
            return batch["actions"][:, :-1]
        if "latent_actions" in batch:
            return batch["latent_actions"][:, :-1]
        if kind == "trained":
            assert model is not None
            lam = model.lam
        else:
            lam = frozen["lam"]
        return lam.encode_actions(batch["videos"].astype(jnp.float32) / 255)

    def action_tokens(self, model: WorldModel, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
        """Of a prepared batch: action tokens (B, T, M), what the latent action model adds to the loss, scalars."""
        kind = self.config.action_kind
        extra, metrics = jnp.zeros(()), {}
        if kind == "true":
            code_BTA = model.actions.table(batch["actions"][:, :-1])
        elif kind == "frozen":
            code_BTA = batch["action_code"]
        else:
            quantized = model.lam(batch["videos"].astype(jnp.float32) / 255)
            code_BTA = scaled(quantized.straight_XL)
            q_loss, commitment_loss = quantized.losses()
            extra = q_loss + self.config.vq_beta * commitment_loss + LAM_REVIVAL * model.lam.vq.revival_loss(quantized)
            usage = code_usage(quantized.index_X, self.num_actions or PUBLISHED_NUM_ACTIONS)
            metrics = {f"lam_{name}": value for name, value in usage.items()}
        return model.actions.of_clip(code_BTA, batch.get("labelled")), extra, metrics

    def tokens_of_actions(self, model: WorldModel, frozen: Modules, index_X: jax.Array) -> jax.Array:
        """Action tokens (X, M) of action indices, for sampling; -1 is the unknown action."""
        known_X = index_X >= 0
        index_X = jnp.maximum(index_X, 0)
        if self.config.action_kind == "true":
            return model.actions(model.actions.table(index_X), known_X)
        vq = frozen["lam"].vq if self.config.action_kind == "frozen" else model.lam.vq
        return model.actions(scaled(vq.lookup(index_X)), known_X)

    # --- sampling and evaluation --------------------------------------------------------------------------------

    @abc.abstractmethod
    def sampler(self, dynamics: Any, **options: Any) -> FrameSampler:
        """The model's sampler; `options` are those of its class."""

    def generate(
        self,
        model: WorldModel,
        frozen: Modules,
        prompt_BTN: jax.Array,
        action_BS: jax.Array,
        key: jax.Array,
        *,
        cached: bool = True,
        **options: Any,
    ) -> jax.Array:
        """Tokens of S + 1 frames that begin with the prompt; `action_BS`, int32, leads from each frame to the next."""
        first_B1M = model.actions.first(prompt_BTN.shape[0])[:, None]
        action_BSM = jnp.concatenate([first_B1M, self.tokens_of_actions(model, frozen, action_BS)], axis=1)
        sampler = self.sampler(model.dynamics, **options)
        return rollout(sampler, prompt_BTN, action_BSM, key, window=self.config.seq_len, cached=cached)

    def sampled_metrics(
        self, model: WorldModel, frozen: Modules, batch: Batch, keys: Keys
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        """Samples the second half of each clip from the first, and a whole clip from its first frame.

        Returns:
            `psnr`, `ssim` of the sampled frames; `psnr_copy` of the last given frame, held, as the tokenizer shows it;
            `delta_psnr`: how much worse another clip's actions make them. The picture `rollout`.
        """
        decode = frozen["tokenizer"].decode
        token_BTN = self.tokens(frozen, batch)
        true_BT = self.action_index(model, frozen, batch)
        recon_BTHWC = decode(token_BTN)
        truth_BTHWC = batch["videos"].astype(jnp.float32) / 255 if "videos" in batch else recon_BTHWC
        given = token_BTN.shape[1] // 2
        other_BT = jnp.concatenate([true_BT[:, : given - 1], jnp.roll(true_BT[:, given - 1 :], 1, axis=0)], axis=1)
        key = keys["sample"]
        made, other = (
            decode(self.generate(model, frozen, token_BTN[:, :given], actions, key))[:, given:]
            for actions in (true_BT, other_BT)
        )
        future = truth_BTHWC[:, given:]
        with_true, with_other = psnr(future, made), psnr(future, other)
        metrics = {
            "psnr": with_true,
            "ssim": ssim(future, made),
            "psnr_copy": psnr(future, jnp.broadcast_to(recon_BTHWC[:, given - 1 : given], future.shape)),
            "delta_psnr": with_true - with_other,
        }
        shown = min(4, token_BTN.shape[0])
        clip = self.generate(model, frozen, token_BTN[:shown, :1], true_BT[:shown], key)
        return metrics, {"rollout": comparison(truth_BTHWC[:shown], decode(clip))}


def scaled(code_XL: jax.Array) -> jax.Array:
    """Codes of about unit length, at unit variance."""
    return code_XL * code_XL.shape[-1] ** 0.5


def _shape(frame_shape: tuple[int, int, int]) -> str:
    return "×".join(map(str, frame_shape))
