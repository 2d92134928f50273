import numpy as np
import pytest
import scipy.linalg

from jasmine.evaluation.frechet import clip_features, frechet_distance


def test_distance_of_shifted_and_stretched_sets():
    """Of normal distributions on a line: (m - n)² + (s - t)²."""
    a = np.random.default_rng(0).normal(size=(50, 1))
    b = 3 * a + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_agrees_with_the_definition_by_matrix_square_roots():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) + 0.3
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_fewer_clips_than_dimensions():
    rng = np.random.default_rng(2)
    near, far = rng.normal(size=(8, 64)), rng.normal(size=(8, 64)) + 1
    assert 0 < frechet_distance(rng.normal(size=(8, 64)), near) < frechet_distance(near, far) < np.inf


def test_equal_distributions_are_apart_by_less_the_more_clips_there_are():
    rng = np.random.default_rng(3)
    small, large = (
        np.mean([frechet_distance(rng.normal(size=(n, 8)), rng.normal(size=(n, 8))) for _ in range(10)])
        for n in (20, 200)
    )
    assert 5 * large < small


def test_features_see_what_moves():
    rng = np.random.default_rng(4)
    still = np.broadcast_to(rng.normal(size=(5, 1, 4, 3)), (5, 8, 4, 3))
    moving = still + rng.normal(size=(5, 8, 4, 3)) * 0.5
    still_features, moving_features = clip_features(still, 8), clip_features(moving, 8)
    assert still_features.shape == (5, 6)
    assert still_features.dtype == np.float64
    np.testing.assert_allclose(still_features[:, :3], still.mean((1, 2)))
    assert (still_features[:, 3:] == 0).all()
    assert (moving_features[:, 3:] > 0.3).all()


def test_a_jump_from_one_window_to_the_next_is_no_motion():
    latent = np.repeat([[0.0, 1.0]], 4, axis=1).reshape(1, 8, 1, 1)
    assert clip_features(latent, 4)[0].tolist() == [0.5, 0.0]
    assert clip_features(latent, 8)[0, 1] > 0


def test_one_clip_is_no_distribution():
    with pytest.raises(ValueError, match="two clips"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
