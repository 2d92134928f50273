"""What a baseline hands to the training loop: how to build the model, its loss, and its evaluation. No more."""

import abc
import dataclasses
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jasmine.data.episodes import Episodes
from jasmine.data.tokens import TokenDataset, TokenInfo

if TYPE_CHECKING:
    from jasmine.training.runs import TrainedRun

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Modules = Mapping[str, Any]


class Keys:
    """Random keys by purpose (`dropout`, `mask`, `noise` …), all from the one key of a step.

    A purpose's key depends on its name alone, so adding a purpose to a model leaves the draws of the others as they were.
    """

    def __init__(self, key: jax.Array):
        self.key = key

    def __getitem__(self, purpose: str) -> jax.Array:
        return jax.random.fold_in(self.key, zlib.crc32(purpose.encode()))


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model has to know of the data it is trained on. It is stored with a run, so that the run can be opened without
    the data.

    Attributes:
        frame_shape: (H, W, C) of the frames; of pre-tokenized data, those that the tokens were made from.
        num_actions: actions are integers below this; None where there are none, or where the data does not say.
        tokens: what pre-tokenized data holds; None of pixels.
    """

    frame_shape: tuple[int, int, int]
    num_actions: int | None = None
    tokens: TokenInfo | None = None

    @classmethod
    def of(cls, dataset: Episodes | TokenDataset) -> "DataInfo":
        """Of an opened dataset. Actions that are not single integers count as none."""
        num_actions = dataset.num_actions if dataset.action_shape == () else None
        return cls(dataset.frame_shape, num_actions, dataset.tokens if isinstance(dataset, TokenDataset) else None)


@dataclasses.dataclass(frozen=True)
class BaseTask(abc.ABC):
    """A thing to train; each baseline has one, under the name `Task`.

    `prepare`, `build`, `loss` and `evaluate` are traced under jit: pure, and on the global batch. Batches hold `videos`,
    (B, T, H, W, C) uint8, or `tokens`, (B, T, N) int32, or `latents`, (B, T, N, L) float32, of pre-tokenized data;
    `actions`, (B, T) int32, where the data has them: entry t leads from frame t to frame t + 1; `latent_actions`, likewise,
    where tokens were made with a latent action model; `labelled`, (B,) bool, where only a share of the episodes is to show
    its actions.

    Attributes:
        config: the baseline's options.
        data: what it is trained on.
        frozen: parts that other runs have trained and this one only uses, by name.
    """

    config: Any
    data: DataInfo
    frozen: "Mapping[str, TrainedRun]" = dataclasses.field(default_factory=dict)

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError where the options do not fit the data or each other."""

    def check_weights(self) -> None:
        """Raises UserError where the weights of frozen parts do not fit the data. Every process calls it, once they have met:
        to read weights is to look for devices."""
        return

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model; every `nnx.Param` of it names its logical axes (`jasmine.models.layers`)."""

    def prepare(self, frozen: Modules, batch: Batch) -> Batch:
        """What the loss needs of a batch: the work of the frozen parts, through which no gradient flows."""
        return batch

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, keys: Keys) -> tuple[jax.Array, Metrics]:
        """The loss of a prepared batch to minimise, a mean over the batch, and cheap scalars for the log."""

    @abc.abstractmethod
    def evaluate(self, model: Any, frozen: Modules, batch: Batch, keys: Keys) -> tuple[Metrics, dict[str, jax.Array]]:
        """Of a batch that is not prepared: scalars for the log, the expensive ones too, and pictures by name: (H, W, 3)
        float in [0, 1]."""
