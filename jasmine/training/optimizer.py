"""AdamW and its learning-rate schedules, with the published Jasmine's defaults; moments in float32."""

from typing import Any

import jax
import optax

from jasmine.training.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The schedule: number of finished updates -> learning rate."""
    warmup, decay = config.resolved_warmup(), config.resolved_decay()
    if config.lr_schedule == "cos":
        return optax.warmup_cosine_decay_schedule(
            config.init_lr, config.max_lr, warmup, max(config.num_steps, 1), config.decay_end
        )
    phases = [
        optax.linear_schedule(config.init_lr, config.max_lr, max(warmup, 1)),
        optax.constant_schedule(config.max_lr),
        optax.linear_schedule(config.max_lr, config.decay_end, max(decay, 1)),
    ]
    if warmup == 0:
        return optax.join_schedules(phases[1:], [config.num_steps - decay])
    return optax.join_schedules(phases, [warmup, config.num_steps - decay])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, after clipping to a global norm if asked for."""
    adamw = optax.adamw(learning_rate(config), b1=config.adam_b1, b2=config.adam_b2, weight_decay=config.weight_decay)
    if config.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
    return adamw


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, replicated: Any) -> Any:
    """Shardings of the optimizer's state: moments like their parameters, counters replicated.

    Args:
        params: abstract parameters.
        shardings: of the parameters, same structure.
        replicated: the sharding for everything that is not shaped like the parameters.
    """
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
    )
