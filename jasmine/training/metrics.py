"""Where a run's numbers go: metrics.jsonl always; TensorBoard and Weights & Biases by flag; a line on the terminal."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jasmine.errors import UserError
from jasmine.training import objects
from jasmine.training.config import TrainConfig
from jasmine.training.run_files import JsonLines, attempt, seconds


class MetricsLog:
    """The sinks of one run. Only process 0 has any; on the others every call is a no-op."""

    def __init__(self, run_dir: epath.Path, config: TrainConfig, job: str, num_parameters: Mapping[str, int]):
        self._config = config
        self._lines: JsonLines | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if jax.process_index() != 0:
            return
        self._lines = JsonLines(run_dir, "metrics.jsonl")
        if config.tensorboard:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(str(run_dir / "tensorboard"))
        if config.log:
            # Slow to import, and not everybody's: only when asked for.
            import wandb

            name = config.name or run_dir.name
            # The run's name is its id: a resumed run goes on with the same curves, whichever machine it is on.
            try:
                self._wandb = wandb.init(
                    entity=config.entity or None,
                    project=config.project,
                    name=name,
                    id=os.environ.get("WANDB_RUN_ID", name),
                    resume="allow",
                    tags=[job, *config.tags],
                    # Its own files stay on this machine's disk where the run is in Cloud Storage.
                    dir=None if objects.is_object(run_dir) else str(run_dir),
                    config={**dataclasses.asdict(config), "num_parameters": dict(num_parameters)},
                )
            except wandb.Error as error:
                raise UserError(f"--log: wandb does not start: {error}; log in, or set WANDB_MODE=offline") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the scalars of a step: finite or not, they are written as they are."""
        if self._lines is None:
            return
        plain = {name: _number(value) for name, value in values.items()}
        self._lines.write({"step": step, **plain, "attempt": attempt(), "time": time.time()})
        if self._tensorboard is not None:
            for name, value in plain.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(plain, step=step)
        self._say(step, plain)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Sends a picture, float (H, W, C) in [0, 1], to the sinks that show pictures."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image_HWC, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image((image_HWC * 255).astype(np.uint8))}, step=step)

    def close(self) -> None:
        """Flushes the sinks."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _say(self, step: int, values: Mapping[str, float]) -> None:
        left = (self._config.stop_at_step or self._config.num_steps) - step
        parts = [
            f"step {step}/{self._config.num_steps}",
            f"loss {values['loss']:.5f}",
            f"lr {values['lr']:.2e}",
            f"{values['frames_per_second']:,.0f} frames/s",
            f"{values['step_time']:.3f} s/step",
            f"ETA {seconds(left * values['step_time'])}",
        ]
        parts += [f"MFU {values['mfu']:.1%}"] if "mfu" in values else []
        parts += [f"{name} {value:.4g}" for name, value in values.items() if name.startswith("val_")]
        print("  ".join(parts), flush=True)


def _number(value: Any) -> float | int:
    scalar = np.asarray(value)
    return int(scalar) if np.issubdtype(scalar.dtype, np.integer) else float(scalar)
