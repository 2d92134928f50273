"""Checksums of what checkpoints hold, one for each of their parts, so that whoever reads one part alone can tell whether it
is what was saved: storage may return other bits than it was given, and of the files of large arrays neither Orbax nor a
disk keeps checksums."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

KEY = "checksums"
"""Of the checksums in what is written beside a checkpoint's arrays."""


def checksums(parts: Mapping[str, Any]) -> dict[str, int]:
    """uint32 of all bits of each tree of arrays, by name; trees without arrays have none. Processes that share the arrays
    all call it."""
    given = {name: arrays for name, tree in parts.items() if (arrays := jax.tree.leaves(tree))}
    return {name: int(value) for name, value in jax.device_get(_sums(given)).items()}


@jax.jit
def _sums(parts: Mapping[str, list[jax.Array]]) -> dict[str, jax.Array]:
    """Integers wrap: the order of summation, and with it the topology, does not matter."""
    return {
        name: jnp.sum(jnp.stack([_sum(array) for array in arrays]), dtype=jnp.uint32) for name, arrays in parts.items()
    }


def _sum(array: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def checksums_on_host(parts: Mapping[str, Any]) -> dict[str, int]:
    """The same of arrays that this process has all of, without compiling anything: for those who read a checkpoint once."""
    found = {}
    for name, tree in parts.items():
        arrays = [np.ascontiguousarray(array).reshape(-1) for array in jax.tree.leaves(tree)]
        words = [int(np.sum(array.view(f"u{array.dtype.itemsize}"), dtype=np.uint64)) for array in arrays]
        if words:
            found[name] = sum(words) % 2**32
    return found


def agree(found: Mapping[str, int], meta: Mapping[str, Any]) -> bool:
    """Whether parts with the checksums `found` are what was saved, by what was written beside them; so they are taken to be
    where that says nothing of them."""
    saved = meta.get(KEY)
    return not isinstance(saved, Mapping) or all(saved.get(name, value) == value for name, value in found.items())


def read(checkpoint: epath.Path) -> Mapping[str, Any]:
    """What was written beside the arrays of a checkpoint; nothing where nothing was.

    Raises:
        Exception: it cannot be read.
    """
    try:
        meta = json.loads((checkpoint / "meta" / "metadata").read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(meta, dict):
        raise ValueError(f"{checkpoint / 'meta'} is not what was written")
    return meta
