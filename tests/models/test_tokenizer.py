import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.models.quantizer import VectorQuantizer
from jasmine.models.tokenizer import VideoTokenizerVQVAE, patchify, unpatchify
from jasmine.models.transformer import SpaceTimeTransformer, TransformerConfig

SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=2, num_heads=2, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return VideoTokenizerVQVAE(
        frame_shape=(16, 24, 3), patch_size=8, latent_dim=8, num_latents=32, codebook_dropout=0.0, transformer=SMALL,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


VIDEO = jax.random.uniform(jax.random.key(1), (2, 5, 16, 24, 3))


def test_patches_are_squares_of_the_frame_in_reading_order():
    patches = patchify(VIDEO, 8)
    assert patches.shape == (2, 5, 6, 192)
    np.testing.assert_array_equal(patches[1, 3, 4].reshape(8, 8, 3), VIDEO[1, 3, 8:16, 8:16])
    np.testing.assert_array_equal(unpatchify(patches, 8, 16, 24), VIDEO)


def test_reconstruction_is_a_video_and_tokens_are_codes(tokenizer):
    out = tokenizer(VIDEO)
    assert out.video_BTHWC.shape == VIDEO.shape
    assert out.video_BTHWC.dtype == jnp.float32
    assert 0 <= float(out.video_BTHWC.min()) <= float(out.video_BTHWC.max()) <= 1
    assert out.quantized.index_X.shape == (2, 5, 6)
    assert out.quantized.index_X.dtype == jnp.int32


def test_decoding_the_tokens_gives_the_reconstruction(tokenizer):
    out = tokenizer(VIDEO)
    np.testing.assert_allclose(tokenizer.decode(out.quantized.index_X), out.video_BTHWC, atol=1e-5)


def test_tokens_of_a_frame_do_not_depend_on_later_frames(tokenizer):
    whole = tokenizer.encode(VIDEO).index_X
    changed = VIDEO.at[:, 3:].set(0.5)
    np.testing.assert_array_equal(tokenizer.encode(changed).index_X[:, :3], whole[:, :3])
    assert (np.asarray(tokenizer.encode(changed).encoded_XL) != np.asarray(tokenizer.encode(VIDEO).encoded_XL)).any()


def test_space_attention_sees_the_whole_frame():
    model = SpaceTimeTransformer(4, 3, SMALL, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 2, 6, 4))
    change = model(x.at[0, 0, 5].add(1.0)) - model(x)
    assert (np.abs(change[0]) > 0).any(axis=-1).all()


def test_causal_space_attention_does_not_look_ahead():
    import dataclasses

    model = SpaceTimeTransformer(4, 3, dataclasses.replace(SMALL, space_causal=True), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 2, 6, 4))
    change = np.abs(model(x.at[0, :, 3].add(1.0)) - model(x))[0]
    assert change[:, :3].max() == 0
    assert (change[:, 3:].max(axis=-1) > 0).all()


def test_quantizer_takes_the_nearest_direction_and_passes_gradients():
    quantizer = VectorQuantizer(16, 4, rngs=nnx.Rngs(0))
    codes = quantizer.codebook[...]
    out = quantizer(3.0 * codes[jnp.array([5, 11, 0])])
    assert out.index_X.tolist() == [5, 11, 0]
    np.testing.assert_allclose(out.straight_XL, codes[jnp.array([5, 11, 0])], atol=1e-6)

    def through(x):
        return (quantizer(x).straight_XL * jnp.arange(4.0)).sum()

    x = jax.random.normal(jax.random.key(3), (2, 4))
    unquantized = jax.grad(lambda x: ((x / jnp.linalg.norm(x, axis=-1, keepdims=True)) * jnp.arange(4.0)).sum())(x)
    np.testing.assert_allclose(jax.grad(through)(x), unquantized, atol=1e-5)


def test_codebook_dropout_leaves_codes_out_of_the_search():
    quantizer = VectorQuantizer(64, 4, dropout=0.5, rngs=nnx.Rngs(0))
    x = quantizer.codebook[...]
    assert quantizer(x).index_X.tolist() == list(range(64))
    used = set(quantizer(x, jax.random.key(0)).index_X.tolist())
    assert 16 <= len(used) <= 48


def test_revival_pulls_unused_codes_and_leaves_used_ones():
    quantizer = VectorQuantizer(16, 4, rngs=nnx.Rngs(0))
    codes = quantizer.codebook[...]
    encoded = codes[jnp.array([3, 3, 9])] + 0.05

    graph, state = nnx.split(quantizer)

    def revival(state):
        module = nnx.merge(graph, state)
        return module.revival_loss(module(encoded))

    step = -np.asarray(jax.grad(revival)(state)["codebook"][...])
    unused = np.setdiff1d(np.arange(16), np.asarray(quantizer(encoded).index_X))
    assert np.abs(step[[3, 9]]).max() == 0
    nearest = jnp.argmax(codes @ quantizer(encoded).encoded_XL.T, axis=1)
    towards = quantizer(encoded).encoded_XL[nearest] - codes
    assert (np.sum(step * np.asarray(towards), axis=1)[unused] > 0).all()


def test_a_patch_of_one_colour_keeps_its_brightness(tokenizer):
    grey = jnp.full((1, 1, 16, 24, 3), 0.2)
    encoded = [np.asarray(tokenizer.encode(grey * factor).encoded_XL) for factor in (1.0, 2.0, 4.0)]
    assert np.abs(encoded[0] - encoded[1]).max() > 0.01
    assert np.abs(encoded[1] - encoded[2]).max() > 0.01


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    import dataclasses

    model = SpaceTimeTransformer(4, 3, dataclasses.replace(SMALL, dropout=0.5), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 2, 6, 4))
    np.testing.assert_array_equal(model(x), model(x))
    assert (model(x, jax.random.key(1)) != model(x, jax.random.key(2))).any()
