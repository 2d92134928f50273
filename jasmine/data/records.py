"""Random access to ArrayRecord files, with failures that name the file and the record.

Everything that reads datasets goes through `ShardReaders`, because ArrayRecord's defaults suit sequential reading:
read-ahead of 16 MiB and a thread pool per reader make one random read many times dearer. Two ways to read remain:
`seek` and `read` cost half the CPU time of `read(first, end)`, but hold the interpreter's lock while they wait for
storage. So reads are of the first kind while they are quick (page cache), and of the second while they are slow
(network storage, big compressed records), where other threads should go on. The bytes are the same either way.

Files that lie in Cloud Storage are read off the local disk, where they are staged when they are opened; between reads
they may be removed from there (`jasmine.data.staging`), and are staged again.

Invariants: a reader serves one thread at a time; at most `max_idle` files stay open between reads; whatever the
library finds wrong becomes a `UserError` naming file and record, never garbage.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from jasmine.data.staged_file import StagedFile
from jasmine.data.staging import StagedFiles
from jasmine.errors import UserError

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 32 * 1024
# Per record, on average over the last hundred reads or so (a preempted read must not count as slow storage). In the page
# cache a record of 8 frames of 64×64×3 takes 20 to 60 µs.
_SLOW_SECONDS, _AVERAGING = 300e-6, 0.02


@dataclass(frozen=True)
class WindowId:
    """Where a window of frames lies: `record` is the first of the records in `file` that hold it."""

    file: str
    record: int
    episode: int
    start: int


class CorruptError(UserError):
    """A file (or one record of it) does not hold what it should."""


def corrupt(path: str, record: int | None, why: str) -> CorruptError:
    """The error for a file (or one record of it) that does not hold what it should."""
    where = path if record is None else f"{path}: record {record}"
    return CorruptError(f"{where} is corrupt ({why}): copy or make the file again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class ShardReaders:
    """The open readers of one split's files, shared by all threads of a process.

    Pickling (as worker processes do) keeps the paths and drops the readers.

    Args:
        paths: the ArrayRecord files, in shard order.
        counts: how many records each file must hold; None accepts any number.
        max_idle: how many readers stay open while no thread uses them.
        staged: where the files come from, if they are not on this machine; `paths` then only names them.
    """

    def __init__(
        self,
        paths: Sequence[str],
        counts: Sequence[int] | None = None,
        max_idle: int = 256,
        staged: StagedFiles | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.staged = staged
        self._counts = None if counts is None else tuple(counts)
        self._max_idle = max_idle
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, list[_Reader]] = OrderedDict()  # by shard, the longest unused first
        self._num_idle = 0
        self._seconds_per_record = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardReaders, (self.paths, self._counts, self._max_idle, self.staged))

    def num_records(self, shard: int) -> int:
        """Number of records of file `shard`."""
        with self._lend(shard) as reader:
            return int(reader.num_records())

    def read(self, shard: int, first: int, count: int = 1) -> list[bytes]:
        """Payloads of `count` neighbouring records of file `shard`, from record `first` on.

        Raises:
            UserError: the file is missing, truncated or corrupt; names the file and the record.
        """
        try:
            return self._read(shard, first, count)
        except CorruptError:
            if self.staged is None or not self.staged.drop_if_damaged(shard):
                raise
            return self._read(shard, first, count)

    def _read(self, shard: int, first: int, count: int) -> list[bytes]:
        began = time.perf_counter()
        if self._seconds_per_record > _SLOW_SECONDS:
            payloads = self._read_unlocked(shard, first, count)
        else:
            payloads = self._read_locked(shard, first, count)
        seconds = (time.perf_counter() - began) / count
        self._seconds_per_record += _AVERAGING * (seconds - self._seconds_per_record)  # a race only blurs the average
        return payloads

    def _read_locked(self, shard: int, first: int, count: int) -> list[bytes]:
        payloads: list[bytes] = []
        with self._lend(shard) as reader:
            try:
                reader.seek(first)
                for _ in range(count):
                    payloads.append(reader.read())
            except (IndexError, RuntimeError) as error:
                raise corrupt(self.paths[shard], first + len(payloads), _first_line(error)) from error
        return payloads

    def _read_unlocked(self, shard: int, first: int, count: int) -> list[bytes]:
        try:
            with self._lend(shard) as reader:
                return list(reader.read(first, first + count))
        except (IndexError, RuntimeError):
            return self._read_locked(shard, first, count)  # which finds out the record at fault

    def close(self) -> None:
        """Closes the readers that no thread uses."""
        with self._lock:
            while self._idle:
                for reader in self._idle.popitem()[1]:
                    reader.close()
            self._num_idle = 0

    @contextmanager
    def _lend(self, shard: int) -> Iterator[Any]:
        reader = self._take(shard)
        while reader is not None and reader.file is not None and not reader.file.acquire():
            reader.close()
            reader = self._take(shard)
        if reader is None:
            reader = self._open(shard)
        try:
            yield reader.records
        except BaseException:  # it is dropped, not lent again: its `close` would only raise the error once more
            if reader.file is not None:
                reader.file.close()
            raise
        if reader.file is not None:
            reader.file.release()
        surplus = self._put_back(shard, reader)
        if surplus is not None:
            surplus.close()

    def _take(self, shard: int) -> "_Reader | None":
        with self._lock:
            readers = self._idle.get(shard)
            if readers is None:
                return None
            self._num_idle -= 1
            reader = readers.pop()
            if not readers:
                del self._idle[shard]
            return reader

    def _put_back(self, shard: int, reader: "_Reader") -> "_Reader | None":
        with self._lock:
            self._idle.setdefault(shard, []).append(reader)
            self._idle.move_to_end(shard)
            self._num_idle += 1
            if self._num_idle <= self._max_idle:
                return None
            self._num_idle -= 1
            oldest = next(iter(self._idle))
            readers = self._idle[oldest]
            surplus = readers.pop()
            if not readers:
                del self._idle[oldest]
            return surplus

    def _open(self, shard: int) -> "_Reader":
        file = None if self.staged is None else self.staged.stage(shard)
        try:
            return _Reader(self._open_records(shard, self.paths[shard] if file is None else file.path), file)
        except BaseException:
            if file is not None:
                file.close()
            raise

    def _open_records(self, shard: int, local: str) -> Any:
        path = self.paths[shard]
        if not os.path.isfile(local):
            raise UserError(f"{path} is missing: its dataset's index or an earlier listing names it; restore the file")
        reader = ArrayRecordReader(local, options=_RANDOM_ACCESS, file_reader_buffer_size=_BUFFER_BYTES)
        try:
            if not reader.ok():
                reader.close()  # raises the reason
        except RuntimeError as error:
            raise corrupt(path, None, f"not a whole ArrayRecord file: {_first_line(error)}") from error
        found = int(reader.num_records())
        if self._counts is not None and found != self._counts[shard]:
            raise corrupt(path, None, f"{found} records where the index says {self._counts[shard]}")
        return reader


@dataclass(frozen=True)
class _Reader:
    """An open file, and what holds it on the disk where it was staged."""

    records: Any
    file: StagedFile | None

    def close(self) -> None:
        self.records.close()
        if self.file is not None:
            self.file.close()
