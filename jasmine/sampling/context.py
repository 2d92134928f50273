"""What a sampler knows of the frames before the one it is making: keys and values in a cache, or the frames themselves.

A model is trained on windows of W frames, so it is never shown more than W at once, nor a place in time that it has not
seen. Within the first W frames the context of a frame is all frames before it. After that it begins at `window_start`: half
a window is dropped at a time, and the context holds between half a window and a whole one. `CachedContext` keeps the
embedded frames of the window beside their keys and values; when half of them are dropped, those of the other half are
computed anew, in one pass over all of them. So every key and value was computed within a window that the model could have
been trained on, whatever the layers are (no drift of positions, nothing of frames that have left the window), and the cost
of a frame does not depend on how long the video is: its refinement passes, one pass over the finished frame (none where
the sampler's own passes made its keys and values), and twice a window the pass over half of it.

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

from jasmine.models.transformer import KeyValue, SpaceTimeTransformer, UnrolledTransformer

State = Any
Made = list[KeyValue]
"""Keys and values of tokens of a new frame, (B, S, G, D), for each time layer; a context without a cache makes none."""


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

    def first_token(self, opened: State, x_B1M: jax.Array) -> tuple[jax.Array, State, Made]:
        """Of a model that is causal in space: the output (B, O) at the frame's first token, the frame so far, and what
        the pass made that `commit` can use."""

    def next_token(
        self, opened: State, so_far: State, x_B1M: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, State, Made]:
        """The same at token `index`, given the tokens before it."""

    def commit(self, state: State, x_BNM: jax.Array, made: Made | None = None) -> State:
        """The state with the finished frame appended. `made`: what the passes over its tokens made, along axis 1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The frames of the window, and their keys and values.

    Attributes:
        x_BWNM: embedded frames at their places in the window.
        layers: for each time layer keys and values, each (B, R + N, G, W, D).
        num_frames: int32 scalar, frames of the video so far.
    """

    x_BWNM: jax.Array
    layers: list[KeyValue]
    num_frames: jax.Array

    def place(self, window: int) -> jax.Array:
        """The next frame's place in its window."""
        return self.num_frames - window_start(self.num_frames, window)


@dataclasses.dataclass(frozen=True)
class CachedContext:
    """Keys and values are kept; a pass costs one frame, or one token."""

    transformer: UnrolledTransformer
    window: int
    tokens: int
    """Tokens in a frame, without registers."""

    def begin(self, x_BTNM: jax.Array) -> Cache:
        T = x_BTNM.shape[1]
        kept = x_BTNM[:, window_start(T, self.window) :]
        return Cache(_fill(kept, self.window, 1), self._layers(kept), jnp.asarray(T, jnp.int32))

    def _layers(self, x_BTNM: jax.Array) -> list[KeyValue]:
        """Keys and values of frames from the window's start on, in arrays that hold a whole window."""
        _, stacked = self.transformer.transformer.with_keys_values(x_BTNM)
        filled = [_fill(a.swapaxes(3, 4), self.window, 4) for a in stacked]
        return [(filled[0][k], filled[1][k]) for k in range(self.transformer.num_time_layers)]

    def open(self, cache: Cache) -> tuple[list[KeyValue], jax.Array]:
        return cache.layers, jnp.broadcast_to(cache.place(self.window), cache.x_BWNM.shape[:1])

    def frame(self, opened: Any, x_BNM: jax.Array) -> jax.Array:
        past, place_B = opened
        return self.transformer.frame(x_BNM, past, place_B)[0]

    def first_token(self, opened: Any, x_B1M: jax.Array) -> tuple[jax.Array, State, Made]:
        past, place_B = opened
        config = self.transformer.config
        width = self.tokens + config.num_registers
        shape = (x_B1M.shape[0], width, self.transformer.kv_heads, config.head_dim)
        empty = [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in self.transformer.blocks]
        y_B1O, so_far, made = self.transformer.tokens(x_B1M, past, place_B, empty, 0)
        return y_B1O[:, 0], so_far, made

    def next_token(
        self, opened: Any, so_far: State, x_B1M: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, State, Made]:
        past, place_B = opened
        y_B1O, so_far, made = self.transformer.tokens(x_B1M, past, place_B, so_far, index)
        return y_B1O[:, 0], so_far, made

    def commit(self, cache: Cache, x_BNM: jax.Array, made: Made | None = None) -> Cache:
        place, half = cache.place(self.window), self.window // 2
        x_BWNM = jax.lax.dynamic_update_index_in_dim(cache.x_BWNM, x_BNM, place, 1)

        def append() -> tuple[jax.Array, list[KeyValue]]:
            new = self.transformer.frame(x_BNM, *self.open(cache))[1] if made is None else made
            layers = [
                tuple(jax.lax.dynamic_update_index_in_dim(*both, place, 3) for both in zip(old, added, strict=True))
                for old, added in zip(cache.layers, new, strict=True)
            ]
            return x_BWNM, layers

        def drop_half() -> tuple[jax.Array, list[KeyValue]]:
            return _fill(x_BWNM[:, half:], self.window, 1), self._layers(x_BWNM[:, half:])

        x_BWNM, layers = jax.lax.cond(place == self.window - 1, drop_half, append)
        return Cache(x_BWNM, layers, cache.num_frames + 1)


def _fill(array: jax.Array, size: int, axis: int) -> jax.Array:
    """Zeros behind, up to `size`."""
    return jnp.pad(array, [(0, size - n if k == axis else 0) for k, n in enumerate(array.shape)])


@dataclasses.dataclass(frozen=True)
class RecomputedContext:
    """The frames of the window are kept, embedded, and every pass runs all of them."""

    transformer: SpaceTimeTransformer
    window: int
    tokens: int

    def begin(self, x_BTNM: jax.Array) -> State:
        T = x_BTNM.shape[1]
        start = window_start(T, self.window)
        return _fill(x_BTNM[:, start:], self.window, 1), jnp.asarray(T, jnp.int32)

    def open(self, state: State) -> State:
        x_BWNM, num_frames = state
        return x_BWNM, num_frames - window_start(num_frames, self.window)

    def frame(self, opened: Any, x_BNM: jax.Array) -> jax.Array:
        x_BWNM, place = opened
        x_BWNM = jax.lax.dynamic_update_index_in_dim(x_BWNM, x_BNM, place, 1)
        return jax.lax.dynamic_index_in_dim(self.transformer(x_BWNM), place, 1, False)

    def first_token(self, opened: Any, x_B1M: jax.Array) -> tuple[jax.Array, State, Made]:
        x_BNM = _fill(x_B1M, self.tokens, 1)
        return self.frame(opened, x_BNM)[:, 0], x_BNM, []

    def next_token(
        self, opened: Any, so_far: State, x_B1M: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, State, Made]:
        x_BNM = jax.lax.dynamic_update_slice_in_dim(so_far, x_B1M, index, 1)
        return jax.lax.dynamic_index_in_dim(self.frame(opened, x_BNM), index, 1, False), x_BNM, []

    def commit(self, state: State, x_BNM: jax.Array, made: Made | None = None) -> State:
        x_BWNM, num_frames = state
        now, then = (window_start(frames, self.window) for frames in (num_frames, num_frames + 1))
        x_BWNM = jax.lax.dynamic_update_index_in_dim(x_BWNM, x_BNM, num_frames - now, 1)
        return jnp.roll(x_BWNM, now - then, axis=1), num_frames + 1
