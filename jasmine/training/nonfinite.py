"""A loss or gradient norm that is not a finite number: noticed without holding training up, and never saved.

Metrics of a step come to the host while later steps are under way, so a bad step is found up to two steps late. What is
done about it starts from the last good checkpoint, and before anything is logged, evaluated or saved all steps so far are
waited for: nothing on disk ever comes after a bad step. Metrics are the same on all processes, and are looked at in the same
places of the loop, so all of them come to the same end of it without a word.

Steps are counted here as in metrics.jsonl: step N is the update from N - 1 to N. The batches that a run leaves out belong to
what it is, wherever it goes on; they stand in each checkpoint and, as soon as one is left out, in `nonfinite/left_out.json`.
"""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.data.episodes import Episodes
from jasmine.data.pipeline import record_ids
from jasmine.data.records import WindowId
from jasmine.data.sampling import batch_of
from jasmine.data.tokens import TokenDataset
from jasmine.errors import EXIT_WOULD_REPEAT, NotFiniteError, UserError
from jasmine.training import run_files
from jasmine.training.config import TrainConfig
from jasmine.training.task import Metrics

WATCHED = ("loss", "grad_norm")
FOLDER = "nonfinite"


class NotFinite(Exception):
    """Step `step` is not finite, in the metrics of `values`, or where there are none, in the part of the state `where`."""

    def __init__(self, step: int, values: Mapping[str, float], where: str = ""):
        self.step, self.values, self.where = step, values, where
        told = ", ".join(f"{name} {value:g}" for name, value in values.items())
        super().__init__(f"step {step}: " + (told or f"{where} is not finite after it"))


class FiniteWatch:
    """The metrics of steps that are under way.

    Args:
        config: `on_nonfinite` and its bound.
        on_skipped: told of each update that the compiled step has left out.
    """

    def __init__(self, config: TrainConfig, on_skipped: Callable[[NotFinite], None]):
        self._skips, self._most = config.on_nonfinite == "skip", config.max_skipped
        self._on_skipped = on_skipped
        self._skipped_in_a_row = 0
        self._under_way: deque[tuple[int, list[jax.Array]]] = deque()

    def add(self, step: int, metrics: Metrics) -> None:
        """Begins to watch a step that has been handed to the devices."""
        watched = [metrics[name] for name in WATCHED]
        for value in watched:
            value.copy_to_host_async()
        self._under_way.append((step, watched))

    def settle(self, ahead: int = 0) -> None:
        """Waits for all steps but the last `ahead`.

        Raises:
            NotFinite: one of them is not, and may not be skipped.
        """
        while len(self._under_way) > ahead:
            step, watched = self._under_way.popleft()
            values = [float(np.asarray(value)) for value in watched]
            if all(map(math.isfinite, values)):
                self._skipped_in_a_row = 0
                continue
            found = NotFinite(step, dict(zip(WATCHED, values, strict=True)))
            self._skipped_in_a_row += 1
            if not self._skips or self._skipped_in_a_row > self._most:
                raise found
            self._on_skipped(found)

    def forget(self) -> None:
        """Drops what is under way: the run goes back to an earlier step."""
        self._under_way.clear()


class StateCheck:
    """Compiled once: looks for a value that is not finite in a whole state, which a finite loss may have led to."""

    def __init__(self, mesh: Mesh):
        replicated = NamedSharding(mesh, PartitionSpec())
        self._check = jax.jit(
            lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]), out_shardings=replicated
        )

    def __call__(self, state: Any) -> str:
        """The name of the first array of `state` that is not finite; empty if all are."""
        flat = jax.tree_util.tree_flatten_with_path(state)[0]
        floats = [(path, leaf) for path, leaf in flat if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        bad = np.flatnonzero(~np.asarray(self._check([leaf for _, leaf in floats])))
        return name_of(floats[bad[0]][0]) if len(bad) else ""


def name_of(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree with dots: `params.encoder.kernel`."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def windows_of(
    dataset: Episodes | TokenDataset, config: TrainConfig, step: int, left_out: Collection[int]
) -> list[WindowId]:
    """Where the windows of the batch of step `step` (counted from 1) lie, in order."""
    return record_ids(
        dataset,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        step=step - 1,
        left_out=left_out,
    )


def describe(window: WindowId) -> str:
    """A window for people."""
    return f"{window.file} record {window.record} (episode {window.episode}, frame {window.start})"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is known of a step that is not finite.

    Attributes:
        found: the step and its values.
        batch: the number of its batch.
        windows: of the batch, in order.
        path: of the file that holds all this.
    """

    found: NotFinite
    batch: int
    windows: list[WindowId]
    path: epath.Path

    @classmethod
    def of(
        cls,
        found: NotFinite,
        run_dir: epath.Path,
        dataset: Episodes | TokenDataset,
        config: TrainConfig,
        left_out: Collection[int],
    ) -> "Finding":
        """Needs no data, but the dataset's index: which windows a batch is made of follows from the step."""
        batch = batch_of(found.step - 1, left_out)
        again = "" if batch == found.step - 1 else f"-batch-{batch}"
        path = run_dir / FOLDER / f"step-{found.step}{again}.json"
        return cls(found, batch, windows_of(dataset, config, found.step, left_out), path)

    def write(self, config: TrainConfig, action: str) -> None:
        """Writes the file. Values that are not finite are text in it: JSON has no numbers for them."""
        found = self.found
        values = {name: value if math.isfinite(value) else str(value) for name, value in found.values.items()}
        record = {"step": found.step, "batch": self.batch, **values, "where": found.where, "action": action}
        record |= {"data_dir": config.data_dir, "seed": config.seed, "seq_len": config.seq_len}
        head = json.dumps(record, indent=1).removesuffix("\n}")
        windows = ",\n".join(f"  {json.dumps(dataclasses.asdict(window))}" for window in self.windows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        run_files.write_atomically(self.path, f'{head},\n "windows": [\n{windows}\n ]\n}}\n'.encode())

    def error(self, config: TrainConfig, left_out: Collection[int], checkpoints: Sequence[int]) -> NotFiniteError:
        """What a user is told when the run stops for it; `checkpoints`: the steps of those that the run has."""
        bound = {
            "stop": "",
            "skip": f" ({config.max_skipped} in a row were skipped, --max_skipped)",
            "rollback": f" ({len(left_out)} batches have been left out, --max_rollbacks)",
        }[config.on_nonfinite]
        last_good = f"step {checkpoints[-1]}" if checkpoints else "none yet"
        return NotFiniteError(
            f"{self.found}{bound}; the last good checkpoint is {last_good}. The windows of its batch, first "
            f"{describe(self.windows[0])}, are in {self.path}; --replay_step={self.found.step} shows where it goes wrong, "
            f"--on_nonfinite=skip or rollback goes on (exit code {EXIT_WOULD_REPEAT})"
        )


def read_left_out(run_dir: epath.Path) -> tuple[int, ...]:
    """The numbers of the batches that a run leaves out.

    Raises:
        UserError: the file that says so is damaged; without it the run would be another one.
    """
    path = run_dir / FOLDER / "left_out.json"
    if not path.exists():
        return ()
    try:
        return tuple(int(batch) for batch in json.loads(path.read_text())["batches"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is damaged: expected {{"batches": [numbers]}}; restore it, or delete it to use all'
        ) from error


def write_left_out(run_dir: epath.Path, batches: Collection[int]) -> None:
    """Puts down the batches that a run leaves out from now on."""
    path = run_dir / FOLDER / "left_out.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run_files.write_atomically(path, (json.dumps({"batches": sorted(batches)}) + "\n").encode())


def left_out_before(step: int, left_out: Collection[int]) -> tuple[int, ...]:
    """The batches that were left out for steps before `step`: with them it takes the batch that it took at first."""
    return tuple(batch for count, batch in enumerate(sorted(left_out)) if batch - count < step - 1)
