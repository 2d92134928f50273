"""The games: frames show the game, actions are those that led from frame to frame, splits share no level."""

from pathlib import Path

import numpy as np
import pytest

from jasmine.data.duplicates import duplicates
from jasmine.data.make import atari, minatar_games, procgen_games
from jasmine.data.make.__main__ import main
from jasmine.data.make.policy import MAX_HOLD, play
from jasmine.data.make.source import SPLITS, Episode
from jasmine.data.opening import open_dataset
from jasmine.errors import UserError


def test_every_procgen_game_makes_a_moving_picture() -> None:
    for game in procgen_games.GAMES:
        options = procgen_games.Procgen(game=game, max_episode_length=24)
        episode = procgen_games.record(options, "train", 0)
        assert episode.frames.dtype == np.uint8
        assert episode.frames.shape[1:] == (64, 64, 3)
        assert len(np.unique(episode.frames.reshape(len(episode.frames), -1), axis=0)) > 4, game
        assert len(np.unique(episode.frames.reshape(-1, 3), axis=0)) > 4, game


def test_splits_and_episodes_never_share_a_level() -> None:
    levels = [
        procgen_games.level(seed, split, episode, attempt)
        for seed in (7,)
        for split in SPLITS
        for episode in range(2000)
        for attempt in (0, 1, 255)
    ]
    assert len(set(levels)) == len(levels)
    assert min(levels) >= 0
    assert max(levels) < 2**31 - 1
    last = procgen_games.LEVELS_PER_SPLIT // 256 - 1
    ranges = {
        split: {procgen_games.level(s, split, e, 255) // 2**29 for s in range(50) for e in (0, last)}
        for split in SPLITS
    }
    assert ranges == {"train": {0}, "val": {1}, "test": {2}}


def test_few_levels_are_played_in_turn_by_all_splits() -> None:
    options = procgen_games.Procgen(num_levels=2, max_episode_length=40)
    episodes = {
        (split, n): procgen_games.record(options, split, n) for split, n in (("train", 0), ("train", 2), ("val", 0))
    }
    other = procgen_games.record(options, "train", 1)
    first = episodes["train", 0]
    assert not np.array_equal(other.frames[0], first.frames[0])
    for key in (("train", 2), ("val", 0)):
        np.testing.assert_array_equal(episodes[key].frames[0], first.frames[0])
        assert not np.array_equal(episodes[key].actions[:16], first.actions[:16])


def test_skipped_frames_are_played_with_the_same_action() -> None:
    options = procgen_games.Procgen(frame_skip=3, max_episode_length=12, min_episode_length=8)
    episode = procgen_games.record(options, "val", 3)
    number = procgen_games.level(0, "val", 3, 0)
    environment = procgen_games._environment_class()(
        num=1, env_name="coinrun", start_level=number, num_levels=1, rand_seed=number, num_threads=0
    )
    assert episode.actions is not None
    for frame, action in zip(episode.frames, episode.actions, strict=True):
        np.testing.assert_array_equal(environment.observe()[1]["rgb"][0], frame)
        for _ in range(3):
            environment.act(np.array([action], np.int32))
    environment.close()
    assert procgen_games.source(options).fps == 5
    with pytest.raises(UserError, match="--frame_skip 0: from 1"):
        procgen_games.source(procgen_games.Procgen(frame_skip=0))


def test_coinrun_actions_lead_to_the_next_frame() -> None:
    """Played again from the same level, the recorded actions give the recorded frames."""
    options = procgen_games.Procgen(max_episode_length=60)
    episode = procgen_games.record(options, "val", 3)
    attempt = next(
        a for a in range(256) if np.array_equal(procgen_games._play_level(options, "val", 3, a).frames, episode.frames)
    )
    number = procgen_games.level(0, "val", 3, attempt)
    environment = procgen_games._environment_class()(
        num=1, env_name="coinrun", start_level=number, num_levels=1, rand_seed=number, num_threads=0
    )
    assert episode.actions is not None
    for frame, action in zip(episode.frames, episode.actions, strict=True):
        np.testing.assert_array_equal(environment.observe()[1]["rgb"][0], frame)
        environment.act(np.array([action], np.int32))
    environment.close()


def test_coinrun_with_held_actions_travels_further_than_with_random_ones() -> None:
    def scenery(policy: procgen_games.PolicyName) -> float:
        """How much the picture has changed after two seconds, over some levels."""
        options = procgen_games.Procgen(policy=policy, max_episode_length=31, min_episode_length=31)
        episodes = [procgen_games.record(options, "train", e).frames.astype(int) for e in range(12)]
        return float(np.mean([np.abs(frames[30] - frames[0]).mean() for frames in episodes]))

    assert scenery("hold") > 1.2 * scenery("random")


def test_hold_policy_holds_and_follows_its_weights() -> None:
    stream = play("hold", [0, 3, 1], np.random.default_rng(0))
    actions = np.array([next(stream) for _ in range(20_000)])
    assert set(actions.tolist()) == {1, 2}
    assert 0.7 < (actions == 1).mean() < 0.8
    changes = np.flatnonzero(np.diff(actions))
    assert np.diff(changes).mean() > MAX_HOLD / 2
    stream = play("random", [0, 3, 1], np.random.default_rng(0))
    counts = np.bincount([next(stream) for _ in range(9000)])
    assert (np.abs(counts - 3000) < 300).all()


@pytest.fixture(scope="module")
def breakout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("breakout")
    asked = ["--num_transitions_train", "300", "--num_transitions_val", "40", "--num_transitions_test", "40"]
    assert main(["atari", "--game", "breakout", "--max_episode_length", "80", *asked, "--output_dir", str(folder)]) == 0
    return folder


def test_atari_split_ends_with_the_episode_that_reaches_the_transitions(breakout: Path) -> None:
    for split, wanted in (("train", 300), ("val", 40), ("test", 40)):
        dataset = open_dataset(breakout, split)
        assert dataset.num_frames >= wanted
        assert dataset.num_frames - dataset.lengths[-1] < wanted


def test_atari_breakout_looks_like_breakout(breakout: Path) -> None:
    dataset = open_dataset(breakout)
    assert (dataset.frame_shape, dataset.fps, dataset.num_actions) == ((210, 160, 3), 15.0, 4)
    frames, actions = dataset.read_episode(0)
    assert actions is not None
    assert tuple(frames[0, 60, 80]) == (200, 72, 72)  # the uppermost row of bricks is red
    assert len(np.unique(frames.reshape(len(frames), -1), axis=0)) > 20
    # The paddle (rows 189 to 192, between the walls) moves to the right while "right" is held.
    paddle = frames[:, 190, 8:152].any(-1)
    centre = (paddle @ np.arange(144.0)) / np.maximum(paddle.sum(1), 1)
    right = [t for t in range(len(frames) - 3) if (actions[t : t + 3] == 2).all()]
    assert all(centre[t + 3] >= centre[t + 1] for t in right)
    assert any(centre[t + 3] > centre[t + 1] + 20 for t in right)


def test_atari_episodes_do_not_depend_on_those_before_them() -> None:
    options = atari.Atari(game="breakout", max_episode_length=40, target_height=84, target_width=84)
    alone = atari.record(options, "train", 5)
    atari.record(options, "train", 6)
    again = atari.record(options, "train", 5)
    assert alone.frames.shape[1:] == (84, 84, 3)
    np.testing.assert_array_equal(alone.frames, again.frames)
    np.testing.assert_array_equal(alone.actions, again.actions)
    assert _different(alone, atari.record(options, "val", 5))


def test_unknown_atari_game_is_named_with_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["atari", "--game", "brekout", "--output_dir", str(tmp_path / "d")]) == 2
    assert "did you mean breakout?" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("game", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
def test_minatar_draws_every_cell_in_its_colour(game: str) -> None:
    options = minatar_games.MinAtar(game=game, min_episode_length=1, max_episode_length=60, frame_size=40)  # type: ignore[arg-type]
    episode = minatar_games.record(options, "train", 0)
    assert episode.frames.shape[1:] == (40, 40, 3)
    assert len(np.unique(episode.frames.reshape(len(episode.frames), -1), axis=0)) > 3
    cells = episode.frames.reshape(-1, 10, 4, 10, 4, 3)
    assert (cells == cells[:, :, :1, :, :1]).all()  # 4×4 pixels of one colour
    colours = {tuple(colour) for colour in episode.frames.reshape(-1, 3).tolist()}
    assert colours <= {(0, 0, 0), *map(tuple, minatar_games.COLOURS.tolist())}
    assert len(colours) > 2


def test_minatar_shows_the_first_kind_of_thing_in_a_cell() -> None:
    state = np.zeros((10, 10, 4), bool)
    state[2, 3, [1, 3]] = True
    frame = minatar_games.draw(state, 64)
    assert tuple(frame[2 * 64 // 10 + 2, 3 * 64 // 10 + 2]) == tuple(minatar_games.COLOURS[1])
    assert (frame.any(-1)).sum() in (36, 42, 49)


def test_minatar_dataset(tmp_path: Path) -> None:
    asked = ["--num_episodes_train", "3", "--num_episodes_val", "1", "--num_episodes_test", "1"]
    assert main(["minatar", "--game", "breakout", *asked, "--output_dir", str(tmp_path / "a")]) == 0
    assert main(["minatar", "--game", "breakout", *asked, "--output_dir", str(tmp_path / "b")]) == 0
    a, b = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert (a.frame_shape, a.fps, a.num_actions) == ((64, 64, 3), 15.0, 6)
    assert a.lengths.tolist() == b.lengths.tolist()
    assert min(a.lengths) >= 20
    for episode in range(3):
        np.testing.assert_array_equal(a.read_episode(episode)[0], b.read_episode(episode)[0])
        np.testing.assert_array_equal(a.read_episode(episode)[1], b.read_episode(episode)[1])


def test_minatar_splits_share_no_episode_though_the_game_repeats_itself(tmp_path: Path) -> None:
    asked = ["--num_episodes_train", "100", "--num_episodes_val", "20", "--num_episodes_test", "20"]
    asked += ["--min_episode_length", "5"]
    assert main(["minatar", "--game", "breakout", *asked, "--output_dir", str(tmp_path)]) == 0
    groups = duplicates({split: open_dataset(tmp_path, split) for split in SPLITS})
    assert groups  # so small a game: episodes do recur
    assert all(len({episode.split for episode in group}) == 1 for group in groups)


def _different(one: Episode, other: Episode) -> bool:
    return one.frames.shape != other.frames.shape or not np.array_equal(one.frames, other.frames)
