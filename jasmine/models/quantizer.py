"""Vector quantization by cosine similarity (VQ-VAE, arXiv 1711.00937; normalised codes as in ViT-VQGAN, arXiv 2110.04627).

Shape key:
    X: any leading axes  K: codes  L: size of a code
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


def unit(x: jax.Array) -> jax.Array:
    """x scaled to length 1 along its last axis. Zero stays zero, and so does its gradient."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a quantizer gives; all float32 but the indices.

    Attributes:
        straight_XL: the chosen code going forward; going back, the gradient passes to the encoder unchanged.
        code_XL: the chosen code, with a gradient to the codebook.
        encoded_XL: the normalised encoder output.
        index_X: int32 index of the chosen code.
    """

    straight_XL: jax.Array
    code_XL: jax.Array
    encoded_XL: jax.Array
    index_X: jax.Array

    def losses(self) -> tuple[jax.Array, jax.Array]:
        """The codebook's and the commitment loss (arXiv 1711.00937, equation 3), as means over all elements."""
        codebook = jnp.square(jax.lax.stop_gradient(self.encoded_XL) - self.code_XL).mean()
        commitment = jnp.square(self.encoded_XL - jax.lax.stop_gradient(self.code_XL)).mean()
        return codebook, commitment


class VectorQuantizer(nnx.Module):
    """Replaces each vector by the code of largest cosine similarity."""

    def __init__(self, num_latents: int, latent_dim: int, *, dropout: float = 0.0, rngs: nnx.Rngs):
        """
        Args:
            dropout: chance of each code to be left out of one call's search, drawn once a call. It keeps a few codes from
                taking everything.
        """
        self.dropout = dropout
        codes = jax.random.normal(rngs.params(), (num_latents, latent_dim), jnp.float32)
        self.codebook = nnx.Param(unit(codes), logical=(None, None))

    def __call__(self, x_XL: jax.Array, key: jax.Array | None = None) -> Quantized:
        """x_XL: encoder output, any float dtype. key: for codebook dropout; None for evaluation."""
        # In float32 whatever the compute dtype: at bfloat16's 8 bits, near codes tie and the choice is the rounding's.
        codebook_KL = self.codebook[...]
        encoded_XL = unit(x_XL.astype(jnp.float32))
        similarity_XK = jnp.matmul(encoded_XL, unit(codebook_KL).T, precision="highest")
        if key is not None and self.dropout > 0:
            dropped_K = jax.random.bernoulli(key, self.dropout, codebook_KL.shape[:1])
            similarity_XK = jnp.where(dropped_K, -jnp.inf, similarity_XK)
        index_X = jnp.argmax(similarity_XK, axis=-1).astype(jnp.int32)
        code_XL = codebook_KL[index_X]
        straight_XL = encoded_XL + jax.lax.stop_gradient(code_XL - encoded_XL)
        return Quantized(straight_XL, code_XL, encoded_XL, index_X)

    def revival_loss(self, quantized: Quantized) -> jax.Array:
        """Mean squared distance of the codes that a batch left unused to the encoder output of it that is nearest to each.

        Codes that nothing chooses get no gradient otherwise and stay dead: the collapse that leaves a large codebook with
        a few codes in use. Nearest anchors, as CVQ-VAE has them (arXiv 2307.15139, section 3.2), but by gradient: no
        running counts that a checkpoint would have to hold.
        """
        codebook_KL = self.codebook[...]
        encoded_DL = jax.lax.stop_gradient(quantized.encoded_XL).reshape(-1, codebook_KL.shape[1])
        unused_K = jnp.ones(codebook_KL.shape[0]).at[quantized.index_X.reshape(-1)].set(0.0)
        nearest_K = jnp.argmax(jnp.matmul(encoded_DL, codebook_KL.T, precision="highest"), axis=0)
        return jnp.mean(unused_K * jnp.square(codebook_KL - encoded_DL[nearest_K]).sum(-1))

    def lookup(self, index_X: jax.Array) -> jax.Array:
        """Codes of int32 indices: (X, L) float32."""
        return self.codebook[...][index_X]
