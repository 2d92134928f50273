"""The space-time transformer that every model here is built from (ST-ViViT as in Genie, arXiv 2402.15391, section 2).

Attention is factored: each block attends over the tokens of a frame, then over the frames of a token's place, then
applies a feed-forward layer; each behind a norm and added to the residual stream. Time attention is causal, so a prefix of
a video encodes to the same tokens as the whole. Blocks are stacked along a leading `layers` axis and scanned: compile time
does not grow with depth. The parts that Dreamer 4 adds (arXiv 2509.24527, section 3) are options of `TransformerConfig`.

`UnrolledTransformer` is the same network one frame, or one token, at a time, with the keys and values of what came before
given: what the samplers are made of.

Shape key:
    B: batch  T: frames  N: tokens in a frame, with registers  S: some tokens of a frame  W: places in a cache
    I: input features  M: model width  H: heads  G: heads of keys and values  D: size of a head  F: feed-forward width
    O: output features  R: register tokens
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jasmine.models.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    attention,
    attention_over_past,
    dropout,
    gate,
    gelu,
    rotate,
    sinusoids,
)
from jasmine.models.quantized import Quantize
from jasmine.training.sharding import constrain

RematPolicy = Literal["none", "dots", "full", "offload"]
KeyValue = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a space-time transformer.

    Attributes:
        dtype: of activations and matrix products.
        norm: LayerNorm, or RMSNorm.
        positions: `sinusoidal` adds tables of place and time to the input; `rope` rotates queries and keys instead.
        ffn: one hidden layer with GELU, or SwiGLU (arXiv 2002.05202), which has a gate of the same width besides.
        qk_norm: RMSNorm over each head's queries and keys.
        logit_soft_cap: bound of attention logits; 0: none.
        num_kv_heads: heads of keys and values, dividing num_heads; None: as many.
        time_every: only every n-th block attends over time. num_blocks is a multiple of it.
        num_registers: learned tokens that stand before those of each frame, and are dropped from the output.
        quantize: `int8` for the matrix products of the blocks; the layers into and out of them keep `dtype`.
    """

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
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["sinusoidal", "rope"] = "sinusoidal"
    ffn: Literal["gelu", "swiglu"] = "gelu"
    qk_norm: bool = False
    logit_soft_cap: float = 0.0
    num_kv_heads: int | None = None
    time_every: int = 1
    num_registers: int = 0
    quantize: Quantize = "none"

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.model_dim // self.num_heads

    def make_norm(self) -> nnx.Module:
        """A norm over the model's width."""
        return (LayerNorm if self.norm == "layer" else RMSNorm)(self.model_dim, logical="embed")


def rematerialize(function: Callable, policy: RematPolicy) -> Callable:
    """Chooses what the backward pass keeps: `none` keeps all activations, `dots` the results of matrix products, `full`
    only each block's input, `offload` moves those of linear layers to host memory (where there is a pinned host space).
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return function
    chosen = {
        "dots": policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names("linear")),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["linear"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    # Inside a scan nothing can be shared with the forward pass, so the barrier against it would only cost time.
    return jax.checkpoint(function, policy=chosen, prevent_cse=False)


class SelfAttention(nnx.Module):
    """Multi-head self-attention. Queries, keys and values come from one fused projection where their heads are as many."""

    def __init__(self, config: TransformerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.flash = config.flash_attention
        self.rope = config.positions == "rope"
        self.soft_cap = config.logit_soft_cap
        heads, head_dim = config.num_heads, config.head_dim
        kv_heads = config.num_kv_heads or heads
        self.grouped = kv_heads != heads
        kind: dict[str, Any] = {"dtype": config.dtype, "quantize": config.quantize, "rngs": rngs, "bias": False}
        width = (config.model_dim,)
        if self.grouped:
            self.q = Linear(width, (heads, head_dim), logical=("embed", "heads", None), **kind)
            self.kv = Linear(width, (2, kv_heads, head_dim), logical=("embed", None, "heads", None), **kind)
        else:
            self.qkv = Linear(width, (3, heads, head_dim), logical=("embed", None, "heads", None), **kind)
        self.q_norm: Any = RMSNorm(head_dim, logical=None) if config.qk_norm else None
        self.k_norm: Any = RMSNorm(head_dim, logical=None) if config.qk_norm else None
        self.out = Linear((heads, head_dim), width, logical=("heads", None, "embed"), **kind)

    def project(self, x_XM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (X, H, D), keys and values (X, G, D), normalised but not rotated."""
        if self.grouped:
            q_XHD = self.q(x_XM)
            k_XGD, v_XGD = jnp.moveaxis(self.kv(x_XM), -3, 0)
        else:
            q_XHD, k_XGD, v_XGD = jnp.moveaxis(self.qkv(x_XM), -3, 0)
        if self.q_norm is not None:
            q_XHD, k_XGD = self.q_norm(q_XHD).astype(v_XGD.dtype), self.k_norm(k_XGD).astype(v_XGD.dtype)
        return q_XHD, k_XGD, v_XGD

    def __call__(self, x_BTNM: jax.Array, axis: int) -> tuple[jax.Array, KeyValue]:
        """Attends over `axis` (1: time, 2: space) of x.

        Returns:
            the result in the compute dtype, same shape as x; the keys, rotated, and values: of time (B, N, T, G, D).
        """
        q, k, v = self.project(x_BTNM)
        if axis == 1:
            q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
        if self.rope:
            places = jnp.arange(q.shape[-3])
            q, k = rotate(q, places), rotate(k, places)
        y = attention(q, k, v, causal=self.causal, soft_cap=self.soft_cap, flash=self.flash)
        return self.out(y.swapaxes(1, 2) if axis == 1 else y), (k, v)

    def over_past(self, x_BSM: jax.Array, past: KeyValue, place_B: jax.Array) -> tuple[jax.Array, KeyValue]:
        """Time attention of tokens of one new frame, each over the frames before it at its own place in the frame.

        Args:
            past: rotated keys, and values, (B, S, G, W, D); what stands at `place_B` and after is not looked at.
            place_B: int32, the frame's place in time.

        Returns:
            (B, S, M), and the new frame's keys, rotated, and values (B, S, G, D).
        """
        q_BSHD, k_BSGD, v_BSGD = self.project(x_BSM)
        if self.rope:
            q_BSHD, k_BSGD = rotate(q_BSHD, place_B[:, None]), rotate(k_BSGD, place_B[:, None])
        seen_B1W = (jnp.arange(past[0].shape[-2]) < place_B[:, None])[:, None]
        q_BSGRD = q_BSHD.reshape(*k_BSGD.shape[:3], -1, k_BSGD.shape[3])
        y = attention_over_past(q_BSGRD, past, (k_BSGD, v_BSGD), seen_B1W, soft_cap=self.soft_cap)
        return self.out(y.reshape(q_BSHD.shape)), (k_BSGD, v_BSGD)

    def over_frame(self, x_BSM: jax.Array, before: KeyValue, first: jax.Array | int) -> tuple[jax.Array, KeyValue]:
        """Causal space attention of the tokens `first` to `first + S` of a frame over those up to each of them.

        Args:
            before: rotated keys, and values, of the whole frame, (B, N, G, D), filled up to `first`.

        Returns:
            (B, S, M), and `before` with the new tokens filled in.
        """
        q, k, v = self.project(x_BSM)
        places = first + jnp.arange(x_BSM.shape[1])
        if self.rope:
            q, k = rotate(q, places), rotate(k, places)
        k, v = (jax.lax.dynamic_update_slice_in_dim(a, b, first, 1) for a, b in zip(before, (k, v), strict=True))
        seen_SN = jnp.arange(k.shape[1]) <= places[:, None]
        return self.out(attention(q, k, v, mask_XLS=seen_SN, soft_cap=self.soft_cap)), (k, v)


class FeedForward(nnx.Module):
    """Two products around GELU, or around the gate of SwiGLU."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.gated = config.ffn == "swiglu"
        kind: dict[str, Any] = {"dtype": config.dtype, "quantize": config.quantize, "rngs": rngs, "bias": False}
        M, F = config.model_dim, config.ffn_dim
        if self.gated:
            self.linear_in = Linear((M,), (2, F), logical=("embed", None, "mlp"), **kind)
        else:
            self.linear_in = Linear((M,), (F,), logical=("embed", "mlp"), **kind)
        self.linear_out = Linear((F,), (M,), logical=("mlp", "embed"), **kind)

    def __call__(self, x_XM: jax.Array) -> jax.Array:
        h = self.linear_in(x_XM)
        h_XF = gate(h[..., 1, :], h[..., 0, :]) if self.gated else gelu(h)
        return self.linear_out(h_XF)


class Block(nnx.Module):
    """Space attention, time attention (unless left out), feed-forward: each behind a norm, added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, *, time: bool = True):
        self.dropout = config.dropout
        self.space_norm = config.make_norm()
        self.space_attention = SelfAttention(config, causal=config.space_causal, rngs=rngs)
        self.time_norm: Any = config.make_norm() if time else None
        self.time_attention: Any = SelfAttention(config, causal=config.time_causal, rngs=rngs) if time else None
        self.ffn_norm = config.make_norm()
        self.ffn = FeedForward(config, rngs)

    def __call__(self, x_BTNM: jax.Array, key: jax.Array | None) -> tuple[jax.Array, KeyValue | None]:
        """Returns the new residual stream, and the keys and values of time attention, (B, N, T, G, D)."""
        keys = [None] * 3 if key is None or self.dropout == 0 else list(jax.random.split(key, 3))
        y, _ = self.space_attention(self.space_norm(x_BTNM), axis=2)
        x_BTNM = x_BTNM + dropout(y, self.dropout, keys[0])
        time = None
        if self.time_attention is not None:
            y, time = self.time_attention(self.time_norm(x_BTNM), axis=1)
            x_BTNM = x_BTNM + dropout(y, self.dropout, keys[1])
        return x_BTNM + dropout(self.ffn(self.ffn_norm(x_BTNM)), self.dropout, keys[2]), time

    def step(
        self,
        x_BSM: jax.Array,
        past: KeyValue | None,
        place_B: jax.Array,
        before: KeyValue | None,
        first: jax.Array | int,
    ) -> tuple[jax.Array, KeyValue | None, KeyValue | None]:
        """Tokens of one new frame: all of them (`before` None), or those from `first` on.

        Returns:
            the new residual stream, the new keys and values of time (None in a block without), and `before`, filled in.
        """
        h = self.space_norm(x_BSM)
        if before is None:
            y_B1SM, _ = self.space_attention(h[:, None], axis=2)
            y = y_B1SM[:, 0]
        else:
            y, before = self.space_attention.over_frame(h, before, first)
        x_BSM = x_BSM + y
        time = None
        if self.time_attention is not None:
            assert past is not None
            y, time = self.time_attention.over_past(self.time_norm(x_BSM), past, place_B)
            x_BSM = x_BSM + y
        return x_BSM + self.ffn(self.ffn_norm(x_BSM)), time, before


class SpaceTimeTransformer(nnx.Module):
    """Tokens in, tokens out: linear (unless tokens come at the model's width) -> positions -> blocks -> norm -> linear.

    No normalisation before or after the first layer: of a patch of one colour it would leave nothing, as its mean is all
    there is to it. Inputs are expected near unit variance.
    """

    def __init__(self, in_dim: int | None, out_dim: int, config: TransformerConfig, rngs: nnx.Rngs):
        """in_dim: size of input tokens; None where they come at the model's width."""
        self.config = config
        kind: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        width = (config.model_dim,)
        self.in_linear = None if in_dim is None else Linear((in_dim,), width, logical=(None, "embed"), **kind)
        groups = config.num_blocks // config.time_every
        keys = jax.random.split(rngs.params(), groups)
        self.blocks = nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        make_space_blocks = nnx.vmap(nnx.vmap(lambda key: Block(config, nnx.Rngs(key), time=False)))
        keys = jax.random.split(rngs.params(), (groups, config.time_every - 1))
        self.space_blocks = make_space_blocks(keys) if config.time_every > 1 else None
        registers_RM = 0.02 * jax.random.normal(rngs.params(), (config.num_registers, config.model_dim))
        self.registers = nnx.Param(registers_RM, logical=(None, "embed")) if config.num_registers else None
        self.out_norm = config.make_norm()
        self.out_linear = Linear(width, (out_dim,), logical=("embed", None), **kind)

    def __call__(self, x_BTNI: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """
        Args:
            x_BTNI: tokens, any float dtype.
            key: for dropout; None for evaluation.

        Returns:
            (B, T, N, O) in the compute dtype.
        """
        return self._run(x_BTNI, key, keep=False)[0]

    def with_keys_values(self, x_BTNI: jax.Array) -> tuple[jax.Array, KeyValue]:
        """The output, and the keys and values of all time attentions, (layers, B, N, T, G, D) with N registers included."""
        return self._run(x_BTNI, None, keep=True)

    def _run(self, x_BTNI: jax.Array, key: jax.Array | None, keep: bool) -> tuple[jax.Array, Any]:
        config = self.config
        x_BTNM = x_BTNI if self.in_linear is None else self.in_linear(x_BTNI)
        B, T = x_BTNM.shape[:2]
        if self.registers is not None:
            registers = jnp.broadcast_to(self.registers[...], (B, T, config.num_registers, config.model_dim))
            x_BTNM = jnp.concatenate([registers.astype(x_BTNM.dtype), x_BTNM], axis=2)
        if config.positions == "sinusoidal":
            time_TM, space_NM = (sinusoids(size, config.model_dim) for size in x_BTNM.shape[1:3])
            x_BTNM = x_BTNM + time_TM[:, None] + space_NM
        x_BTNM = x_BTNM.astype(config.dtype)
        stacks = [nnx.split(stack) for stack in (self.blocks, self.space_blocks) if stack is not None]
        graphs = [graph for graph, _ in stacks]

        def one(graph: Any) -> Callable:
            def layer(x_BTNM: jax.Array, scanned: tuple[Any, jax.Array]) -> tuple[jax.Array, KeyValue | None]:
                parameters, index = scanned
                layer_key = None if key is None else jax.random.fold_in(key, index)
                x_BTNM, time = nnx.merge(graph, parameters)(x_BTNM, layer_key)
                return constrain(x_BTNM, "batch"), time if keep else None

            return rematerialize(layer, config.remat)

        def group(x_BTNM: jax.Array, scanned: tuple[list[Any], jax.Array]) -> tuple[jax.Array, KeyValue | None]:
            parameters, index = scanned
            first = index * config.time_every
            if len(graphs) > 1:
                indices = first + jnp.arange(config.time_every - 1)
                x_BTNM, _ = jax.lax.scan(one(graphs[1]), x_BTNM, (parameters[1], indices))
            return one(graphs[0])(x_BTNM, (parameters[0], first + config.time_every - 1))

        groups = jnp.arange(config.num_blocks // config.time_every)
        x_BTNM, times = jax.lax.scan(group, constrain(x_BTNM, "batch"), ([layers for _, layers in stacks], groups))
        return self.out_linear(self.out_norm(x_BTNM[:, :, config.num_registers :])), times


class UnrolledTransformer:
    """A SpaceTimeTransformer's parameters taken apart into blocks, once, for sampling: a scan would copy each block's
    weights out of their stack at every call. Weights of matrix products are held in the compute dtype."""

    def __init__(self, transformer: SpaceTimeTransformer):
        self.transformer = transformer
        self.config = config = transformer.config
        self.blocks: list[Block] = []
        for group in range(config.num_blocks // config.time_every):
            if transformer.space_blocks is not None:
                within = range(config.time_every - 1)
                self.blocks += [_pick(transformer.space_blocks, (group, k), config.dtype) for k in within]
            self.blocks.append(_pick(transformer.blocks, (group,), config.dtype))

    @property
    def num_time_layers(self) -> int:
        """How many of the blocks attend over time."""
        return self.config.num_blocks // self.config.time_every

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.config.num_kv_heads or self.config.num_heads

    def frame(self, x_BNM: jax.Array, past: list[KeyValue], place_B: jax.Array) -> tuple[jax.Array, list[KeyValue]]:
        """One new frame, all its tokens at once.

        Args:
            x_BNM: tokens at the model's width, without registers.
            past: for each time layer keys and values (B, R + N, G, W, D) of the frames before, at places 0 to `place_B`.
            place_B: int32, the frame's place.

        Returns:
            outputs (B, N, O); for each time layer the frame's keys and values (B, R + N, G, D).
        """
        x_BNM = self._with_registers(x_BNM)
        x, new, _ = self._run(x_BNM, past, place_B, None, 0)
        return self._head(x[:, self.config.num_registers :]), new

    def tokens(
        self,
        x_BSM: jax.Array,
        past: list[KeyValue],
        place_B: jax.Array,
        before: list[KeyValue],
        first: jax.Array | int,
    ) -> tuple[jax.Array, list[KeyValue], list[KeyValue]]:
        """The tokens from `first` on of a frame that is causal in space.

        Args:
            x_BSM: tokens at the model's width. The first tokens of a frame (`first` 0) bring the registers with them.
            past: as for `frame`, whole.
            before: for each block the keys and values (B, R + N, G, D) of the frame so far.
            first: which token of the frame x begins with, registers not counted.

        Returns:
            outputs (B, S, O); `before` filled in; for each time layer the tokens' keys and values (B, S, G, D), those of
            registers included.
        """
        registers = self.config.num_registers
        size, start = x_BSM.shape[1], first + registers
        if isinstance(first, int) and first == 0:
            x_BSM = self._with_registers(x_BSM)
            start = 0
        length = x_BSM.shape[1]
        mine = [tuple(jax.lax.dynamic_slice_in_dim(a, start, length, 1) for a in layer) for layer in past]
        x, new, before = self._run(x_BSM, mine, place_B, before, start)
        return self._head(x[:, length - size :]), before, new

    def _with_registers(self, x_BNM: jax.Array) -> jax.Array:
        registers = self.transformer.registers
        if registers is None:
            return x_BNM
        registers_BRM = jnp.broadcast_to(registers[...], (x_BNM.shape[0], *registers[...].shape))
        return jnp.concatenate([registers_BRM.astype(x_BNM.dtype), x_BNM], axis=1)

    def _run(
        self, x_BSM: jax.Array, past: list[Any], place_B: jax.Array, before: list[KeyValue] | None, start: Any
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        if self.config.positions == "sinusoidal":
            M, S = self.config.model_dim, x_BSM.shape[1]
            window, total = past[0][0].shape[-2], S if before is None else before[0][0].shape[1]
            space_SM = jax.lax.dynamic_slice_in_dim(jnp.asarray(sinusoids(total, M)), start, S)
            x_BSM = x_BSM + jnp.asarray(sinusoids(window, M))[place_B][:, None] + space_SM
        x_BSM = x_BSM.astype(self.config.dtype)
        new: list[Any] = []
        filled: list[Any] = []
        pasts = iter(past)
        for index, block in enumerate(self.blocks):
            layer_past = next(pasts) if block.time_attention is not None else None
            x_BSM, time, so_far = block.step(x_BSM, layer_past, place_B, before[index] if before else None, start)
            if time is not None:
                new.append(time)
            filled.append(so_far)
        return x_BSM, new, filled

    def _head(self, x_BSM: jax.Array) -> jax.Array:
        return self.transformer.out_linear(self.transformer.out_norm(x_BSM))


def _pick(stack: nnx.Module, index: tuple[int, ...], dtype: Any) -> Block:
    """One block of a stack, its weights of products (all but the vectors) in `dtype`."""

    def one(leaf: jax.Array) -> jax.Array:
        picked = leaf[index]
        return picked.astype(dtype) if picked.ndim > 1 else picked

    graph, parameters = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(one, parameters))
