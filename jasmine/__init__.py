"""Jasmine trains world models in JAX. It knows jax; it never imports `launch`."""

import os

# Read when the libraries for gs:// paths are imported. With a cache of listings a process never sees what others write; and
# epath would take TensorFlow, where that is installed, which is not configured for it.
os.environ.setdefault("FSSPEC_GCS_USE_LISTINGS_CACHE", "false")
os.environ.setdefault("EPATH_USE_TF", "false")
