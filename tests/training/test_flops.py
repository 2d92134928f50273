from types import SimpleNamespace

import jax
import jax.numpy as jnp

from jasmine.training.flops import peak_flops, product_flops


def test_counts_matrix_products_also_inside_scans():
    x, w = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))

    def forward(x, w):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer), x, w)[0]

    assert product_flops(forward, x, w) == 5 * 2 * 8 * 16 * 16


def test_peak_by_the_name_of_the_device():
    peaks = [
        peak_flops(SimpleNamespace(device_kind=kind))
        for kind in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "TPU v5 lite")
    ]
    assert peaks == [756e12, 989e12, 197e12]
    assert peak_flops(jax.devices()[0]) is None
