"""Feeds the batches of consecutive steps, read ahead by threads or worker processes.

Grain's element i is the whole local batch of step `start_step + i`, read in one call: what an element is follows from
(seed, step) alone, so threads, workers and prefetching change when a batch is read, never what is in it or the order.

Invariants: a process reads only its rows of the global batch; at most `prefetch` batches wait in memory (with worker
processes: at least one in each, and up to three more of each on their way); worker processes never see the signals by
which a cluster asks a job to save, since the trainer needs them until it has, and they die with the process that
started them.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Protocol, Self

import grain
import numpy as np
from absl import flags

from jasmine.data.episodes import EpisodeDataset, Episodes
from jasmine.data.read_ahead import ReadAhead
from jasmine.data.records import WindowId
from jasmine.data.sampling import WindowSampler, permute
from jasmine.data.tokens import TokenDataset
from jasmine.errors import UserError

_CLUSTER_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
_ENDLESS = 2**60
_LOTS = 2**62


class BatchIterator(Protocol):
    """Batches without end; `close` ends the threads and processes behind it."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def batches(
    dataset: Episodes | TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: slice | np.ndarray | None = None,
    start_step: int = 0,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    label_fraction: float = 1.0,
    stop_step: int | None = None,
    left_out: Collection[int] = (),
) -> BatchIterator:
    """The batches of steps `start_step`, `start_step + 1`, … without end.

    Args:
        dataset: an opened split, of frames or of tokens.
        seq_len: frames in a window.
        batch_size: windows in the global batch, over all processes.
        seed: of the order of windows, and of which episodes are labelled.
        rows: the share of the global batch that this process reads, a slice or sorted row numbers; None for all of it.
        start_step: the step of the first batch.
        num_workers: worker processes that read; 0 reads in this process. The program's main module must then be
            importable without side effects (the `__main__` guard).
        num_threads: threads that read, in each process; 0 reads when a batch is asked for. More threads hide the
            latency of slow storage; one is enough for the page cache.
        prefetch: batches to have ready.
        label_fraction: the share of episodes whose actions may be used; below 1, batches say which do (`is_labelled`).
        stop_step: the batch of this step and later ones will not be asked for: shards from a bucket that only these need
            are not fetched ahead. None: there is no such step.
        left_out: numbers of batches that no step takes (`jasmine.data.sampling.batch_of`).

    Returns:
        An iterator over {"videos": uint8 (b, seq_len, H, W, C)}, b the number of rows; where the dataset has actions,
        {"actions": int32 (b, seq_len, *action_shape)}; with a `label_fraction` below 1, {"labelled": bool (b,)}. Of a
        token dataset there are no videos, but what `TokenDataset.read_windows` returns.

    Raises:
        UserError: no episode is as long as a window, tokens are of windows of another length, or an option is out of
            range. Iterating raises it for data that turns out damaged.
    """
    if not 0 <= label_fraction <= 1:
        raise UserError(f"--label_fraction={label_fraction}: give a share of the episodes, from 0 to 1")
    if isinstance(dataset, TokenDataset):
        dataset.check_seq_len(seq_len)
    sampler = WindowSampler(dataset.lengths, seq_len, seed, source=dataset.path, left_out=left_out)
    source = _StepSource(
        dataset, sampler, batch_size, slice(None) if rows is None else rows, start_step, label_fraction
    )
    ahead = max(1, prefetch // max(1, num_workers))
    read_options = grain.ReadOptions(
        num_threads=min(num_threads, ahead), prefetch_buffer_size=ahead if num_threads else 0
    )
    pipeline = grain.MapDataset.source(source).to_iter_dataset(read_options)
    if isinstance(dataset, EpisodeDataset | TokenDataset) and dataset.staged is not None:
        # Here, not in the workers: what they need is fetched in the order of steps.
        being_read = ahead * max(1, num_workers) if num_threads else 1
        read_ahead = ReadAhead(
            dataset.staged,
            lambda step: dataset.shards_of(source.windows(step)[0]),
            start_step,
            being_read,
            stop_step,
        )
        return _StagedBatches(_iterator(pipeline, num_workers), read_ahead, start_step)
    return _iterator(pipeline, num_workers)


def _iterator(pipeline: Any, num_workers: int) -> BatchIterator:
    if num_workers == 0:
        return iter(pipeline)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its flags in worker processes, and this program has no others
    workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    return _WorkerBatches(iter(pipeline.mp_prefetch(workers, worker_init_fn=_die_with_parent)))


def is_labelled(dataset: Episodes | TokenDataset, episodes: np.ndarray, *, seed: int, fraction: float) -> np.ndarray:
    """Whether the actions of episodes may be used in training: bool (B,). About a share of `fraction` may.

    A function of the seed and of which episode of the source it is, so frames and their tokens agree, and a larger
    fraction only adds episodes.

    Args:
        dataset: an opened split, of frames or of tokens.
        episodes: int64 (B,), as `dataset` counts them.
        seed: any integer.
        fraction: 0 to 1.
    """
    ids = dataset.episode_ids[episodes] if isinstance(dataset, TokenDataset) else episodes
    no_epoch = np.full_like(ids, -1)  # so that the draws are others than those of the order of windows
    return permute(ids, no_epoch, _LOTS, seed) < fraction * _LOTS


def record_ids(
    dataset: Episodes | TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    step: int,
    left_out: Collection[int] = (),
) -> list[WindowId]:
    """Where the windows of the global batch of `step` lie, in order: what to look at when that step goes wrong."""
    sampler = WindowSampler(dataset.lengths, seq_len, seed, source=dataset.path, left_out=left_out)
    episodes, starts = sampler.windows(step, batch_size)
    return [dataset.locate(int(episode), int(start)) for episode, start in zip(episodes, starts, strict=True)]


class _WorkerBatches:
    """Starts grain's worker processes, which it does when the first batch is asked for, with signals blocked.

    Threads inherit the mask from the thread that starts them, and processes from theirs, from their first moment on.
    """

    def __init__(self, iterator: BatchIterator) -> None:
        self._iterator = iterator
        self._started = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._started:
            return next(self._iterator)
        self._started = True
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _CLUSTER_SIGNALS)
        try:
            resource_tracker.ensure_running()  # a process too, whose start unblocks signals in the thread that causes it
            signal.pthread_sigmask(signal.SIG_BLOCK, _CLUSTER_SIGNALS)
            return next(self._iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def close(self) -> None:
        self._iterator.close()


class _StagedBatches:
    """Fetches ahead of the batches that are asked for; begins before the first is."""

    def __init__(self, iterator: BatchIterator, ahead: ReadAhead, start_step: int) -> None:
        self._iterator, self._ahead, self._step = iterator, ahead, start_step

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._ahead.reached(self._step)
        self._step += 1
        return batch

    def close(self) -> None:
        self._ahead.close()
        self._iterator.close()


@dataclass(frozen=True)
class _StepSource:
    """Grain's random-access source: element i is the local batch of step `start_step + i`."""

    dataset: Episodes | TokenDataset
    sampler: WindowSampler
    batch_size: int
    rows: slice | np.ndarray
    start_step: int
    label_fraction: float

    def __len__(self) -> int:
        return _ENDLESS

    def windows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Episodes and starts of the local batch of a step."""
        episodes, starts = self.sampler.windows(step, self.batch_size)
        return episodes[self.rows], starts[self.rows]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        episodes, starts = self.windows(self.start_step + index)
        read = self.dataset.read_windows(episodes, starts, self.sampler.seq_len)
        if isinstance(read, dict):
            batch = read
        else:
            videos, actions = read
            batch = {"videos": videos} if actions is None else {"videos": videos, "actions": actions}
        if self.label_fraction < 1:
            seed, fraction = self.sampler.seed, self.label_fraction
            batch["labelled"] = is_labelled(self.dataset, episodes, seed=seed, fraction=fraction)
        return batch


def _die_with_parent(_worker: int, _num_workers: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
