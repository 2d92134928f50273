"""Samples videos from a causal dynamics model, token after token, with a cache of keys and values.

    python jasmine/baselines/maskgit/sample_causal.py RUN --data_dir data/coinrun --num_frames 32 --top_p 0.9

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
    """Options of sampling from a causal dynamics model."""

    temperature: float | None = None
    """Of the draws of tokens; 0 takes the likeliest. Default: that which the run was evaluated with."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""

    def check(self) -> None:
        super().check()
        for name in ("temperature", "top_k"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: cannot be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: a probability above 0, up to 1")

    def sampler_options(self) -> dict[str, Any]:
        options = {"top_k": self.top_k, "top_p": self.top_p}
        return options if self.temperature is None else options | {"temperature": self.temperature}


if __name__ == "__main__":
    with cli.exit_with_job():
        command.run(Config, "train_dynamics_causal", sys.argv[1:], __doc__ or "")
