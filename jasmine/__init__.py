"""Jasmine trains world models in JAX. It knows jax; it never imports `launch`."""
