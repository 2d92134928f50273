"""A trained world: a dynamics run with its tokenizer and actions, opened to make videos.

world = load_world("runs/dynamics")
video = world.generate(prompt, actions, key=jax.random.key(0))
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jasmine.errors import UserError
from jasmine.training.dynamics_task import DynamicsTask
from jasmine.training.runs import TrainedRun, load_run

DYNAMICS_JOBS = ("train_dynamics_maskgit", "train_dynamics_causal", "train_dynamics_diffusion")


@dataclasses.dataclass(frozen=True)
class World:
    """What `load_world` opens.

    Attributes:
        run: the dynamics run.
        options: of its sampler (`jasmine.sampling.samplers`), by name.
        cached: keep keys and values of past frames; False computes them anew for every pass, for comparison.
    """

    run: TrainedRun
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cached: bool = True

    @property
    def task(self) -> DynamicsTask:
        """The run's task."""
        assert isinstance(self.run.task, DynamicsTask)
        return self.run.task

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its frames."""
        return self.run.data.frame_shape

    @property
    def seq_len(self) -> int:
        """Frames in the windows that it was trained on: no frame looks back further."""
        return self.run.config.seq_len

    @property
    def action_kind(self) -> str:
        """`true`, or where latent actions come from: `frozen`, `trained` along."""
        return self.run.config.action_kind

    @property
    def num_actions(self) -> int:
        """Actions are integers below this; -1 is an unknown one."""
        assert self.task.num_actions is not None
        return self.task.num_actions

    @functools.cached_property
    def _weights(self) -> tuple[Any, dict[str, Any]]:
        return self.run.params, {name: part.params for name, part in self.task.frozen.items()}

    def _modules(self, weights: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        params, frozen = weights
        modules = {name: self.task.frozen[name].definition.module(part) for name, part in frozen.items()}
        return self.run.definition.module(params), modules

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        """The jitted functions; jax keeps one program for each shape."""

        def infer(weights: Any, videos: jax.Array) -> jax.Array:
            model, frozen = self._modules(weights)
            W, T = self.seq_len, videos.shape[1]
            # Windows that share a frame: an action is read off the frame that it leads to.
            pieces = [videos[:, begin : begin + W] for begin in range(0, max(T - 1, 1), W - 1)]
            indices = [self.task.action_index(model, frozen, {"videos": piece}) for piece in pieces]
            return jnp.concatenate(indices, axis=1)

        def generate(weights: Any, prompt: jax.Array, actions: jax.Array, key: jax.Array) -> jax.Array:
            model, frozen = self._modules(weights)
            tokens = self._encode(frozen, prompt)
            made = self.task.generate(model, frozen, tokens, actions, key, cached=self.cached, **self.options)
            return self._windowed(frozen["tokenizer"].decode, made)

        def reconstruct(weights: Any, videos: jax.Array) -> jax.Array:
            _, frozen = self._modules(weights)
            return self._windowed(frozen["tokenizer"].decode, self._encode(frozen, videos))

        return {function.__name__: jax.jit(function) for function in (infer, generate, reconstruct)}

    def _encode(self, frozen: Any, videos: jax.Array) -> jax.Array:
        return self._windowed(lambda piece: self.task.tokens(frozen, {"videos": piece}), videos)

    def _windowed(self, function: Callable[[jax.Array], jax.Array], frames_BT: jax.Array) -> jax.Array:
        """Applies what is causal in time to windows of the trained length. Each but the first begins with half a window of
        frames that the one before has done: they are only there to be looked back at."""
        W, T = self.seq_len, frames_BT.shape[1]
        pieces, done = [function(frames_BT[:, :W])], min(W, T)
        while done < T:
            begin = done - W // 2
            pieces.append(function(frames_BT[:, begin : begin + W])[:, done - begin :])
            done = min(begin + W, T)
        return jnp.concatenate(pieces, axis=1)

    def infer_actions(self, videos_BTHWC: np.ndarray, actions_BT: np.ndarray | None = None) -> np.ndarray:
        """The actions that this world is told, int32 (B, T), entry t from frame t to frame t + 1: `actions_BT` themselves
        where it takes true ones, else those that its latent action model reads off the frames (the last is 0, unused).

        Raises:
            UserError: true actions are needed and not given.
        """
        if self.action_kind == "true":
            if actions_BT is None:
                raise UserError(f"{self.run.path} takes true actions, and the data has none; name the actions")
            return np.asarray(actions_BT, np.int32)
        index = np.asarray(self._compiled["infer"](self._weights, np.asarray(videos_BTHWC)))
        return np.pad(index, ((0, 0), (0, 1))).astype(np.int32)

    def generate(self, prompt_BTHWC: np.ndarray, actions_BS: np.ndarray, *, key: jax.Array) -> jax.Array:
        """A video of S frames.

        Args:
            prompt_BTHWC: uint8, its first T frames, T from 1 to S.
            actions_BS: int32; entry t leads from frame t to frame t + 1, the last is not used; -1 is an unknown action.
            key: of all random draws.

        Returns:
            float32 (B, S, H, W, C) in [0, 1]; the frames of the prompt as the tokenizer shows them.

        Raises:
            UserError: frames of another shape, actions out of range, or more prompt than video.
        """
        prompt, actions = np.asarray(prompt_BTHWC), np.asarray(actions_BS, np.int32)
        if prompt.shape[2:] != self.frame_shape or prompt.dtype != np.uint8:
            raise UserError(
                f"the prompt is {prompt.dtype} {prompt.shape}, and {self.run.path} makes uint8 frames of {self.frame_shape}"
            )
        if not 1 <= prompt.shape[1] <= actions.shape[1]:
            raise UserError(f"a prompt of {prompt.shape[1]} frames for a video of {actions.shape[1]}")
        if actions.max(initial=0) >= self.num_actions or actions.min(initial=0) < -1:
            raise UserError(
                f"actions from {actions.min()} to {actions.max()}: {self.run.path} knows 0 to {self.num_actions - 1}"
            )
        return self._compiled["generate"](self._weights, prompt, actions[:, :-1], key)

    def reconstruct(self, videos_BTHWC: np.ndarray) -> jax.Array:
        """uint8 frames as the tokenizer shows them, float32 in [0, 1]."""
        return self._compiled["reconstruct"](self._weights, np.asarray(videos_BTHWC))


def load_world(run: str, *, option: str = "RUN", cached: bool = True, **options: Any) -> World:
    """Opens a dynamics run by its directory or name.

    Args:
        option: what to call it in an error.
        options: of the sampler (`jasmine.sampling.samplers`), for example `temperature`.

    Raises:
        UserError: no such run, no checkpoint, or no dynamics run.
    """
    return World(load_run(run, option=option, jobs=DYNAMICS_JOBS), options, cached)
