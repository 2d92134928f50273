"""Samples videos from a diffusion dynamics model (Dreamer 4, arXiv 2509.24527, section 3.2), with a cache of keys and values.

    python jasmine/baselines/diffusion/sample_diffusion.py RUN --data_dir data/coinrun --num_frames 32

Expected: `sample.gif`, `sample.mp4` and `sample.json` in `RUN/samples/<step>/`.
"""

import dataclasses
import sys
from typing import Any

from jasmine.errors import UserError
from jasmine.sampling import command
from jasmine.training import cli


@dataclasses.dataclass(frozen=True)
class Config(command.SampleConfig):
    """Options of sampling from a diffusion dynamics model."""

    diffusion_steps: int | None = None
    """Steps from noise to a frame. Default: 4 of a model trained with --shortcut, else as many as it has levels."""
    diffusion_corrupt_context_factor: float | None = None
    """Share of noise in finished frames as later ones see them. Default: what the run was trained with."""

    def check(self) -> None:
        super().check()
        if self.diffusion_steps is not None and self.diffusion_steps < 1:
            raise UserError(f"--diffusion_steps={self.diffusion_steps}: must be at least 1")
        factor = self.diffusion_corrupt_context_factor
        if factor is not None and not 0 <= factor <= 1:
            raise UserError(f"--diffusion_corrupt_context_factor={factor}: a share from 0 to 1")

    def sampler_options(self) -> dict[str, Any]:
        corrupt = self.diffusion_corrupt_context_factor
        return {"steps": self.diffusion_steps} | ({} if corrupt is None else {"context_level": 1 - corrupt})


if __name__ == "__main__":
    with cli.exit_with_job():
        command.run(Config, "train_dynamics_diffusion", sys.argv[1:], __doc__ or "")
