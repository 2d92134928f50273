"""MinAtar (Young and Tian 2019, arXiv 1903.03176): five Atari games on a 10×10 grid, drawn in colour.

MinAtar's state says for each cell which of a few kinds of thing are in it. A kind has a colour of its own, a cell shows
the first kind of those present (the player comes first, its surroundings later), and cells are enlarged to the nearest
pixel. Actions are never sticky: the recorded action is the one that was played.
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from jasmine.data.make.policy import PolicyName, play
from jasmine.data.make.source import (
    SPLITS,
    CommonOptions,
    Episode,
    Source,
    check_lengths,
    episode_rng,
    first_long_enough,
)
from jasmine.errors import UserError

GRID = 10
ACTION_NAMES = ("none", "left", "up", "right", "down", "fire")
# One colour per channel of MinAtar's state; Seaquest has the most channels, ten. Black is an empty cell.
COLOURS = np.array(
    [
        (255, 255, 255),
        (255, 80, 60),
        (80, 200, 255),
        (255, 200, 40),
        (90, 220, 90),
        (230, 90, 230),
        (70, 90, 255),
        (255, 140, 20),
        (150, 255, 210),
        (150, 150, 160),
    ],
    np.uint8,
)


@dataclass(frozen=True, kw_only=True)
class MinAtar(CommonOptions):
    """A MinAtar game: a 10×10 grid in colour, 6 actions, stored at 15 frames a second."""

    game: Literal["asterix", "breakout", "freeway", "seaquest", "space_invaders"] = "breakout"
    num_episodes_train: int = 5_000_000
    num_episodes_val: int = 25_000
    num_episodes_test: int = 25_000
    min_episode_length: int = 20
    max_episode_length: int = 500
    """In frames. Longer episodes are cut off."""
    frame_size: int = 64
    """Height and width in pixels."""
    episodes_per_shard: int = 10_000
    """Most episodes in one file (of at most 1 GiB). An interrupted dataset goes on after its last whole file."""
    policy: PolicyName = "hold"
    """hold: draw an action, hold it for up to 8 frames. random: a uniform one at every frame."""


def source(options: MinAtar) -> Source:
    """Episodes of `options.game`. UserError for impossible lengths, or where MinAtar is not installed."""
    check_lengths(options.min_episode_length, options.max_episode_length)
    if options.frame_size < GRID:
        raise UserError(f"--frame_size {options.frame_size}: the game has {GRID}×{GRID} cells, so at least {GRID}")
    _environment(options.game)
    return Source(
        env=f"minatar/{options.game}",
        frame_shape=(options.frame_size, options.frame_size, 3),
        fps=15.0,
        num_actions=len(ACTION_NAMES),
        wanted={split: getattr(options, f"num_episodes_{split}") for split in SPLITS},
        counts="items",
        record=partial(record, options),
        action_names=ACTION_NAMES,
    )


def record(options: MinAtar, split: str, episode: int) -> Episode:
    """Plays episode number `episode` of `split`."""
    return first_long_enough(
        partial(_play_game, options, split, episode), options.min_episode_length, f"{options.game}, {split}"
    )


def draw(state: np.ndarray, size: int) -> np.ndarray:
    """bool (10, 10, channels) to uint8 (size, size, 3)."""
    cells = np.where(state.any(-1, keepdims=True), COLOURS[state.argmax(-1)], np.uint8(0))
    cell_of_pixel = np.arange(size) * GRID // size
    return cells[cell_of_pixel][:, cell_of_pixel]


def _play_game(options: MinAtar, split: str, episode: int, attempt: int) -> Episode:
    rng = episode_rng(options.seed, split, episode, attempt)
    environment = _environment(options.game)
    environment.seed(int(rng.random() * 2**32))
    environment.reset()
    actions = play(options.policy, [1.0] * len(ACTION_NAMES), rng)
    frames: list[np.ndarray] = []
    taken: list[int] = []
    ended = False
    while len(frames) < options.max_episode_length and not ended:
        frames.append(draw(np.asarray(environment.state(), bool), options.frame_size))
        taken.append(next(actions))
        _, ended = environment.act(taken[-1])
    return Episode(np.stack(frames), np.array(taken, np.int32))


def _environment(game: str) -> Any:
    logging.disable(logging.WARNING)  # MinAtar complains where seaborn, which only its own window needs, is absent
    try:
        from minatar import Environment
    except ImportError as error:
        raise UserError(f"MinAtar needs the package minatar ({error}); install jasmine-world-models[games]") from None
    finally:
        logging.disable(logging.NOTSET)
    return Environment(game, sticky_action_prob=0.0)
