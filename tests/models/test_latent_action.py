"""A latent action says what changed between two frames, and the decoder gets nothing else of the second."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jasmine.models.latent_action import LatentActionModel
from jasmine.models.transformer import TransformerConfig
from tests.models.random_weights import random_weights

SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=2, num_heads=2, dtype=jnp.float32)
T = 5
VIDEO = jax.random.uniform(jax.random.key(1), (2, T, 16, 16, 3))


@pytest.fixture(scope="module")
def lam() -> LatentActionModel:
    shape = {"frame_shape": (16, 16, 3), "patch_size": 8, "latent_dim": 8, "num_latents": 6, "codebook_dropout": 0.0}
    return random_weights(lambda: LatentActionModel(**shape, transformer=SMALL, rngs=nnx.Rngs(0)))


def test_shapes(lam):
    out = lam(VIDEO)
    assert out.video_BTHWC.shape == (2, T - 1, 16, 16, 3)
    assert out.video_BTHWC.dtype == jnp.float32
    assert out.quantized.index_X.shape == (2, T - 1)
    np.testing.assert_array_equal(lam.encode_actions(VIDEO), out.quantized.index_X)


@pytest.mark.parametrize("frame", range(T))
def test_an_action_is_read_off_the_frames_up_to_the_one_it_leads_to(lam, frame):
    before = lam(VIDEO).quantized.encoded_XL
    after = lam(VIDEO.at[:, frame].set(1 - VIDEO[:, frame])).quantized.encoded_XL
    changed = np.abs(after - before).max((0, 2)) > 1e-5
    assert changed.tolist() == [action + 1 >= frame for action in range(T - 1)]  # action t leads to frame t + 1


@pytest.mark.parametrize("frame", range(T - 1))
def test_a_guess_is_made_from_the_frames_before_and_the_actions_up_to_it(lam, frame):
    codes = lam(VIDEO).quantized.straight_XL
    guess = lam.decode(VIDEO[:, :-1], codes)
    other_frame = lam.decode(VIDEO[:, :-1].at[:, frame].set(1 - VIDEO[:, frame]), codes)
    other_action = lam.decode(VIDEO[:, :-1], codes.at[:, frame].set(-codes[:, frame]))
    expected = [later >= frame for later in range(T - 1)]  # guess t is of frame t + 1
    for other in (other_frame, other_action):
        assert (np.abs(other - guess).max((0, 2, 3, 4)) > 1e-4).tolist() == expected


def test_the_last_frame_reaches_its_guess_through_the_code_alone(lam):
    guess = lam(VIDEO)
    other = lam(VIDEO.at[:, -1].add(1e-3))
    same = (guess.quantized.index_X[:, -1] == other.quantized.index_X[:, -1]).tolist()
    assert any(same)
    for clip in np.flatnonzero(same):
        np.testing.assert_allclose(other.video_BTHWC[clip, -1], guess.video_BTHWC[clip, -1], atol=1e-4)
