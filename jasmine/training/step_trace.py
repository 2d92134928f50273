"""The profiler's trace of a few steps (`--profile_steps a:b`), for TensorBoard and Perfetto."""

import tempfile
import uuid

import jax
from etils import epath

from jasmine.training import objects
from jasmine.training.distributed import say
from jasmine.training.task import Metrics


class StepTrace:
    """Begins and ends the trace as the steps go by.

    Args:
        window: the steps at which it begins and ends; None for no trace.
        run_dir: of the run. Where it is in a bucket the trace goes into a temporary folder of this machine.
    """

    def __init__(self, window: tuple[int, int] | None, run_dir: epath.Path):
        self._window = window
        self._running = False
        self._folder = run_dir / "profile"
        if objects.is_object(run_dir):  # the profiler writes to disks only
            self._folder = epath.Path(tempfile.gettempdir()) / f"jasmine-profile-{uuid.uuid4().hex}"

    def before(self, step: int) -> None:
        """The update from `step` to the next is about to be handed to the devices."""
        if self._window and self._window[0] <= step < self._window[1] and not self._running:
            # Without Python's frames: their hook kills threads that start meanwhile, such as those of a save.
            profiler = jax.profiler.ProfileOptions()
            profiler.python_tracer_level = 0
            jax.profiler.start_trace(str(self._folder), profiler_options=profiler)
            self._running = True

    def after(self, step: int, metrics: Metrics) -> None:
        """The update that leads to `step` and gives `metrics` was handed to them."""
        if self._window and self._running and step == self._window[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._running = False
            say(f"profiler trace of steps {self._window[0]} to {self._window[1]} in {self._folder}")

    def close(self) -> None:
        """Ends a trace that a stop fell into."""
        if self._running:
            jax.profiler.stop_trace()
