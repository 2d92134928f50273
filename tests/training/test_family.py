"""Every baseline under every parallelism, and what its loss may depend on."""

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jasmine.baselines.diffusion import train_dynamics_diffusion
from jasmine.data.tokens import open_training_data
from jasmine.training import cli
from jasmine.training.data_feed import DataFeed
from jasmine.training.mesh import MeshConfig, make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.runs import TrainedRun, baseline_modules, frozen_parts
from jasmine.training.sharding import ShardingRules, tree_shardings
from jasmine.training.state import ModelDefinition, abstract_state, initial_state
from jasmine.training.step import frozen_modules, make_update
from jasmine.training.task import BaseTask, DataInfo, Keys
from tests.jobs import FAMILY, Family

NAMES = [name for name in FAMILY if name != "vqvae"]  # which tests/training/test_parallelism.py holds to more


def make_task(family: Family, name: str) -> BaseTask:
    module = importlib.import_module(baseline_modules()[FAMILY[name][0]])
    config = cli.parse(module.Config, family.args(name, Path("unused")))
    config.check()
    data = DataInfo.of(open_training_data(config.data_dir))
    task = module.Task(config, data, frozen_parts(config, epath.Path("unused")))
    task.check()
    return task


def train(task: BaseTask, mesh_config: MeshConfig, steps: int = 3):
    """The state after a few steps, and what they logged."""
    config, rules, mesh = task.config, ShardingRules(), make_mesh(mesh_config)
    definition, optimizer = ModelDefinition(task), make_optimizer(config)
    abstract = abstract_state(definition, optimizer, mesh, rules, ema=False)
    state = initial_state(task, definition, optimizer, abstract)
    frozen = {
        name: part.load(tree_shardings(part.definition.shapes, part.definition.logical, mesh, rules))[1]
        for name, part in task.frozen.items()
    }
    feed = DataFeed(open_training_data(config.data_dir), config, mesh, rules, seed=config.seed)
    compiled, logged = None, []
    for _ in range(steps):
        batch = next(feed)
        if compiled is None:
            update = make_update(task, definition, optimizer, mesh, rules, abstract)
            compiled = update.lower(state, frozen, batch).compile({"xla_backend_optimization_level": 0})
        state, metrics = compiled(state, frozen, batch)
        logged.append(jax.device_get(metrics))
    feed.close()
    return state, logged


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_mesh_gives_the_same_losses_with_parameters_that_are_really_split(family, name):
    task = make_task(family, name)
    _, expected = train(task, MeshConfig(data=8))
    for mesh in (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)):
        state, logged = train(task, mesh)
        for mine, theirs in zip(logged, expected, strict=True):
            np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-4)
            np.testing.assert_allclose(mine["grad_norm"], theirs["grad_norm"], rtol=1e-3)
            assert mine["batch_checksum"] == theirs["batch_checksum"]
        for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
            large = {
                jax.tree_util.keystr(path): leaf.size // leaf.addressable_shards[0].data.size
                for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
                if leaf.size >= 16 * 16
            }
            kernels = {path: parts for path, parts in large.items() if "attention" in path or "ffn" in path}
            assert len(kernels) >= 3
            assert set(kernels.values()) == {mesh.fsdp * mesh.tensor}, kernels
            assert min(large.values()) >= mesh.fsdp, large


# --- whole families at their published size, as shapes ------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, ModelDefinition]:
    """The models that the defaults describe, of 64×64×3 frames, by job."""
    data = DataInfo((64, 64, 3), num_actions=15)
    modules = {job: importlib.import_module(name) for job, name in baseline_modules().items()}
    definitions = {}
    for job, module in modules.items():
        config = module.Config(data_dir="unused")
        frozen = {
            name: TrainedRun(
                epath.Path(name), part.jobs[0], modules[part.jobs[0]].Config(), data, (),
                modules[part.jobs[0]].Task(modules[part.jobs[0]].Config(), data),
            )
            for name, part in config.frozen_runs().items()
        }  # fmt: skip
        definitions[job] = ModelDefinition(module.Task(config, data, frozen))
    return definitions


def test_every_parameter_names_axes_that_the_sharding_rules_know(published):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for job, definition in published.items():
        shardings = tree_shardings(definition.shapes, definition.logical, mesh, ShardingRules())
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]:
            shape = definition.shapes
            for key in path:
                shape = shape[key.key]
            if shape.size > 100_000:  # what is worth splitting is split
                assert sharding.shard_shape(shape.shape) != shape.shape, (job, path)


def test_the_published_shapes_have_the_size_that_their_layers_add_up_to(published):
    def products(model_dim: int = 512, ffn_dim: int = 2048, *, time: bool = True) -> int:
        return (2 if time else 1) * 4 * model_dim**2 + 2 * model_dim * ffn_dim

    patch, code = 16 * 16 * 3, 32
    coder = 2 * 4 * products() + 2 * (patch + code) * 512  # encoder and decoder, into and out of each
    lam_encoder = 4 * products() + (patch + code) * 512
    expected = {
        "train_tokenizer_vqvae": coder + 1024 * code,
        "train_tokenizer_mae": coder,
        "train_lam": 2 * 4 * products() + (2 * patch + 2 * code + patch) * 512,
        "train_dynamics_maskgit": 6 * products() + 2 * 1024 * 512 + lam_encoder,
        "train_dynamics_causal": 6 * products() + products(time=False) + 2 * 1024 * 512 + lam_encoder,
        "train_dynamics_diffusion": 6 * products() + 2 * code * 512 + 64 * 512 + lam_encoder,
    }
    for job, size in expected.items():
        assert published[job].count()["total"] == pytest.approx(size, rel=0.005), job


# --- what a loss depends on -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_actions_of_clips_that_are_not_labelled_are_not_seen(family):
    task = make_task(family, "diffusion")
    definition = ModelDefinition(task)
    params = jax.tree.map(lambda shape: 0.3 * jnp.asarray(np.random.default_rng(shape.size).normal(size=shape.shape),
                                                          jnp.float32), definition.shapes)  # fmt: skip
    frozen = frozen_modules(task, {name: part.params for name, part in task.frozen.items()})
    rng = np.random.default_rng(0)
    videos = jnp.asarray(rng.integers(0, 256, (8, 4, 16, 16, 3), dtype=np.uint8))

    @jax.jit
    def loss(actions, labelled):
        batch = task.prepare(frozen, {"videos": videos, "actions": actions, "labelled": labelled})
        return task.loss(definition.module(params), batch, Keys(jax.random.key(0)))[0]

    actions = jnp.asarray(rng.integers(0, 4, (8, 4)), jnp.int32)
    half = jnp.arange(8) < 4
    before = loss(actions, half)
    assert loss(actions.at[4:].set((actions[4:] + 1) % 4), half) == before
    assert loss(actions.at[:4].set((actions[:4] + 1) % 4), half) != before
    assert loss(actions, jnp.ones(8, bool)) != before


SHORTCUT = train_dynamics_diffusion.Config(diffusion_denoise_steps=16, shortcut=True)
HALVINGS = jnp.array([[0, 1, 2, 3]])  # steps of 16, 8, 4 and 2 levels
LEVELS = jnp.array([[0, 8, 4, 14]])


def shortcut_target(dynamics, noised: jax.Array) -> jax.Array:
    task = train_dynamics_diffusion.Task(SHORTCUT, SimpleNamespace())
    return task._two_half_steps(dynamics, noised, jnp.zeros_like(noised), None, LEVELS, HALVINGS)


def test_the_shortcut_target_of_a_straight_flow_is_the_data():
    clean, noise = (jax.random.normal(jax.random.key(k), (1, 4, 5, 6)) for k in range(2))
    tau = (LEVELS / 16)[..., None, None]
    target = shortcut_target(lambda *_: clean, (1 - tau) * noise + tau * clean)
    np.testing.assert_allclose(target, clean, atol=1e-5)


def test_a_step_to_the_shortcut_target_lands_where_two_half_steps_land():
    def dynamics(x, past, action, level, halvings):  # as good as any: it bends the flow
        assert (halvings == HALVINGS + 1).all()
        return jnp.tanh(x + level[..., None, None] / 7)

    noised = jax.random.normal(jax.random.key(0), (1, 4, 5, 6))
    tau, step = (x[..., None, None] for x in (LEVELS / 16, 0.5**HALVINGS))

    def euler(x, tau, step):
        guess = dynamics(x, None, None, jnp.round(tau[..., 0, 0] * 16).astype(int), HALVINGS + 1)
        return x + (guess - x) / (1 - tau) * step

    halfway = euler(noised, tau, step / 2)
    there = euler(halfway, tau + step / 2, step / 2)
    target = shortcut_target(dynamics, noised)
    np.testing.assert_allclose(noised + (target - noised) / (1 - tau) * step, there, atol=1e-5)
    assert np.abs(target - dynamics(noised, None, None, LEVELS, HALVINGS + 1)).max() > 0.01


def test_options_of_the_model_are_those_of_its_transformer():
    config = dataclasses.replace(SHORTCUT, norm="rms", positions="rope", ffn="swiglu", num_registers=3, time_every=2)
    transformer = config.transformer()
    for field in dataclasses.fields(transformer):
        if hasattr(config, field.name) and field.name != "dtype":
            assert getattr(transformer, field.name) == getattr(config, field.name)
