"""The sixteen procgen games (Cobbe et al. 2020, arXiv 1912.01588), CoinRun among them: 64×64 RGB at 15 frames a second.

Each episode is one level, played until the game ends it or until `max_episode_length`. Levels are numbered, and the
three splits own disjoint ranges of numbers, so no level of `train` is ever seen in `val` or `test` (unless `num_levels`
says otherwise). An episode has an environment of its own (it takes 2 ms to make), hence depends on no other episode.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import tyro

from jasmine.data.make.policy import MAX_HOLD, PolicyName, play
from jasmine.data.make.source import (
    MAX_ATTEMPTS,
    SPLITS,
    CommonOptions,
    Episode,
    Source,
    check_lengths,
    episode_rng,
    first_fitting,
)
from jasmine.errors import UserError

GAMES = (
    "bigfish",
    "bossfight",
    "caveflyer",
    "chaser",
    "climber",
    "coinrun",
    "dodgeball",
    "fruitbot",
    "heist",
    "jumper",
    "leaper",
    "maze",
    "miner",
    "ninja",
    "plunder",
    "starpilot",
)
# Index is the action number. The letters are keys whose meaning depends on the game; `D` fires where a game has shots.
ACTION_NAMES = (
    "left+down",
    "left",
    "left+up",
    "down",
    "none",
    "up",
    "right+down",
    "right",
    "right+up",
    "D",
    "A",
    "W",
    "S",
    "Q",
    "E",
)
GAMES_WITH_SHOTS = ("bossfight", "caveflyer", "dodgeball", "fruitbot", "ninja", "plunder", "starpilot")
FPS = 15
LEVELS_PER_SPLIT = 2**29  # level numbers are int32


@dataclass(frozen=True, kw_only=True)
class Procgen(CommonOptions):
    """A procgen game: 64×64 RGB, 15 actions, 15 frames a second."""

    game: tyro.conf.Suppress[str] = "coinrun"
    num_episodes_train: int = 10_000
    num_episodes_val: int = 500
    num_episodes_test: int = 500
    max_episode_length: int = 1000
    """In frames. Longer episodes are cut off."""
    distribution_mode: Literal["easy", "hard"] = "hard"
    """Difficulty of the levels."""
    num_levels: int = 0
    """Levels that all episodes, of all splits, play in turn: a small world that small models can learn. 0: every episode has
    a level of its own."""
    frame_skip: int = 1
    """Frames of the game for each one that is kept; an action lasts as long. The larger, the more an action shows."""
    policy: PolicyName = "hold"
    """hold: draw an action that suits the game, hold it for up to 8 frames of it. random: a uniform one at every frame."""


def source(options: Procgen) -> Source:
    """Episodes of `options.game`. UserError for impossible lengths, or where procgen is not installed."""
    check_lengths(options.min_episode_length, options.max_episode_length)
    if not 0 <= options.num_levels <= LEVELS_PER_SPLIT:
        raise UserError(f"--num_levels {options.num_levels}: from 0, a level for every episode, to {LEVELS_PER_SPLIT}")
    if not 1 <= options.frame_skip <= FPS:
        raise UserError(f"--frame_skip {options.frame_skip}: from 1, every frame, to {FPS}, one a second")
    wanted = {split: getattr(options, f"num_episodes_{split}") for split in SPLITS}
    for split, episodes in wanted.items():
        if episodes > LEVELS_PER_SPLIT // MAX_ATTEMPTS:
            raise UserError(f"--num_episodes_{split} {episodes}: at most {LEVELS_PER_SPLIT // MAX_ATTEMPTS}")
    _environment_class()
    return Source(
        env=options.game,
        frame_shape=(64, 64, 3),
        fps=FPS / options.frame_skip,
        num_actions=len(ACTION_NAMES),
        wanted=wanted,
        counts="items",
        record=partial(record, options),
        action_names=ACTION_NAMES,
    )


def record(options: Procgen, split: str, episode: int) -> Episode:
    """Plays episode number `episode` of `split`."""
    return first_fitting(
        partial(_play_level, options, split, episode), options.min_episode_length, f"{options.game}, {split}"
    )


def level(seed: int, split: str, episode: int, attempt: int) -> int:
    """The level number: distinct for all (split, episode, attempt) of one seed."""
    return (
        SPLITS.index(split) * LEVELS_PER_SPLIT
        + ((seed * 1_000_003 + episode) * MAX_ATTEMPTS + attempt) % LEVELS_PER_SPLIT
    )


def _play_level(options: Procgen, split: str, episode: int, attempt: int) -> Episode:
    number = level(options.seed, split, episode, attempt)
    if options.num_levels:  # the actions differ, by split, episode and attempt
        number = level(options.seed, "train", episode % options.num_levels, 0)
    environment = _environment_class()(
        num=1,
        env_name=options.game,
        start_level=number,
        num_levels=1,
        rand_seed=number,
        num_threads=0,
        distribution_mode=options.distribution_mode,
    )
    rng = episode_rng(options.seed, split, episode, attempt)
    actions = play(options.policy, _weights(options.game), rng, max_hold=max(1, MAX_HOLD // options.frame_skip))
    frames: list[np.ndarray] = []
    taken: list[int] = []
    try:
        while len(frames) < options.max_episode_length:
            _, observation, first = environment.observe()
            if first[0] and frames:  # the environment has begun the level anew
                break
            frames.append(observation["rgb"][0].copy())
            taken.append(next(actions))
            for _ in range(options.frame_skip):
                environment.act(np.array([taken[-1]], np.int32))
                if environment.observe()[2][0]:
                    break
    finally:
        environment.close()
    return Episode(np.stack(frames), np.array(taken, np.int32))


def _weights(game: str) -> list[float]:
    """How likely the hold policy draws each action: moves alike, unless the game's way lies in one direction."""
    weights = dict.fromkeys(ACTION_NAMES[:9], 1.0)
    if game in ("coinrun", "ninja"):
        weights |= {"right": 8.0, "right+up": 8.0, "up": 2.0}
    if game in ("climber", "jumper"):
        weights |= {"left+up": 4.0, "right+up": 4.0, "up": 3.0}
    if game in GAMES_WITH_SHOTS:
        weights["D"] = 4.0
    return [weights.get(name, 0.0) for name in ACTION_NAMES]


def _environment_class() -> Any:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gym announces its own retirement when imported
            from procgen import ProcgenGym3Env
    except ImportError as error:
        raise UserError(
            f"procgen games need the package procgen ({error}); install jasmine-world-models[games]"
        ) from None
    return ProcgenGym3Env
