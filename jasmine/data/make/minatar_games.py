"""MinAtar (Young and Tian 2019, arXiv 1903.03176): five Atari games on a 10×10 grid, drawn in colour.

MinAtar's state says for each cell which of a few kinds of thing are in it. A kind has a colour of its own, a cell shows
the first kind of those present (the player comes first, its surroundings later), and cells are enlarged to the nearest
pixel. Actions are never sticky: the recorded action is the one that was played.

The games are so small that episodes recur (of 1000 of Breakout, 20 do; far more where short ones are kept).
So that no episode of `train` is also in `val` or `test`, its pixels decide which split an episode may belong to; an
episode of another split's is played anew. Within a split episodes repeat as often as the game brings them up.
"""

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache, partial
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
    first_fitting,
)
from jasmine.errors import UserError

GRID = 10
ACTION_NAMES = ("none", "left", "up", "right", "down", "fire")
# How an episode's digest, in [0, 1), decides on its split: a game whose digest lies elsewhere is played anew.
SPLIT_ENDS = (0.8, 0.9, 1.0)
MAX_HOLD = 3  # frames; in one frame a thing crosses a tenth of the picture
MAX_GAMES = 20_000  # for one episode; most games of Breakout are lost within ten frames
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
    """hold: draw an action, hold it for up to 3 frames. random: a uniform one at every frame."""


def source(options: MinAtar) -> Source:
    """Episodes of `options.game`. UserError for impossible lengths, or where MinAtar is not installed."""
    check_lengths(options.min_episode_length, options.max_episode_length)
    if options.frame_size < GRID:
        raise UserError(f"--frame_size {options.frame_size}: the game has {GRID}×{GRID} cells, so at least {GRID}")
    _game_class(options.game)
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
    return first_fitting(
        partial(_play_game, options, split, episode),
        options.min_episode_length,
        f"{options.game}, {split}",
        lambda played: split_of(played.frames) == split,
        MAX_GAMES,
    )


def split_of(frames: np.ndarray) -> str:
    """The one split that an episode of these frames may be in."""
    digest = hashlib.blake2b(frames.tobytes(), digest_size=6).digest()
    return SPLITS[int(np.searchsorted(SPLIT_ENDS, int.from_bytes(digest, "big") / 2**48, side="right"))]


def draw(state: np.ndarray, size: int) -> np.ndarray:
    """States, bool (…, 10, 10, channels), in colour: uint8 (…, size, size, 3)."""
    cells = np.where(state.any(-1, keepdims=True), COLOURS[state.argmax(-1)], np.uint8(0))
    cell_of_pixel = np.arange(size) * GRID // size
    return cells[..., cell_of_pixel[:, None], cell_of_pixel, :]


def _play_game(options: MinAtar, split: str, episode: int, attempt: int) -> Episode:
    rng = episode_rng(options.seed, split, episode, attempt)
    environment = _game_class(options.game)(ramping=True)
    environment.random = np.random.RandomState(int(rng.random() * 2**32))
    environment.reset()
    actions = play(options.policy, [1.0] * len(ACTION_NAMES), rng, MAX_HOLD)
    states: list[np.ndarray] = []
    taken: list[int] = []
    ended = False
    while len(states) < options.max_episode_length and not ended:
        states.append(np.asarray(environment.state(), bool))
        taken.append(next(actions))
        _, ended = environment.act(taken[-1])
    # Enlarged only where it can be kept: most games are too short.
    size = options.frame_size if len(states) >= options.min_episode_length else GRID
    return Episode(draw(np.stack(states), size), np.array(taken, np.int32))


@cache
def _game_class(game: str) -> Any:
    """The game's class, from its file: importing minatar itself takes seconds, for plotting that is not used here."""
    package = importlib.util.find_spec("minatar")
    if package is None or not package.submodule_search_locations:
        raise UserError("MinAtar needs the package minatar: install jasmine-world-models[games]")
    path = os.path.join(package.submodule_search_locations[0], "environments", f"{game}.py")
    spec = importlib.util.spec_from_file_location(f"minatar_{game}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Env
