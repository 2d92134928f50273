"""The order of windows: a bijection per epoch, uniform, and a pure function of seed and step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jasmine.data.sampling import WindowSampler, permute
from jasmine.errors import UserError

LENGTHS = np.array([20, 5, 16, 160, 0, 33])
GOLDEN = [(68, 125), (93, 94), (74, 67), (54, 112), (22, 70), (4, 26), (17, 124), (70, 5)]
GOLDEN_SMALL = [(1, 0), (0, 0), (1, 2), (0, 2), (1, 3), (1, 1), (0, 1), (1, 4)]


def take(sampler, num_windows, batch_size, first_step=0):
    steps = range(first_step, first_step + -(-num_windows // batch_size))
    episodes, starts = zip(*(sampler.windows(step, batch_size) for step in steps), strict=True)
    return list(zip(np.concatenate(episodes).tolist(), np.concatenate(starts).tolist(), strict=True))


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_each_epoch_is_a_permutation(size, seed, epoch):
    offsets = np.arange(size)
    assert sorted(permute(offsets, np.full(size, epoch), size, seed).tolist()) == offsets.tolist()


def test_permutes_sets_far_beyond_memory():
    size = 2**61 + 3
    offsets = np.arange(10_000) * (size // 10_000)
    values = permute(offsets, np.zeros(10_000, np.int64), size, 0)
    assert len(np.unique(values)) == 10_000
    assert 0 <= values.min() <= values.max() < size
    np.testing.assert_allclose(np.quantile(values / size, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)


@pytest.mark.parametrize("size", [3, 5, 10, 33, 1500])
def test_every_window_is_as_likely_at_every_place_and_after_every_other(size):
    epochs = 400_000 // size
    order = permute(np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size), size, 1).reshape(epochs, size)
    for place in {0, size // 2, size - 1}:
        assert chi_square_z(np.bincount(order[:, place], minlength=size)) < 5
    if size <= 33:
        pairs = np.bincount(order[:, 0] * size + order[:, 1], minlength=size * size).reshape(size, size)
        assert chi_square_z(pairs[~np.eye(size, dtype=bool)]) < 5


def chi_square_z(counts):
    expected = counts.mean()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


def test_an_epoch_holds_every_window_once_and_no_other():
    sampler = WindowSampler(LENGTHS, 16, seed=3)
    windows = {(e, s) for e, length in enumerate(LENGTHS) for s in range(length - 16 + 1)}
    assert sampler.num_windows == len(windows) == 5 + 1 + 145 + 18
    for epoch in range(3):
        epoch_windows = take(sampler, len(windows), 13, first_step=epoch * 13)
        assert len(epoch_windows) == 169
        assert set(epoch_windows) == windows


def test_epochs_and_seeds_differ_and_the_same_seed_repeats():
    def first_epochs(seed):
        return [take(WindowSampler(LENGTHS, 16, seed), 169, 13, first_step=13 * k) for k in range(2)]

    assert first_epochs(0) == first_epochs(0)
    orders = [order for seed in (0, 1, -1, 2**64 + 5) for order in first_epochs(seed)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_batches_cross_epochs_without_a_gap():
    sampler = WindowSampler(np.array([18]), 16, seed=0)  # three windows
    starts = sampler.windows(0, 300)[1].reshape(100, 3)
    assert (np.sort(starts, axis=1) == [0, 1, 2]).all()
    np.testing.assert_array_equal(sampler.windows(1, 150)[1], starts.ravel()[150:])


def test_any_step_by_itself_is_the_step_in_sequence():
    sampler = WindowSampler(LENGTHS, 16, seed=0)
    sequence = [sampler.windows(step, 7) for step in range(60)]
    for step in (59, 3, 31):
        for alone, in_sequence in zip(WindowSampler(LENGTHS, 16, seed=0).windows(step, 7), sequence[step], strict=True):
            np.testing.assert_array_equal(alone, in_sequence)


def test_values_never_change():
    """A checkpoint's step means these windows; a new order would silently change every resumed run."""
    episodes, starts = WindowSampler(np.array([160] * 100), 16, seed=42).windows(1_000, 8)
    assert list(zip(episodes.tolist(), starts.tolist(), strict=True)) == GOLDEN
    episodes, starts = WindowSampler(np.array([18, 20]), 16, seed=7).windows(2, 8)
    assert list(zip(episodes.tolist(), starts.tolist(), strict=True)) == GOLDEN_SMALL


def test_windows_longer_than_every_episode_say_the_longest():
    with pytest.raises(UserError, match=r"windows of 161 frames .* of data/train: give at most 160"):
        WindowSampler(LENGTHS, 161, seed=0, source="data/train")
    with pytest.raises(UserError, match="give at most 0"):
        WindowSampler(np.array([], np.int64), 16, seed=0)
    with pytest.raises(UserError, match="give at least 1"):
        WindowSampler(LENGTHS, 0, seed=0)
