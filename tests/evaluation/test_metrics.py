import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasmine.evaluation.metrics import (
    code_usage,
    delta_psnr,
    drift,
    frame_psnr,
    frame_ssim,
    mean_and_error,
    psnr,
    ssim,
)

VIDEO = jax.random.uniform(jax.random.key(0), (2, 3, 16, 16, 3))


def test_psnr_of_a_known_error():
    assert float(psnr(jnp.full_like(VIDEO, 0.5), jnp.full_like(VIDEO, 0.6))) == pytest.approx(20.0, abs=1e-3)


def test_each_frame_has_its_own_psnr_and_ssim():
    worse = VIDEO.at[1, 2].set(1 - VIDEO[1, 2])
    for metric in (frame_psnr, frame_ssim):
        values = np.asarray(metric(VIDEO, worse))
        assert values.shape == (2, 3)
        assert np.argwhere(values < values.max() - 1e-3).tolist() == [[1, 2]]
    assert float(psnr(VIDEO, worse)) == pytest.approx(float(frame_psnr(VIDEO, worse).mean()))


def test_an_equal_frame_does_not_make_a_mean_infinite():
    """Where nothing moves, copying the last frame is exact; it must still be comparable."""
    assert 58 < float(psnr(VIDEO, VIDEO)) < 59
    assert float(psnr(VIDEO, VIDEO)) > float(psnr(VIDEO, jnp.round(VIDEO * 255) / 255 + 1 / 255))


def test_ssim_is_one_for_equal_and_falls_with_noise():
    noisy = VIDEO + 0.2 * jax.random.normal(jax.random.key(1), VIDEO.shape)
    assert float(ssim(VIDEO, VIDEO)) == pytest.approx(1.0, abs=1e-4)
    assert float(ssim(VIDEO, noisy)) < 0.9


def test_ssim_of_frames_smaller_than_its_window():
    small = VIDEO[:, :, :10, :10]
    assert float(ssim(small, small)) == pytest.approx(1.0, abs=1e-4)
    assert float(ssim(small, 1 - small)) < 0.5


def test_delta_psnr_is_positive_where_random_actions_are_worse():
    difference = delta_psnr(np.array([[30.0, 28.0]]), np.array([[29.0, 22.0]]))
    assert difference.tolist() == [[1.0, 6.0]]


def test_drift_is_what_a_clip_loses_from_its_first_to_its_last_quarter():
    falling = np.tile(np.arange(8.0)[::-1], (2, 1))  # quarters: 7, 6 and 1, 0
    assert drift(falling).tolist() == [6.0, 6.0]
    assert drift(np.ones((1, 3))).tolist() == [0.0]


def test_mean_and_standard_error():
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert error == pytest.approx(np.sqrt(5 / 3 / 4))


def test_code_usage_counts_codes_and_their_spread():
    usage = code_usage(jnp.array([[0, 1], [2, 3]]), 8)
    assert float(usage["codebook_usage"]) == 0.5
    assert float(usage["codebook_perplexity"]) == pytest.approx(4.0)
