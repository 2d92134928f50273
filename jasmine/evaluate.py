"""Measures what a run has trained, on data it has not seen: one JSON file for programs, one HTML page for people.

    python -m jasmine.evaluate RUN --data D [--horizon 32] [--features MAE_RUN]

RUN is the run directory of a tokenizer, a latent action model or a dynamics model, or a run's name under the storage root;
its newest checkpoint is measured, with moving averages where it keeps them. The files go to `RUN/evaluation/<step>/`;
those of another evaluation are never replaced.
"""

import dataclasses
import os
import sys
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.table import Table as TextTable

from jasmine.data.episodes import EpisodeDataset, Episodes
from jasmine.data.published import PublishedDataset
from jasmine.data.sampling import WindowSampler
from jasmine.data.tokens import TokenDataset, open_training_data
from jasmine.errors import UserError
from jasmine.evaluation import measure, report
from jasmine.sampling.world import DYNAMICS_JOBS, World
from jasmine.training import cli
from jasmine.training.runs import TrainedRun, load_run

DYNAMICS_HORIZON = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, on what."""

    data: str = ""
    """Data that the run was not trained on: a dataset, or one split of it. Pixels, not tokens."""
    split: str = "val"
    """Which split, where --data is a dataset."""
    output_dir: str = ""
    """Where to write. Default: evaluation/<step> in the run directory."""
    num_clips: int = 64
    """Clips to measure on, drawn at random from all there are."""
    horizon: int = 0
    """Frames of a clip, given ones included. Default: 32 for dynamics models, the run's --seq_len for others."""
    prompt_frames: int = 1
    """Frames that a dynamics model is given."""
    features: str = ""
    """Run of an MAE tokenizer, for the Fréchet distance in its latents; none if not given."""
    batch_size: int = 8
    """Clips worked on at once."""
    num_pictures: int = 4
    """Clips shown."""
    seed: int = 0
    """Which clips, and every random draw."""


def evaluate(run: TrainedRun, options: Options) -> epath.Path:
    """Measures a run and writes both files; returns their folder.

    Raises:
        UserError: options that do not fit the run or the data, or a folder that holds another evaluation. Before anything
            is computed.
    """
    dynamics = run.job in DYNAMICS_JOBS
    length = options.horizon or (DYNAMICS_HORIZON if dynamics else run.config.seq_len)
    _check(options, length, dynamics)
    dataset = _open(options, run.data.frame_shape, length)
    features = _features(options, run.data.frame_shape)
    identity = report.Evaluation(
        run=str(run.path),
        job=run.job,
        step=run.step,
        weights=run.fingerprint(),
        data=f"{options.num_clips} clips of {length} frames of {dataset.path}, {_shape(dataset.frame_shape)}",
        options=_identity(options, length, dynamics),
    )
    default = run.path / "evaluation" / str(run.step)
    output_dir = epath.Path(options.output_dir).expanduser() if options.output_dir else default
    report.check_free(output_dir, identity)
    clips = _clips(dataset, options, length)
    if run.config.dtype == "float32":  # as in training: accelerators would multiply in TF32 or bfloat16
        jax.config.update("jax_default_matmul_precision", "highest")
    plan = measure.Plan(options.batch_size, options.seed, options.prompt_frames, options.num_pictures)
    if dynamics:
        findings = measure.world_model(World(run), clips, plan, features)
    elif run.job == "train_lam":
        findings = measure.latent_action_model(run.module(), clips, plan)
    else:
        findings = measure.tokenizer(run.module(), clips, plan, features)
    report.write(output_dir, identity, findings)
    _print(identity, findings)
    return output_dir


def _check(options: Options, length: int, dynamics: bool) -> None:
    if not options.data:
        raise UserError("--data is not set: name a dataset, or a split of it, that the run was not trained on")
    for name, least in (("num_clips", 2), ("prompt_frames", 1), ("batch_size", 1), ("num_pictures", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least {least}")
    least = options.prompt_frames + 1 if dynamics else 2
    if length < least:
        raise UserError(f"--horizon={length}: give at least {least}, or there is nothing to measure")


def _open(options: Options, frame_shape: tuple[int, int, int], length: int) -> Episodes:
    dataset = open_training_data(options.data, options.split)
    if isinstance(dataset, PublishedDataset):
        dataset = PublishedDataset(dataset.path, frame_shape)  # it does not store its shape
    if isinstance(dataset, TokenDataset):
        raise UserError(
            f"--data {options.data} holds tokens, and pictures are measured: name the data they were made from"
        )
    if dataset.frame_shape != frame_shape:
        raise UserError(
            f"--data {options.data} has frames of {_shape(dataset.frame_shape)}, and the run was trained on "
            f"{_shape(frame_shape)}: name data of that shape"
        )
    longest = int(dataset.lengths.max())
    if length > longest:
        raise UserError(f"--horizon={length} is longer than every episode of {dataset.path}: give at most {longest}")
    windows = WindowSampler(dataset.lengths, length, options.seed).num_windows
    if options.num_clips > windows:
        raise UserError(
            f"--num_clips={options.num_clips}: {dataset.path} holds {windows} different clips of {length} frames; give at "
            "most as many"
        )
    return dataset


def _clips(dataset: Episodes, options: Options, length: int) -> measure.Clips:
    sampler = WindowSampler(dataset.lengths, length, options.seed)
    videos, actions = dataset.read_windows(*sampler.windows(0, options.num_clips), length)
    others = None
    if options.features and 2 * options.num_clips <= sampler.num_windows:
        others, _ = dataset.read_windows(*sampler.windows(1, options.num_clips), length)
    known = dataset.num_actions is not None and dataset.action_shape == ()
    names = dataset.index.metadata.get("action_names", []) if isinstance(dataset, EpisodeDataset) else []
    return measure.Clips(
        videos=videos,
        actions=actions if known else None,
        others=others,
        num_actions=dataset.num_actions or 0,
        action_names=names,
        fps=dataset.fps,
    )


def _features(options: Options, frame_shape: tuple[int, int, int]) -> measure.Features | None:
    if not options.features:
        return None
    run = load_run(options.features, option="--features", jobs=("train_tokenizer_mae",))
    if run.data.frame_shape != frame_shape:
        raise UserError(
            f"--features {options.features} was trained on frames of {_shape(run.data.frame_shape)}, the run on "
            f"{_shape(frame_shape)}: name a tokenizer of the same data"
        )
    return measure.mae_features(run.module(), run.config.seq_len)


def _identity(options: Options, length: int, dynamics: bool) -> dict[str, Any]:
    """The options that the findings depend on, as they took effect."""
    chosen = dataclasses.asdict(options) | {"horizon": length}
    for name in ("data", "features"):
        if os.path.exists(chosen[name]):  # else a URL, or the name of a run
            chosen[name] = os.path.abspath(chosen[name])
    unused = {"output_dir", "num_pictures"} | (set() if dynamics else {"prompt_frames"})
    return {name: value for name, value in chosen.items() if name not in unused}


def _shape(frame_shape: tuple[int, int, int]) -> str:
    return "×".join(map(str, frame_shape))


def _print(evaluation: report.Evaluation, findings: report.Findings) -> None:
    table = TextTable(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for found in findings.measures:
        table.add_row(found.label, found.text(), found.meaning)
    console = Console(highlight=False)
    console.print(f"[bold]{evaluation.job}, step {evaluation.step:,}[/]: {evaluation.data}")
    console.print(table)
    for note in findings.notes:
        console.print(note, style="dim")


def main(argv: list[str]) -> None:
    """The command line."""
    if not argv or argv[0].startswith("-"):
        if set(argv) & {"-h", "--help"}:
            cli.parse(Options, ["--help"], __doc__ or "")
        raise UserError("name a run first: python -m jasmine.evaluate RUN --data D (--help lists all options)")
    options = cli.parse(Options, argv[1:], __doc__ or "")
    output_dir = evaluate(load_run(argv[0], option="RUN"), options)
    print(f"{output_dir / report.JSON_NAME}\n{output_dir / report.HTML_NAME}")


if __name__ == "__main__":
    with cli.exit_with_job():
        main(sys.argv[1:])
