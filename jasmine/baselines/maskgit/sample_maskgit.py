"""Samples videos from a MaskGIT dynamics model (Genie, arXiv 2402.15391, section 2.1), with a cache of keys and values.

    python jasmine/baselines/maskgit/sample_maskgit.py RUN --data_dir data/coinrun --num_frames 32
    python jasmine/baselines/maskgit/sample_maskgit.py RUN --start_image frame.png --actions 7x8,5x8

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
    """Options of sampling from a MaskGIT dynamics model."""

    maskgit_steps: int | None = None
    """Rounds of the schedule. Default: those the run was evaluated with."""
    temperature: float | None = None
    """Of the draws of tokens; 0 takes the likeliest. Default: that which the run was evaluated with."""
    choice_temperature: float = 1.0
    """How much chance there is in which tokens are fixed first."""

    def check(self) -> None:
        super().check()
        if self.maskgit_steps is not None and self.maskgit_steps < 1:
            raise UserError(f"--maskgit_steps={self.maskgit_steps}: must be at least 1")
        for name in ("temperature", "choice_temperature"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: cannot be negative")

    def sampler_options(self) -> dict[str, Any]:
        given = {"steps": self.maskgit_steps, "temperature": self.temperature}
        return {name: value for name, value in given.items() if value is not None} | {
            "choice_temperature": self.choice_temperature
        }


if __name__ == "__main__":
    with cli.exit_with_job():
        command.run(Config, "train_dynamics_maskgit", sys.argv[1:], __doc__ or "")
