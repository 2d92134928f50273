"""How games are played when nobody plays them.

Uniformly random actions hardly move a character: in 15 frames a second they cancel out. The `hold` policy draws an
action, holds it for a random number of frames and then draws the next, with weights that a game may choose (CoinRun:
mostly right and jump), so that episodes show the world and not only its first screen. `random` draws an action
uniformly at every frame, as the published generators do.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

PolicyName = Literal["hold", "random"]
MAX_HOLD = 8  # frames; about half a second at 15 frames a second


def play(
    policy: PolicyName, weights: Sequence[float], rng: np.random.Generator, max_hold: int = MAX_HOLD
) -> Iterator[int]:
    """Endless actions in [0, len(weights)). `weights` need not add up to 1; `random` ignores them."""
    # Only `rng.random()` is used: of all draws it is the one whose stream numpy has never changed.
    if policy == "random":
        while True:
            yield int(rng.random() * len(weights))
    thresholds = np.cumsum(weights) / np.sum(weights)
    while True:
        action = int(np.searchsorted(thresholds, rng.random(), side="right"))
        for _ in range(1 + int(rng.random() * max_hold)):
            yield action
