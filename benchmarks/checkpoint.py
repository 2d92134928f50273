"""Measures checkpoints: how long a save holds training up, how long until it is on disk, how long a restore takes.

    python benchmarks/checkpoint.py [--quick]

The state is the VQ-VAE tokenizer's with AdamW's moments, at the small shape (dim 128, 2 blocks) and at the baseline's default
(dim 512, 4 blocks), on one device, on local disk; medians. `blocked` is what the training loop waits; `committed` runs beside
it. `replicated` is the small shape on eight devices of one process that all hold it, one of which gives it for writing; its
ratios are to Orbax's default, by which all of them give a part. The last line is one JSON object. `--quick` takes
the small shape only.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time

import jax
import orbax.checkpoint as ocp
from etils import epath

from jasmine.baselines.maskgit.train_tokenizer_vqvae import Config, Task
from jasmine.training import checkpoint
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.mesh import make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, abstract_state, initial_state
from jasmine.training.task import DataInfo

REPLICAS = 8
SMALL = Config(data_dir="unused", model_dim=128, ffn_dim=512, num_blocks=2)
DEFAULT = Config(data_dir="unused")


def measure(config: Config, saves: int, replicas: int = 1) -> dict[str, float]:
    """Figures of one shape, the whole of which each of some devices holds."""
    mesh = make_mesh(config.mesh, jax.devices()[:replicas])
    task = Task(config, DataInfo((64, 64, 3)))
    definition, optimizer = ModelDefinition(task), make_optimizer(config)
    abstract = abstract_state(definition, optimizer, mesh, ShardingRules(), ema=False)
    state = jax.block_until_ready(initial_state(task, definition, optimizer, abstract))
    checkpoint._as_saved(state, {})  # compiled alike for all
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    blocked, committed, restored = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpointer(epath.Path(folder) / "checkpoints", config)
        for step in range(1, saves + 2):
            begin = time.perf_counter()
            checkpoints.save(step, state, {"config": dataclasses.asdict(config)})
            blocked.append(time.perf_counter() - begin)
            checkpoints.wait()
            committed.append(time.perf_counter() - begin)
        for _ in range(3):
            begin = time.perf_counter()
            found = checkpoints.restore(abstract)
            assert found is not None
            jax.block_until_ready(found.state)
            restored.append(time.perf_counter() - begin)
        checkpoints.close()
    # The first save also starts Orbax's threads.
    return {
        "mebibytes": size / 2**20,
        "first_blocked_seconds": blocked[0],
        "blocked_seconds": statistics.median(blocked[1:]),
        "committed_seconds": statistics.median(committed[1:]),
        "restore_seconds": statistics.median(restored),
    }


def _share_as_orbax_does() -> None:
    ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(), override=True)


def compare_sharing(saves: int) -> dict[str, float]:
    """Figures of the small shape where several devices hold it, and what part they are of those of Orbax's default."""
    ours = measure(SMALL, saves, REPLICAS)
    ours_shared, checkpoint._share_writing = checkpoint._share_writing, _share_as_orbax_does
    default = measure(SMALL, saves, REPLICAS)
    checkpoint._share_writing = ours_shared
    ratios = {f"ratio_{name}": ours[name] / default[name] for name in ours if name.endswith("seconds")}
    return ours | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape only")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", REPLICAS)
    shapes = {"small": SMALL} if options.quick else {"small": SMALL, "default": DEFAULT}
    result = {name: measure(config, saves=5) for name, config in shapes.items()}
    if jax.device_count() >= REPLICAS:
        result["replicated"] = compare_sharing(saves=5)
    for name, figures in result.items():
        print(f"{name}: " + "  ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
