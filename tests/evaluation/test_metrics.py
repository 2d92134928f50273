import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasmine.evaluation.media import comparison
from jasmine.evaluation.metrics import code_usage, psnr, ssim

VIDEO = jax.random.uniform(jax.random.key(0), (2, 3, 16, 16, 3))


def test_psnr_of_a_known_error():
    assert float(psnr(jnp.full_like(VIDEO, 0.5), jnp.full_like(VIDEO, 0.6))) == pytest.approx(20.0, abs=1e-3)


def test_ssim_is_one_for_equal_and_falls_with_noise():
    noisy = VIDEO + 0.2 * jax.random.normal(jax.random.key(1), VIDEO.shape)
    assert float(ssim(VIDEO, VIDEO)) == pytest.approx(1.0, abs=1e-4)
    assert float(ssim(VIDEO, noisy)) < 0.9


def test_code_usage_counts_codes_and_their_spread():
    usage = code_usage(jnp.array([[0, 1], [2, 3]]), 8)
    assert float(usage["codebook_usage"]) == 0.5
    assert float(usage["codebook_perplexity"]) == pytest.approx(4.0)


def test_comparison_shows_truth_above_guess():
    image = np.asarray(comparison(jnp.ones((3, 5, 8, 8, 3)), jnp.zeros((3, 5, 8, 8, 3)), clips=2, frames=4))
    assert image.shape == (2 * 2 * 10 * 16, 4 * 10 * 16, 3)
    assert image[80, 80].tolist() == [1, 1, 1]
    assert image[240, 80].tolist() == [0, 0, 0]
    assert comparison(jnp.ones((1, 2, 8, 8, 1)), jnp.ones((1, 2, 8, 8, 1))).shape[-1] == 3
