"""The measures of models whose answers are known: a world that knows the truth, one that ignores its actions, and so on."""

import dataclasses
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jasmine.evaluation.measure import Clips, Plan, latent_action_model, mae_features, tokenizer, world_model
from jasmine.evaluation.report import Findings
from jasmine.models.latent_action import LatentActionModel
from jasmine.models.tokenizer import VideoTokenizerMAE, VideoTokenizerVQVAE
from jasmine.models.transformer import TransformerConfig

SIZE, FRAMES = 16, 12
STEPS = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=1, num_heads=2, dtype=jnp.float32)


def render(places_T2: np.ndarray) -> np.ndarray:
    """A bright square on a dark ground: uint8 (T, 16, 16, 3)."""
    video = np.full((len(places_T2), SIZE, SIZE, 3), 20, np.uint8)
    for frame, (y, x) in enumerate(places_T2 % SIZE):
        video[frame][np.ix_((y + np.arange(4)) % SIZE, (x + np.arange(4)) % SIZE)] = (255, 200, 40)
    return video


def play(start_2: np.ndarray, actions_T: np.ndarray) -> np.ndarray:
    """What becomes of a square at `start` under actions; one frame more than actions."""
    return render(start_2 + np.concatenate([[(0, 0)], np.cumsum(3 * STEPS[actions_T], 0)]))


def make_clips(count: int = 10, frames: int = FRAMES) -> Clips:
    rng = np.random.default_rng(3)
    actions = rng.integers(0, 4, (count, frames)).astype(np.int32)
    videos = np.stack([play(rng.integers(0, SIZE, 2), a[:-1]) for a in actions])
    return Clips(
        videos, actions, others=videos[::-1], num_actions=4, action_names=["right", "left", "down", "up"], fps=15
    )


CLIPS = make_clips()


@dataclasses.dataclass
class Game:
    """A world that finds the square in the prompt and moves it as it is told, or does not listen."""

    listens: bool = True
    action_kind: str = "true"
    num_actions: int = 4

    def infer_actions(self, videos: np.ndarray, actions: np.ndarray | None) -> Any:
        assert actions is not None
        return (actions + 1) % 4 if self.action_kind == "frozen" else actions

    def generate(self, prompt: np.ndarray, actions: np.ndarray, *, key: jax.Array) -> Any:
        actions = (actions - 1) % 4 if self.action_kind == "frozen" else actions
        made = []
        for clip, taken in zip(prompt, actions, strict=True):
            P = len(clip)
            corner = next(p for p in np.ndindex(SIZE, SIZE) if (render(np.array([p]))[0] == clip[-1]).all())
            future = taken[P - 1 : -1] if self.listens else np.zeros(len(taken) - P, int)
            made.append(np.concatenate([clip[:-1], play(np.array(corner), future)]))
        return jnp.asarray(np.stack(made), jnp.float32) / 255

    def reconstruct(self, videos: np.ndarray) -> Any:
        return jnp.asarray(videos, jnp.float32) / 255


def values(findings: Findings) -> dict[str, float]:
    return {measure.key: measure.value for measure in findings.measures}


@pytest.mark.parametrize("prompt_frames", [1, 3])
def test_a_world_that_knows_the_game(prompt_frames: int):
    found = values(world_model(Game(), CLIPS, Plan(batch_size=4, prompt_frames=prompt_frames)))
    assert found["psnr"] > 58
    assert found["ssim"] == pytest.approx(1.0, abs=1e-4)
    assert found["psnr_gain"] == pytest.approx(found["psnr"] - found["psnr_copy"], abs=1e-4)
    assert found["psnr_gain"] > 20
    assert found["delta_psnr"] > 20
    assert found["delta_psnr_t4"] > 20
    assert found["delta_psnr_other"] > 20
    assert found["drift_psnr"] == pytest.approx(0, abs=1e-4)
    assert "action_information" not in found  # true actions, nothing to compare them with


def test_a_world_that_does_not_listen():
    found = values(world_model(Game(listens=False), CLIPS, Plan(batch_size=4)))
    assert found["delta_psnr"] == pytest.approx(0, abs=1e-4)
    assert found["psnr"] < 40
    assert found["drift_psnr"] > 1


def test_latent_actions_are_compared_with_true_ones():
    findings = world_model(Game(action_kind="frozen"), make_clips(24), Plan(batch_size=8))
    assert values(findings)["psnr"] > 58
    assert values(findings)["action_information"] == pytest.approx(1.0, abs=1e-6)
    [table] = findings.tables
    assert (table.counts.argmax(1) == (np.arange(4) - 1) % 4).all()
    assert list(table.column_names) == ["right", "left", "down", "up"]


def test_a_collapsed_action_space_is_not_taken_for_control():
    """All clips have the same action; a random one is another, and does something."""

    class Collapsed(Game):
        def infer_actions(self, videos: np.ndarray, actions: np.ndarray | None) -> Any:
            return np.zeros(videos.shape[:2], np.int32)

    found = values(world_model(Collapsed(), CLIPS, Plan(batch_size=4)))
    assert found["delta_psnr"] != pytest.approx(0, abs=0.1)
    assert found["delta_psnr_other"] == 0


def test_curves_hold_a_number_a_frame():
    findings = world_model(Game(listens=False), CLIPS, Plan(batch_size=4, prompt_frames=2))
    psnr = findings.curves["psnr_generated"]
    assert psnr.shape == (FRAMES,)
    assert psnr[:2].min() > 58  # the prompt
    assert psnr[2:].mean() == pytest.approx(values(findings)["psnr"], abs=1e-4)
    assert np.isnan(findings.curves["delta_psnr"][:2]).all()


def test_what_is_measured_does_not_depend_on_how_clips_fall_into_batches():
    whole, parts = (values(world_model(Game(listens=False), CLIPS, Plan(batch_size=size))) for size in (10, 3))
    for name in ("psnr", "psnr_copy", "ssim", "drift_psnr"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-5)


def test_clips_without_actions():
    class Dreamer(Game):
        def infer_actions(self, videos: np.ndarray, actions: np.ndarray | None) -> Any:
            assert actions is None
            return np.zeros(videos.shape[:2], np.int32)

    clips = dataclasses.replace(CLIPS, actions=None, num_actions=0, action_names=())
    findings = world_model(Dreamer(action_kind="frozen"), clips, Plan(batch_size=4))
    assert "action_information" not in values(findings)
    assert findings.tables == []


def test_a_short_horizon_leaves_out_what_it_does_not_reach():
    found = values(world_model(Game(), make_clips(4, frames=3), Plan(batch_size=4)))
    assert "delta_psnr_t4" not in found
    assert found["psnr"] > 58


def test_pictures_show_every_frame():
    findings = world_model(Game(), CLIPS, Plan(batch_size=4, pictures=2))
    kinds = [picture.mime for picture in findings.pictures]
    assert kinds == ["image/gif", "image/png", "image/png"]
    with Image.open(io.BytesIO(findings.pictures[0].data)) as image:
        assert image.n_frames == FRAMES


def mae() -> VideoTokenizerMAE:
    return VideoTokenizerMAE(
        frame_shape=(SIZE, SIZE, 3), patch_size=8, latent_dim=4, max_mask_ratio=0.9, transformer=SMALL, rngs=nnx.Rngs(0)
    )


def test_frechet_distance_tells_the_game_from_a_still_picture_and_is_not_called_fvd():
    clips = make_clips(24)
    findings = world_model(Game(), clips, Plan(batch_size=8), mae_features(mae(), 8))
    found = values(findings)
    assert found["frechet_mae"] < 1e-6 < found["frechet_mae_copy"]
    assert found["frechet_mae_data"] < 1e-6  # these others are the same clips in another order
    assert not [m for m in findings.measures if "fvd" in m.key.lower() or "fvd" in m.label.lower()]
    assert any("24 clips of 8 features" in note for note in findings.notes)


def test_frechet_distance_without_further_clips_has_no_floor():
    clips = dataclasses.replace(CLIPS, others=None)
    assert np.isnan(values(world_model(Game(), clips, Plan(batch_size=8), mae_features(mae(), 8)))["frechet_mae_data"])


def test_features_are_of_windows_that_the_tokenizer_was_trained_on():
    """So what they say of a frame depends on nothing in another window."""
    module, changed = mae(), CLIPS.videos.copy()
    changed[:, 4:8] = 255 - changed[:, 4:8]
    latents = [np.asarray(module.encode_latents(jnp.asarray(v, jnp.float32) / 255)) for v in (CLIPS.videos[:, :4],)]
    features = mae_features(module, 4)(CLIPS.videos[:, :4])
    np.testing.assert_allclose(features[:, :4], latents[0].mean((1, 2)), atol=1e-5)
    first, second = (mae_features(module, 4)(v)[:, :4] * 3 for v in (CLIPS.videos, changed))
    rest = [mae_features(module, 4)(v[:, 4:8])[:, :4] for v in (CLIPS.videos, changed)]
    np.testing.assert_allclose(first - second, rest[0] - rest[1], atol=1e-4)


def test_a_tokenizers_usage_counts_all_clips_once():
    module = VideoTokenizerVQVAE(
        frame_shape=(SIZE, SIZE, 3), patch_size=8, latent_dim=4, num_latents=32, codebook_dropout=0.0,
        transformer=SMALL, rngs=nnx.Rngs(0),
    )  # fmt: skip
    findings = tokenizer(module, CLIPS, Plan(batch_size=4))
    index = np.asarray(module.encode_tokens(jnp.asarray(CLIPS.videos, jnp.float32) / 255))
    found = values(findings)
    assert found["codebook_usage"] == pytest.approx(100 * len(np.unique(index)) / 32)
    guess = np.asarray(module.decode(jnp.asarray(index)))
    error = np.square(guess - CLIPS.videos / 255).mean((2, 3, 4))
    assert found["psnr"] == pytest.approx(-10 * np.log10(error).mean(), abs=1e-3)
    assert findings.curves["psnr"].shape == (FRAMES,)


def test_a_tokenizer_without_codes():
    found = values(tokenizer(mae(), CLIPS, Plan(batch_size=4)))
    assert found.keys() == {"psnr", "ssim"}


def test_a_latent_action_model_is_compared_with_what_it_must_beat():
    module = LatentActionModel(
        frame_shape=(SIZE, SIZE, 3), patch_size=8, latent_dim=4, num_latents=6, codebook_dropout=0.0,
        transformer=SMALL, rngs=nnx.Rngs(0),
    )  # fmt: skip
    findings = latent_action_model(module, CLIPS, Plan(batch_size=4))
    found = values(findings)
    video = jnp.asarray(CLIPS.videos, jnp.float32) / 255
    copied = np.square(np.asarray(video[:, 1:] - video[:, :-1])).mean((2, 3, 4))
    assert found["psnr_copy"] == pytest.approx(-10 * np.log10(copied).mean(), abs=1e-2)
    own = np.square(np.asarray(module(video).video_BTHWC - video[:, 1:])).mean((2, 3, 4))
    assert found["psnr"] == pytest.approx(-10 * np.log10(own).mean(), abs=1e-3)
    other = np.roll(np.asarray(module.encode_actions(video)), 1, axis=0)
    mistaken = np.square(np.asarray(module.decode(video[:, :-1], module.vq.lookup(other)) - video[:, 1:])).mean(
        (2, 3, 4)
    )
    assert found["delta_psnr_other"] == pytest.approx(found["psnr"] + 10 * np.log10(mistaken).mean(), abs=1e-3)
    [table] = findings.tables
    assert table.counts.sum() == 10 * (FRAMES - 1)
    assert len(table.row_names) == 6
