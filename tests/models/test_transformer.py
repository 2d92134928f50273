"""The transformer under each of its options: what an output may depend on, and that the option does what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.models.layers import RMSNorm, attention, rotate
from jasmine.models.transformer import FeedForward, SpaceTimeTransformer, TransformerConfig
from tests.models.random_weights import random_weights

BASE = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=2, num_heads=4, dtype=jnp.float32)
OPTIONS = {
    "base": {},
    "rms": {"norm": "rms"},
    "rope": {"positions": "rope"},
    "swiglu": {"ffn": "swiglu"},
    "qk_norm": {"qk_norm": True},
    "soft_cap": {"logit_soft_cap": 2.0},
    "grouped": {"num_kv_heads": 2},
    "time_every": {"time_every": 2},
    "registers": {"num_registers": 3},
}
ALL = {key: value for options in OPTIONS.values() for key, value in options.items()}
T, N, IN, OUT = 4, 5, 6, 7
X = jax.random.normal(jax.random.key(0), (1, T, N, IN))

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(**options) -> SpaceTimeTransformer:
    config = dataclasses.replace(BASE, **options)
    return random_weights(lambda: SpaceTimeTransformer(IN, OUT, config, nnx.Rngs(0)))


def seen_by(model: SpaceTimeTransformer) -> np.ndarray:
    """Which outputs change with each input: bool (T, N, T, N)."""
    one = jnp.eye(T * N, dtype=bool).reshape(T * N, 1, T, N, 1)
    masks = jnp.concatenate([jnp.zeros_like(one[:1]), one])
    outputs = jit(jax.vmap(lambda mask: model(jnp.where(mask, -X, X))))(masks)
    return np.asarray(jnp.abs(outputs[1:] - outputs[0]).max((1, 4)) > 1e-4).reshape(T, N, T, N)


@pytest.mark.parametrize("space_causal", [False, True])
@pytest.mark.parametrize("option", [*OPTIONS, "all"])
def test_no_output_sees_a_later_frame_nor_if_causal_a_later_token(option, space_causal):
    seen = seen_by(make(**(ALL if option == "all" else OPTIONS[option]), space_causal=space_causal))
    frame, token = np.arange(T), np.arange(N)
    expected = np.broadcast_to((frame[:, None] <= frame)[:, None, :, None], seen.shape)
    if space_causal:
        expected = expected & (token[:, None] <= token)[None, :, None, :]
    np.testing.assert_array_equal(seen, expected)


def test_a_model_without_time_sees_one_frame_and_every_nth_block_is_enough_for_the_past():
    config = dataclasses.replace(BASE, num_blocks=4, time_every=4)
    model = random_weights(lambda: SpaceTimeTransformer(IN, OUT, config, nnx.Rngs(0)))
    assert jax.tree.leaves(nnx.state(model.blocks))[0].shape[0] == 1
    assert jax.tree.leaves(nnx.state(model.space_blocks))[0].shape[:2] == (1, 3)
    assert seen_by(model)[0, 0].all()
    names = {part for path in nnx.to_flat_state(nnx.state(model.space_blocks)) for part in map(str, path[0])}
    assert "space_attention" in names
    assert "time_attention" not in names


@pytest.mark.parametrize("option", ["rope", "soft_cap"])
def test_options_without_weights_of_their_own_change_the_output(option):
    plain, other = jit(make().__call__)(X), jit(make(**OPTIONS[option]).__call__)(X)
    assert other.shape == plain.shape == (1, T, N, OUT)
    assert jnp.abs(other - plain).max() > 1e-3


def test_registers_join_each_frame_and_are_dropped_from_the_output():
    model = make(num_registers=3)
    before = jit(model.__call__)(X)
    assert before.shape == (1, T, N, OUT)
    model.registers[...] = -model.registers[...]
    assert (jnp.abs(jit(model.__call__)(X) - before).max((0, 2, 3)) > 1e-3).all()


def test_with_qk_norm_the_size_of_queries_does_not_matter():
    change = {}
    for qk_norm in (False, True):
        model = make(qk_norm=qk_norm)
        before = jit(model.__call__)(X)
        for layer in (model.blocks.space_attention, model.blocks.time_attention):
            layer.qkv.kernel[...] = layer.qkv.kernel[...].at[:, :, 0].multiply(7.0)  # (layers, M, 3, H, D)
        change[qk_norm] = float(jnp.abs(jit(model.__call__)(X) - before).max())
    assert change[True] < 1e-3
    assert change[False] > 1e-1


def test_swiglu_is_a_product_with_a_gate():
    layer = random_weights(lambda: FeedForward(dataclasses.replace(BASE, ffn="swiglu"), nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (3, 16))
    gate, value = (x @ layer.linear_in.kernel[...][:, k] for k in range(2))
    np.testing.assert_allclose(layer(x), (jax.nn.silu(gate) * value) @ layer.linear_out.kernel[...], atol=1e-4)


def test_grouped_heads_are_heads_that_share_keys_and_values():
    q = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 6, 2, 8))
    grouped = attention(q, k, v)
    repeated = attention(q, k.repeat(2, axis=-2), v.repeat(2, axis=-2))
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)


def test_the_soft_cap_bounds_how_much_one_key_can_win():
    q, k = jnp.full((1, 1, 8), 10.0), jnp.zeros((2, 1, 8)).at[0].set(10.0)
    v = jnp.zeros((2, 1, 8)).at[0].set(1.0)
    free, capped = (float(attention(q, k, v, soft_cap=cap)[0, 0, 0]) for cap in (0.0, 2.0))
    assert free == pytest.approx(1.0)
    assert capped == pytest.approx(1 / (1 + np.exp(-2.0)), rel=1e-3)
    far = jax.random.normal(jax.random.key(0), (3, 5, 2, 8))
    np.testing.assert_allclose(attention(*far, soft_cap=1e4), attention(*far), atol=1e-5)


def test_rotation_tells_distances_and_not_places():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))

    def product(at_q: int, at_k: int) -> float:
        turned = (rotate(x, jnp.array([at])) for x, at in ((q, at_q), (k, at_k)))
        return float(jnp.vdot(*turned))

    assert product(7, 4) == pytest.approx(product(3, 0), rel=1e-4)
    assert product(7, 4) != pytest.approx(product(7, 5), rel=1e-2)
    assert jnp.linalg.norm(rotate(q, jnp.array([9]))) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)


def test_rms_norm_has_mean_square_one_and_keeps_the_mean():
    x = 3 + jax.random.normal(jax.random.key(0), (4, 64))
    y = RMSNorm(64, logical=None)(x)
    np.testing.assert_allclose(jnp.square(y).mean(-1), 1, rtol=1e-4)
    np.testing.assert_allclose(y, x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True)), rtol=1e-4)


def test_a_video_begins_like_a_longer_one():
    for options in ({}, {"positions": "rope"}):
        model = make(**options)
        np.testing.assert_allclose(jit(model.__call__)(X)[:, :2], jit(model.__call__)(X[:, :2]), atol=1e-4)
