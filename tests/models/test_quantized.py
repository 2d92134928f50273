"""int8 training: the products are really int8, and training goes the way it goes in bfloat16."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jasmine.models.quantized import int8_product
from jasmine.models.tokenizer import patchify
from jasmine.models.transformer import SpaceTimeTransformer, TransformerConfig
from jasmine.training.flops import product_flops
from jasmine.training.mesh import AXES, MeshConfig, make_mesh
from jasmine.training.model_config import ModelConfig
from jasmine.training.optimizer import make_optimizer
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, abstract_state, initial_state
from jasmine.training.step import make_update
from jasmine.training.task import BaseTask, DataInfo

pytestmark = pytest.mark.slow

BLOCK_PRODUCTS = 6  # space attention, time attention and feed-forward have two layers each


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "num_in"), [((5, 7, 32), (32, 3, 4, 8), 1), ((2, 3, 5, 4, 8), (4, 8, 48), 2)]
)
def test_product_and_gradients_are_near_those_of_float32(x_shape, kernel_shape, num_in, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    # Tokens and channels of very different size: each needs a scale of its own.
    x = (jax.random.normal(keys[0], x_shape) * jnp.logspace(-3, 3, x_shape[1])[:, *[None] * (len(x_shape) - 2)]).astype(
        dtype
    )
    kernel = jax.random.normal(keys[1], kernel_shape) * jnp.logspace(-2, 2, kernel_shape[-1])
    gradient = jax.random.normal(keys[2], (*x_shape[:-num_in], *kernel_shape[num_in:]))

    y, back = jax.vjp(lambda x, kernel: int8_product(x, kernel, num_in), x, kernel)
    exact, exact_back = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, num_in), x.astype(jnp.float32), kernel)
    assert y.shape == exact.shape
    assert y.dtype == dtype
    per_channel = np.linalg.norm((y - exact).reshape(-1, y.shape[-1]) / x.shape[1], axis=0)
    assert (per_channel / np.linalg.norm(exact.reshape(-1, y.shape[-1]) / x.shape[1], axis=0) < 0.03).all()

    (to_x, to_kernel), (exact_x, exact_kernel) = back(gradient.astype(dtype)), exact_back(gradient)
    assert (to_x.dtype, to_kernel.dtype) == (dtype, jnp.float32)
    assert _distance(to_x, exact_x) < 0.03
    assert _distance(to_kernel, exact_kernel) < (1e-6 if dtype == jnp.float32 else 0.01)  # not in int8


def _distance(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm((a.astype(jnp.float32) - b).reshape(-1)) / jnp.linalg.norm(b.reshape(-1)))


def test_zeros_give_zeros():
    y, back = jax.vjp(lambda x, kernel: int8_product(x, kernel, 1), jnp.zeros((3, 8)), jnp.zeros((8, 4)))
    for array in (y, *back(jnp.zeros((3, 4)))):
        np.testing.assert_array_equal(array, 0)


# --- in the transformer ------------------------------------------------------------------------------------------

SMALL = TransformerConfig(model_dim=16, ffn_dim=32, num_blocks=3, num_heads=2, dtype=jnp.bfloat16)


def _transformer(**options: Any) -> tuple[Any, Any]:
    graph, state = nnx.split(SpaceTimeTransformer(6, 5, dataclasses.replace(SMALL, **options), nnx.Rngs(0)))
    return graph, state


def _products(jaxpr: Any) -> Iterator[Any]:
    """All matrix products of a traced program, those within loops once."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _products(inner)


def _int8_products(function: Any, *args: Any) -> int:
    count = 0
    for equation in _products(jax.make_jaxpr(function)(*args).jaxpr):
        if all(variable.aval.dtype == jnp.int8 for variable in equation.invars):
            assert equation.outvars[0].aval.dtype == jnp.int32
            count += 1
    return count


@pytest.mark.parametrize(
    ("options", "forward", "both"),
    [
        ({"quantize": "none"}, 0, 0),
        ({"quantize": "int8"}, BLOCK_PRODUCTS, 2 * BLOCK_PRODUCTS),
        ({"quantize": "int8", "remat": "dots"}, BLOCK_PRODUCTS, 2 * BLOCK_PRODUCTS),
        ({"quantize": "int8", "ffn": "swiglu", "num_kv_heads": 1}, BLOCK_PRODUCTS + 2, 2 * (BLOCK_PRODUCTS + 2)),
    ],
)
def test_blocks_multiply_int8_forward_and_backward(options, forward, both):
    graph, state = _transformer(**options)
    x = jnp.ones((2, 3, 4, 6))

    def loss(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x).astype(jnp.float32).mean()

    assert _int8_products(loss, state, x) == forward
    assert _int8_products(jax.grad(loss), state, x) == both


def test_int8_products_count_as_work():
    counts = []
    for quantize in ("none", "int8"):
        graph, state = _transformer(quantize=quantize)
        counts.append(
            product_flops(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, jnp.ones((2, 3, 4, 6)))
        )
    assert counts[0] == counts[1] > 0


def test_parameters_are_those_of_the_model_without():
    (_, plain), (_, quantized_state) = _transformer(), _transformer(quantize="int8")
    jax.tree.map(np.testing.assert_array_equal, plain, quantized_state)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_and_dropout_give_the_same_gradients(remat):
    gradients = []
    for policy in ("none", remat):
        graph, state = _transformer(quantize="int8", remat=policy, dropout=0.2, dtype=jnp.float32)

        def loss(state: Any, graph: Any = graph) -> jax.Array:
            return jnp.square(nnx.merge(graph, state)(jnp.ones((2, 3, 4, 6)), jax.random.key(1))).mean()

        gradients.append(jax.jit(jax.grad(loss))(state))
    # Not to the last bit: what is computed again rounds differently, and a value on the edge then takes the next of the 255
    # integers. Other draws of dropout would change the whole of it.
    plain, recomputed = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in gradients)
    assert np.linalg.norm(recomputed - plain) < 0.02 * np.linalg.norm(plain)


# --- in training -------------------------------------------------------------------------------------------------


class NextFrame(nnx.Module):
    """Predicts the patches of each frame from the frames before it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.transformer = SpaceTimeTransformer(192, 192, config.transformer(), rngs)


class NextFrameTask(BaseTask):
    """Nothing discrete in between: at a vector quantizer, curves that differ in the last bit soon differ in every one."""

    def check(self):
        pass

    def build(self, rngs):
        return NextFrame(self.config, rngs)

    def loss(self, model, batch, keys):
        patch_BTNP = patchify(2 * batch["videos"].astype(jnp.float32) / 255 - 1, 8)
        predicted = model.transformer(patch_BTNP[:, :-1], keys["dropout"])
        return jnp.square(predicted.astype(jnp.float32) - patch_BTNP[:, 1:]).mean(), {}

    def evaluate(self, model, frozen, batch, keys):
        raise NotImplementedError


STEPS = 100
CONFIG = ModelConfig(
    data_dir="unused", batch_size=8, seq_len=4, model_dim=64, ffn_dim=128, num_blocks=2, num_heads=4, max_lr=1e-3,
    num_steps=200, warmup_steps=10,
)  # fmt: skip


def colour_cycles(seed: int) -> np.ndarray:
    """A batch of clips in which each 8×8 patch takes one of eight colours after the other."""
    colours = np.random.default_rng(5).integers(0, 256, (8, 3), dtype=np.uint8)
    first = np.random.default_rng(seed).integers(0, 8, (8, 1, 2, 2))
    return colours[(first + np.arange(4)[:, None, None]) % 8].repeat(8, 2).repeat(8, 3)


def single() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def losses(mesh: Mesh, steps: int = STEPS, **options: Any) -> np.ndarray:
    """Losses of the first steps of training, (steps,)."""
    config, rules = dataclasses.replace(CONFIG, **options), ShardingRules()
    task = NextFrameTask(config, DataInfo((16, 16, 3)))
    definition, optimizer = ModelDefinition(task), make_optimizer(config)
    abstract = abstract_state(definition, optimizer, mesh, rules, ema=False)
    state = initial_state(task, definition, optimizer, abstract)
    update = make_update(task, definition, optimizer, mesh, rules, abstract)
    sharding = NamedSharding(mesh, rules.spec(("batch",), (8,), mesh))
    found = []
    for step in range(steps):
        state, metrics = update(state, {}, {"videos": jax.device_put(colour_cycles(step), sharding)})
        found.append(float(metrics["loss"]))
    return np.array(found)


def deviation(curve: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative difference of two curves of losses, each a running mean over ten steps."""
    mine, theirs = (np.convolve(values, np.ones(10) / 10, "valid") for values in (curve, expected))
    return float(np.abs(mine / theirs - 1).max())


@pytest.fixture(scope="module")
def bfloat16() -> np.ndarray:
    curve = losses(single())
    assert curve[-1] < 0.1 * curve[0]
    return curve


# Measured over three seeds: int8 at most 1.0 %, float32 1.5 %, int4 17 % to 41 % away from bfloat16.
@pytest.mark.parametrize("mesh", ["one device", "2×2×2"])
def test_loss_follows_bfloat16(mesh, bfloat16):
    where = single() if mesh == "one device" else make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert deviation(losses(where, quantize="int8"), bfloat16) < 0.03


def test_four_bits_would_not_follow(bfloat16, monkeypatch):
    quantize = qwix.quantize
    monkeypatch.setattr(qwix, "quantize", lambda x, _, **options: quantize(x, jnp.int4, **options))
    assert deviation(losses(single(), quantize="int8"), bfloat16) > 0.1


def test_every_mesh_gives_the_same_losses():
    expected = losses(single(), steps=4, quantize="int8", dtype="float32")
    for mesh in (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, tensor=4)):
        curve = losses(make_mesh(mesh), steps=4, quantize="int8", dtype="float32")
        np.testing.assert_allclose(curve, expected, rtol=1e-3)
