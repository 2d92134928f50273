"""From the host's pipeline to the devices: the next global batch is there before the step that uses it starts."""

import queue
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jasmine.data.episodes import Episodes
from jasmine.data.pipeline import batches
from jasmine.data.tokens import TokenDataset
from jasmine.training.config import TrainConfig
from jasmine.training.sharding import ShardingRules
from jasmine.training.task import Batch, DataInfo

DEVICE_BATCHES_AHEAD = 2
CLOSE_SECONDS = 5


def abstract_batch(
    data: DataInfo, config: TrainConfig, mesh: Mesh, rules: ShardingRules
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a `DataFeed` of such data gives: shapes, dtypes and shardings."""
    clip = (config.batch_size, config.seq_len)
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {"videos": ((*clip, *data.frame_shape), np.uint8)}
    if data.tokens is not None:
        arrays = {
            data.tokens.kind: (
                (*clip, *data.tokens.shape),
                {"tokens": np.int32, "latents": np.float32}[data.tokens.kind],
            )
        }
        if data.tokens.lam is not None:
            arrays["latent_actions"] = (clip, np.int32)
    if data.num_actions is not None:
        arrays["actions"] = (clip, np.int32)
    if config.labelled_share() < 1:
        arrays["labelled"] = (clip[:1], np.bool_)
    sharding = NamedSharding(mesh, rules.spec(("batch",), clip[:1], mesh))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in arrays.items()}


class DataFeed:
    """Iterates over global batches on the devices, from `start_step` on, for ever.

    Each process reads only the rows that its devices need; a thread reads, cuts and copies ahead of the step. What a
    batch holds follows from the seed and the step alone (`jasmine.data.sampling`), and from which batches are left out.
    """

    def __init__(
        self,
        dataset: Episodes | TokenDataset,
        config: TrainConfig,
        mesh: Mesh,
        rules: ShardingRules,
        *,
        seed: int,
        start_step: int = 0,
        stop_step: int | None = None,
        left_out: Collection[int] = (),
    ):
        self._sharding = NamedSharding(mesh, rules.spec(("batch",), (config.batch_size,), mesh))
        shards = self._sharding.addressable_devices_indices_map((config.batch_size,))
        self._device_rows = {
            device: range(*index[0].indices(config.batch_size)) for device, index in shards.items() if index is not None
        }
        # Devices of a process may hold the same rows (tensor parallel) and, on some pods, rows that are not neighbours.
        self._rows = np.unique(np.concatenate([np.array(rows) for rows in self._device_rows.values()]))
        self._batch_size = config.batch_size
        self._source = batches(
            dataset,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=seed,
            rows=self._rows,
            start_step=start_step,
            num_workers=config.num_workers,
            label_fraction=config.labelled_share(),
            stop_step=stop_step,
            left_out=left_out,
        )
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(DEVICE_BATCHES_AHEAD)
        self._closed = threading.Event()
        self.waited_seconds = 0.0
        self._thread = threading.Thread(target=self._fill, name="data-feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises what the pipeline raised."""
        batch = None
        while batch is None:
            batch = self.get(timeout=60)
        return batch

    def get(self, timeout: float) -> Batch | None:
        """The next batch, or None if there is none within `timeout` seconds. `waited_seconds` adds up what callers waited."""
        start = time.perf_counter()
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        finally:
            self.waited_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops reading; batches in flight are dropped. A read that hangs is left behind: its thread is a daemon."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _fill(self) -> None:
        try:
            for local in self._source:
                self._put({name: self._to_devices(array) for name, array in local.items()})
                if self._closed.is_set():
                    return
        except BaseException as error:  # the consumer raises it where the user sees it
            self._put(error)
        finally:
            self._source.close()

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _to_devices(self, local: np.ndarray) -> jax.Array:
        pieces = []
        for device, rows in self._device_rows.items():
            first = int(np.searchsorted(self._rows, rows.start))
            pieces.append(jax.device_put(local[first : first + len(rows)], device))
        shape = (self._batch_size, *local.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, pieces)
