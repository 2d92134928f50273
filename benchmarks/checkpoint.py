"""Measures checkpoints: how long a save holds training up, how long until it is on disk, how long a restore takes.

    python benchmarks/checkpoint.py [--quick]

The state is the VQ-VAE tokenizer's with AdamW's moments, at the small shape (dim 128, 2 blocks) and at the baseline's default
(dim 512, 4 blocks), on one device, on local disk; medians. `blocked` is what the training loop waits; `committed` runs beside
it. The last line is one JSON object. `--quick` takes the small shape only.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time

import jax
from etils import epath

from jasmine.baselines.maskgit.train_tokenizer_vqvae import Config, Task
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.mesh import make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, abstract_state, initial_state
from jasmine.training.task import DataInfo

SMALL = Config(data_dir="unused", model_dim=128, ffn_dim=512, num_blocks=2)
DEFAULT = Config(data_dir="unused")


def measure(config: Config, saves: int) -> dict[str, float]:
    """Figures of one shape."""
    mesh = make_mesh(config.mesh)
    task = Task(config, DataInfo((64, 64, 3)))
    definition, optimizer = ModelDefinition(task), make_optimizer(config)
    abstract = abstract_state(definition, optimizer, mesh, ShardingRules(), ema=False)
    state = jax.block_until_ready(initial_state(task, definition, optimizer, abstract))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape only")
    options = parser.parse_args()
    shapes = {"small": SMALL} if options.quick else {"small": SMALL, "default": DEFAULT}
    result = {name: measure(config, saves=5) for name, config in shapes.items()}
    for name, figures in result.items():
        print(f"{name}: " + "  ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
