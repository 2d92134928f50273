"""The space-time transformer that every model here is built from (ST-ViViT as in Genie, arXiv 2402.15391, section 2).

Attention is factored: each block attends over the patches of a frame, then over the frames of a patch position, then
applies a feed-forward layer; pre-LayerNorm with residuals. Time attention is causal, so a prefix of a video encodes to
the same tokens as the whole. Blocks are stacked along a leading `layers` axis and scanned: compile time does not grow
with depth.

Shape key:
    B: batch  T: frames  N: tokens in a frame  I: input features  M: model width  H: heads  D: size of a head
    F: feed-forward width  O: output features
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.models.layers import LayerNorm, Linear, attention, dropout, sinusoids
from jasmine.training.sharding import constrain

RematPolicy = Literal["none", "dots", "full", "offload"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a space-time transformer; `dtype` is that of activations and matrix products."""

    model_dim: int
    ffn_dim: int
    num_blocks: int
    num_heads: int
    dropout: float = 0.0
    dtype: Any = jnp.bfloat16
    space_causal: bool = False
    time_causal: bool = True
    flash_attention: bool = True
    remat: RematPolicy = "none"


def rematerialize(function: Callable, policy: RematPolicy) -> Callable:
    """Chooses what the backward pass keeps: `none` keeps all activations, `dots` the results of matrix products, `full`
    only each block's input, `offload` moves matrix products to host memory (on backends that have a pinned host space).
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return function
    chosen = {
        "dots": policies.dots_saveable,
        "full": policies.nothing_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[policy]
    # Inside a scan nothing can be shared with the forward pass, so the barrier against it would only cost time.
    return jax.checkpoint(function, policy=chosen, prevent_cse=False)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: TransformerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.flash = config.flash_attention
        heads, head_dim = config.num_heads, config.model_dim // config.num_heads
        self.qkv = Linear(
            (config.model_dim,),
            (3, heads, head_dim),
            logical=("embed", None, "heads", None),
            dtype=config.dtype,
            rngs=rngs,
        )
        self.out = Linear(
            (heads, head_dim), (config.model_dim,), logical=("heads", None, "embed"), dtype=config.dtype, rngs=rngs
        )

    def __call__(self, x_BTNM: jax.Array, axis: int) -> jax.Array:
        """Attends over `axis` (1: time, 2: space) of x; result in the compute dtype, same shape."""
        q_BTNHD, k_BTNHD, v_BTNHD = jnp.moveaxis(self.qkv(x_BTNM), -3, 0)
        if axis == 1:
            q_BTNHD, k_BTNHD, v_BTNHD = (y.swapaxes(1, 2) for y in (q_BTNHD, k_BTNHD, v_BTNHD))
        y = attention(q_BTNHD, k_BTNHD, v_BTNHD, causal=self.causal, flash=self.flash)
        return self.out(y.swapaxes(1, 2) if axis == 1 else y)


class Block(nnx.Module):
    """Space attention, time attention, feed-forward: each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.space_norm = LayerNorm(config.model_dim, logical="embed")
        self.space_attention = SelfAttention(config, causal=config.space_causal, rngs=rngs)
        self.time_norm = LayerNorm(config.model_dim, logical="embed")
        self.time_attention = SelfAttention(config, causal=config.time_causal, rngs=rngs)
        self.ffn_norm = LayerNorm(config.model_dim, logical="embed")
        self.ffn_in = Linear(
            (config.model_dim,), (config.ffn_dim,), logical=("embed", "mlp"), dtype=config.dtype, rngs=rngs
        )
        self.ffn_out = Linear(
            (config.ffn_dim,), (config.model_dim,), logical=("mlp", "embed"), dtype=config.dtype, rngs=rngs
        )

    def __call__(self, x_BTNM: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = [None] * 3 if key is None or self.dropout == 0 else list(jax.random.split(key, 3))
        x_BTNM = x_BTNM + dropout(self.space_attention(self.space_norm(x_BTNM), axis=2), self.dropout, keys[0])
        x_BTNM = x_BTNM + dropout(self.time_attention(self.time_norm(x_BTNM), axis=1), self.dropout, keys[1])
        h_BTNF = jax.nn.gelu(self.ffn_in(self.ffn_norm(x_BTNM)))
        return x_BTNM + dropout(self.ffn_out(h_BTNF), self.dropout, keys[2])


class SpaceTimeTransformer(nnx.Module):
    """Tokens in, tokens out: linear -> positions -> blocks -> norm -> linear.

    No normalisation before or after the first layer: of a patch of one colour it would leave nothing, as its mean is all
    there is to it. Inputs are expected near unit variance.
    """

    def __init__(self, in_dim: int, out_dim: int, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.in_linear = Linear((in_dim,), (config.model_dim,), logical=(None, "embed"), dtype=config.dtype, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_blocks)
        self.blocks = nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        self.out_norm = LayerNorm(config.model_dim, logical="embed")
        self.out_linear = Linear(
            (config.model_dim,), (out_dim,), logical=("embed", None), dtype=config.dtype, rngs=rngs
        )

    def __call__(self, x_BTNI: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """
        Args:
            x_BTNI: tokens, any float dtype.
            key: for dropout; None for evaluation.

        Returns:
            (B, T, N, O) in the compute dtype.
        """
        config = self.config
        x_BTNM = self.in_linear(x_BTNI)
        T, N = x_BTNM.shape[1:3]
        time_TM, space_NM = sinusoids(T, config.model_dim), sinusoids(N, config.model_dim)
        x_BTNM = (x_BTNM + time_TM[:, None] + space_NM).astype(config.dtype)

        graph, layers = nnx.split(self.blocks)

        def layer(x_BTNM: jax.Array, scanned: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            parameters, index = scanned
            layer_key = None if key is None else jax.random.fold_in(key, index)
            return constrain(nnx.merge(graph, parameters)(x_BTNM, layer_key), "batch"), None

        body = rematerialize(layer, config.remat)
        x_BTNM, _ = jax.lax.scan(body, constrain(x_BTNM, "batch"), (layers, jnp.arange(config.num_blocks)))
        return self.out_linear(self.out_norm(x_BTNM))
