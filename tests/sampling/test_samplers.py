"""What each sampler promises of the frames that it makes, whatever the model's weights."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.errors import UserError
from jasmine.models.dynamics import DynamicsCausal, DynamicsDiffusion, DynamicsMaskGIT
from jasmine.models.transformer import TransformerConfig
from jasmine.sampling.samplers import CausalSampler, DiffusionSampler, MaskGITSampler, draw, rollout
from tests.models.random_weights import random_weights

SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=1, num_heads=2, dtype=jnp.float32)
B, N, V, L = 3, 9, 24, 6
PROMPT = jax.random.randint(jax.random.key(1), (B, 2, N), 0, V)
ACTIONS = jax.random.normal(jax.random.key(2), (B, 6, 16))


def sampled(sampler, key: int = 3) -> np.ndarray:
    return np.asarray(jax.jit(lambda: rollout(sampler, PROMPT, ACTIONS, jax.random.key(key), window=4))())


def causal() -> DynamicsCausal:
    return random_weights(lambda: DynamicsCausal(num_latents=V, look_back=True, transformer=SMALL, rngs=nnx.Rngs(0)))


def test_a_window_of_one_frame_is_refused():
    sampler = CausalSampler(causal())
    with pytest.raises(UserError, match="--seq_len of at least 2"):
        rollout(sampler, PROMPT, ACTIONS, jax.random.key(0), window=1)


# --- MaskGIT ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maskgit() -> DynamicsMaskGIT:
    return random_weights(lambda: DynamicsMaskGIT(num_latents=V, transformer=SMALL, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 100])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 16, 256])
def test_every_round_of_the_schedule_fixes_tokens_and_the_last_fixes_all(maskgit, steps, num_tokens):
    schedule = MaskGITSampler(maskgit, steps=steps).schedule(num_tokens)
    assert schedule[-1] == 0
    assert (np.diff(schedule, prepend=num_tokens) < 0).all()
    cosine = {int(num_tokens * np.cos(np.pi / 2 * round_ / steps)) for round_ in range(1, steps)} | {0}
    assert set(schedule.tolist()) == cosine - {num_tokens}


@dataclasses.dataclass(frozen=True)
class AllRounds(MaskGITSampler):
    """With the rounds that fix no token."""

    def schedule(self, num_tokens: int) -> np.ndarray:
        rounds = np.arange(1, self.steps + 1)
        return np.floor(num_tokens * np.cos(np.pi / 2 * rounds / self.steps) + 1e-9).astype(np.int32)


def test_rounds_that_are_left_out_change_nothing(maskgit):
    options = {"steps": 25, "temperature": 0.0, "choice_temperature": 0.0}
    few, all_rounds = MaskGITSampler(maskgit, **options), AllRounds(maskgit, **options)
    assert len(few.schedule(N)) < len(all_rounds.schedule(N)) == 25
    np.testing.assert_array_equal(sampled(few), sampled(all_rounds))
    # The rounds that are not left out do change something.
    assert (sampled(few) != sampled(MaskGITSampler(maskgit, **{**options, "steps": 1}))).any()


def test_maskgit_draws_depend_on_the_key_and_at_temperature_0_on_nothing(maskgit):
    warm, cold = MaskGITSampler(maskgit), MaskGITSampler(maskgit, temperature=0.0, choice_temperature=0.0)
    assert (sampled(warm, 3) != sampled(warm, 4)).any()
    np.testing.assert_array_equal(sampled(cold, 3), sampled(cold, 4))
    np.testing.assert_array_equal(sampled(warm)[:, :2], PROMPT)
    assert sampled(warm).min() >= 0
    assert sampled(warm).max() < V


# --- causal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 1.0}, {0, 1, 2, 3, 4}),
        ({"temperature": 0.0}, {2}),
        ({"temperature": 1.0, "top_k": 1}, {2}),
        ({"temperature": 1.0, "top_k": 3}, {2, 0, 4}),
        ({"temperature": 1.0, "top_k": 99}, {0, 1, 2, 3, 4}),
        ({"temperature": 1.0, "top_p": 0.3}, {2}),
        ({"temperature": 1.0, "top_p": 0.65}, {2, 0}),
        ({"temperature": 1.0, "top_p": 0.75}, {2, 0, 4}),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.99}, {2, 0}),
        ({"temperature": 0.2, "top_p": 0.9}, {2, 0}),  # 0.8 and 0.19 after the temperature
    ],
)
def test_draws_are_among_the_allowed_and_reach_all_of_them(options, allowed):
    logits = jnp.log(jnp.array([0.3, 0.1, 0.4, 0.05, 0.15]))
    drawn = draw(jax.random.uniform(jax.random.key(0), (4000,)), jnp.broadcast_to(logits, (4000, 5)), **options)
    assert drawn.dtype == jnp.int32
    assert set(drawn.tolist()) == allowed


def test_draws_follow_the_probabilities():
    share = jnp.array([0.1, 0.2, 0.7])
    points = jax.random.uniform(jax.random.key(0), (20_000,))
    drawn = np.asarray(draw(points, jnp.broadcast_to(jnp.log(share), (20_000, 3)), 1.0))
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, share, atol=0.02)


def test_a_causal_frame_at_temperature_0_is_the_likeliest_token_after_token():
    model = causal()
    made = sampled(CausalSampler(model, temperature=0.0))
    assert (made[:, 2:] != made[:, 1:-1]).any()
    logits = jax.jit(model.__call__)(made[:, :4], ACTIONS[:, :4])  # as in training, all tokens at once
    np.testing.assert_array_equal(logits[:, 2:].argmax(-1), made[:, 2:4])


# --- diffusion --------------------------------------------------------------------------------------------------


def perfect_dynamics(data_BNL: jax.Array) -> SimpleNamespace:
    """A model that sees the data in any noise; what it is shown stands in for the embedding."""
    return SimpleNamespace(
        denoise_steps=16, shortcut=False, embed=lambda *shown: shown, head=lambda shown, past: data_BNL
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 16, None])
def test_a_model_that_sees_the_data_in_the_noise_makes_the_data(steps):
    data = jax.random.normal(jax.random.key(1), (B, N, L))
    sampler = DiffusionSampler(perfect_dynamics(data), steps=steps)
    context = SimpleNamespace(frame=lambda opened, shown: shown[0])
    made, _ = sampler.sample(context, None, jnp.zeros((B, N, L)), jnp.zeros((B, 16)), jax.random.key(5))
    np.testing.assert_allclose(made, data, atol=1e-6)


def test_a_step_goes_the_right_way_at_the_level_that_the_model_is_told():
    """With half the way still to go, the frame is half noise."""
    data, seen = jnp.ones((B, N, L)), []
    sampler = DiffusionSampler(perfect_dynamics(data), steps=4)
    context = SimpleNamespace(frame=lambda opened, shown: seen.append(shown) or shown[0])
    with jax.disable_jit():
        sampler.sample(context, None, jnp.zeros((B, N, L)), jnp.zeros((B, 16)), jax.random.key(5))
    assert [int(level_B[0]) for *_, level_B, _ in seen] == [0, 4, 8, 12]
    noise = seen[0][0]
    assert np.std(noise) == pytest.approx(1, abs=0.2)
    for step, (shown, *_) in enumerate(seen):
        np.testing.assert_allclose(shown, (1 - step / 4) * noise + step / 4 * data, atol=1e-6)


def test_finished_frames_are_shown_with_as_much_noise_as_the_level_says():
    frame = jax.random.normal(jax.random.key(1), (B, 400, L))
    dynamics = perfect_dynamics(frame)
    shown, past, _, level_B, _ = DiffusionSampler(dynamics, context_level=1.0).embed(
        frame, frame, jnp.zeros((B, 16)), jax.random.key(0)
    )
    np.testing.assert_array_equal(shown, frame)
    np.testing.assert_array_equal(past, frame)
    assert level_B.tolist() == [15] * B
    shown, past, _, level_B, _ = DiffusionSampler(dynamics, context_level=0.75).embed(
        frame, frame, jnp.zeros((B, 16)), jax.random.key(0)
    )
    assert level_B.tolist() == [12] * B
    for noised in (shown, past):
        assert np.std(noised - 0.75 * frame) == pytest.approx(0.25, rel=0.05)
    # The frames of a prompt: as they would have been had they been made.
    prompt = jnp.stack([frame, frame + 1], 1)
    embedded = DiffusionSampler(dynamics).embed_prompt(prompt, jnp.zeros((B, 2, 16)), jax.random.key(9))
    for t in range(2):
        key = jax.random.fold_in(jax.random.key(9), t)
        before = prompt[:, 0] if t else jnp.zeros_like(frame)
        expected = DiffusionSampler(dynamics).embed(prompt[:, t], before, jnp.zeros((B, 16)), key)
        for mine, theirs in zip(embedded, expected, strict=True):
            if mine is not None:
                np.testing.assert_allclose(mine[:, t], theirs, atol=1e-6)


def test_steps_must_divide_the_levels():
    plain = DynamicsDiffusion(latent_dim=L, denoise_steps=12, shortcut=False, transformer=SMALL, rngs=nnx.Rngs(0))
    short = DynamicsDiffusion(latent_dim=L, denoise_steps=16, shortcut=True, transformer=SMALL, rngs=nnx.Rngs(0))
    assert DiffusionSampler(plain).num_steps == 12
    assert DiffusionSampler(plain, steps=3).num_steps == 3
    assert DiffusionSampler(short).num_steps == 4
    for dynamics, steps in ((plain, 5), (plain, 24), (short, 3), (short, 32)):
        with pytest.raises(UserError, match="these do"):
            _ = DiffusionSampler(dynamics, steps=steps).num_steps
