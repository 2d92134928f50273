"""Do latent actions mean what the player did? Mutual information of latent and true actions, without being fooled by chance.

Counted in a finite sample, two unrelated sequences share some information; held actions, which make neighbouring frames
alike, share more. So what counts is the excess over chance, and chance is measured: each clip's latent actions against
another clip's true ones, which keeps how often actions occur and how long they are held.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ActionConsistency:
    """What latent actions tell of true ones.

    Attributes:
        table: int64 (latent actions, true actions), how often each pair occurs.
        mutual_information: of the table, in nats; biased upwards in small samples.
        chance: the same, mean over pairings of clips that do not belong together, in nats.
        normalized: (mutual_information - chance) / (smaller of the two entropies - chance). 1: one tells the other; 0, and
            below it by accident: no more than chance; 0 too where either never varies.
        p_value: how often chance does as well; at least 1 / (shuffles + 1).
    """

    table: np.ndarray
    mutual_information: float
    chance: float
    normalized: float
    p_value: float


def contingency(latent: np.ndarray, true: np.ndarray, num_latent: int, num_true: int) -> np.ndarray:
    """How often each latent action meets each true one: int64 (num_latent, num_true); the arguments have equal shapes."""
    pairs = latent.reshape(-1).astype(np.int64) * num_true + true.reshape(-1)
    return np.bincount(pairs, minlength=num_latent * num_true).reshape(num_latent, num_true)


def entropy(counts: np.ndarray) -> float:
    """Of the distribution that counts of any shape describe, in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(table: np.ndarray) -> float:
    """Of the row and the column of a table of counts, in nats (Cover and Thomas, "Elements of information theory", 2.4)."""
    return max(0.0, entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table))


def action_consistency(
    latent_BT: np.ndarray, true_BT: np.ndarray, *, num_latent: int, num_true: int, shuffles: int = 200, seed: int = 0
) -> ActionConsistency:
    """Compares the actions of B clips, entry by entry.

    The excess over chance and its scale are those of the adjusted mutual information (Vinh, Epps and Bailey, JMLR 11, 2010,
    section 4), but chance pairs whole clips rather than single entries.

    Args:
        latent_BT: integers in [0, num_latent).
        true_BT: integers in [0, num_true).
        shuffles: pairings that chance is measured on.

    Raises:
        ValueError: there are fewer than two clips, so nothing to measure chance on.
    """
    if len(latent_BT) < 2:
        raise ValueError("action consistency needs at least two clips")
    rng = np.random.default_rng(seed)
    table = contingency(latent_BT, true_BT, num_latent, num_true)
    information = mutual_information(table)
    shuffled = np.array([
        mutual_information(contingency(latent_BT, true_BT[_strangers(rng, len(true_BT))], num_latent, num_true))
        for _ in range(shuffles)
    ])  # fmt: skip
    chance = float(shuffled.mean())
    room = min(entropy(table.sum(1)), entropy(table.sum(0))) - chance
    return ActionConsistency(
        table=table,
        mutual_information=information,
        chance=chance,
        normalized=(information - chance) / room if room > 1e-9 else 0.0,
        p_value=float((1 + (shuffled >= information - 1e-12).sum()) / (1 + shuffles)),
    )


def _strangers(rng: np.random.Generator, count: int) -> np.ndarray:
    """A random permutation of `range(count)` that leaves nothing in its place: one cycle through all."""
    order = rng.permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, 1)
    return partner
