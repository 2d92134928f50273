"""What a sampler knows of the frames before the one it is making: keys and values in a cache, or the frames themselves.

A model is trained on windows of W frames, so it is never shown more than W at once, nor a place in time that it has not
seen. Within the first W frames the context of a frame is all frames before it. After that it begins at `window_start`: half
a window is dropped at a time, and the context holds between half a window and a whole one. `CachedContext` keeps two
caches that begin half a window apart; when the one in use is full, the other, half full, takes over, and the full one
begins anew. So every key and value was computed within a window that the model could have been trained on, whatever the
layers are (no drift of positions, nothing of frames that have left the window), and each frame costs the same however long
the video is: its refinement passes, and one pass over the finished frame for both caches at once.

`RecomputedContext` gives the same outputs by running the whole window for every pass, as the published Jasmine does. It is
there to test and to measure against.

Shape key:
    B: batch  T: frames  N: tokens in a frame  R: register tokens  W: frames in a window  M: model width
    G: heads of keys and values  D: size of a head
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jasmine.models.transformer import SpaceTimeTransformer, UnrolledTransformer

State = Any


def window_start(frame: jax.Array | int, window: int) -> Any:
    """The first frame of the context of `frame`: 0 while `frame` < W, later the next multiple of half a window."""
    half = window // 2
    later = half * ((frame - window) // half + 1)
    if isinstance(frame, int):
        return 0 if frame < window else later
    return jnp.where(frame < window, 0, later)


class Context(Protocol):
    """The frames of a video so far, as an immutable state that goes through `jax.lax` loops."""

    def begin(self, x_BTNM: jax.Array) -> State:
        """The state after the T frames of a prompt, T at least 1; embedded tokens at the model's width."""

    def open(self, state: State) -> State:
        """What the passes over the next frame need; call it once a frame, outside their loop."""

    def frame(self, opened: State, x_BNM: jax.Array) -> jax.Array:
        """The transformer's outputs (B, N, O) for the next frame."""

    def first_token(self, opened: State, x_B1M: jax.Array) -> tuple[jax.Array, State]:
        """Of a model that is causal in space: the output (B, O) at the frame's first token, and the frame so far."""

    def next_token(self, opened: State, so_far: State, x_B1M: jax.Array, index: jax.Array) -> tuple[jax.Array, State]:
        """The output at token `index`, given the tokens before it."""

    def commit(self, state: State, x_BNM: jax.Array) -> State:
        """The state with the finished frame appended."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of two streams of frames that begin half a window apart.

    Attributes:
        layers: for each time layer keys and values, each (2, B, R + N, G, W, D).
        num_frames: int32 scalar, frames so far.
    """

    layers: list[Any]
    num_frames: jax.Array


@dataclasses.dataclass(frozen=True)
class CachedContext:
    """Keys and values are kept; a pass costs one frame, or one token."""

    transformer: UnrolledTransformer
    window: int
    tokens: int
    """Tokens in a frame, without registers."""

    def begin(self, x_BTNM: jax.Array) -> Cache:
        B, T = x_BTNM.shape[:2]
        width = self.tokens + self.transformer.config.num_registers
        shape = (2, B, width, self.transformer.kv_heads, self.window, self.transformer.config.head_dim)
        dtype = self.transformer.config.dtype
        layers: list[Any] = [
            (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.transformer.num_time_layers)
        ]
        start = window_start(T, self.window)
        stream = (start // (self.window // 2)) % 2
        for begin, place in ((start, stream), (start + self.window // 2, 1 - stream)):
            if begin < T:
                _, kept = self.transformer.transformer.with_keys_values(x_BTNM[:, begin:])
                layers = [
                    tuple(
                        old.at[place, :, :, :, : T - begin].set(new[k].swapaxes(2, 3))
                        for old, new in zip(layers[k], kept, strict=True)
                    )
                    for k in range(len(layers))
                ]
        return Cache(layers, jnp.asarray(T, jnp.int32))

    def _places(self, cache: Cache) -> tuple[jax.Array, jax.Array]:
        """The stream in use, and the next frame's place in it."""
        start = window_start(cache.num_frames, self.window)
        return (start // (self.window // 2)) % 2, cache.num_frames - start

    def open(self, cache: Cache) -> tuple[list[Any], jax.Array]:
        stream, place = self._places(cache)
        # The one copy of the cache that a frame costs, so that its passes read arrays of their own.
        past = [tuple(jax.lax.dynamic_index_in_dim(a, stream, 0, False) for a in layer) for layer in cache.layers]
        return past, jnp.broadcast_to(place, past[0][0].shape[:1])

    def frame(self, opened: Any, x_BNM: jax.Array) -> jax.Array:
        past, place_B = opened
        return self.transformer.frame(x_BNM, past, place_B)[0]

    def first_token(self, opened: Any, x_B1M: jax.Array) -> tuple[jax.Array, State]:
        past, place_B = opened
        config = self.transformer.config
        width = self.tokens + config.num_registers
        shape = (x_B1M.shape[0], width, self.transformer.kv_heads, config.head_dim)
        empty = [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in self.transformer.blocks]
        y_B1O, so_far = self.transformer.tokens(x_B1M, past, place_B, empty, 0)
        return y_B1O[:, 0], so_far

    def next_token(self, opened: Any, so_far: State, x_B1M: jax.Array, index: jax.Array) -> tuple[jax.Array, State]:
        past, place_B = opened
        y_B1O, so_far = self.transformer.tokens(x_B1M, past, place_B, so_far, index)
        return y_B1O[:, 0], so_far

    def commit(self, cache: Cache, x_BNM: jax.Array) -> Cache:
        # By the context of the frame after: with an odd window, the frame that fills one stream begins it anew as well.
        start = window_start(cache.num_frames + 1, self.window)
        stream, place = (start // (self.window // 2)) % 2, cache.num_frames - start
        other = place - self.window // 2  # below 0: that stream has not begun, and place 0 is written again when it has
        B = x_BNM.shape[0]
        places_2 = jnp.where(jnp.arange(2) == stream, place, jnp.maximum(other, 0))
        places_P = jnp.repeat(places_2, B)  # both streams as one batch of twice the size
        flat = [tuple(a.reshape(2 * B, *a.shape[2:]) for a in layer) for layer in cache.layers]
        _, new = self.transformer.frame(jnp.tile(x_BNM, (2, 1, 1)), flat, places_P)
        rows_P = jnp.arange(2 * B)
        layers = [
            tuple(
                old.at[rows_P, :, :, places_P].set(added).reshape(2, B, *old.shape[1:])
                for old, added in zip(layer, layer_new, strict=True)
            )
            for layer, layer_new in zip(flat, new, strict=True)
        ]
        return Cache(layers, cache.num_frames + 1)


@dataclasses.dataclass(frozen=True)
class RecomputedContext:
    """The frames of the window are kept, embedded, and every pass runs all of them."""

    transformer: SpaceTimeTransformer
    window: int
    tokens: int

    def begin(self, x_BTNM: jax.Array) -> State:
        T = x_BTNM.shape[1]
        start = window_start(T, self.window)
        kept = x_BTNM[:, start:]
        padding = ((0, 0), (0, self.window - kept.shape[1]), (0, 0), (0, 0))
        return jnp.pad(kept, padding), jnp.asarray(T, jnp.int32)

    def open(self, state: State) -> State:
        x_BWNM, num_frames = state
        return x_BWNM, num_frames - window_start(num_frames, self.window)

    def frame(self, opened: Any, x_BNM: jax.Array) -> jax.Array:
        x_BWNM, place = opened
        x_BWNM = jax.lax.dynamic_update_index_in_dim(x_BWNM, x_BNM, place, 1)
        return jax.lax.dynamic_index_in_dim(self.transformer(x_BWNM), place, 1, False)

    def first_token(self, opened: Any, x_B1M: jax.Array) -> tuple[jax.Array, State]:
        x_BNM = jnp.pad(x_B1M, ((0, 0), (0, self.tokens - 1), (0, 0)))
        return self.frame(opened, x_BNM)[:, 0], x_BNM

    def next_token(self, opened: Any, so_far: State, x_B1M: jax.Array, index: jax.Array) -> tuple[jax.Array, State]:
        x_BNM = jax.lax.dynamic_update_slice_in_dim(so_far, x_B1M, index, 1)
        return jax.lax.dynamic_index_in_dim(self.frame(opened, x_BNM), index, 1, False), x_BNM

    def commit(self, state: State, x_BNM: jax.Array) -> State:
        x_BWNM, num_frames = state
        now, then = (window_start(frames, self.window) for frames in (num_frames, num_frames + 1))
        x_BWNM = jax.lax.dynamic_update_index_in_dim(x_BWNM, x_BNM, num_frames - now, 1)
        return jnp.roll(x_BWNM, now - then, axis=1), num_frames + 1
