"""Measures the samplers: frames/s with the cache of keys and values, against the same model computing its whole window anew
for every pass, which is what the published Jasmine does.

    python benchmarks/sampling.py [--quick] [--dims 128 512] [--batches 1 8] [--num_blocks 2] [--dtype float32]

16 tokens a frame (64×64 frames in patches of 16), windows of 16 frames, 8 heads, feed-forward four times the width, untrained
weights. Each sampler makes the frames 1 to 16 of a window from one given frame. MaskGIT: 25 steps, all of which the
published way runs, while ours leaves out those that fix no token (same result); diffusion: 16 steps, and 4 of a model with
shortcuts; causal: 16 tokens. The two ways take turns, so that their ratio holds on a noisy machine; figures are medians.
`flat` is the mean time of the frames far beyond the window over that of the first window's frames. The last line is one
JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jasmine.models.dynamics import DynamicsCausal, DynamicsDiffusion, DynamicsMaskGIT
from jasmine.models.transformer import TransformerConfig
from jasmine.sampling.samplers import (
    CausalSampler,
    DiffusionSampler,
    FrameSampler,
    MaskGITSampler,
    make_context,
    next_frame,
    rollout,
)

WINDOW, TOKENS, CODES, LATENT_DIM, LEVELS = 16, 16, 1024, 32, 64


SAMPLERS: dict[str, Callable[[Any], FrameSampler]] = {
    "maskgit": lambda model: MaskGITSampler(model, steps=25),
    "causal": CausalSampler,
    "diffusion": lambda model: DiffusionSampler(model, steps=16),
    "diffusion_shortcut": DiffusionSampler,
}


class EveryStep(MaskGITSampler):
    """Runs as many passes as there are steps, as the published sampler does; those at first fix no token."""

    def schedule(self, num_tokens: int) -> np.ndarray:
        fixing = super().schedule(num_tokens)
        return np.concatenate([np.full(self.steps - len(fixing), num_tokens, fixing.dtype), fixing])


def make_model(name: str, config: TransformerConfig) -> nnx.Module:
    """An untrained model."""
    rngs = nnx.Rngs(0)
    if name == "maskgit":
        return DynamicsMaskGIT(num_latents=CODES, transformer=config, rngs=rngs)
    if name == "causal":
        return DynamicsCausal(num_latents=CODES, look_back=True, transformer=config, rngs=rngs)
    shortcut = name == "diffusion_shortcut"
    return DynamicsDiffusion(
        latent_dim=LATENT_DIM, denoise_steps=LEVELS, shortcut=shortcut, transformer=config, rngs=rngs
    )


PUBLISHED: dict[str, Callable[[Any], FrameSampler]] = {"maskgit": lambda model: EveryStep(model, steps=25)}


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes, to its end."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def measure(name: str, config: TransformerConfig, batch: int, rounds: int, uncached_frames: int) -> dict[str, float]:
    """Frames/s of both ways, their ratio, and how flat the cost of a frame is."""
    make_sampler = SAMPLERS[name]
    published_sampler = PUBLISHED.get(name, make_sampler)
    graph, weights = nnx.split(make_model(name, config))
    if name.startswith("diffusion"):
        prompt = jax.random.normal(jax.random.key(1), (batch, 1, TOKENS, LATENT_DIM))
    else:
        prompt = jax.random.randint(jax.random.key(1), (batch, 1, TOKENS), 0, CODES)
    actions = jax.random.normal(jax.random.key(2), (batch, WINDOW, config.model_dim))
    key = jax.random.key(3)

    def video(cached: bool, frames: int) -> Callable[[], Any]:
        def run(weights: Any, prompt: jax.Array, actions: jax.Array) -> jax.Array:
            sampler = (make_sampler if cached else published_sampler)(nnx.merge(graph, weights))
            return rollout(sampler, prompt, actions, key, window=WINDOW, cached=cached)

        compiled = jax.jit(run).lower(weights, prompt, actions[:, : 1 + frames]).compile()
        return lambda: compiled(weights, prompt, actions[:, : 1 + frames])

    ways = {
        "cached": (video(True, WINDOW - 1), WINDOW - 1),
        "recomputed": (video(False, uncached_frames), uncached_frames),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for function, _ in ways.values():
        seconds(function)
    for _ in range(rounds):
        for way, (function, frames) in ways.items():
            times[way].append(seconds(function) / frames)
    result = {f"{way}_frames_per_second": batch / statistics.median(times[way]) for way in ways}
    result["speedup"] = statistics.median(
        slow / fast for slow, fast in zip(times["recomputed"], times["cached"], strict=True)
    )

    def begin(weights: Any, prompt: jax.Array) -> Any:
        sampler = make_sampler(nnx.merge(graph, weights))
        return make_context(sampler, TOKENS, WINDOW).begin(sampler.embed_prompt(prompt, actions[:, :1], key))

    def more(weights: Any, state: Any, previous: jax.Array) -> Any:
        sampler = make_sampler(nnx.merge(graph, weights))
        context = make_context(sampler, TOKENS, WINDOW)
        return next_frame(sampler, context, state, previous, actions[:, 1], jax.random.fold_in(key, state.num_frames))

    state, frame = jax.jit(begin)(weights, prompt), prompt[:, 0]
    step = jax.jit(more)
    each: list[float] = []
    for _ in range(6 * WINDOW):
        start = time.perf_counter()
        state, frame = jax.block_until_ready(step(weights, state, frame))
        each.append(time.perf_counter() - start)
    # Means: a frame in eight also computes half a window anew.
    within, beyond = statistics.mean(each[2:WINDOW]), statistics.mean(each[4 * WINDOW :])
    return result | {"interactive_frame_seconds": beyond, "flat": beyond / within}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="dim 128, batch 1, two blocks, two rounds")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num_blocks", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--models", nargs="+", default=["maskgit", "causal", "diffusion", "diffusion_shortcut"])
    options = parser.parse_args()
    dims, batches, num_blocks = options.dims, options.batches, options.num_blocks
    if options.quick:
        dims, batches, num_blocks = [128], [1], 2
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "num_blocks": num_blocks, "dtype": options.dtype}
    for dim in dims:
        config = TransformerConfig(
            model_dim=dim, ffn_dim=4 * dim, num_blocks=num_blocks, num_heads=8, dtype=jnp.dtype(options.dtype)
        )
        for batch in batches:
            for name in options.models:
                # Recomputing takes long, and all its frames cost the same: a few tell its speed.
                figures = measure(name, config, batch, 2 if options.quick else 3, uncached_frames=1)
                result[f"{name}_dim{dim}_batch{batch}"] = figures
                print(
                    f"{name:18s} dim {dim} batch {batch}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()),
                    flush=True,
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
