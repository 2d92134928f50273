"""Runs the training step of a published Jasmine script on request, for `train_step.py`; not a command of its own.

It is a process of its own because the published package is called `jasmine` too: `PYTHONPATH` must name the checkout. The
script's own `main` runs, unchanged, up to and through its training loop: its model, optimizer, step, and what that
step computes beside the loss are its own. Replaced are only what has no part in the step: its data (one batch of noise,
already in memory), the loading of the tokenizer's weights (random ones cost the same), its `jax.distributed.initialize()`
(which fails off-cluster), and `nnx.jit` by itself with a stopwatch.

Protocol: argument 1 is a JSON object, `module`, `dtype` and `args` (fields of the script's `Args`). Each line on standard
input asks for one step; each is answered on standard output by a JSON object of seconds. The first line of output comes
unasked and has the times of lowering and compiling. What the script prints is dropped.
"""

import contextlib
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

ANSWERS = sys.stdout


class TimedStep:
    """Stands for the script's jitted training step: each call waits to be asked for, and is timed to the end of its
    device work."""

    def __init__(self, jitted: Any):
        self.jitted = jitted

    def lower(self, *args: Any) -> Any:
        """Lowers and compiles, which is what the script does next, and answers with the times."""
        began, cpu_began = time.perf_counter(), time.process_time()
        lowered = self.jitted.lower(*args)
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        ended, cpu = time.perf_counter(), time.process_time() - cpu_began
        _answer(lower=lowered_at - began, compile=ended - lowered_at, compile_cpu=cpu)
        return SimpleNamespace(compile=lambda: compiled)

    def __call__(self, *args: Any) -> Any:
        if not sys.stdin.readline():
            sys.exit()
        began, cpu_began = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(self.jitted(*args))
        _answer(step=time.perf_counter() - began, step_cpu=time.process_time() - cpu_began)
        return result


def _answer(**fields: float) -> None:
    print(json.dumps(fields), file=ANSWERS, flush=True)


def _timed_jit(function: Callable | None = None, **options: Any) -> Any:
    if function is None:
        return lambda function: _timed_jit(function, **options)
    jitted = nnx.jit(function, **options)
    return TimedStep(jitted) if function.__name__ == "train_step" else jitted


def main() -> None:
    order = json.loads(sys.argv[1])
    jax.config.update("jax_enable_compilation_cache", False)
    distributed: Any = jax.distributed
    distributed.initialize = lambda: None
    script: Any = importlib.import_module(order["module"])
    script.Args.dtype = jnp.dtype(order["dtype"])
    args = script.Args(**order["args"], data_dir="unused", log=False)
    shape = (args.batch_size, args.seq_len, args.image_height, args.image_width, args.image_channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    script.args = args  # the diffusion script's loss reads the global of this name
    script.nnx = SimpleNamespace(**{**vars(nnx), "jit": _timed_jit})
    script.build_dataloader = lambda *_: itertools.repeat({"videos": noise})
    script.restore_genie_components = lambda optimizer, *_: optimizer
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        script.main(args)


if __name__ == "__main__":
    main()
