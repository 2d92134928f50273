"""Measures the training step of every baseline: step time, frames/s, compile time, FLOPs, MFU where the peak is known.

    python benchmarks/train_step.py [--quick] [--baselines JOB …] [--dtypes float32 bfloat16] [--steps 30]
        [--shape small|default|genie] [--reference DIR]

Small shape: batch 4 × 16 frames of 64×64×3, patch 16, dim 128, feed-forward 512, 2 blocks, 8 heads; dynamics have 4 blocks,
on a tokenizer and a latent action model of 2. `default` takes the shape of the baselines' defaults, `genie` about the
CoinRun shape of the Genie paper (arXiv 2402.15391, appendix F); both are for accelerators.

`--reference DIR` (a checkout of the published Jasmine) measures the same step of its own scripts beside ours, at the same
dtype, shape and data, in processes that sleep while ours steps; `reference_step.py` says how. Both sides train the same
parts from pixels: dynamics run the frozen tokenizer and train the latent action model along. What the published step does
on every call is in its time, as its users pay for it: metrics such as SSIM and top-k accuracy, decoding its predictions for
them, recomputing every block in the backward pass, moments and decay of frozen weights. Ours leaves such metrics to its
evaluation. Loading data, logging and checkpoints are in neither.

Every program is compiled afresh, without the compilation cache. The contenders take turns step by step and ratios are taken
round by round, so that they hold on a noisy machine: `frames_over_reference` is the median of the reference's seconds over
ours. What a user waits for compilation is `compile_over_reference`, our processor time over its (which other jobs on the
machine disturb less than the clock): of lowering and compiling before the first step, and of what the first steps took
beyond as many later ones. The published script compiles its step ahead, for its count of FLOPs, and throws that away: its
first call compiles again. `first_compile_over_reference` leaves the first steps out. Steps are timed to the end of their
device work; float32 products have jax's default precision on both sides. The last line is one JSON object.
"""

import abc
import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from jasmine.training.flops import peak_flops, step_flops
from jasmine.training.mesh import MeshConfig, make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.runs import TrainedRun
from jasmine.training.sharding import ShardingRules
from jasmine.training.state import ModelDefinition, TrainState, abstract_state, initial_state
from jasmine.training.step import make_update
from jasmine.training.task import BaseTask, DataInfo

DATA = DataInfo(frame_shape=(64, 64, 3))
DTYPES = ("float32", "bfloat16")
WARMUP_STEPS = 3  # the published script settles at its third


@dataclass(frozen=True)
class Shape:
    """Sizes of the models. `blocks`: of the encoder, and again of the decoder, in tokenizer and latent action model."""

    dim: int
    ffn_dim: int
    blocks: int
    dynamics_blocks: int
    patch: int
    batch: int
    tokenizer_batch: int


SHAPES = {
    "small": Shape(dim=128, ffn_dim=512, blocks=2, dynamics_blocks=4, patch=16, batch=4, tokenizer_batch=4),
    "default": Shape(dim=512, ffn_dim=2048, blocks=4, dynamics_blocks=6, patch=16, batch=36, tokenizer_batch=48),
    "genie": Shape(dim=512, ffn_dim=2048, blocks=8, dynamics_blocks=12, patch=4, batch=36, tokenizer_batch=48),
}
SEQ_LEN, LAM_PATCH = 16, 16
# Module under `jasmine.baselines`, the same in the published code -> the tokenizer that it needs, if any.
BASELINES = {
    "maskgit.train_tokenizer_vqvae": None,
    "diffusion.train_tokenizer_mae": None,
    "train_lam": None,
    "maskgit.train_dynamics_maskgit": "maskgit.train_tokenizer_vqvae",
    "maskgit.train_dynamics_causal": "maskgit.train_tokenizer_vqvae",
    "diffusion.train_dynamics_diffusion": "diffusion.train_tokenizer_mae",
}
QUICK = ("train_tokenizer_vqvae", "train_dynamics_maskgit")


def model_options(baseline: str, shape: Shape) -> dict[str, Any]:
    """Options of a tokenizer or the latent action model; both sides have the same names for them."""
    lam = baseline == "train_lam"
    return {
        "batch_size": shape.batch if lam else shape.tokenizer_batch,
        "model_dim": shape.dim,
        "ffn_dim": shape.ffn_dim,
        "num_blocks": shape.blocks,
        "patch_size": LAM_PATCH if lam else shape.patch,
    }


def dynamics_options(shape: Shape) -> dict[str, Any]:
    """Options of our dynamics; the tokenizer's come with it."""
    return {
        "batch_size": shape.batch,
        "model_dim": shape.dim,
        "ffn_dim": shape.ffn_dim,
        "num_blocks": shape.dynamics_blocks,
        "lam_dim": shape.dim,
        "lam_ffn_dim": shape.ffn_dim,
        "lam_num_blocks": shape.blocks,
        "lam_patch_size": LAM_PATCH,
    }


def reference_options(baseline: str, shape: Shape) -> dict[str, Any]:
    """Fields of the published script's `Args`."""
    if BASELINES[baseline] is None:
        return model_options(baseline, shape)
    parts = {"tokenizer": shape.blocks, "lam": shape.blocks, "dyna": shape.dynamics_blocks}
    options: dict[str, Any] = {"batch_size": shape.batch, "patch_size": shape.patch, "lam_patch_size": LAM_PATCH}
    for part, blocks in parts.items():
        options |= {f"{part}_dim": shape.dim, f"{part}_ffn_dim": shape.ffn_dim, f"{part}_num_blocks": blocks}
    if baseline == "diffusion.train_dynamics_diffusion":
        options["diffusion_denoise_steps"] = 64  # its default of 0 fails
    return options


@dataclass
class Times:
    """Seconds, all of them. `compile_cpu` is the processor time of lowering and compiling together, `warmup_cpu` that of
    the first steps."""

    lower: float
    compile: float
    compile_cpu: float
    warmup_cpu: float = 0.0
    steps: list[float] = field(default_factory=list)
    steps_cpu: list[float] = field(default_factory=list)

    @property
    def all_compile_cpu(self) -> float:
        """Processor time of compilation, wherever it took place."""
        return self.compile_cpu + self.warmup_cpu - WARMUP_STEPS * statistics.median(self.steps_cpu)


class Contender(abc.ABC):
    """A compiled training step with its state."""

    times: Times
    frames: int
    """Of a batch."""

    @abc.abstractmethod
    def step(self) -> tuple[float, float]:
        """Makes one step; the seconds that it took, and those of processor time."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees its memory."""

    def figures(self) -> dict[str, Any]:
        """What is reported of it."""
        step = statistics.median(self.times.steps)
        return {
            "step_seconds": step,
            "step_seconds_min": min(self.times.steps),
            "frames_per_second": self.frames / step,
            "lower_seconds": self.times.lower,
            "compile_seconds": self.times.compile,
            "compile_cpu_seconds": self.times.compile_cpu,
            "all_compile_cpu_seconds": self.times.all_compile_cpu,
        }


def begin(
    baseline: str, options: dict[str, Any], parts: dict[str, TrainedRun], mesh: Mesh, rules: ShardingRules
) -> tuple[BaseTask, TrainState, TrainState]:
    """A baseline's task, its state at step 0, and that state's shapes. `parts`: what it builds on."""
    module = importlib.import_module(f"jasmine.baselines.{baseline}")
    task = module.Task(module.Config(**options), DATA, parts)
    definition, optimizer = ModelDefinition(task), make_optimizer(task.config)
    abstract = abstract_state(definition, optimizer, mesh, rules, ema=False)
    return task, jax.block_until_ready(initial_state(task, definition, optimizer, abstract)), abstract


class Ours(Contender):
    """A baseline's step as the training loop compiles it."""

    def __init__(self, baseline: str, shape: Shape, dtype: str, flash_attention: bool, remat: str):
        mesh, rules = make_mesh(MeshConfig()), ShardingRules()
        common = {"seq_len": SEQ_LEN, "dtype": dtype, "use_flash_attention": flash_attention, "remat": remat}
        parts: dict[str, TrainedRun] = {}
        frozen: dict[str, Any] = {}
        if (tokenizer := BASELINES[baseline]) is not None:
            task, state, _ = begin(tokenizer, model_options(tokenizer, shape) | common, {}, mesh, rules)
            job = tokenizer.rpartition(".")[2]
            parts["tokenizer"] = TrainedRun(epath.Path("untrained"), job, task.config, DATA, (), task)
            frozen["tokenizer"] = state.params
        began = time.perf_counter()
        options = dynamics_options(shape) if tokenizer else model_options(baseline, shape)
        task, self.state, abstract = begin(baseline, options | common, parts, mesh, rules)
        self.init_seconds = time.perf_counter() - began
        size = (task.config.batch_size, task.config.seq_len, *DATA.frame_shape)
        self.frames = size[0] * size[1]
        videos = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        sharding = NamedSharding(mesh, rules.spec(("batch",), size[:1], mesh))
        self.inputs = (frozen, {"videos": jax.device_put(videos, sharding)})
        definition = ModelDefinition(task)
        self.flops = step_flops(task, definition, *self.inputs)
        began, cpu_began = time.perf_counter(), time.process_time()
        update = make_update(task, definition, make_optimizer(task.config), mesh, rules, abstract)
        lowered = update.lower(self.state, *self.inputs)
        lowered_at = time.perf_counter()
        self.compiled = lowered.compile()
        ended, cpu = time.perf_counter(), time.process_time() - cpu_began
        self.times = Times(lowered_at - began, ended - lowered_at, cpu)

    def step(self) -> tuple[float, float]:
        began, cpu_began = time.perf_counter(), time.process_time()
        self.state, metrics = self.compiled(self.state, *self.inputs)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began, time.process_time() - cpu_began

    def figures(self) -> dict[str, Any]:
        step, peak = statistics.median(self.times.steps), peak_flops(jax.devices()[0])
        return super().figures() | {
            "init_seconds": self.init_seconds,
            "model_gflops": self.flops / 1e9,
            "model_gflops_per_second": self.flops / step / 1e9,
            "mfu": None if peak is None else self.flops / step / (peak * jax.device_count()),
        }

    def close(self) -> None:
        for array in jax.tree.leaves((self.state, self.inputs)):
            array.delete()


class Reference(Contender):
    """The published script's step, in a process of its own."""

    def __init__(self, baseline: str, shape: Shape, dtype: str, flash_attention: bool, checkout: Path, python: str):
        options = reference_options(baseline, shape) | {"seq_len": SEQ_LEN, "use_flash_attention": flash_attention}
        self.baseline, self.frames = baseline, options["batch_size"] * SEQ_LEN
        order = {"module": f"jasmine.baselines.{baseline}", "dtype": dtype, "args": options}
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("reference_step.py")), json.dumps(order)],
            env={**os.environ, "PYTHONPATH": str(checkout), "FLAX_PYTREE_MODULE": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.times = Times(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                f"error: the published {self.baseline} ended with exit code {self.process.wait()}, for the reason above"
            )
        return json.loads(line)

    def step(self) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["step"], answer["step_cpu"]

    def close(self) -> None:
        self.process.communicate()


def take_turns(contenders: list[Contender], steps: int) -> None:
    """Fills in the contenders' times, one step of each in turn."""
    for contender in contenders:
        contender.times.warmup_cpu = sum(contender.step()[1] for _ in range(WARMUP_STEPS))
    for _ in range(steps):
        for contender in contenders:
            seconds, cpu = contender.step()
            contender.times.steps.append(seconds)
            contender.times.steps_cpu.append(cpu)


def compare(ours: Times, reference: Times) -> dict[str, float]:
    """Above 1 in frames and below 1 in compile time is better than the reference."""
    by_round = [theirs / mine for mine, theirs in zip(ours.steps, reference.steps, strict=True)]
    return {
        "frames_over_reference": statistics.median(by_round),
        "compile_over_reference": ours.all_compile_cpu / reference.all_compile_cpu,
        "first_compile_over_reference": ours.compile_cpu / reference.compile_cpu,
    }


def show(title: str, sides: dict[str, Any]) -> None:
    """Prints the figures of one baseline at one dtype, for people."""
    for side, values in sides.items():
        if isinstance(values, dict):
            shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if value is not None)
            print(f"{title} {side}: {shown}", flush=True)
        else:
            print(f"{title} {side} {values:.3g}", flush=True)


def main() -> None:
    names = {baseline.rpartition(".")[2]: baseline for baseline in BASELINES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two baselines, float32 alone, and 3 steps")
    parser.add_argument("--baselines", nargs="+", choices=names, metavar="JOB", help="default: all; of --quick, two")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="rounds that are timed")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full", "offload"), help="of ours")
    parser.add_argument(
        "--flash_attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cuDNN's attention, of both, where it can be had: on NVIDIA GPUs in bfloat16",
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="checkout of the published code to compare with")
    parser.add_argument(
        "--reference_python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter to run it with; default: this one",
    )
    options = parser.parse_args()
    if options.reference is not None:
        if not (options.reference / "jasmine" / "utils" / "train_utils.py").is_file():
            parser.error(
                f"--reference {options.reference} is no checkout of the published code: no jasmine/utils/train_utils.py"
            )
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both sides share an accelerator's memory
    jax.config.update("jax_enable_compilation_cache", False)
    shape = SHAPES[options.shape]
    on_gpu = jax.default_backend() == "gpu"
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "shape": asdict(shape),
        "baselines": {},
    }
    for name in options.baselines or (QUICK if options.quick else names):
        baseline = names[name]
        contenders: dict[tuple[str, str], Contender] = {}
        for dtype in DTYPES[:1] if options.quick else options.dtypes:
            flash = options.flash_attention and on_gpu and dtype == "bfloat16"
            contenders[dtype, "ours"] = Ours(baseline, shape, dtype, flash, options.remat)
            if options.reference is not None:
                contenders[dtype, "reference"] = Reference(
                    baseline, shape, dtype, flash, options.reference, options.reference_python
                )
        take_turns(list(contenders.values()), 3 if options.quick else options.steps)
        found: dict[str, Any] = {}
        for (dtype, side), contender in contenders.items():
            found.setdefault(dtype, {})[side] = contender.figures()
            contender.close()
        for dtype, sides in found.items():
            if options.reference is not None:
                sides |= compare(contenders[dtype, "ours"].times, contenders[dtype, "reference"].times)
            show(f"{name} {dtype}", sides)
        result["baselines"][name] = found
        jax.clear_caches()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
