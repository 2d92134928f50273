import jax
import jax.numpy as jnp

from jasmine.training.flops import model_flops


def test_counts_matrix_products_also_inside_scans():
    x, w = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))

    def forward(x, w):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer), x, w)[0]

    assert model_flops(forward, x, w) == 3 * 5 * 2 * 8 * 16 * 16
