"""What the `sample_*.py` scripts share: a start frame and actions in, a GIF, an mp4 and numbers out."""

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jasmine.data.episodes import EpisodeDataset
from jasmine.data.images import IMAGE_ERRORS, open_image
from jasmine.data.sampling import WindowSampler
from jasmine.data.tokens import TokenDataset, open_training_data
from jasmine.errors import UserError
from jasmine.evaluation.media import Column, curve_plot, side_by_side, write_gif, write_mp4
from jasmine.evaluation.metrics import frame_psnr, frame_ssim
from jasmine.sampling.world import World, load_world
from jasmine.training import cli
from jasmine.training.run_files import write_atomically


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Options of every sampler."""

    data_dir: str = ""
    """Where start frames and recorded actions come from. Default: the run's validation data, else its training data."""
    start_image: str = ""
    """A picture to start from instead, scaled to the size of the frames."""
    actions: str = "recorded"
    """`recorded`: the clip's own, true or as the latent action model reads them; `random`; or typed in: numbers with
    commas, `3x5` for five times 3, `?` for unknown; the last is repeated to the end."""
    num_frames: int = 16
    """Frames of the video, the given ones included. It may be longer than the model's training window."""
    prompt_frames: int = 1
    """Frames that are given."""
    num_clips: int = 4
    seed: int = 0
    """Of the choice of clips and of every draw."""
    output_dir: str = ""
    """Where to write. Default: `samples/<step>` in the run directory."""

    def sampler_options(self) -> dict[str, Any]:
        """Options of the model's sampler."""
        return {}

    def check(self) -> None:
        """Raises UserError for values that no model could use."""
        for name in ("num_frames", "prompt_frames", "num_clips"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.prompt_frames >= self.num_frames:
            raise UserError(
                f"--prompt_frames={self.prompt_frames} leaves none of --num_frames={self.num_frames} to make"
            )
        if self.start_image and self.prompt_frames > 1:
            raise UserError(f"--prompt_frames={self.prompt_frames}: --start_image is one frame")
        if self.start_image and self.actions == "recorded":
            raise UserError("--start_image has no recorded actions: give --actions, for example --actions random")


def typed_actions(text: str, count: int, num_actions: int) -> np.ndarray:
    """Actions as a user types them: `0,3x5,?` -> int32 (count,); unknown is -1.

    Raises:
        UserError: not such a list, or an action that there is not.
    """
    actions: list[int] = []
    for part in text.split(","):
        action, _, times = part.strip().partition("x")
        number = "-1" if action == "?" else action
        if not number.removeprefix("-").isdecimal() or (times and not times.isdecimal()):
            raise UserError(
                f"--actions={text}: {part.strip()!r} is no action; give recorded, random, or a list such as 0,3x5,?"
            )
        if not -1 <= int(number) < num_actions:
            raise UserError(f"--actions={text}: the model knows actions 0 to {num_actions - 1}, not {action}")
        actions += [int(number)] * int(times or 1)
    if not actions:
        raise UserError(f"--actions={text}: no action in it")
    return np.array((actions + [actions[-1]] * count)[:count], np.int32)


def sample(config: SampleConfig, run: str, job: str) -> None:
    """Samples and writes `sample.gif`, `sample.mp4`, `sample.json`, and the curves `psnr.png` and `ssim.png` where the true
    frames are known.

    Raises:
        UserError: options that do not fit the run, its data or each other; another kind of run than `job` trains.
    """
    config.check()
    world = load_world(run, **config.sampler_options())
    if world.run.job != job:
        raise UserError(f"{run} was made by {world.run.job}; this samples {job}: use the sampler that goes with it")
    clips, actions, names, fps = _start(config, world)
    prompt = clips[:, : config.prompt_frames]
    begin = time.perf_counter()
    video = np.asarray(jax.block_until_ready(world.generate(prompt, actions, key=jax.random.key(config.seed))))
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    jax.block_until_ready(world.generate(prompt, actions, key=jax.random.key(config.seed)))
    elapsed = time.perf_counter() - begin
    made = (config.num_frames - config.prompt_frames) * len(video)
    record: dict[str, Any] = {
        "run": str(world.run.path),
        "step": world.run.step,
        "options": dataclasses.asdict(config),
        "actions": actions[:, :-1].tolist(),
        "seconds": elapsed,
        "frames_per_second": made / elapsed,
        "compile_seconds": first - elapsed,
    }
    output_dir = epath.Path(config.output_dir or world.run.path / "samples" / str(world.run.step))
    output_dir.mkdir(parents=True, exist_ok=True)
    columns = [Column("sampled", video)]
    if config.actions == "recorded":
        truth = clips.astype(np.float32) / 255
        psnr, ssim = (
            np.asarray(metric(jnp.asarray(truth), jnp.asarray(video))).mean(0) for metric in (frame_psnr, frame_ssim)
        )
        record |= {"psnr": psnr.tolist(), "ssim": ssim.tolist()}
        columns.insert(0, Column("true", clips))
        plot = curve_plot({"PSNR": psnr}, "PSNR (dB)", config.prompt_frames)
        write_atomically(output_dir / "psnr.png", plot)
        write_atomically(output_dir / "ssim.png", curve_plot({"SSIM": ssim}, "SSIM", config.prompt_frames))
        print("frame  PSNR dB   SSIM")
        for frame in range(config.num_frames):
            given = "  given" if frame < config.prompt_frames else ""
            print(f"{frame:5d}  {psnr[frame]:7.2f}  {ssim[frame]:5.3f}{given}")
    shown = np.concatenate([actions[:, :-1], np.full((len(actions), 1), -1)], axis=1)
    pictures = side_by_side(columns, actions_BT=shown, action_names=names, prompt_frames=config.prompt_frames)
    write_gif(output_dir / "sample.gif", pictures, fps)
    write_mp4(output_dir / "sample.mp4", pictures, fps)
    write_atomically(output_dir / "sample.json", (json.dumps(record, indent=2) + "\n").encode())
    print(f"{made} frames in {elapsed:.2f} s: {made / elapsed:,.1f} frames/s (and {first - elapsed:.1f} s to compile)")
    print(output_dir / "sample.gif")


def _start(config: SampleConfig, world: World) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], float | None]:
    """Clips uint8 (B, T, H, W, C), actions int32 (B, num_frames), names of actions, frames a second."""
    rng = np.random.default_rng(config.seed)
    shape = (config.num_clips, config.num_frames)
    names: tuple[str, ...] = ()
    if config.start_image:
        height, width, channels = world.frame_shape
        try:
            found = open_image(config.start_image)
            image = found.convert("L" if channels == 1 else "RGB").resize((width, height))
        except IMAGE_ERRORS as error:
            raise UserError(f"--start_image={config.start_image} cannot be read: {error}") from error
        clips = np.broadcast_to(np.asarray(image).reshape(world.frame_shape), (config.num_clips, 1, *world.frame_shape))
        fps = None
    else:
        path = config.data_dir or world.run.config.val_data_dir or world.run.config.data_dir
        split = "train" if not config.data_dir and not world.run.config.val_data_dir else "val"
        dataset = open_training_data(path, split)
        if isinstance(dataset, TokenDataset):
            raise UserError(
                f"{path} holds tokens, and a video starts from frames; name the dataset they were made from"
            )
        recorded = config.actions == "recorded"
        needed = config.num_frames if recorded else config.prompt_frames
        if dataset.frame_shape != world.frame_shape:
            raise UserError(
                f"{path} has frames of {dataset.frame_shape}, and {world.run.path} makes {world.frame_shape}"
            )
        if needed > (longest := int(dataset.lengths.max())):
            option, otherwise = ("num_frames", ", or --actions random") if recorded else ("prompt_frames", "")
            raise UserError(
                f"--{option}={needed} is longer than every episode of {path}: give at most {longest}{otherwise}"
            )
        sampler = WindowSampler(dataset.lengths, needed, config.seed, source=path)
        episodes, starts = sampler.windows(0, config.num_clips)
        clips, true_actions = dataset.read_windows(episodes, starts, needed)
        fps = dataset.fps
        if world.action_kind == "true" and isinstance(dataset, EpisodeDataset):
            names = tuple(dataset.index.metadata.get("action_names", ()))
        if recorded:
            return clips, world.infer_actions(clips, true_actions), names, fps
    if config.actions == "random":
        return clips, rng.integers(0, world.num_actions, shape).astype(np.int32), names, fps
    typed = typed_actions(config.actions, config.num_frames, world.num_actions)
    return clips, np.broadcast_to(typed, shape), names, fps


def run(config_class: Any, job: str, argv: list[str], description: str) -> None:
    """The command line of a sampler: RUN, then options."""
    if argv[:1] in (["-h"], ["--help"]):
        cli.parse(config_class, argv[:1], description)
    if not argv or argv[0].startswith("-"):
        raise UserError("name the run to sample from first: a run directory, or a run under the storage root")
    sample(cli.parse(config_class, argv[1:], description), argv[0], job)
