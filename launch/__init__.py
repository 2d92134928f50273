"""Submits, watches and stops jobs on clusters. Knows clusters; never imports jax or `jasmine`."""
