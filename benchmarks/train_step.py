"""Measures the training step of the VQ-VAE tokenizer: step time, frames/s, compile time, FLOPs, MFU where the peak is known.

    python benchmarks/train_step.py [--quick] [--default_shape]

Small shape: batch 4 × 16 frames of 64×64×3, patch 16, dim 128, feed-forward 512, 2 blocks, 8 heads. `--default_shape` takes
the baseline's own (dim 512, batch 48), for accelerators. Each dtype compiles afresh, without the compilation cache. Figures
are medians over steps; the two dtypes' steps are interleaved, so that their ratio holds on a noisy machine. The last line is
one JSON object.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jasmine.baselines.maskgit.train_tokenizer_vqvae import Config, TokenizerTask
from jasmine.training.flops import model_flops, peak_flops
from jasmine.training.mesh import make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, abstract_state, initial_state
from jasmine.training.step import make_update
from jasmine.training.task import Keys

FRAME = (64, 64, 3)
DTYPES = ("float32", "bfloat16")


class Contender:
    """One compiled step with its state."""

    def __init__(self, config: Config):
        self.config = config
        mesh, rules = make_mesh(config.mesh), ShardingRules()
        task = TokenizerTask(config, FRAME)
        definition, optimizer = ModelDefinition(task), make_optimizer(config)
        abstract = abstract_state(definition, optimizer, mesh, rules, ema=False)
        begin = time.perf_counter()
        self.state = jax.block_until_ready(initial_state(task, definition, optimizer, abstract))
        self.init_seconds = time.perf_counter() - begin
        shape = (config.batch_size, config.seq_len, *FRAME)
        videos = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        sharding = NamedSharding(mesh, rules.spec(("batch",), shape[:1], mesh))
        self.batch = {"videos": jax.device_put(videos, sharding)}
        begin = time.perf_counter()
        lowered = make_update(task, definition, optimizer, mesh, rules, abstract).lower(self.state, self.batch)
        self.lower_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin

        def forward(params: Any, batch: Any) -> Any:
            return task.loss(definition.module(params), batch, Keys(jax.random.key(0)))

        self.flops = model_flops(forward, self.state.params, self.batch)
        self.times: list[float] = []

    def step(self) -> None:
        begin = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(metrics)
        self.times.append(time.perf_counter() - begin)

    def figures(self) -> dict[str, float | None]:
        step = statistics.median(self.times)
        peak = peak_flops(jax.devices()[0])
        return {
            "step_seconds": step,
            "step_seconds_min": min(self.times),
            "frames_per_second": self.config.batch_size * self.config.seq_len / step,
            "init_seconds": self.init_seconds,
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "model_gflops": self.flops / 1e9,
            "model_gflops_per_second": self.flops / step / 1e9,
            "mfu": None if peak is None else self.flops / step / (peak * jax.device_count()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 steps instead of 30")
    parser.add_argument(
        "--default_shape", action="store_true", help="the baseline's own shape instead of the small one"
    )
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full", "offload"))
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    shape: dict[str, Any] = {"data_dir": "unused", "remat": options.remat}
    if not options.default_shape:
        shape |= {"batch_size": 4, "model_dim": 128, "ffn_dim": 512, "num_blocks": 2}
    contenders = {dtype: Contender(Config(**shape, dtype=dtype)) for dtype in DTYPES}  # type: ignore[arg-type]
    for contender in contenders.values():
        contender.step()  # the first touches memory for the first time
        contender.times.clear()
    for _ in range(5 if options.quick else 30):
        for contender in contenders.values():
            contender.step()
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    for dtype, contender in contenders.items():
        result[dtype] = contender.figures()
        shown = {name: value for name, value in result[dtype].items() if value is not None}
        print(f"{dtype}: " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    result["bfloat16_over_float32_frames"] = (
        result["bfloat16"]["frames_per_second"] / result["float32"]["frames_per_second"]
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
