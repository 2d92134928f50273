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
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Logical = Sequence[str | None]


class RandomKeys(Protocol):
    """Random keys by purpose, such as `keys["dropout"]`: `jasmine.training.task.Keys`, or a dict."""

    def __getitem__(self, purpose: str) -> jax.Array: ...


class Linear(nnx.Module):
    """`y = x @ kernel + bias` from the last axes of x to any number of new ones. lecun-normal kernel, zero bias."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        *,
        logical: Logical,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """
        Args:
            in_shape: sizes of the trailing axes of the input that are contracted.
            out_shape: sizes of the axes that replace them.
            logical: logical axes of the kernel, `len(in_shape) + len(out_shape)` of them.
            dtype: of the product and the result.
        """
        self.num_in = len(in_shape)
        self.dtype = dtype
        in_axes = tuple(range(self.num_in))
        out_axes = tuple(range(self.num_in, self.num_in + len(out_shape)))
        init = jax.nn.initializers.lecun_normal(in_axis=in_axes, out_axis=out_axes)
        self.kernel = nnx.Param(init(rngs.params(), (*in_shape, *out_shape), jnp.float32), logical=tuple(logical))
        self.bias = nnx.Param(jnp.zeros(tuple(out_shape), jnp.float32), logical=tuple(logical[self.num_in :]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., *in_shape), any float dtype -> (..., *out_shape) in `dtype`."""
        contract = (tuple(range(x.ndim - self.num_in, x.ndim)), tuple(range(self.num_in)))
        y = jax.lax.dot_general(x.astype(self.dtype), self.kernel[...].astype(self.dtype), (contract, ((), ())))
        return y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed and returned in float32."""

    def __init__(self, size: int, *, logical: str | None):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), logical=(logical,))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), logical=(logical,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        # Mean of squares minus square of the mean: one pass over x, and float32 has the digits for it.
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * self.scale[...] + self.bias[...]


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


@functools.cache
def _has_fused_attention() -> bool:
    """cuDNN's kernel needs an NVIDIA GPU of the Ampere generation (compute capability 8.0) or later."""
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def attention(q_XLHD: jax.Array, k_XSHD: jax.Array, v_XSHD: jax.Array, *, causal: bool, flash: bool) -> jax.Array:
    """Scaled dot-product attention.

    X: any number of leading axes · L: queries · S: keys · H: heads · D: size of a head. On a recent NVIDIA GPU, in bfloat16
    or float16 and with head sizes that it takes, `flash` selects cuDNN's fused kernel, which needs no padding of L or S;
    else XLA's.
    """
    lead = q_XLHD.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q_XLHD, k_XSHD, v_XSHD))
    takes = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    fused = flash and takes and _fused_allowed.get() and _has_fused_attention()
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn" if fused else "xla")
    return out.reshape(*lead, *out.shape[-3:])
