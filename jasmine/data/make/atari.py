"""Atari 2600 games by the Arcade Learning Environment; ale-py carries the ROMs.

A frame is the full RGB screen after an action was held for `frame_skip` ticks of the console, each pixel the maximum
over the last two ticks, because many games draw their sprites on every other tick only (Mnih et al. 2015, Methods).
Actions are never sticky: the recorded action is the one that was played. The console itself has no randomness then, so
episodes differ by their actions alone, which start with up to 30 frames of nothing.
"""

import difflib
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image

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

TICKS_PER_SECOND = 60


@dataclass(frozen=True, kw_only=True)
class Atari(CommonOptions):
    """An Atari 2600 game: 210×160 RGB, 15 frames a second at the default frame skip."""

    game: str = "breakout"
    """Any ROM of ale-py: breakout, pong, space_invaders, ms_pacman, …"""
    num_transitions_train: int = 10_000_000
    """Frames; a split ends with the episode that reaches this number."""
    num_transitions_val: int = 500_000
    num_transitions_test: int = 500_000
    max_episode_length: int = 2000
    """In frames. Longer episodes are cut off."""
    target_height: int = 210
    target_width: int = 160
    """84×84 is what agents usually see; resized by averaging areas."""
    frame_skip: int = 4
    """Ticks of the console (60 a second) that one action lasts."""
    policy: PolicyName = "hold"
    """hold: draw an action, hold it for up to 8 frames. random: a uniform one at every frame."""


def source(options: Atari) -> Source:
    """Episodes of `options.game`, as many as hold the wanted transitions. UserError for an unknown game."""
    check_lengths(options.min_episode_length, options.max_episode_length)
    if options.frame_skip < 1:
        raise UserError(f"--frame_skip {options.frame_skip} must be at least 1")
    if min(options.target_height, options.target_width) < 1:
        raise UserError("--target_height and --target_width must be at least 1")
    _, actions = _console(options.game)
    return Source(
        env=f"atari/{options.game}",
        frame_shape=(options.target_height, options.target_width, 3),
        fps=TICKS_PER_SECOND / options.frame_skip,
        num_actions=len(actions),
        wanted={split: getattr(options, f"num_transitions_{split}") for split in SPLITS},
        counts="frames",
        record=partial(record, options),
        action_names=tuple(action.name.lower() for action in actions),
    )


def record(options: Atari, split: str, episode: int) -> Episode:
    """Plays episode number `episode` of `split`."""
    return first_fitting(
        partial(_play_game, options, split, episode), options.min_episode_length, f"{options.game}, {split}"
    )


def _play_game(options: Atari, split: str, episode: int, attempt: int) -> Episode:
    console, action_set = _console(options.game)
    console.reset_game()
    rng = episode_rng(options.seed, split, episode, attempt)
    for _ in range(int(rng.random() * 31)):
        console.act(action_set[0])
    actions = play(options.policy, [1.0] * len(action_set), rng)
    screen = console.getScreenRGB()
    previous = np.empty_like(screen)
    frames: list[np.ndarray] = []
    taken: list[int] = []
    while len(frames) < options.max_episode_length and not console.game_over():
        frames.append(_resized(screen, options.target_height, options.target_width))
        taken.append(next(actions))
        for tick in range(options.frame_skip):
            console.act(action_set[taken[-1]])
            if tick == options.frame_skip - 2:
                console.getScreenRGB(previous)
        console.getScreenRGB(screen)
        if options.frame_skip > 1:
            np.maximum(screen, previous, out=screen)
    return Episode(np.stack(frames), np.array(taken, np.int32))


def _resized(screen: np.ndarray, height: int, width: int) -> np.ndarray:
    if screen.shape[:2] == (height, width):
        return screen.copy()
    return np.asarray(Image.fromarray(screen).resize((width, height), Image.Resampling.BOX))


@lru_cache(maxsize=1)
def _console(game: str) -> tuple[Any, list[Any]]:
    """A console with the game in it, and the actions that mean something in this game. Loading takes 0.1 s."""
    try:
        import ale_py
        from ale_py import roms
    except ImportError as error:
        raise UserError(f"Atari games need the package ale-py ({error}); install jasmine-world-models[games]") from None
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    known = sorted(roms.get_all_rom_ids())
    if game not in known:
        alike = difflib.get_close_matches(game, known, n=1)
        hint = f"did you mean {alike[0]}?" if alike else f"ale-py knows {', '.join(known)}"
        raise UserError(f"--game {game}: no such Atari game; {hint}")
    console = ale_py.ALEInterface()
    console.setFloat("repeat_action_probability", 0.0)
    console.setInt("random_seed", 0)
    console.loadROM(roms.get_rom_path(game))
    return console, list(console.getMinimalActionSet())
