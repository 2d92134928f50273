"""The few layers that every model is made of. Parameters are float32 and name their logical axes for sharding.

Each parameter is an `nnx.Param` with metadata `logical`, a tuple with one logical axis (see
`jasmine.training.sharding.ShardingRules`) or None for each of its axes. Matrix products run in the layer's compute
`dtype`; normalisation runs in float32 whatever that is.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jasmine.models.quantized import Quantize, int8_product
from jasmine.training.sharding import traced_device

Logical = Sequence[str | None]


class RandomKeys(Protocol):
    """Random keys by purpose, such as `keys["dropout"]`: `jasmine.training.task.Keys`, or a dict."""

    def __getitem__(self, purpose: str) -> jax.Array: ...


class Linear(nnx.Module):
    """`y = x @ kernel (+ bias)` from the last axes of x to any number of new ones. lecun-normal kernel, zero bias."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        *,
        logical: Logical,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        bias: bool = True,
        quantize: Quantize = "none",
    ):
        """
        Args:
            in_shape: sizes of the trailing axes of the input that are contracted.
            out_shape: sizes of the axes that replace them.
            logical: logical axes of the kernel, `len(in_shape) + len(out_shape)` of them.
            dtype: of the product and the result.
            bias: whether there is one.
            quantize: `int8` computes the product in 8 bits (`jasmine.models.quantized`); the result stays in `dtype`.
        """
        self.num_in = len(in_shape)
        self.dtype = dtype
        self.quantize = quantize
        in_axes = tuple(range(self.num_in))
        out_axes = tuple(range(self.num_in, self.num_in + len(out_shape)))
        init = jax.nn.initializers.lecun_normal(in_axis=in_axes, out_axis=out_axes)
        self.kernel = nnx.Param(init(rngs.params(), (*in_shape, *out_shape), jnp.float32), logical=tuple(logical))
        zeros = jnp.zeros(tuple(out_shape), jnp.float32)
        self.bias: Any = nnx.Param(zeros, logical=tuple(logical[self.num_in :])) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., *in_shape), any float dtype -> (..., *out_shape) in `dtype`."""
        x = x.astype(self.dtype)
        if self.quantize == "int8":
            y = int8_product(x, self.kernel[...], self.num_in)
        else:
            contract = (tuple(range(x.ndim - self.num_in, x.ndim)), tuple(range(self.num_in)))
            y = jax.lax.dot_general(x, self.kernel[...].astype(self.dtype), (contract, ((), ())))
        # For remat policies, which see the products inside of int8_product no more than those of a kernel.
        y = checkpoint_name(y, "linear")
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed and returned in float32."""

    def __init__(self, size: int, *, logical: str | None):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), logical=(logical,))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), logical=(logical,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalize(x.astype(jnp.float32)) * self.scale[...] + self.bias[...]


@jax.custom_vjp
def _normalize(x: jax.Array) -> jax.Array:
    """x, float32, with mean 0 and variance 1 along the last axis. Its gradient is written out because what jax derives
    keeps several arrays of the size of x for the backward pass, where one will do."""
    return _normalize_forward(x)[0]


def _normalize_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    mean = x.mean(-1, keepdims=True)
    # Mean of squares minus square of the mean: one pass over x, and float32 has the digits for it.
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    inverse = jax.lax.rsqrt(variance + 1e-6)
    normal = (x - mean) * inverse
    return normal, (normal, inverse)


def _normalize_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    normal, inverse = saved
    along = (gradient * normal).mean(-1, keepdims=True)
    return ((gradient - gradient.mean(-1, keepdims=True) - normal * along) * inverse,)


_normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x: jax.Array) -> jax.Array:
    """GELU by tanh (arXiv 1606.08415). Only x is kept for the backward pass, which computes the rest again."""
    return jax.nn.gelu(x)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gate(x: jax.Array, gates: jax.Array) -> jax.Array:
    """SwiGLU's product (arXiv 2002.05202), likewise."""
    return jax.nn.silu(gates) * x


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis (arXiv 1910.07467), computed and returned in float32."""

    def __init__(self, size: int, *, logical: str | None):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), logical=(logical,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * self.scale[...]


class Embedding(nnx.Module):
    """A learned vector for each of `num` indices; normal with a standard deviation of 0.02 or as given."""

    def __init__(self, num: int, size: int, *, logical: str | None = None, rngs: nnx.Rngs, std: float = 0.02):
        table = std * jax.random.normal(rngs.params(), (num, size), jnp.float32)
        self.table = nnx.Param(table, logical=(None, logical))

    def __call__(self, index_X: jax.Array) -> jax.Array:
        """int32 indices (X) -> float32 (X, size)."""
        return self.table[...][index_X]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; with `key` None (evaluation) or rate 0 the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def sinusoids(length: int, size: int) -> np.ndarray:
    """Sinusoidal position table, (length, size) float32 (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    position = np.arange(length, dtype=np.float32)[:, None]
    frequency = np.exp(np.arange(0, size, 2, dtype=np.float32) * (-math.log(10_000.0) / size))
    table = np.zeros((length, size), np.float32)
    table[:, 0::2] = np.sin(position * frequency)
    table[:, 1::2] = np.cos(position * frequency[: size // 2])
    return table


_fused_allowed = contextvars.ContextVar("fused attention allowed", default=True)


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Within it, attention is traced as plain matrix products on every backend."""
    token = _fused_allowed.set(False)
    try:
        yield
    finally:
        _fused_allowed.reset(token)


def _has_fused_attention() -> bool:
    """cuDNN's kernel needs an NVIDIA GPU of the Ampere generation (compute capability 8.0) or later."""
    device = traced_device()
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def rotate(x_XLHD: jax.Array, place_XL: jax.Array) -> jax.Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.2): turns pairs of features by angles that grow with
    the place, so that a product of two rotated vectors depends on the distance of their places only.

    Args:
        x_XLHD: queries or keys, D even.
        place_XL: int32 places, broadcastable to the leading axes of x and L.
    """
    half = x_XLHD.shape[-1] // 2
    frequency_D = np.exp(np.arange(half, dtype=np.float32) * (-math.log(10_000.0) / half))
    angle_XL1D = place_XL[..., None, None].astype(jnp.float32) * frequency_D
    cos, sin = jnp.cos(angle_XL1D), jnp.sin(angle_XL1D)
    first, second = jnp.split(x_XLHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_XLHD.dtype)


def attention(
    q_XLHD: jax.Array,
    k_XSGD: jax.Array,
    v_XSGD: jax.Array,
    *,
    causal: bool = False,
    mask_XLS: jax.Array | None = None,
    soft_cap: float = 0.0,
    flash: bool = False,
) -> jax.Array:
    """Scaled dot-product attention, (X, L, H, D) in the dtype of q.

    X: any number of leading axes · L: queries · S: keys · H: heads · G: heads of keys and values, which divide H
    (grouped queries, arXiv 2305.13245) · D: size of a head.

    Args:
        causal: query l sees keys up to l.
        mask_XLS: True where a query sees a key; broadcastable. Not together with `causal`.
        soft_cap: logits are bent to stay within this by tanh (Gemma 2, arXiv 2408.00118, section 2); 0: not.
        flash: on a recent NVIDIA GPU, in bfloat16 or float16 and with head sizes that it takes, use cuDNN's fused kernel,
            which needs no padding of L or S; else XLA's products.
    """
    takes = q_XLHD.dtype in (jnp.bfloat16, jnp.float16) and q_XLHD.shape[-1] % 8 == 0 and q_XLHD.shape[-1] <= 128
    if flash and takes and mask_XLS is None and not soft_cap and _fused_allowed.get() and _has_fused_attention():
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q_XLHD, k_XSGD, v_XSGD))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        return out.reshape(*q_XLHD.shape[:-3], *out.shape[-3:])
    *lead, L, H, D = q_XLHD.shape
    S, G = k_XSGD.shape[-3:-1]
    q_XLGRD = q_XLHD.reshape(*lead, L, G, H // G, D)
    logits = jnp.einsum("...lgrd,...sgd->...grls", q_XLGRD, k_XSGD, preferred_element_type=jnp.float32) / math.sqrt(D)
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if causal:
        mask_XLS = jnp.tri(L, S, dtype=bool)
    if mask_XLS is not None:
        logits = jnp.where(mask_XLS[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_XSGD.dtype)
    return jnp.einsum("...grls,...sgd->...lgrd", weights, v_XSGD).reshape(q_XLHD.shape)


def attention_over_past(
    q_XGRD: jax.Array,
    past: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    seen_XW: jax.Array,
    *,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Attention of one query over cached keys and the one that came with it, (X, G, R, D) in the dtype of q.

    X: leading axes · G: heads of keys and values · R: queries to each of them · W: places in the cache · D: size of a head.
    The cache lies as its products read it, and the new key's share is added to theirs, so that nothing is copied.

    Args:
        past: keys and values, (X, G, W, D).
        new: key and value, (X, G, D).
        seen_XW: which places hold something; broadcastable.
    """
    (k_XGWD, v_XGWD), (k_XGD, v_XGD) = past, new
    scale = 1 / math.sqrt(q_XGRD.shape[-1])
    old_XGRW = jnp.einsum("...rd,...wd->...rw", q_XGRD, k_XGWD, preferred_element_type=jnp.float32) * scale
    own_XGR1 = (q_XGRD * k_XGD[..., None, :]).astype(jnp.float32).sum(-1, keepdims=True) * scale
    if soft_cap:
        old_XGRW, own_XGR1 = (soft_cap * jnp.tanh(logits / soft_cap) for logits in (old_XGRW, own_XGR1))
    old_XGRW = jnp.where(seen_XW[..., None, None, :], old_XGRW, -jnp.inf)
    most_XGR1 = jnp.maximum(old_XGRW.max(-1, keepdims=True), own_XGR1)
    old_XGRW, own_XGR1 = jnp.exp(old_XGRW - most_XGR1), jnp.exp(own_XGR1 - most_XGR1)
    total_XGR1 = old_XGRW.sum(-1, keepdims=True) + own_XGR1
    weights = (old_XGRW / total_XGR1).astype(v_XGWD.dtype), (own_XGR1 / total_XGR1).astype(v_XGWD.dtype)
    return jnp.einsum("...rw,...wd->...rd", weights[0], v_XGWD) + weights[1] * v_XGD[..., None, :]
