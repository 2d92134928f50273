"""What is measured of each kind of model, on clips in memory: tokenizers, latent action models, world models.

Each number stands beside what it must be compared with: a world model's PSNR beside that of copying the last given frame,
which it must beat, and that of the tokenizer's round trip, which it cannot; a latent action model's beside the same decoder
with another action. Numbers that are means over clips carry their standard error.

Everything is worked through in batches of one size (the last is filled up, and the filling thrown away), so that nothing
compiles twice. Draws follow from the seed and the clip's batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jasmine.evaluation.actions import action_consistency
from jasmine.evaluation.frechet import clip_features, frechet_distance
from jasmine.evaluation.media import Column, curve_plot, gif, side_by_side, to_uint8
from jasmine.evaluation.metrics import (
    GENIE_FRAME,
    code_usage,
    delta_psnr,
    drift,
    frame_psnr,
    frame_ssim,
    mean_and_error,
)
from jasmine.evaluation.report import Findings, Measure, Picture, Table

Features = Callable[[np.ndarray], np.ndarray]
"""Videos uint8 (B, T, H, W, C) to feature vectors (B, D) float64."""

# Uniform draws hold actions that data never has, and that alone makes a model that knows only one action look controllable.
OTHER_ACTIONS = (
    "The same against another clip's actions, which are as likely ones: 0 for a model whose action never varies."
)


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of a dataset.

    Attributes:
        videos: uint8 (B, T, H, W, C).
        actions: int32 (B, T), entry t leads from frame t to frame t + 1; None where the data has none.
        others: as many further clips, uint8, for what two samples of the same data differ by; None where there are not as
            many or nobody asks.
        num_actions: true actions are below it; 0 without.
        action_names: by true action, as many as have one.
        fps: of the recording, None where it is not known.
    """

    videos: np.ndarray
    actions: np.ndarray | None
    others: np.ndarray | None = None
    num_actions: int = 0
    action_names: Sequence[str] = ()
    fps: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to go about it: clips worked on at once, seed of every draw, frames that are given, clips in the pictures."""

    batch_size: int
    seed: int = 0
    prompt_frames: int = 1
    pictures: int = 4

    def batches(self, count: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """Batch number, rows (all batches as long; the last repeats the last row) and how many of them are real."""
        size = min(self.batch_size, count)
        for number, start in enumerate(range(0, count, size)):
            yield number, np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


class WorldModel(Protocol):
    """What is needed of `jasmine.sampling.world.World`."""

    @property
    def action_kind(self) -> str: ...

    @property
    def num_actions(self) -> int: ...

    def infer_actions(self, videos_BTHWC: np.ndarray, actions_BT: np.ndarray | None) -> Any: ...

    def generate(self, prompt_BTHWC: np.ndarray, actions_BS: np.ndarray, *, key: jax.Array) -> Any: ...

    def reconstruct(self, videos_BTHWC: np.ndarray) -> Any: ...


# --- tokenizers ---------------------------------------------------------------------------------------------------


def tokenizer(module: Any, clips: Clips, plan: Plan, features: Features | None = None) -> Findings:
    """How well frames survive the way through the tokens, and how the tokens are used.

    Args:
        module: has `encode_tokens` or `encode_latents`, and `decode`.
    """
    discrete = hasattr(module, "encode_tokens")

    @nnx.jit
    def round_trip(module: Any, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
        videos = videos.astype(jnp.float32) / 255
        tokens = module.encode_tokens(videos) if discrete else module.encode_latents(videos)
        return tokens, module.decode(tokens)

    results = _Collected()
    for _, rows, real in plan.batches(len(clips.videos)):
        tokens, guess = round_trip(module, clips.videos[rows])
        results.add(
            real, tokens=tokens if discrete else (), guess=_pixels(guess), **_quality(clips.videos[rows], guess)
        )
    psnr, ssim, guess = results["psnr"], results["ssim"], results["guess"]
    measures = [
        _over_clips("psnr", "PSNR", psnr, "Of reconstructed frames against true ones; more is better.", "dB"),
        _over_clips("ssim", "SSIM", ssim, "Structural similarity of reconstructed frames; 1 is equal."),
    ]
    if discrete:
        measures += _usage(results["tokens"], module.vq.codebook[...].shape[0], "Codes")
    frechet, notes = _frechet({"": guess}, clips.videos, clips.others, features)
    return Findings(
        measures=[*measures, *frechet],
        curves={"psnr": psnr.mean(0), "ssim": ssim.mean(0)},
        pictures=[
            _animation("True clips beside reconstructed ones.", clips, plan, {"truth": clips.videos, "reconstructed": guess}),
            _plot("PSNR over the frames of a clip, mean over clips.", {"PSNR": psnr}, "PSNR (dB)"),
        ],
        notes=notes,
    )  # fmt: skip


# --- latent action models -----------------------------------------------------------------------------------------


def latent_action_model(module: Any, clips: Clips, plan: Plan) -> Findings:
    """How much the latent action tells the decoder, and what it has to do with the true one.

    Args:
        module: a `jasmine.models.latent_action.LatentActionModel`.
    """
    num_codes = module.vq.codebook[...].shape[0]
    encode = nnx.jit(lambda module, videos: module.encode_actions(videos.astype(jnp.float32) / 255))

    @nnx.jit
    def decode(module: Any, past: jax.Array, index_BT: jax.Array) -> jax.Array:
        return module.decode(past.astype(jnp.float32) / 255, module.vq.lookup(index_BT))

    inferred = _Collected()
    for _, rows, real in plan.batches(len(clips.videos)):
        inferred.add(real, index=encode(module, clips.videos[rows]))
    index = inferred["index"]
    actions = {
        "own": index,
        "random": np.random.default_rng(plan.seed).integers(0, num_codes, index.shape, dtype=np.int32),
        "other": np.roll(index, 1, axis=0),
    }
    results = _Collected()
    for _, rows, real in plan.batches(len(clips.videos)):
        past, truth = clips.videos[rows][:, :-1], clips.videos[rows][:, 1:]
        guesses = {name: decode(module, past, chosen[rows]) for name, chosen in actions.items()} | {"copy": past}
        quality = {name: _quality(truth, guess) for name, guess in guesses.items()}
        psnrs = {f"psnr_{name}": values["psnr"] for name, values in quality.items()}
        results.add(real, guess=_pixels(guesses["own"]), ssim=quality["own"]["ssim"], **psnrs)
    psnr = results["psnr_own"]
    measures = [
        _over_clips("psnr", "PSNR", psnr, "Of the next frame, made from the true past and the inferred action.", "dB"),
        _over_clips("ssim", "SSIM", results["ssim"], "Structural similarity of the same; 1 is equal."),
        _over_clips("psnr_copy", "PSNR of copying", results["psnr_copy"],
                    "The true frame before, as it is. Better than this, or nothing of motion is learned.", "dB"),
        _over_clips("delta_psnr", "ΔPSNR", delta_psnr(psnr, results["psnr_random"]),
                    "PSNR with the inferred action less that with a random one: how much the action says.", "dB"),
        _over_clips("delta_psnr_other", "ΔPSNR, other clip's actions", delta_psnr(psnr, results["psnr_other"]),
                    OTHER_ACTIONS, "dB"),
        *_usage(index, num_codes, "Latent actions"),
    ]  # fmt: skip
    consistency, tables = _consistency(index, clips, num_codes, plan.seed)
    shown = {"truth": clips.videos[:, 1:], "from past + action": results["guess"]}
    shifted = dataclasses.replace(clips, actions=index, action_names=_latent_names(num_codes))
    return Findings(
        measures=[*measures, *consistency],
        tables=tables,
        pictures=[
            _animation(
                "Next frames, true and made from the true past and the inferred action, which is drawn below.",
                shifted, plan, shown,
            )
        ],
    )  # fmt: skip


# --- world models -------------------------------------------------------------------------------------------------


def world_model(world: WorldModel, clips: Clips, plan: Plan, features: Features | None = None) -> Findings:
    """How near sampled clips stay to the true ones, for how long, and whether they listen to their actions.

    From the first `plan.prompt_frames` frames of each clip the rest is sampled three times with the same random key: with
    the clip's own actions (true ones, or inferred by the latent action model), with uniformly drawn ones, and with another
    clip's.
    """
    P, S = plan.prompt_frames, clips.videos.shape[1]
    inferred = _Collected()
    for _, rows, real in plan.batches(len(clips.videos)):
        known = None if clips.actions is None else clips.actions[rows]
        inferred.add(real, actions=world.infer_actions(clips.videos[rows], known))
    own = inferred["actions"]
    random = np.random.default_rng(plan.seed).integers(0, world.num_actions, own.shape, dtype=own.dtype)
    actions = {"generated": own, "random": random, "other": np.roll(own, 1, axis=0)}
    for chosen in actions.values():
        chosen[:, : P - 1] = own[:, : P - 1]  # those between given frames are past
    results = _Collected()
    for number, rows, real in plan.batches(len(clips.videos)):
        videos = clips.videos[rows]
        prompt, key = videos[:, :P], jax.random.fold_in(jax.random.key(plan.seed), number)
        guesses = {
            **{name: _pixels(world.generate(prompt, chosen[rows], key=key)) for name, chosen in actions.items()},
            "reconstruction": _pixels(world.reconstruct(videos)),
            "copy": np.concatenate([prompt, prompt[:, -1:].repeat(S - P, axis=1)], axis=1),
        }
        quality = {name: _quality(videos, guess) for name, guess in guesses.items()}
        values = {f"{metric}_{name}": v for name, found in quality.items() for metric, v in found.items()}
        results.add(real, **guesses, **values)
    generated = {name: results[name][:, P:] for name in results.names if name.startswith(("psnr", "ssim"))}
    controlled = delta_psnr(generated["psnr_generated"], generated["psnr_random"])
    measures = [
        _over_clips("psnr", "PSNR", generated["psnr_generated"], "Of generated frames against true ones.", "dB"),
        _over_clips("psnr_copy", "PSNR of copying", generated["psnr_copy"],
                    "The last given frame, held. Better than this, or the model has not learned to move.", "dB"),
        _over_clips("psnr_reconstruction", "PSNR of the tokenizer", generated["psnr_reconstruction"],
                    "Its round trip of the same true frames: the ceiling for sampling.", "dB"),
        _over_clips("psnr_gain", "Gain over copying", generated["psnr_generated"] - generated["psnr_copy"],
                    "The first less the second, clip by clip; above 0 is better than copying.", "dB"),
        _over_clips("ssim", "SSIM", generated["ssim_generated"], "Structural similarity of generated frames; 1 is equal."),
        _over_clips("ssim_copy", "SSIM of copying", generated["ssim_copy"], "Of the last given frame, held."),
        _over_clips("delta_psnr", "ΔPSNR", controlled,
                    "PSNR with the clip's actions less that with random ones, all generated frames: controllability.", "dB"),
        *([_over_clips(f"delta_psnr_t{GENIE_FRAME}", f"ΔPSNR, t = {GENIE_FRAME}", controlled[:, GENIE_FRAME - 1],
                       f"The same at generated frame {GENIE_FRAME}, as Genie reports it.", "dB")]
          if S - P >= GENIE_FRAME else []),
        _over_clips("delta_psnr_other", "ΔPSNR, other clip's actions",
                    delta_psnr(generated["psnr_generated"], generated["psnr_other"]), OTHER_ACTIONS, "dB"),
        _over_clips("drift_psnr", "Drift, PSNR", drift(generated["psnr_generated"]),
                    "Lost from the first to the last quarter of the generated frames; 0 is none.", "dB"),
        _over_clips("drift_ssim", "Drift, SSIM", drift(generated["ssim_generated"]), "The same of SSIM."),
    ]  # fmt: skip
    latent = world.action_kind != "true"
    used = own[:, :-1]
    consistency, tables = _consistency(used, clips, world.num_actions, plan.seed) if latent else ([], [])
    versions = {"": results["generated"][:, P:], "copy": results["copy"][:, P:]}
    others = None if clips.others is None else clips.others[:, P:]
    frechet, notes = _frechet(versions, clips.videos[:, P:], others, features)
    names = {
        "sampled": "generated",
        "random actions": "random",
        "last frame held": "copy",
        "tokenizer alone": "reconstruction",
    }
    shown = dataclasses.replace(
        clips,
        actions=np.concatenate([used, np.full_like(used[:, :1], -1)], axis=1),  # none is taken at the last frame
        action_names=_latent_names(world.num_actions) if latent else clips.action_names,
    )
    plotted = {name: results[name] for name in generated}
    for metric in ("psnr", "ssim"):
        plotted[f"{metric}_copy"][:, :P] = np.nan  # given frames equal themselves, and would squash the plot
    columns = {
        "truth": clips.videos,
        "sampled": results["generated"],
        "random actions": results["random"],
    }
    return Findings(
        measures=[*measures, *consistency, *frechet],
        curves={
            **{name: results[name].mean(0) for name in generated},
            "delta_psnr": np.concatenate([np.full(P, np.nan), controlled.mean(0)]),
        },
        tables=tables,
        pictures=[
            _animation(
                f"True clips; sampled from the first {P} frame{'s' * (P > 1)} and the actions drawn below; and with random "
                "actions instead.",
                shown, plan, columns, P,
            ),
            *(
                _plot(
                    f"{metric.upper()} over the horizon, mean over clips: how far sampling holds.",
                    {label: plotted[f"{metric}_{name}"] for label, name in names.items()},
                    unit, P,
                )
                for metric, unit in (("psnr", "PSNR (dB)"), ("ssim", "SSIM"))
            ),
        ],
        notes=notes,
    )  # fmt: skip


# --- what they share ----------------------------------------------------------------------------------------------


def mae_features(module: Any, window: int) -> Features:
    """`clip_features` in the latents of an MAE tokenizer, encoded `window` frames at a time: those it was trained on."""
    encode = nnx.jit(lambda module, videos: module.encode_latents(videos.astype(jnp.float32) / 255))

    def features(videos_BTHWC: np.ndarray) -> np.ndarray:
        T = videos_BTHWC.shape[1]
        parts = [np.asarray(encode(module, videos_BTHWC[:, start : start + window])) for start in range(0, T, window)]
        return clip_features(np.concatenate(parts, axis=1), window)

    return features


class _Collected:
    """Per-clip arrays by name, joined over batches."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, real: int, **arrays: Any) -> None:
        for name, array in arrays.items():
            self._parts.setdefault(name, []).append(np.asarray(array)[:real])

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self._parts[name])


@jax.jit
def _frame_quality(truth: jax.Array, guess: jax.Array) -> dict[str, jax.Array]:
    truth, guess = (video.astype(jnp.float32) / (255 if video.dtype == jnp.uint8 else 1) for video in (truth, guess))
    return {"psnr": frame_psnr(truth, guess), "ssim": frame_ssim(truth, guess)}


def _quality(truth: Any, guess: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in _frame_quality(truth, guess).items()}


def _pixels(video: Any) -> np.ndarray:
    return to_uint8(np.asarray(video))


def _over_clips(key: str, label: str, values: np.ndarray, meaning: str, unit: str = "") -> Measure:
    """Mean over everything, with the standard error over clips, which are the leading axis."""
    mean, error = mean_and_error(np.asarray(values, np.float64).reshape(len(values), -1).mean(1))
    return Measure(key, label, mean, meaning, unit, error)


def _usage(index: np.ndarray, num_codes: int, what: str) -> list[Measure]:
    usage = jax.device_get(code_usage(jnp.asarray(index), num_codes))
    return [
        Measure("codebook_usage", f"{what} in use", 100 * float(usage["codebook_usage"]), f"Of {num_codes:,}.", "%"),
        Measure("codebook_perplexity", "Perplexity", float(usage["codebook_perplexity"]),
                f"As many equally frequent ones would be as varied; at most {num_codes:,}."),
    ]  # fmt: skip


def _consistency(latent_BT: np.ndarray, clips: Clips, num_latent: int, seed: int) -> tuple[list[Measure], list[Table]]:
    """Of latent actions (B, T - 1) with the true ones, where there are any, and clips enough to measure chance on."""
    if clips.actions is None or len(latent_BT) < 2:
        return [], []
    found = action_consistency(
        latent_BT, clips.actions[:, :-1], num_latent=num_latent, num_true=clips.num_actions, seed=seed
    )
    measures = [
        Measure("action_information", "Action consistency", found.normalized,
                "What latent actions tell of true ones beyond chance, of all they could: 1 is a mere renaming, 0 chance."),
        Measure("action_mutual_information", "Mutual information", found.mutual_information,
                "Of latent and true actions as counted, chance included.", "nats"),
        Measure("action_information_chance", "Mutual information by chance", found.chance,
                "The same with each clip's latent actions against another clip's true ones.", "nats"),
        Measure("action_p_value", "p-value", found.p_value,
                "How often chance does as well; clips of one episode are not independent."),
    ]  # fmt: skip
    seen = np.flatnonzero(found.table.sum(0))
    names = [*clips.action_names, *map(str, range(len(clips.action_names), clips.num_actions))]
    table = Table(
        "actions",
        "Which true actions each latent action stands for: share of its occurrences.",
        found.table[:, seen],
        _latent_names(num_latent),
        [names[action] for action in seen],
    )
    return measures, [table]


def _frechet(
    versions: dict[str, np.ndarray], truth: np.ndarray, others: np.ndarray | None, features: Features | None
) -> tuple[list[Measure], list[str]]:
    """Distances of versions of the clips, "" being the model's own, to the truth, and the note that goes with them."""
    if features is None or len(truth) < 2:
        return [], []
    true_ND = features(truth)
    unit_D = true_ND.std(0, ddof=1)
    unit_D[unit_D == 0] = 1.0  # what never varies in the data cannot be weighed by how much it does
    true_ND = true_ND / unit_D
    labels = {"": "Fréchet distance (MAE latents)", "copy": "… of copying"}
    meanings = {
        "": "Of the model's clips to true ones, in an MAE tokenizer's latents; less is better. This is not FVD.",
        "copy": "Of the last given frame, held: right in looks, wrong in motion.",
    }
    measures = [
        Measure("_".join(filter(None, ("frechet_mae", name))), labels[name],
                frechet_distance(features(video) / unit_D, true_ND), meanings[name])
        for name, video in versions.items()
    ]  # fmt: skip
    floor = np.nan if others is None else frechet_distance(features(others) / unit_D, true_ND)
    measures.append(
        Measure(
            "frechet_mae_data",
            "… of other true clips",
            floor,
            "Of as many others: how far two samples of the data are "
            "apart. A model's clips may be nearer: they begin like the true ones.",
        )
    )
    note = (
        f"The Fréchet distance is fitted to {true_ND.shape[0]} clips of {true_ND.shape[1]} features, each in units of its "
        "standard deviation over the true clips; it falls with the number of clips. Compare it only with values from as many "
        "clips of the same length, in the same tokenizer's latents."
    )
    return measures, [note]


def _latent_names(count: int) -> list[str]:
    return [f"latent {index}" for index in range(count)]


def _animation(
    caption: str, clips: Clips, plan: Plan, versions: dict[str, np.ndarray], prompt_frames: int = 0
) -> Picture:
    count = plan.pictures
    columns = [Column(name, videos[:count]) for name, videos in versions.items()]
    pictures = side_by_side(
        columns,
        actions_BT=None if clips.actions is None else clips.actions[:count],
        action_names=clips.action_names,
        prompt_frames=prompt_frames,
        wide=1 if len(columns) > 2 else 2,  # wider, and frames would be too small on a phone
    )
    return Picture(caption, "image/gif", gif(pictures, clips.fps))


def _plot(caption: str, curves: dict[str, np.ndarray], ylabel: str, prompt_frames: int = 0) -> Picture:
    means = {name: values.mean(0) for name, values in curves.items()}
    return Picture(caption, "image/png", curve_plot(means, ylabel, prompt_frames))
