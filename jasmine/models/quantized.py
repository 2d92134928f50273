"""The matrix product of int8 training: what `Linear` computes when the model is built with `quantize="int8"`.

Of the three products of a layer and its gradients two run in int8 with int32 sums: the layer itself and the gradient of
its input. The third, the gradient of the kernel, sums over every token of the batch, so that a single scale would have to
span all of them; it stays in the compute dtype (as in SwitchBack, arXiv 2304.13013, section 2). Parameters stay float32, so a
checkpoint does not know how it was trained and loads with or without.

Scales are dynamic, the largest magnitude over the contracted axes: one scale for each token, and one for each channel of
the kernel that is kept. Nothing is calibrated and no state is carried from step to step.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

Quantize = Literal["none", "int8"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def int8_product(x: jax.Array, kernel: jax.Array, num_in: int) -> jax.Array:
    """`x @ kernel` over the last `num_in` axes of x, in int8.

    Args:
        x: (..., *in_shape), any float dtype.
        kernel: (*in_shape, *out_shape), best in float32: rounding it to bfloat16 first would round twice.
        num_in: how many axes are contracted.

    Returns:
        (..., *out_shape) in x's dtype; gradients in the dtypes of x and kernel.
    """
    return _product(x, kernel, range(num_in))


def _product(x: jax.Array, kernel: jax.Array, contracted: range) -> jax.Array:
    """Contracts these axes of the kernel with as many last axes of x, both quantized along them."""
    import qwix  # only here: every job would wait for it otherwise

    lead = x.ndim - len(contracted)
    kept = [axis for axis in range(kernel.ndim) if axis not in contracted]
    # A scale has the dtype of what it was taken from; in bfloat16 it would round the result once more.
    q_x = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=range(lead))
    q_kernel = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=kept)
    numbers = ((tuple(range(lead, x.ndim)), tuple(contracted)), ((), ()))
    return qwix.dot_general(q_x, q_kernel, numbers).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array, num_in: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return int8_product(x, kernel, num_in), (x, kernel)


def _backward(num_in: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    lead = tuple(range(x.ndim - num_in))
    to_x = _product(gradient, kernel, range(num_in, kernel.ndim))
    to_kernel = jax.lax.dot_general(x, gradient, ((lead, lead), ((), ())))
    return to_x, to_kernel.astype(kernel.dtype)


int8_product.defvjp(_forward, _backward)
