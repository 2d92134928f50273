import numpy as np
import pytest

from jasmine.evaluation.actions import action_consistency, contingency, mutual_information


def held(rng: np.random.Generator, clips: int, frames: int, actions: int, hold: int) -> np.ndarray:
    """Actions that a player holds for `hold` frames."""
    return rng.integers(0, actions, (clips, -(-frames // hold))).repeat(hold, axis=1)[:, :frames]


def test_contingency_counts_pairs():
    table = contingency(np.array([[0, 1, 1]]), np.array([[2, 0, 0]]), 2, 3)
    assert table.tolist() == [[0, 0, 1], [2, 0, 0]]


def test_mutual_information_of_a_renaming_is_the_entropy():
    assert mutual_information(np.diag([5, 5, 5, 5])) == pytest.approx(np.log(4))
    assert mutual_information(np.full((4, 4), 3)) == pytest.approx(0.0, abs=1e-12)


def test_a_renaming_is_wholly_consistent():
    true = np.random.default_rng(0).integers(0, 4, (32, 15))
    result = action_consistency((true + 1) % 4, true, num_latent=6, num_true=4)
    assert result.normalized == pytest.approx(1.0)
    assert result.p_value < 0.01
    assert result.table.shape == (6, 4)
    assert result.table.sum() == true.size


def test_a_coarser_action_space_is_consistent_as_far_as_it_goes():
    true = np.random.default_rng(0).integers(0, 4, (32, 15))
    assert action_consistency(true // 2, true, num_latent=2, num_true=4).normalized == pytest.approx(1.0)


def test_unrelated_held_actions_are_at_chance_although_the_sample_shares_information():
    rng = np.random.default_rng(1)
    results = [
        action_consistency(held(rng, 16, 15, 6, 5), held(rng, 16, 15, 15, 5), num_latent=6, num_true=15, seed=seed)
        for seed in range(20)
    ]
    assert np.mean([result.mutual_information for result in results]) > 0.1  # what a naive count would report
    assert abs(np.mean([result.normalized for result in results])) < 0.05
    assert np.mean([result.p_value < 0.05 for result in results]) <= 0.2


def test_half_noise_lies_between():
    rng = np.random.default_rng(2)
    true = rng.integers(0, 4, (64, 15))
    latent = np.where(rng.random(true.shape) < 0.5, true, rng.integers(0, 4, true.shape))
    assert 0.1 < action_consistency(latent, true, num_latent=4, num_true=4).normalized < 0.6


def test_latent_actions_that_never_vary_tell_nothing():
    true = np.random.default_rng(0).integers(0, 4, (8, 15))
    result = action_consistency(np.zeros_like(true), true, num_latent=6, num_true=4)
    assert (result.normalized, result.mutual_information) == (0.0, 0.0)
    assert result.p_value == 1.0


def test_one_clip_has_no_chance_to_measure():
    with pytest.raises(ValueError, match="two clips"):
        action_consistency(np.zeros((1, 4), int), np.zeros((1, 4), int), num_latent=2, num_true=2)
