"""How each dynamics model makes a frame: MaskGIT unmasks it in rounds, the causal model writes token after token, diffusion
makes it out of noise. `rollout` makes a video of such frames.

Pure functions of (weights, prompt, actions, key): the draws of frame f come from `fold_in(key, f)`, so a longer video begins
like a shorter one, and one made in pieces is the one made at once.

Shape key:
    B: batch  T: frames of the prompt  S: frames of the video  N: tokens in a frame  L: size of a latent token
    M: model width  V: codes
"""

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jasmine.errors import UserError
from jasmine.models.dynamics import DynamicsCausal, DynamicsDiffusion, DynamicsMaskGIT
from jasmine.models.transformer import UnrolledTransformer
from jasmine.sampling.context import CachedContext, Context, Made, RecomputedContext, State


class FrameSampler(Protocol):
    """A dynamics model with the options of its sampling. Frames are tokens (B, N) int32, or latents (B, N, L) float32."""

    @property
    def dynamics(self) -> Any:
        """The model."""

    def width(self, num_tokens: int) -> int:
        """How many tokens the transformer gets for a frame of `num_tokens`."""

    def embed_prompt(self, frames_BTN: jax.Array, action_BTM: jax.Array, key: jax.Array) -> jax.Array:
        """Finished frames 0 to T as later frames see them, embedded (B, T, width, M)."""

    def sample(
        self, context: Context, opened: State, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Made | None]:
        """The next frame, given the one before it and the action that leads to it; and what its passes made that
        `Context.commit` can use."""

    def embed(self, frame_BN: jax.Array, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array) -> jax.Array:
        """A finished frame as later frames see it, embedded (B, width, M)."""


def rollout(
    sampler: FrameSampler,
    prompt_BTN: jax.Array,
    action_BSM: jax.Array,
    key: jax.Array,
    *,
    window: int,
    cached: bool = True,
) -> jax.Array:
    """A video that goes on from a prompt.

    Args:
        prompt_BTN: tokens (B, T, N) or latents (B, T, N, L), T at least 1.
        action_BSM: the action token of every frame (`ActionTokens`), of the prompt's too; S at least T.
        key: of all random draws.
        window: frames in the windows that the model was trained on, at least 2; no frame looks back further.
        cached: keep keys and values; False computes the whole window anew for every pass, with the same result.

    Returns:
        (B, S, N) or (B, S, N, L): the prompt and the frames that were made.
    """
    T = prompt_BTN.shape[1]
    context = make_context(sampler, prompt_BTN.shape[2], window, cached)
    state = context.begin(sampler.embed_prompt(prompt_BTN, action_BSM[:, :T], key))

    def step(carry: tuple[State, jax.Array], scanned: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        action_BM, frame = scanned
        state, previous = carry
        state, made = next_frame(sampler, context, state, previous, action_BM, jax.random.fold_in(key, frame))
        return (state, made), made

    later = (action_BSM[:, T:].swapaxes(0, 1), jnp.arange(T, action_BSM.shape[1]))
    _, made = jax.lax.scan(step, (state, prompt_BTN[:, -1]), later)
    return jnp.concatenate([prompt_BTN, made.swapaxes(0, 1)], axis=1)


def make_context(sampler: FrameSampler, num_tokens: int, window: int, cached: bool = True) -> Context:
    """The context that `next_frame` and `rollout` use for frames of `num_tokens`."""
    if window < 2:
        raise UserError(
            f"a window of {window} frame holds no frame before the one to make; train with --seq_len of at least 2"
        )
    transformer, width = sampler.dynamics.transformer, sampler.width(num_tokens)
    if cached:
        return CachedContext(UnrolledTransformer(transformer), window, width)
    return RecomputedContext(transformer, window, width)


def next_frame(
    sampler: FrameSampler,
    context: Context,
    state: State,
    previous_BN: jax.Array,
    action_BM: jax.Array,
    key: jax.Array,
) -> tuple[State, jax.Array]:
    """One frame more: the context with it, and the frame. `key` is that of the frame."""
    frame_BN, made = sampler.sample(context, context.open(state), previous_BN, action_BM, key)
    return context.commit(state, sampler.embed(frame_BN, previous_BN, action_BM, key), made), frame_BN


# --- MaskGIT ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MaskGITSampler:
    """Parallel decoding by confidence (MaskGIT, arXiv 2202.04200, section 3.2).

    Attributes:
        steps: rounds of the cosine schedule. Rounds that would fix no token are left out: they change nothing.
        temperature: of the tokens' draws; 0 takes the likeliest.
        choice_temperature: how much chance there is in which tokens are fixed first; it falls with the share that is masked.
    """

    dynamics: DynamicsMaskGIT
    steps: int = 25
    temperature: float = 1.0
    choice_temperature: float = 1.0

    def width(self, num_tokens: int) -> int:
        return num_tokens + 1

    def embed_prompt(self, frames_BTN: jax.Array, action_BTM: jax.Array, key: jax.Array) -> jax.Array:
        return self.dynamics.embed(frames_BTN, action_BTM)

    def embed(self, frame_BN: jax.Array, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array) -> jax.Array:
        return self.dynamics.embed(frame_BN, action_BM)

    def schedule(self, num_tokens: int) -> np.ndarray:
        """How many tokens are still masked after each round, int32; falls to 0."""
        rounds = np.arange(1, self.steps + 1)
        masked = np.floor(num_tokens * np.cos(np.pi / 2 * rounds / self.steps)).astype(np.int32)
        masked[-1] = 0
        return masked[np.diff(masked, prepend=num_tokens) < 0]

    def sample(
        self, context: Context, opened: State, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, None]:
        B, N = previous_BN.shape
        left = self.schedule(N)

        def refine(
            carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            token_BN, masked_BN = carry
            num_left, point_BN, noise_BN = scanned
            x_BNM = self.dynamics.embed(token_BN, action_BM, masked_BN, previous_BN)
            logits_BNV = context.frame(opened, x_BNM)[:, 1:].astype(jnp.float32)
            drawn_BN = draw(point_BN, logits_BNV, self.temperature)
            log_BNV = jax.nn.log_softmax(logits_BNV)
            confidence_BN = jnp.take_along_axis(log_BNV, drawn_BN[..., None], -1)[..., 0]
            confidence_BN = confidence_BN + self.choice_temperature * (num_left / N) * noise_BN
            confidence_BN = jnp.where(masked_BN, confidence_BN, jnp.inf)
            token_BN = jnp.where(masked_BN, drawn_BN, token_BN)
            rank_BN = jnp.argsort(jnp.argsort(confidence_BN, axis=-1), axis=-1)
            return (token_BN, rank_BN < num_left), None

        start = (jnp.zeros((B, N), jnp.int32), jnp.ones((B, N), bool))
        rounds = (len(left), B, N)
        points = jax.random.uniform(jax.random.fold_in(key, 0), rounds)
        noise = jax.random.gumbel(jax.random.fold_in(key, 1), rounds)
        (token_BN, _), _ = jax.lax.scan(refine, start, (jnp.asarray(left), points, noise))
        return token_BN, None


# --- causal -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CausalSampler:
    """Token after token, in raster order.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0: among all.
        top_p: draw among the likeliest that together have this probability (arXiv 1904.09751); 1: among all.
    """

    dynamics: DynamicsCausal
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def width(self, num_tokens: int) -> int:
        return num_tokens

    def embed_prompt(self, frames_BTN: jax.Array, action_BTM: jax.Array, key: jax.Array) -> jax.Array:
        return self.dynamics.of_clip(frames_BTN, action_BTM)

    def embed(self, frame_BN: jax.Array, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array) -> jax.Array:
        return self.dynamics.embed(frame_BN, action_BM, self.dynamics.look_back(previous_BN))

    def sample(
        self, context: Context, opened: State, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Made]:
        B, N = previous_BN.shape
        known_BNM = self.dynamics.look_back(previous_BN)
        points_NB = jax.random.uniform(key, (N, B))
        choose = functools.partial(draw, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        x_B1M = action_BM[:, None] + known_BNM[:, :1]
        logits_BV, so_far, made_first = context.first_token(opened, x_B1M)
        first_B = choose(points_NB[0], logits_BV.astype(jnp.float32))

        def write(
            carry: tuple[jax.Array, State], scanned: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, State], Any]:
            index, point_B = scanned
            token_B, so_far = carry
            known_B1M = jax.lax.dynamic_slice_in_dim(known_BNM, index, 1, 1)
            x_B1M = self.dynamics.token(token_B)[:, None] + known_B1M
            logits_BV, so_far, made = context.next_token(opened, so_far, x_B1M, index)
            token_B = choose(point_B, logits_BV.astype(jnp.float32))
            return (token_B, so_far), (token_B, [tuple(a[:, 0] for a in layer) for layer in made])

        _, rest = jax.lax.scan(write, (first_B, so_far), (jnp.arange(1, N), points_NB[1:]))
        # The keys and values of every token are made by now: the finished frame needs no pass of its own.
        first = (first_B[:, None], made_first)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.moveaxis(b, 0, 1)], axis=1), first, rest)


# --- diffusion --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiffusionSampler:
    """Euler steps from noise to data in the flow that the model's clean guesses imply (Dreamer 4, arXiv 2509.24527,
    section 3.2).

    Attributes:
        steps: K; it divides the model's `denoise_steps`. Default: 4 of a model with shortcuts, else all.
        context_level: signal level of finished frames as later frames see them; the noise in them makes up for their
            mistakes, which training has not shown. 1 leaves them clean (at the highest level that the model knows).
    """

    dynamics: DynamicsDiffusion
    steps: int | None = None
    context_level: float = 0.9

    @property
    def num_steps(self) -> int:
        """`steps`, with the default filled in.

        Raises:
            UserError: it does not divide the model's levels.
        """
        levels = self.dynamics.denoise_steps
        steps = self.steps or (min(4, levels) if self.dynamics.shortcut else levels)
        if levels % steps or (self.dynamics.shortcut and steps & (steps - 1)):
            fits = [k for k in range(1, levels + 1) if levels % k == 0]
            raise UserError(f"{steps} diffusion steps do not divide the model's {levels} levels; these do: {fits}")
        return steps

    def width(self, num_tokens: int) -> int:
        return num_tokens + 2

    def _halvings(self, shape: tuple[int, ...], steps: int) -> jax.Array | None:
        return jnp.full(shape, int(math.log2(steps)), jnp.int32) if self.dynamics.shortcut else None

    def embed_prompt(self, frames_BTN: jax.Array, action_BTM: jax.Array, key: jax.Array) -> jax.Array:
        T = frames_BTN.shape[1]
        keys = jax.vmap(lambda frame: jax.random.fold_in(key, frame))(jnp.arange(T))
        past_BTNL = jnp.pad(frames_BTN[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        embed = jax.vmap(self.embed, in_axes=(1, 1, 1, 0), out_axes=1)
        return embed(frames_BTN, past_BTNL, action_BTM, keys)

    def embed(self, frame_BN: jax.Array, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array) -> jax.Array:
        levels, shape = self.dynamics.denoise_steps, frame_BN.shape[:1]
        level = min(round(self.context_level * levels), levels - 1)
        seen = self.corrupt(frame_BN, jax.random.fold_in(key, 1))
        past = self.corrupt(previous_BN, jax.random.fold_in(key, 2))
        return self.dynamics.embed(seen, past, action_BM, jnp.full(shape, level), self._halvings(shape, levels))

    def corrupt(self, frame_BNL: jax.Array, key: jax.Array) -> jax.Array:
        """A finished frame with the noise that later frames see it with."""
        signal = min(self.context_level, 1.0)
        return (1 - signal) * jax.random.normal(key, frame_BNL.shape) + signal * frame_BNL

    def sample(
        self, context: Context, opened: State, previous_BN: jax.Array, action_BM: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, None]:
        steps, shape = self.num_steps, previous_BN.shape[:1]
        halvings_B = self._halvings(shape, steps)
        past_BNL = self.corrupt(previous_BN, jax.random.fold_in(key, 2))

        def denoise(x_BNL: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
            level_B = jnp.broadcast_to(step * (self.dynamics.denoise_steps // steps), shape)
            out = context.frame(opened, self.dynamics.embed(x_BNL, past_BNL, action_BM, level_B, halvings_B))
            # (clean - x) / (1 - τ) is the velocity; 1 - τ is (steps - step) / steps.
            return x_BNL + (self.dynamics.head(out, past_BNL) - x_BNL) / (steps - step), None

        noise_BNL = jax.random.normal(jax.random.fold_in(key, 0), previous_BN.shape)
        return jax.lax.scan(denoise, noise_BNL, jnp.arange(steps))[0], None


def draw(point_X: jax.Array, logits_XV: jax.Array, temperature: float, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Int32 indices (X) drawn from logits, float32 (X, V), by one number each, uniform in [0, 1); see `CausalSampler` for
    the options."""
    if temperature == 0:
        return jnp.argmax(logits_XV, axis=-1).astype(jnp.int32)
    logits_XV = logits_XV / temperature
    if 0 < top_k < logits_XV.shape[-1]:
        least = jax.lax.top_k(logits_XV, top_k)[0][..., -1:]
        logits_XV = jnp.where(logits_XV < least, -jnp.inf, logits_XV)
    if top_p < 1:
        ordered = jnp.sort(logits_XV, axis=-1, descending=True)
        share = jax.nn.softmax(ordered)
        inside = jnp.cumsum(share, axis=-1) - share < top_p  # the first is always inside
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_XV = jnp.where(logits_XV < least, -jnp.inf, logits_XV)
    return _categorical(point_X, logits_XV)


def _categorical(point_X: jax.Array, logits_XV: jax.Array) -> jax.Array:
    """Draws by inverting the cumulative distribution, first over groups of codes and then within one: one random number a
    draw, where Gumbel noise takes one for every code, which costs more than a small model does."""
    V = logits_XV.shape[-1]
    size = math.isqrt(V - 1) + 1
    weight_XV = jnp.exp(logits_XV - logits_XV.max(-1, keepdims=True))
    padding = [(0, 0)] * (logits_XV.ndim - 1) + [(0, size * size - V)]
    weight_XGS = jnp.pad(weight_XV, padding).reshape(*logits_XV.shape[:-1], size, size)
    until = jnp.triu(jnp.ones((size, size), weight_XV.dtype))  # a product with it adds up what stands before
    groups_XG = jnp.matmul(weight_XGS.sum(-1), until, precision="highest")
    point_X = point_X * groups_XG[..., -1]  # below the total, as a float32 below 1 is at most 1 - 2⁻²⁴
    group_X = jnp.minimum((groups_XG <= point_X[..., None]).sum(-1), size - 1)
    chosen_XS = jnp.take_along_axis(weight_XGS, group_X[..., None, None], axis=-2)[..., 0, :]
    within_XS = jnp.matmul(chosen_XS, until, precision="highest")
    before_X = jnp.take_along_axis(groups_XG, group_X[..., None], axis=-1)[..., 0] - within_XS[..., -1]
    place_X = jnp.minimum((within_XS <= (point_X - before_X)[..., None]).sum(-1), size - 1)
    # Rounding may point past the group's last weight; its likeliest code is then as good as any.
    weight_X = jnp.take_along_axis(chosen_XS, place_X[..., None], axis=-1)[..., 0]
    place_X = jnp.where(weight_X > 0, place_X, jnp.argmax(chosen_XS, axis=-1))
    return (group_X * size + place_X).astype(jnp.int32)
