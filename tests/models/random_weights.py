"""Models whose every weight matters: training begins with zeros and ones, and what they hide no test would see."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def random_weights(make: Callable[[], Model], seed: int = 0) -> Model:
    """The model that `make` makes, with random weights; scales are about 1. Compiles nothing."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    values = [
        jnp.asarray(("scale" in jax.tree_util.keystr(path)) + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
        for path, leaf in leaves
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, values))
