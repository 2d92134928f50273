"""What a baseline hands to the training loop: how to build the model, its loss, and its evaluation. No more."""

import zlib
from typing import Any, Protocol

import jax
from flax import nnx

from jasmine.training.config import TrainConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Keys:
    """Random keys by purpose (`dropout`, `mask`, `noise` …), all from the one key of a step.

    A purpose's key depends on its name alone, so adding a purpose to a model leaves the draws of the others as they were.
    """

    def __init__(self, key: jax.Array):
        self.key = key

    def __getitem__(self, purpose: str) -> jax.Array:
        return jax.random.fold_in(self.key, zlib.crc32(purpose.encode()))


class Task(Protocol):
    """A thing to train. All methods but `check` are traced under jit: pure, and on the global batch.

    Batches hold `videos`, (B, T, H, W, C) uint8, and `actions`, (B, T) int32, where the data has them.
    """

    @property
    def config(self) -> TrainConfig:
        """The baseline's options."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the data's frames."""

    def check(self) -> None:
        """Raises UserError where the options do not fit the data or each other."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model; every `nnx.Param` of it names its logical axes (`jasmine.models.layers`)."""

    def loss(self, model: Any, batch: Batch, keys: Keys) -> tuple[jax.Array, Metrics]:
        """The loss to minimise, a mean over the batch, and cheap scalars for the log."""

    def evaluate(self, model: Any, batch: Batch, keys: Keys) -> tuple[Metrics, dict[str, jax.Array]]:
        """Scalars for the log, the expensive ones too, and pictures by name: (H, W, 3) float in [0, 1]."""
