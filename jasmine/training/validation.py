"""Evaluation while a run trains: on the same validation batches every time, so that its curve compares like with like."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from jasmine.data.episodes import Episodes
from jasmine.data.sampling import WindowSampler
from jasmine.data.tokens import TokenDataset
from jasmine.training.config import TrainConfig
from jasmine.training.data_feed import DataFeed
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, Params, TrainState
from jasmine.training.step import FrozenParams, make_evaluation
from jasmine.training.task import BaseTask, Batch, Metrics


class Validation:
    """The evaluation of a task on at most `val_steps` batches; of the averaged parameters, where the run has some.

    Args:
        dataset: the validation data.
        task, definition: what is evaluated.
        config: of the run.
        mesh, rules: how batches and parameters are laid out.
    """

    def __init__(
        self,
        dataset: Episodes | TokenDataset,
        task: BaseTask,
        definition: ModelDefinition,
        config: TrainConfig,
        mesh: Mesh,
        rules: ShardingRules,
    ):
        self._dataset, self._config, self._mesh, self._rules = dataset, config, mesh, rules
        self._evaluate = make_evaluation(task, definition, mesh, rules)

    def metric_names(self, state: TrainState, frozen: FrozenParams, batch: Batch) -> list[str]:
        """The names of what `run` measures; computes nothing."""
        metrics, _ = jax.eval_shape(self._evaluate, _parameters(state), frozen, batch, jax.random.key(0))
        return [f"val_{name}" for name in metrics]

    def run(self, state: TrainState, frozen: FrozenParams) -> tuple[dict[str, float], dict[str, jax.Array]]:
        """Means over the batches, and the pictures of the first of them, still on the devices."""
        config = self._config
        sampler = WindowSampler(self._dataset.lengths, config.seq_len, config.seed)
        count = min(config.val_steps, math.ceil(sampler.num_windows / config.batch_size))
        feed = DataFeed(self._dataset, config, self._mesh, self._rules, seed=config.seed, stop_step=count)
        params = _parameters(state)
        collected: list[Metrics] = []
        pictures: dict[str, jax.Array] = {}
        try:
            for index in range(count):
                key = jax.random.fold_in(jax.random.key(config.seed), index)
                metrics, media = self._evaluate(params, frozen, next(feed), key)
                collected.append(metrics)
                pictures = pictures or media
        finally:
            feed.close()
        host = jax.device_get(collected)
        return {f"val_{name}": float(np.mean([metrics[name] for metrics in host])) for name in host[0]}, pictures


def _parameters(state: TrainState) -> Params:
    return state.params if state.ema is None else state.ema
