"""Losses and accuracies over tokens that several baselines share.

Shape key:
    B: batch  T: frames  N: tokens in a frame  V: codes
"""

import jax
import jax.numpy as jnp


def token_loss(
    logits_BTNV: jax.Array, token_BTN: jax.Array, counted_BTN: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats, and the squared log-partition (z-loss; PaLM, arXiv 2204.02311, section 5): means over tokens.

    Args:
        logits_BTNV: float32.
        token_BTN: int32, the truth.
        counted_BTN: which tokens count; None for all.
    """
    log_z_BTN = jax.nn.logsumexp(logits_BTNV, axis=-1)
    chosen_BTN = jnp.take_along_axis(logits_BTNV, token_BTN[..., None], axis=-1)[..., 0]
    return _mean(log_z_BTN - chosen_BTN, counted_BTN), _mean(jnp.square(log_z_BTN), counted_BTN)


def top_k_accuracy(
    logits_BTNV: jax.Array, token_BTN: jax.Array, counted_BTN: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The share of tokens whose truth is among the k likeliest, for k = 1, 2, 5 and 16 (as far as there are codes)."""
    chosen = jnp.take_along_axis(logits_BTNV, token_BTN[..., None], axis=-1)
    rank_BTN = (logits_BTNV > chosen).sum(-1)
    sizes = [k for k in (1, 2, 5, 16) if k < logits_BTNV.shape[-1]]
    return {f"top{k}_accuracy": _mean((rank_BTN < k).astype(jnp.float32), counted_BTN) for k in sizes}


def copy_accuracy(token_BTN: jax.Array, counted_BTN: jax.Array | None = None) -> jax.Array:
    """The share of tokens that are as they were in the frame before: what `top1_accuracy` has to beat. Counted from frame 1
    on."""
    same_BTN = (token_BTN[:, 1:] == token_BTN[:, :-1]).astype(jnp.float32)
    return _mean(same_BTN, None if counted_BTN is None else counted_BTN[:, 1:])


def _mean(value_BTN: jax.Array, counted_BTN: jax.Array | None) -> jax.Array:
    if counted_BTN is None:
        return value_BTN.mean()
    return jnp.where(counted_BTN, value_BTN, 0.0).sum() / jnp.maximum(counted_BTN.sum(), 1)
