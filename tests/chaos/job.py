"""The tokenizer's baseline as chaos runs it: steps take a while, and at points with a name it can be held to be disturbed.

Slow batches stand for a larger model: most of a step's time goes into nothing, so that faults find training and not only
its start. At a point (a save has begun, an old checkpoint is half deleted, a checkpoint is about to be read) the first
process that finds the file `arm-<point>` in `CHAOS_DIR` renames it to `held-<point>` and waits until that is gone: who
disturbs does it right there.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from etils import epath

from jasmine.baselines.maskgit.train_tokenizer_vqvae import Config, main
from jasmine.training import cli
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.data_feed import DataFeed
from tests.keep_programs import keep_programs

HOLD_SECONDS = 5.0
POINTS = ("saving", "deleting", "restoring")


def reach(point: str) -> None:
    """Waits at a point if that was asked for."""
    held = Path(os.environ["CHAOS_DIR"]) / f"held-{point}"
    try:
        held.with_name(f"arm-{point}").rename(held)
    except FileNotFoundError:
        return
    deadline = time.monotonic() + HOLD_SECONDS
    while held.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def disturb() -> None:
    """Puts the points into the training code, and the time into its steps."""
    get, save, restore = DataFeed.get, Checkpointer.save, Checkpointer.restore

    def slow_get(self: DataFeed, *args: Any, **options: Any) -> Any:
        batch = get(self, *args, **options)
        if batch is not None:
            time.sleep(float(os.environ.get("CHAOS_STEP_SECONDS", "0")))
        return batch

    def save_to_point(self: Checkpointer, *args: Any, **options: Any) -> Any:
        begun = save(self, *args, **options)
        reach("saving")
        return begun

    def restore_from_point(self: Checkpointer, *args: Any, **options: Any) -> Any:
        reach("restoring")
        return restore(self, *args, **options)

    DataFeed.get, Checkpointer.save, Checkpointer.restore = slow_get, save_to_point, restore_from_point  # type: ignore[method-assign]
    for kind in {type(epath.Path("/")), type(epath.Path("gs://bucket"))}:
        _hold_while_deleting(kind)


def _hold_while_deleting(kind: Any) -> None:
    rmtree = kind.rmtree

    def rmtree_past_point(self: Any, *args: Any, **options: Any) -> None:
        if self.parent.name == "checkpoints" and self.name.isdigit() and (self / "state").is_dir():
            for file in _files(self / "state")[::2]:
                file.unlink(missing_ok=True)
            reach("deleting")
        rmtree(self, *args, **options)

    kind.rmtree = rmtree_past_point


def _files(folder: Any) -> list[Any]:
    found = []
    for path in sorted(folder.iterdir()):
        found += _files(path) if path.is_dir() else [path]
    return found


if __name__ == "__main__":
    disturb()
    with contextlib.suppress(ImportError, AttributeError):  # it only saves time
        keep_programs()
    cli.run(main, Config)
