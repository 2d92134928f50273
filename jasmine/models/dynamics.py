"""Dynamics models: the tokens of the next frame, given the frames before it and the action that leads to it.

All three run the space-time transformer on frames that begin with an action token (Genie adds actions to the tokens;
prepending them is better, see the published Jasmine). They differ in how a frame comes about: MaskGIT unmasks a frame's
tokens in a few rounds, the causal model writes them one after the other, diffusion makes continuous tokens out of noise.

Each has `embed`, from frames to what the transformer takes; training runs it over whole clips, a sampler over the one
frame in the making.

Shape key:
    B: batch  T: frames  N: tokens in a frame, without action  L: size of a latent token  M: model width
    A: size of a latent action  V: codes of the tokenizer  X: leading axes
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.models.latent_action import LatentActionEncoder
from jasmine.models.layers import Embedding, Linear, sinusoids
from jasmine.models.transformer import Block, SpaceTimeTransformer, TransformerConfig


class ActionTokens(nnx.Module):
    """One token for each frame: the action that leads to it, or a learned token where that is not known, as at frame 0."""

    def __init__(self, *, num_actions: int | None, latent_action_dim: int, model: TransformerConfig, rngs: nnx.Rngs):
        """num_actions: of the learned table of true actions; None where actions come as codes of a latent action model."""
        self.table: Any = None if num_actions is None else Embedding(num_actions, latent_action_dim, rngs=rngs, std=1.0)
        self.up = Linear(
            (latent_action_dim,), (model.model_dim,), logical=(None, "embed"), dtype=model.dtype, rngs=rngs
        )
        unknown_M = jax.random.normal(rngs.params(), (model.model_dim,), jnp.float32)
        self.unknown = nnx.Param(unknown_M, logical=("embed",))

    def __call__(self, code_XA: jax.Array, known_X: jax.Array | None = None) -> jax.Array:
        """Tokens (X, M). code_XA: codes of unit variance. known_X: False where the action is not known; None: all are."""
        token_XM = self.up(code_XA)
        if known_X is None:
            return token_XM
        return jnp.where(known_X[..., None], token_XM, self.unknown[...].astype(token_XM.dtype))

    def of_clip(self, code_BTA: jax.Array, known_B: jax.Array | None = None) -> jax.Array:
        """Tokens of T + 1 frames from the T actions between them; `known_B` False where a clip's are not known."""
        known_BT = None if known_B is None else jnp.broadcast_to(known_B[:, None], code_BTA.shape[:2])
        token_BTM = self(code_BTA, known_BT)
        return jnp.concatenate([self.first(token_BTM.shape[0])[:, None], token_BTM], axis=1)

    def first(self, batch: int) -> jax.Array:
        """The token of a frame that no action leads to, (batch, M)."""
        return jnp.broadcast_to(self.unknown[...].astype(self.up.dtype), (batch, self.unknown[...].shape[0]))


class WorldModel(nnx.Module):
    """What a dynamics baseline trains: dynamics, action tokens, and the latent action encoder if it is trained along."""

    def __init__(self, dynamics: nnx.Module, actions: ActionTokens, lam: LatentActionEncoder | None):
        self.dynamics = dynamics
        self.actions = actions
        self.lam: Any = lam


def _read_out(tokens: Embedding, transformer: SpaceTimeTransformer) -> None:
    """Has the last layer begin as the transpose of the embedding, at the variance that it has anyway. Most tokens are as they
    were in the frame before: whatever finds an embedding there thus names its token, instead of learning each code's name."""
    table_VM = tokens.table[...]
    transformer.out_linear.kernel[...] = table_VM.T / table_VM.shape[1] ** 0.5


class DynamicsMaskGIT(nnx.Module):
    """Masked token modelling within frames, causal in time (MaskGIT, arXiv 2202.04200; as dynamics: Genie, section 2.1).

    A masked place shows what stood there in the frame before, which in sampling is always known and mostly right. The frame
    before is shown whole in training too, masked or not: being causal in time, its own tokens are told without it.
    `look_back=False` shows the mask token alone, as published.
    """

    def __init__(self, *, num_latents: int, look_back: bool = True, transformer: TransformerConfig, rngs: nnx.Rngs):
        M = transformer.model_dim
        self.look_back = look_back
        self.tokens = Embedding(num_latents, M, logical="embed", rngs=rngs, std=1.0)
        self.mask_token = nnx.Param(jax.random.normal(rngs.params(), (M,), jnp.float32), logical=("embed",))
        self.transformer = SpaceTimeTransformer(None, num_latents, transformer, rngs)
        _read_out(self.tokens, self.transformer)

    def embed(
        self,
        token_XN: jax.Array,
        action_XM: jax.Array,
        masked_XN: jax.Array | None = None,
        previous_XN: jax.Array | None = None,
    ) -> jax.Array:
        """(X, 1 + N, M): the action, then the frame's tokens, the masked ones replaced by the mask token, and the token of
        the frame before added to it, where that is given."""
        x_XNM = self.tokens(token_XN)
        if masked_XN is not None:
            masked_XNM = self.mask_token[...]
            if self.look_back and previous_XN is not None:
                masked_XNM = masked_XNM + self.tokens(previous_XN)
            x_XNM = jnp.where(masked_XN[..., None], masked_XNM, x_XNM)
        return jnp.concatenate([action_XM[..., None, :], x_XNM.astype(action_XM.dtype)], axis=-2)

    def __call__(
        self,
        token_BTN: jax.Array,
        action_BTM: jax.Array,
        masked_BTN: jax.Array | None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every token, (B, T, N, V) float32."""
        # Of frame 0, of which nothing is masked, what went before does not matter.
        x_BTNM = self.embed(token_BTN, action_BTM, masked_BTN, jnp.roll(token_BTN, 1, axis=1))
        return self.transformer(x_BTNM, dropout_key)[:, :, 1:].astype(jnp.float32)


def random_mask(key: jax.Array, shape: tuple[int, ...], mask_limit: float) -> jax.Array:
    """Which tokens of clips (B, T, N) to mask in training: each with a chance drawn for its clip between `mask_limit` and 1,
    none in the first frame."""
    chance_key, mask_key = jax.random.split(key)
    chance_B11 = jax.random.uniform(chance_key, (shape[0], 1, 1), minval=mask_limit)
    return jax.random.bernoulli(mask_key, chance_B11, shape).at[:, 0].set(False)


class DynamicsCausal(nnx.Module):
    """Autoregressive over the tokens of a frame, in raster order, and over frames.

    Factored attention that is causal both ways never shows a token's place, nor what lies right of it or below, in the
    frame before: position n of a frame is fed token n - 1, and looks back in time at positions that were fed the same.
    A model that cannot see what it would have to copy is a poor model of video, so one block without causality reads the
    whole frame before, and its output at n is added to the input at n. `look_back=False` leaves it out, as published.
    """

    def __init__(self, *, num_latents: int, look_back: bool, transformer: TransformerConfig, rngs: nnx.Rngs):
        M = transformer.model_dim
        self.dtype = transformer.dtype
        self.tokens = Embedding(num_latents, M, logical="embed", rngs=rngs, std=1.0)
        self.past = Block(dataclasses.replace(transformer, space_causal=False), rngs, time=False) if look_back else None
        causal = dataclasses.replace(transformer, space_causal=True)
        self.transformer = SpaceTimeTransformer(None, num_latents, causal, rngs)
        _read_out(self.tokens, self.transformer)

    def look_back(self, token_XN: jax.Array) -> jax.Array:
        """What is known of a frame from the frame before it, (X, N, M): of every token its place's surroundings there."""
        lead = token_XN.shape[:-1]
        x_XNM = self.tokens(token_XN)
        x_B1NM = (x_XNM + sinusoids(*x_XNM.shape[-2:])).astype(self.dtype).reshape(-1, 1, *x_XNM.shape[-2:])
        if self.past is None:
            return jnp.zeros((*lead, *x_B1NM.shape[2:]), self.dtype)
        return self.past(x_B1NM, None)[0].reshape(*lead, *x_B1NM.shape[2:])

    def embed(self, token_XN: jax.Array, action_XM: jax.Array, known_XNM: jax.Array) -> jax.Array:
        """(X, N, M): position n is fed token n - 1 (the action at 0), and `known_XNM` of the frame before at n."""
        x_XNM = jnp.concatenate([action_XM[..., None, :], self.token(token_XN[..., :-1])], axis=-2)
        return x_XNM + known_XNM

    def token(self, token_X: jax.Array) -> jax.Array:
        """Embedded tokens in the compute dtype."""
        return self.tokens(token_X).astype(self.dtype)

    def of_clip(self, token_BTN: jax.Array, action_BTM: jax.Array) -> jax.Array:
        """The embedded frames of clips; nothing is known before the first."""
        known_BTNM = jnp.pad(self.look_back(token_BTN[:, :-1]), ((0, 0), (1, 0), (0, 0), (0, 0)))
        return self.embed(token_BTN, action_BTM, known_BTNM)

    def __call__(self, token_BTN: jax.Array, action_BTM: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits of every token given those before it, (B, T, N, V) float32."""
        return self.transformer(self.of_clip(token_BTN, action_BTM), dropout_key).astype(jnp.float32)


class DynamicsDiffusion(nnx.Module):
    """Diffusion forcing: each frame has a signal level of its own (arXiv 2407.01392), and the model predicts the clean
    latents (x-prediction, Dreamer 4, arXiv 2509.24527, section 3.2).

    Signal level τ: 0 is noise, 1 the data; a frame at τ is (1 - τ) · noise + τ · latents. One token before each frame's
    latents carries τ and, for shortcut forcing, the size of the step that is to be taken, as a power of two.

    The model tells the difference of a frame to the one before, and is shown that one beside the noised latents: with a
    little noise, as finished frames have it in sampling. `look_back=False` leaves that to time attention, as published.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        denoise_steps: int,
        shortcut: bool,
        look_back: bool = True,
        transformer: TransformerConfig,
        rngs: nnx.Rngs,
    ):
        """denoise_steps: levels between noise and data, a power of two with `shortcut`."""
        M = transformer.model_dim
        kind: dict[str, Any] = {"logical": (None, "embed"), "dtype": transformer.dtype, "rngs": rngs}
        self.past_in: Any = Linear((latent_dim,), (M,), **kind) if look_back else None
        self.denoise_steps = denoise_steps
        self.shortcut = shortcut
        self.latents_in = Linear((latent_dim,), (M,), **kind)
        self.level = Embedding(denoise_steps, M, logical="embed", rngs=rngs, std=1.0)
        sizes = int(math.log2(denoise_steps)) + 1
        self.step_size = Embedding(sizes, M, logical="embed", rngs=rngs, std=1.0) if shortcut else None
        self.transformer = SpaceTimeTransformer(None, latent_dim, transformer, rngs)
        if look_back:
            kernel = self.transformer.out_linear.kernel
            kernel[...] = jnp.zeros_like(kernel[...])  # begins as no difference

    def embed(
        self,
        noised_XNL: jax.Array,
        past_XNL: jax.Array,
        action_XM: jax.Array,
        level_X: jax.Array,
        halvings_X: jax.Array | None,
    ) -> jax.Array:
        """(X, 2 + N, M): action, level and step size, latents.

        Args:
            past_XNL: the latents of the frame before, with a little noise; zeros before the first frame.
            level_X: int32, τ · denoise_steps.
            halvings_X: int32, the step size is 2^-halvings; None without `shortcut`.
        """
        signal_XM = self.level(level_X)
        if self.step_size is not None:
            assert halvings_X is not None
            signal_XM = signal_XM + self.step_size(halvings_X)
        x_XNM = self.latents_in(noised_XNL)
        if self.past_in is not None:
            x_XNM = x_XNM + self.past_in(past_XNL)
        front = [token[..., None, :].astype(x_XNM.dtype) for token in (action_XM, signal_XM)]
        return jnp.concatenate([*front, x_XNM], axis=-2)

    def head(self, out_XNL: jax.Array, past_XNL: jax.Array) -> jax.Array:
        """Clean latents (X, N, L) float32 from the transformer's output (X, 2 + N, L)."""
        clean_XNL = out_XNL[..., 2:, :].astype(jnp.float32)
        return clean_XNL if self.past_in is None else past_XNL + clean_XNL

    def __call__(
        self,
        noised_BTNL: jax.Array,
        past_BTNL: jax.Array,
        action_BTM: jax.Array,
        level_BT: jax.Array,
        halvings_BT: jax.Array | None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The clean latents that the model sees in noised ones, (B, T, N, L) float32."""
        x_BTNM = self.embed(noised_BTNL, past_BTNL, action_BTM, level_BT, halvings_BT)
        return self.head(self.transformer(x_BTNM, dropout_key), past_BTNL)
