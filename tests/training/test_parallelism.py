"""Data parallel, FSDP and tensor parallel are a flag: the same losses, and parameters that are really split."""

import dataclasses

import jax
import numpy as np
import pytest

from jasmine.baselines.maskgit.train_tokenizer_vqvae import Config, Task
from jasmine.training.mesh import MeshConfig, make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, abstract_state, initial_state
from jasmine.training.step import batch_checksum, make_update
from jasmine.training.task import DataInfo

pytestmark = pytest.mark.slow

CONFIG = Config(
    data_dir="unused", batch_size=8, seq_len=4, model_dim=32, ffn_dim=64, num_blocks=2, num_heads=4, patch_size=8,
    num_latents=32, latent_dim=8, dtype="float32", num_steps=100, warmup_steps=0, log_batch_checksum=True,
)  # fmt: skip
VIDEOS = np.random.default_rng(0).integers(0, 256, (8, 4, 16, 16, 3), dtype=np.uint8)


def train(config: Config, steps: int = 4):
    """Losses and checksums of a few steps, and the state after them."""
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    task = Task(config, DataInfo((16, 16, 3)))
    definition, optimizer = ModelDefinition(task), make_optimizer(config)
    abstract = abstract_state(definition, optimizer, mesh, rules, config.ema_decay > 0)
    state = initial_state(task, definition, optimizer, abstract)
    update = make_update(task, definition, optimizer, mesh, rules, abstract)
    sharding = jax.sharding.NamedSharding(mesh, rules.spec(("batch",), (8,), mesh))
    logged = []
    for _ in range(steps):
        state, metrics = update(state, {}, {"videos": jax.device_put(VIDEOS, sharding)})
        logged.append({name: np.asarray(value) for name, value in metrics.items()})
    return state, logged


@pytest.fixture(scope="module")
def single():
    return train(dataclasses.replace(CONFIG, mesh=MeshConfig(data=8)))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, tensor=4)]
)
def test_every_mesh_gives_the_same_losses(single, mesh):
    state, logged = train(dataclasses.replace(CONFIG, mesh=mesh))
    for mine, expected in zip(logged, single[1], strict=True):
        np.testing.assert_allclose(mine["loss"], expected["loss"], rtol=1e-4)
        np.testing.assert_allclose(mine["grad_norm"], expected["grad_norm"], rtol=1e-3)
        assert mine["batch_checksum"] == expected["batch_checksum"]
    kernel = state.params["encoder"]["blocks"]["ffn"]["linear_in"]["kernel"]
    moment = state.opt_state[0].mu["encoder"]["blocks"]["ffn"]["linear_in"]["kernel"]
    for array in (kernel, moment):
        assert array.shape == (2, 32, 64)
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 32 // mesh.fsdp, 64 // mesh.tensor)}
    heads = state.params["encoder"]["blocks"]["time_attention"]["qkv"]["kernel"]
    assert {shard.data.shape[3] for shard in heads.addressable_shards} == {4 // mesh.tensor}


def test_initial_parameters_do_not_depend_on_the_mesh(single):
    first, _ = train(dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=8)), steps=0)
    second, _ = train(dataclasses.replace(CONFIG, mesh=MeshConfig(tensor=4)), steps=0)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_accumulation_in_parts_is_the_same_step(single):
    # Without random draws: each part would make its own.
    config = dataclasses.replace(CONFIG, codebook_dropout=0.0)
    _, whole = train(config)
    _, parts = train(dataclasses.replace(config, grad_accumulation_steps=4, mesh=MeshConfig(data=2, tensor=4)))
    for mine, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(mine["loss"], expected["loss"], rtol=1e-4)
        np.testing.assert_allclose(mine["mse"], expected["mse"], rtol=1e-4)
        np.testing.assert_allclose(mine["grad_norm"], expected["grad_norm"], rtol=1e-3)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_recomputes_the_same_gradients(single, remat):
    _, logged = train(dataclasses.replace(CONFIG, mesh=MeshConfig(data=8), remat=remat), steps=2)
    for mine, expected in zip(logged, single[1], strict=False):
        np.testing.assert_allclose(mine["grad_norm"], expected["grad_norm"], rtol=1e-5)


def test_moving_average_follows_the_weights():
    state, logged = train(dataclasses.replace(CONFIG, ema_decay=0.5), steps=1)
    assert logged[0]["lr"] > 0
    start, _ = train(dataclasses.replace(CONFIG, ema_decay=0.5), steps=0)
    before, after, average = (
        np.asarray(p["decoder"]["out_linear"]["kernel"]) for p in (start.params, state.params, state.ema)
    )
    assert (before != after).any()
    np.testing.assert_allclose(average, (before + after) / 2, rtol=1e-5, atol=1e-7)


def test_clipping_bounds_the_update():
    _, free = train(dataclasses.replace(CONFIG, max_grad_norm=0.0), steps=1)
    state, clipped = train(dataclasses.replace(CONFIG, max_grad_norm=1e-3), steps=1)
    # Logged before clipping; by another program, which may add in another order.
    np.testing.assert_allclose(clipped[0]["grad_norm"], free[0]["grad_norm"], rtol=1e-5)
    second_moment = state.opt_state[1][0].nu
    total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(second_moment))
    assert total == pytest.approx(0.1 * 1e-6, rel=1e-3)


def test_checksum_sees_swapped_examples_and_single_pixels():
    changed = VIDEOS.copy()
    changed[3, 2, 5, 7, 1] ^= 1
    swapped = VIDEOS[[1, 0, 2, 3, 4, 5, 6, 7]]
    values = {int(batch_checksum(videos)) for videos in (VIDEOS, changed, swapped)}
    assert len(values) == 3
    assert batch_checksum(VIDEOS).dtype == np.uint32
