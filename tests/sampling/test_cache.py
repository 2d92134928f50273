"""The cache of keys and values is another way to the same outputs: for every layer option, every window and prompt, and far
beyond the window."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.models.dynamics import DynamicsCausal, DynamicsDiffusion, DynamicsMaskGIT
from jasmine.models.transformer import SpaceTimeTransformer, TransformerConfig, UnrolledTransformer
from jasmine.sampling.context import CachedContext, RecomputedContext, window_start
from jasmine.sampling.samplers import CausalSampler, DiffusionSampler, MaskGITSampler, make_context, next_frame, rollout
from jasmine.training.flops import product_flops
from tests.models.random_weights import random_weights

pytestmark = pytest.mark.slow

BASE = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=2, num_heads=4, dtype=jnp.float32)
DREAMER = {
    "norm": "rms", "positions": "rope", "ffn": "swiglu", "qk_norm": True, "logit_soft_cap": 5.0, "num_kv_heads": 2,
    "num_blocks": 4, "time_every": 2, "num_registers": 2,
}  # fmt: skip
OPTIONS = {
    "base": {},
    "rms": {"norm": "rms"},
    "rope": {"positions": "rope"},
    "swiglu": {"ffn": "swiglu"},
    "qk_norm": {"qk_norm": True},
    "soft_cap": {"logit_soft_cap": 2.0},
    "grouped": {"num_kv_heads": 2},
    "time_every": {"num_blocks": 4, "time_every": 2},
    "registers": {"num_registers": 3},
    "all": DREAMER,
}
B, N = 2, 5
ATOL = 2e-5

# Outputs are compared, not speed: XLA's passes would take most of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def transformer(option: str, **changes) -> SpaceTimeTransformer:
    config = dataclasses.replace(BASE, **OPTIONS[option], **changes)
    return random_weights(lambda: SpaceTimeTransformer(None, 7, config, nnx.Rngs(0)))


def frames_of_windows(model: SpaceTimeTransformer, x_BSNM: jax.Array, window: int, shift: int = 0) -> np.ndarray:
    """The truth: each frame's outputs (S, B, N, O) when the model is run, as in training, over a window of its context."""
    run = jit(model.__call__)
    padded = jnp.pad(x_BSNM, ((0, 0), (0, window), (0, 0), (0, 0)))
    outputs = []
    for frame in range(x_BSNM.shape[1]):
        start = max(0, window_start(frame, window) - shift)
        outputs.append(run(padded[:, start : start + window + shift])[:, frame - start])
    return np.asarray(outputs)


def frames_of_context(context, x_BSNM: jax.Array, prompt: int) -> np.ndarray:
    """The same of a context that is given frame after frame, (S - prompt, B, N, O)."""
    step = jit(lambda state, x_BNM: (context.commit(state, x_BNM), context.frame(context.open(state), x_BNM)))
    state, outputs = jit(context.begin)(x_BSNM[:, :prompt]), []
    for frame in range(prompt, x_BSNM.shape[1]):
        state, output = step(state, x_BSNM[:, frame])
        outputs.append(output)
    return np.asarray(outputs)


def video(frames: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).standard_normal((B, frames, N, BASE.model_dim)), jnp.float32)


# --- the context of a frame -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 6, 7, 16])
def test_context_is_the_whole_past_at_first_and_later_from_half_a_window_to_a_whole_one(window):
    starts = [window_start(frame, window) for frame in range(5 * window)]
    assert starts[:window] == [0] * window
    for frame, start in enumerate(starts[window:], window):
        assert window // 2 <= frame - start < window
    assert {after - before for before, after in itertools.pairwise(starts)} == {0, window // 2}
    np.testing.assert_array_equal(jax.vmap(lambda f: window_start(f, window))(jnp.arange(5 * window)), starts)


# --- frames at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["base", "all"])
@pytest.mark.parametrize(("window", "prompts"), [(6, (2,)), (5, (8,))])
def test_cached_frames_are_those_of_the_window(option, window, prompts):
    cached_frames_are_those_of_the_window(option, window, prompts)


@pytest.mark.parametrize(("window", "prompts"), [(2, (1,)), (3, (4,)), (4, (1, 4, 5)), (7, (6, 7, 15))])
def test_every_window_and_every_prompt(window, prompts):
    cached_frames_are_those_of_the_window("base", window, prompts)


def cached_frames_are_those_of_the_window(option: str, window: int, prompts: tuple[int, ...]) -> None:
    model, x = transformer(option), video(max(prompts) + 5 * window // 2)
    truth = frames_of_windows(model, x, window)
    for prompt in prompts:
        cached = frames_of_context(CachedContext(UnrolledTransformer(model), window, N), x, prompt)
        np.testing.assert_allclose(cached, truth[prompt:], atol=ATOL)


def test_recomputed_frames_are_those_of_the_window():
    model = transformer("all")
    for window, prompt, frames in ((6, 2, 17), (5, 8, 15)):
        x = video(frames)
        recomputed = frames_of_context(RecomputedContext(model, window, N), x, prompt)
        np.testing.assert_allclose(recomputed, frames_of_windows(model, x, window)[prompt:], atol=ATOL)


@pytest.mark.parametrize("option", ["base", "rope"])
def test_a_context_that_began_one_frame_earlier_would_show(option):
    model, x = transformer(option), video(17)
    right, wrong = (frames_of_windows(model, x, 6, shift) for shift in (0, 1))
    assert (np.abs(right - wrong)[6:].max((1, 2, 3)) > 1e-3).all()


# --- token by token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_cached_tokens_and_frames_of_a_model_that_is_causal_in_space_are_those_of_the_window(option):
    model = transformer(option, space_causal=True)
    prompt, frames = (8, 15) if list(OPTIONS).index(option) % 2 else (2, 13)
    window, x = 5, video(frames)
    context = CachedContext(UnrolledTransformer(model), window, N)

    @jit
    def step(state, x_BNM):
        opened = context.open(state)
        first_BO, so_far, _ = context.first_token(opened, x_BNM[:, :1])

        def next_token(so_far, scanned):
            index, x_BM = scanned
            output_BO, so_far, _ = context.next_token(opened, so_far, x_BM[:, None], index)
            return so_far, output_BO

        _, later = jax.lax.scan(next_token, so_far, (jnp.arange(1, N), x_BNM[:, 1:].swapaxes(0, 1)))
        tokens_BNO = jnp.concatenate([first_BO[:, None], later.swapaxes(0, 1)], axis=1)
        return context.commit(state, x_BNM), tokens_BNO, context.frame(opened, x_BNM)

    state, tokens, whole = jit(context.begin)(x[:, :prompt]), [], []
    for frame in range(prompt, frames):
        state, by_token, at_once = step(state, x[:, frame])
        tokens.append(by_token)
        whole.append(at_once)
    truth = frames_of_windows(model, x, window)[prompt:]
    np.testing.assert_allclose(tokens, truth, atol=ATOL)
    np.testing.assert_allclose(whole, truth, atol=ATOL)


# --- samplers ---------------------------------------------------------------------------------------------------


def make_sampler(kind: str, option: str = "base"):
    config = dataclasses.replace(BASE, **OPTIONS[option])
    kinds = {
        "maskgit": (MaskGITSampler, DynamicsMaskGIT, {"num_latents": 24}),
        "causal": (CausalSampler, DynamicsCausal, {"num_latents": 24, "look_back": True}),
        "diffusion": (DiffusionSampler, DynamicsDiffusion, {"latent_dim": 6, "denoise_steps": 8, "shortcut": True}),
    }
    sampler, dynamics, shape = kinds[kind]
    model = random_weights(lambda: dynamics(**shape, transformer=config, rngs=nnx.Rngs(0)))
    return sampler(model, **({"steps": 4} if kind == "maskgit" else {}))


def inputs(kind: str, prompt: int, frames: int) -> tuple[jax.Array, jax.Array]:
    key = jax.random.key(4)
    shape = (B, prompt, N)
    tokens = jax.random.normal(key, (*shape, 6)) if kind == "diffusion" else jax.random.randint(key, shape, 0, 24)
    return tokens, jax.random.normal(jax.random.key(5), (B, frames, BASE.model_dim))


def make_video(sampler, prompt: jax.Array, actions: jax.Array, window: int, cached: bool = True) -> np.ndarray:
    made = jit(
        lambda prompt, actions: rollout(sampler, prompt, actions, jax.random.key(3), window=window, cached=cached)
    )
    return np.asarray(made(prompt, actions))


@pytest.mark.parametrize("kind", ["maskgit", "causal", "diffusion"])
@pytest.mark.parametrize(("option", "window", "prompt"), [("base", 5, 1), ("all", 6, 7)])
def test_cached_videos_are_the_recomputed_ones(kind, option, window, prompt):
    sampler = make_sampler(kind, option)
    tokens, actions = inputs(kind, prompt, 17)
    cached, recomputed = (make_video(sampler, tokens, actions, window, cached) for cached in (True, False))
    np.testing.assert_array_equal(cached[:, :prompt], tokens)
    if kind == "diffusion":
        np.testing.assert_allclose(cached, recomputed, atol=1e-4)
    else:
        np.testing.assert_array_equal(cached, recomputed)
    later = cached[:, prompt:]
    assert np.abs(later[:, 1:] - later[:, :-1]).max((0, 2, *range(3, cached.ndim))).min() > 0  # no frame stands still


@pytest.mark.parametrize("kind", ["maskgit", "causal", "diffusion"])
def test_a_longer_video_begins_like_a_shorter_one_and_is_the_one_made_in_pieces(kind):
    sampler, window, frames = make_sampler(kind), 4, 11
    tokens, actions = inputs(kind, 2, frames)
    whole = make_video(sampler, tokens, actions, window)
    np.testing.assert_allclose(make_video(sampler, tokens, actions[:, :6], window), whole[:, :6], atol=1e-5)
    context, key = make_context(sampler, N, window), jax.random.key(3)
    step = jit(functools.partial(next_frame, sampler, context))
    state, previous = jit(lambda: context.begin(sampler.embed_prompt(tokens, actions[:, :2], key)))(), tokens[:, -1]
    for frame in range(2, frames):
        state, previous = step(state, previous, actions[:, frame], jax.random.fold_in(key, frame))
        np.testing.assert_allclose(previous, whole[:, frame], atol=1e-5)


@pytest.mark.parametrize("kind", ["maskgit", "causal", "diffusion"])
def test_every_frame_costs_the_same_however_long_the_video_and_much_less_than_recomputed(kind):
    sampler, window = make_sampler(kind), 16

    def cost(frames: int, cached: bool) -> float:
        tokens, actions = inputs(kind, 1, frames)
        return product_flops(
            lambda tokens, actions: rollout(sampler, tokens, actions, jax.random.key(0), window=window, cached=cached),
            tokens, actions,
        )  # fmt: skip

    first, second, third = (cost(frames, True) for frames in (11, 21, 101))
    assert third - second == pytest.approx(8 * (second - first))
    per_frame = (second - first) / 10
    recomputed = (cost(21, False) - cost(11, False)) / 10
    assert recomputed > 4 * per_frame
