"""What an output of a dynamics model may depend on: it is a prediction only if it has not seen what it predicts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.models.dynamics import ActionTokens, DynamicsCausal, DynamicsDiffusion, DynamicsMaskGIT, random_mask
from jasmine.models.transformer import TransformerConfig
from tests.models.random_weights import random_weights

SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=2, num_heads=2, dtype=jnp.float32)
DREAMER = dataclasses.replace(
    SMALL, norm="rms", positions="rope", ffn="swiglu", qk_norm=True, logit_soft_cap=9.0, num_kv_heads=1, time_every=2,
    num_registers=2,
)  # fmt: skip
T, N, V, L = 4, 5, 12, 6
TOKENS = jax.random.randint(jax.random.key(1), (1, T, N), 0, V)
ACTIONS = jax.random.normal(jax.random.key(2), (1, T, 16))
FRAMES = np.arange(T)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
both = pytest.mark.parametrize("config", [SMALL, DREAMER], ids=["small", "dreamer"])


def dependence(function, x: jax.Array, changed: jax.Array, places: int) -> np.ndarray:
    """Which outputs change when x is changed at one place: bool (places, T, N). The first `places` axes of x after the
    batch's are places; `changed` holds what is put there. `function` gives (1, T, N, …)."""
    shape = x.shape[1 : 1 + places]
    one = jnp.eye(np.prod(shape), dtype=bool).reshape(-1, 1, *shape, *([1] * (x.ndim - 1 - places)))
    masks = jnp.concatenate([jnp.zeros_like(one[:1]), one])  # first nothing: the same program, so the same rounding
    outputs = jit(jax.vmap(lambda mask: function(jnp.where(mask, changed, x))))(masks)
    change = jnp.abs(outputs[1:] - outputs[0]).max(tuple(range(4, outputs.ndim)), initial=0)
    return np.asarray(change > 1e-4)[:, 0].reshape(*shape, T, N)


def make(kind: str, config: TransformerConfig, **options):
    kinds = {
        "maskgit": (DynamicsMaskGIT, {"num_latents": V}),
        "causal": (DynamicsCausal, {"num_latents": V, "look_back": True}),
        "diffusion": (DynamicsDiffusion, {"latent_dim": L, "denoise_steps": 8, "shortcut": False}),
    }
    dynamics, shape = kinds[kind]
    return random_weights(lambda: dynamics(**(shape | options), transformer=config, rngs=nnx.Rngs(0)))


@both
@pytest.mark.parametrize("look_back", [True, False])
def test_maskgit_does_not_see_masked_tokens_nor_later_frames(config, look_back):
    model = make("maskgit", config, look_back=look_back)
    masked = jax.random.bernoulli(jax.random.key(3), 0.5, TOKENS.shape).at[:, 0].set(False)
    seen = dependence(lambda tokens: model(tokens, ACTIONS, masked), TOKENS, (TOKENS + 1) % V, 2)
    hidden = np.asarray(masked[0])
    for frame in FRAMES:
        for token in range(N):
            # From which frame on it shows: its own, or the next, where a masked place looks back at it, or never.
            first = T if hidden[frame, token] else frame
            if look_back and first == T and frame + 1 < T and hidden[frame + 1, token]:
                first = frame + 1
            assert not seen[frame, token, :first].any()
            assert seen[frame, token, first:].all()


@both
@pytest.mark.parametrize("kind", ["maskgit", "causal", "diffusion"])
def test_an_action_shows_in_the_frame_that_it_leads_to_and_later_only(config, kind):
    model = make(kind, config)
    latents, level = jax.random.normal(jax.random.key(4), (1, T, N, L)), jnp.full((1, T), 4)
    run = {
        "maskgit": lambda actions: model(TOKENS, actions, None),
        "causal": lambda actions: model(TOKENS, actions),
        "diffusion": lambda actions: model(latents, latents, actions, level, None),
    }[kind]
    seen = dependence(run, ACTIONS, -ACTIONS, 1)  # adding a constant would be lost in the first LayerNorm
    for frame in FRAMES:
        assert not seen[frame, :frame].any()
        assert seen[frame, frame:].all()


@both
@pytest.mark.parametrize("look_back", [True, False])
def test_causal_tokens_see_what_was_written_before_them_and_with_look_back_the_whole_frame_before(config, look_back):
    model = make("causal", config, look_back=look_back)
    seen = dependence(lambda tokens: model(tokens, ACTIONS), TOKENS, (TOKENS + 1) % V, 2)
    for frame in FRAMES:
        assert not seen[frame, :, :frame].any()
        for token in range(N):
            assert not seen[frame, token, frame, : token + 1].any()
            assert seen[frame, token, frame, token + 1 :].all()
            if frame + 1 < T:
                assert seen[frame, token, frame + 1, token + 1 :].all()
                assert seen[frame, token, frame + 1, : token + 1].all() == look_back
                assert seen[frame, token, frame + 1, : token + 1].any() == look_back


@both
@pytest.mark.parametrize("shortcut", [True, False])
def test_diffusion_sees_the_frame_itself_and_past_ones(config, shortcut):
    model = make("diffusion", config, shortcut=shortcut)
    latents = jax.random.normal(jax.random.key(4), (1, T, N, L))
    level, halvings = jnp.array([[0, 3, 7, 4]]), jnp.array([[1, 2, 3, 0]]) if shortcut else None
    seen = dependence(lambda x: model(x, latents, ACTIONS, level, halvings), latents, -latents, 2)
    of_past = dependence(lambda past: model(latents, past, ACTIONS, level, halvings), latents, -latents, 2)
    of_level = dependence(lambda level: model(latents, latents, ACTIONS, level, halvings), level, (level + 1) % 8, 1)
    for frame in FRAMES:
        for each in (seen, of_past):
            assert not each[frame, :, :frame].any()
            assert each[frame, :, frame:].all()
        assert not of_level[frame, :frame].any()
        assert of_level[frame, frame:].all()
    if shortcut:
        other = (halvings + 1) % 4
        of_size = dependence(lambda size: model(latents, latents, ACTIONS, level, size), halvings, other, 1)
        assert (of_size == of_level).all()


def test_masks_leave_the_first_frame_and_cover_a_share_of_each_clip_from_the_limit_to_all():
    masked = np.asarray(random_mask(jax.random.key(0), (400, 9, 50), 0.5))
    assert not masked[:, 0].any()
    share = masked[:, 1:].mean((1, 2))
    assert 0.4 < share.min() < 0.53
    assert 0.97 < share.max() <= 1
    assert share.mean() == pytest.approx(0.75, abs=0.03)


def test_unknown_actions_are_one_token_whatever_they_are():
    tokens = ActionTokens(num_actions=4, latent_action_dim=8, model=SMALL, rngs=nnx.Rngs(0))
    first, second = (tokens.table(jnp.array([actions, actions])) for actions in ([0, 1, 2], [3, 3, 0]))
    known = jnp.array([True, False])
    one, other = tokens.of_clip(first, known), tokens.of_clip(second, known)
    assert one.shape == (2, 4, 16)
    np.testing.assert_array_equal(one[1], jnp.broadcast_to(tokens.first(1), (4, 16)))
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[:, 0], tokens.first(2))  # no action leads to the first frame
    assert (one[0, 1:] != other[0, 1:]).any(-1).all()
