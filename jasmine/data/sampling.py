"""Which windows make the batch of a step: the half of the step invariant that concerns data.

Every window of `seq_len` consecutive frames of one episode is one example, so an episode is drawn in proportion to
how many windows it holds. An epoch is a permutation of all windows, anew for each epoch. The batch of step s takes the
positions s·B to (s+1)·B of the endless sequence of epochs; where a run leaves batches out (`--on_nonfinite rollback`), later
steps take the next ones.

Invariants: `WindowSampler.windows` is a pure function of (lengths, seq_len, seed, left_out, step, batch_size); it knows
nothing of processes, workers or what was read before. It needs no memory per window: the permutation is computed, not stored.
Its values are part of what a checkpoint means; changing them changes every resumed run.
"""

from collections.abc import Collection

import numpy as np

from jasmine.errors import UserError

# Of the Feistel network. Four make a pseudorandom permutation of a large set; sets of a handful need many more to be
# uniform (chi-square over positions and over neighbouring pairs).
_ROUNDS, _SMALL_SET, _ROUNDS_SMALL_SET = 8, 1024, 24


class WindowSampler:
    """The windows of a dataset in a random order without end.

    Args:
        lengths: episode lengths in frames, int64 (E,).
        seq_len: frames in a window.
        seed: any integer.
        source: what to call the data in an error.
        left_out: numbers of batches that no step takes.

    Raises:
        UserError: no episode is as long as a window.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seq_len: int,
        seed: int,
        *,
        source: str = "the data",
        left_out: Collection[int] = (),
    ) -> None:
        if seq_len < 1:
            raise UserError(f"a window of {seq_len} frames (--seq_len): give at least 1")
        longest = int(np.max(lengths, initial=0))
        if seq_len > longest:
            raise UserError(
                f"windows of {seq_len} frames (--seq_len) are longer than every episode of {source}: "
                f"give at most {longest}, the length of the longest"
            )
        self.seq_len = seq_len
        self.seed = seed
        self.left_out = tuple(sorted(left_out))
        self._ends = np.cumsum(np.maximum(np.asarray(lengths, np.int64) - seq_len + 1, 0))

    @property
    def num_windows(self) -> int:
        """How many windows the dataset holds: the length of an epoch."""
        return int(self._ends[-1])

    def windows(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of the update that takes `step` to `step + 1`.

        Returns:
            episodes, starts: int64 (batch_size,) each; frames `starts[i]` to `starts[i] + seq_len` of `episodes[i]`.
        """
        positions = batch_of(step, self.left_out) * batch_size + np.arange(batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_windows)
        windows = permute(offsets, epochs, self.num_windows, self.seed)
        episodes = np.searchsorted(self._ends, windows, side="right")
        before = np.where(episodes > 0, self._ends[episodes - 1], 0)
        return episodes, windows - before


def batch_of(step: int, left_out: Collection[int]) -> int:
    """The number of the batch that the update from `step` to `step + 1` takes: `step`, and one more for each batch before it
    that is left out."""
    for batch in sorted(left_out):
        step += batch <= step
    return step


def permute(offsets: np.ndarray, epochs: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where the permutation of `range(size)` that belongs to (seed, epoch) puts each offset.

    A Feistel network on the smallest power of two that holds `size` is a bijection; applying it again to results
    outside `range(size)` (cycle walking) makes it one on `range(size)`. On average less than two passes are needed.

    Args:
        offsets: int64 (B,) in [0, size).
        epochs: int64 (B,), the epoch of each offset.
        size: 1 to 2^62.
        seed: any integer.

    Returns:
        int64 (B,) in [0, size).
    """
    bits = max(2, (size - 1).bit_length())
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    seeds = _mix(_mix(np.full(len(offsets), seed % 2**64, np.uint64)) ^ epochs.astype(np.uint64))
    rounds = _ROUNDS if size >= _SMALL_SET else _ROUNDS_SMALL_SET
    keys = _mix(seeds + np.arange(rounds, dtype=np.uint64)[:, None])
    values = offsets.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        low, high = values[walking] & low_mask, values[walking] >> low_bits
        for even_key, odd_key in zip(keys[::2, walking], keys[1::2, walking], strict=True):
            high ^= _mix(even_key ^ low) & high_mask
            low ^= _mix(odd_key ^ high) & low_mask
        values[walking] = high << low_bits | low
        walking = walking[values[walking] >= np.uint64(size)]
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
