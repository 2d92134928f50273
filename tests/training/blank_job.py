"""The tokenizer, but for a loss that is scaled by each clip's contrast over itself: 1, and NaN where all of a clip is blank.

So a step is not finite if and only if its batch holds a blank clip, on every topology.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jasmine.baselines.maskgit import train_tokenizer_vqvae as baseline
from jasmine.training import cli, heartbeat
from jasmine.training.loop import train
from jasmine.training.task import Batch, Keys, Metrics

heartbeat.SECONDS = 0.05  # the last beat is looked at


@dataclasses.dataclass(frozen=True)
class Task(baseline.Task):
    def loss(self, model: baseline.VideoTokenizerVQVAE, batch: Batch, keys: Keys | None) -> tuple[jax.Array, Metrics]:
        loss, metrics = super().loss(model, batch, keys)
        contrast_B = jnp.std(batch["videos"].astype(jnp.float32), axis=(1, 2, 3, 4))
        return loss * jnp.mean(contrast_B / contrast_B), metrics


def main(config: baseline.Config) -> None:
    train(Task, config, baseline.JOB)


if __name__ == "__main__":
    sys.argv[0] = f"{baseline.JOB}.py"
    cli.run(main, baseline.Config)
