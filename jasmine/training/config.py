"""Options that every baseline has. A baseline adds its model's and changes defaults; the names mean the same in all.

Names follow the published Jasmine where it has the option.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jasmine.errors import UserError
from jasmine.models.transformer import RematPolicy
from jasmine.training.mesh import MeshConfig

# Options that may differ between the attempts of a run; any other makes it another function of the step.
FREE_OPTIONS = {
    "data_dir", "val_data_dir", "ckpt_dir", "restore_ckpt", "data_cache_gib", "num_workers", "stop_at_step", "mesh", "remat",
    "use_flash_attention", "log", "tensorboard", "name", "project", "entity", "tags", "log_interval", "log_gradients",
    "log_batch_checksum", "profile_steps", "log_checkpoint_interval", "log_checkpoint_keep_period", "keep_checkpoints",
    "save_every_minutes", "keep_best", "best_metric", "best_mode", "on_nonfinite", "max_skipped", "max_rollbacks",
    "replay_step", "val_interval", "val_steps",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FrozenRun:
    """A trained part that a run builds on: the option that names it, the run, and the jobs that make such a part."""

    option: str
    run: str
    jobs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Data, schedule, parallelism, logging and checkpoints of a training run."""

    # Options without which there is nothing to train on. The launcher reads these names in the source, without importing it.
    REQUIRED: ClassVar[tuple[str, ...]] = ("data_dir",)

    # --- where things are ---
    data_dir: str = ""
    """Training data: a split's folder (`data/coinrun/train`) or a dataset's root (then its `train`). It may be in a bucket
    (`gs://BUCKET/coinrun`): files are then staged on the local disk."""
    val_data_dir: str = ""
    """Validation data, likewise (of a root: its `val`). Empty: no evaluation."""
    ckpt_dir: str = ""
    """The run directory: checkpoints, metrics and pictures. Default: `JASMINE_RUN_DIR`, which the launcher sets."""
    restore_ckpt: bool = True
    """Go on from the newest checkpoint of the run directory. With --no-restore_ckpt a run that has some is refused."""
    image_height: int | None = None
    """Frame height in pixels. Only for data in the published format, which does not store it: all three, or none for
    64×64×3."""
    image_width: int | None = None
    """Frame width, likewise."""
    image_channels: int | None = None
    """Colour channels, likewise."""
    data_cache_gib: float | None = None
    """Local disk for files of data in a bucket, in GiB, shared by all jobs of a host. Default: four fifths of what is
    free. `JASMINE_DATA_CACHE_DIR` says where (default `~/.cache/jasmine/data`)."""
    num_workers: int = 0
    """Processes that read data. 0: threads of this one, enough unless frames are JPEG, WebP or PNG."""

    # --- how long, with what ---
    seed: int = 0
    """Of parameters, data order and every random draw. With `step` it fixes the run."""
    num_steps: int = 300_000
    """Length of the schedule in optimizer updates."""
    stop_at_step: int = 0
    """Save and finish at this step of the same schedule; 0: at its end."""
    batch_size: int = 48
    """Clips in the global batch."""
    seq_len: int = 16
    """Frames in a clip."""
    grad_accumulation_steps: int = 1
    """Parts that a batch is worked through in, one update for all: less memory, the same gradient but for random draws,
    which each part makes for itself."""

    # --- optimizer ---
    init_lr: float = 0.0
    """Learning rate at step 0."""
    max_lr: float = 3e-4
    """Learning rate after warm-up."""
    decay_end: float = 0.0
    """Learning rate at the end."""
    lr_schedule: Literal["wsd", "cos"] = "wsd"
    """Warm-up, stable, linear decay (arXiv 2404.06395), or warm-up and cosine."""
    warmup_steps: int | None = None
    """Linear warm-up. Default: 1/30 of num_steps, at most 10000."""
    wsd_decay_steps: int | None = None
    """Length of the final decay of `wsd`. Default: 1/10 of num_steps."""
    adam_b1: float = 0.9
    adam_b2: float = 0.9
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.0
    """Clip gradients to this global norm; 0: do not."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights and evaluate it; 0: do not."""

    # --- numerics and parallelism ---
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matrix products. Parameters, optimizer, normalisation and losses are float32."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    remat: RematPolicy = "none"
    """What the backward pass recomputes: `none`, `dots` (all but matrix products), `full` (each block), `offload`."""
    use_flash_attention: bool = True
    """cuDNN's fused attention on NVIDIA GPUs in bfloat16."""

    # --- logging ---
    log: bool = False
    """Log to Weights & Biases as well (`WANDB_MODE=offline` works)."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory as well."""
    name: str = ""
    """Name of the run in wandb. Default: the run directory's."""
    project: str = "jasmine"
    entity: str = ""
    tags: tuple[str, ...] = ()
    log_interval: int = 50
    """Steps between lines of metrics.jsonl."""
    log_gradients: bool = False
    """Log the standard deviation of the gradients of each component."""
    log_batch_checksum: bool = False
    """Log a checksum of the global batch's pixels: equal on every topology."""
    profile_steps: str = ""
    """`a:b` writes a profiler trace of steps a to b into the run directory."""

    # --- saving: at each of these, on a signal, and at the end. A checkpoint stays while any reason to keep it holds ---
    log_checkpoint_interval: int = 1000
    """Steps between checkpoints; a number past num_steps: none by steps."""
    save_every_minutes: float = 0.0
    """Minutes since the last checkpoint after which another is due; 0: none by the clock."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    log_checkpoint_keep_period: int = 20_000
    """Checkpoints at multiples of this are kept for ever; 0: none are."""
    keep_best: int = 0
    """Checkpoints with the best `best_metric` that are kept; with a metric of evaluations, each of these is saved."""
    best_metric: str = "val_loss"
    """As named in metrics.jsonl; a checkpoint has it if that step was evaluated (`val_…`), or saved on schedule (others)."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the best value is the smallest or the largest."""

    # --- a loss or gradient norm that is not finite ---
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """`stop` (exit code 65); `skip` that update; `rollback` to the newest checkpoint and leave that batch out."""
    max_skipped: int = 10
    """Updates in a row that `skip` leaves out before it stops."""
    max_rollbacks: int = 3
    """Batches of a run that `rollback` leaves out before it stops."""
    replay_step: int = 0
    """Instead of training: go from the newest checkpoint before it to this step, and show where it goes wrong. Writes nothing
    into the run."""

    # --- evaluation ---
    val_interval: int = 20_000
    """Steps between evaluations."""
    val_steps: int = 50
    """Batches of an evaluation."""

    def frozen_runs(self) -> dict[str, FrozenRun]:
        """The trained parts that this run builds on, by name."""
        return {}

    def labelled_share(self) -> float:
        """The share of episodes whose actions training may see."""
        return 1.0

    def resolved_warmup(self) -> int:
        """Warm-up in steps, with the default filled in."""
        return min(10_000, self.num_steps // 30) if self.warmup_steps is None else self.warmup_steps

    def resolved_decay(self) -> int:
        """Final decay in steps, with the default filled in."""
        return self.num_steps // 10 if self.wsd_decay_steps is None else self.wsd_decay_steps

    def profile_window(self) -> tuple[int, int] | None:
        """First and last step of `profile_steps`."""
        if not self.profile_steps:
            return None
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise UserError(f"--profile_steps={self.profile_steps}: expected a:b with a < b, for example 10:15")
        return int(first), int(last)

    def check(self) -> None:
        """Raises UserError for values that can be refused before anything is opened or allocated."""
        if not self.data_dir:
            raise UserError(
                "--data_dir is not set: name a dataset, e.g. one made by `python -m jasmine.data.make coinrun`"
            )
        check_least(
            self,
            1,
            *("num_steps", "batch_size", "seq_len", "grad_accumulation_steps", "log_interval", "keep_checkpoints"),
            *("max_skipped", "max_rollbacks", "image_height", "image_width", "image_channels"),
        )
        check_least(
            self,
            0,
            *("num_workers", "seed", "init_lr", "max_lr", "decay_end", "warmup_steps", "wsd_decay_steps"),
            *("weight_decay", "max_grad_norm"),
        )
        check_chance(self, "adam_b1", "adam_b2", "ema_decay")
        for name in ("log_checkpoint_interval", "val_interval", "val_steps"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name}={getattr(self, name)}: must be at least 1 (a number past num_steps means never)"
                )
        for name in ("save_every_minutes", "keep_best", "log_checkpoint_keep_period"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name}={getattr(self, name)}: must be 0 (none) or more")
        if self.keep_best and self.best_metric.startswith("val_") and not self.val_data_dir:
            raise UserError(
                f"--keep_best={self.keep_best} goes by --best_metric={self.best_metric}, but --val_data_dir is not set: "
                f"set it, or take a metric of training such as loss"
            )
        if not 0 <= self.replay_step <= self.num_steps:
            raise UserError(
                f"--replay_step={self.replay_step} is not a step of the run: from 1 to --num_steps={self.num_steps}"
            )
        if self.replay_step and not self.restore_ckpt:
            raise UserError(
                "--replay_step goes on from a checkpoint of the run, which --no-restore_ckpt forbids: give one of them"
            )
        if not 0 <= self.stop_at_step <= self.num_steps:
            raise UserError(
                f"--stop_at_step={self.stop_at_step} is not between 0 and the end, --num_steps={self.num_steps}"
            )
        if self.lr_schedule == "cos" and self.resolved_warmup() >= self.num_steps:
            raise UserError(
                f"--warmup_steps={self.warmup_steps} leaves none of --num_steps={self.num_steps} for the cosine"
            )
        if self.data_cache_gib is not None and not self.data_cache_gib > 0:
            raise UserError(
                f"--data_cache_gib={self.data_cache_gib}: must be more than 0; leave it out for the default"
            )
        if len({size is None for size in (self.image_height, self.image_width, self.image_channels)}) > 1:
            raise UserError("give all of --image_height, --image_width and --image_channels, or none")
        decay = self.resolved_decay() if self.lr_schedule == "wsd" else 0
        if self.resolved_warmup() + decay > self.num_steps:
            raise UserError(
                f"--warmup_steps={self.resolved_warmup()} and --wsd_decay_steps={decay} together are longer than "
                f"--num_steps={self.num_steps}; leave them out to have them derived from it"
            )
        self.profile_window()


def check_least(config: TrainConfig, least: int, *names: str) -> None:
    """Raises UserError for the first of these options that is given, and is less than `least` or not finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name}={value}: must be at least {least}")


def check_chance(config: TrainConfig, *names: str) -> None:
    """Raises UserError for the first of these options that is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)}: from 0 up to, not including, 1")


def changed_options(before: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """The options that make the rest of a run another run's curve, with their values before (as recorded) and now."""
    now = dataclasses.asdict(config)
    names = now.keys() & before.keys() - FREE_OPTIONS
    return [(name, before[name], now[name]) for name in names if before[name] != now[name]]
