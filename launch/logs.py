"""Shows what the processes of a run print: whole logs of one attempt, or everything as it comes.

A log is shown line by line, so that lines of several hosts do not mix; while a run lives, a line that is not complete
yet waits for its end.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.objects import is_object
from launch.record import RunRecord
from launch.run_dir import RunDir, open_at, read_tail
from launch.standing import Watch
from launch.text import printable

POLL_SECONDS = 0.1
# In Cloud Storage a look is a request that is paid for, and logs come there every few seconds.
OBJECT_POLL_SECONDS = 1.0

Print = Callable[[str], None]


def to_stdout(*, flush: bool) -> Print:
    """Return what prints lines of logs: as they are, or on a terminal, which nothing in them may steer, with colours only."""
    on_terminal = sys.stdout.isatty()

    def write(line: str) -> None:
        print(printable(line, colours=True) if on_terminal else line, flush=flush)

    return write


def hosts_in_order(run: RunDir, record: RunRecord, attempt: int) -> list[int]:
    """Return the hosts that have a log in an attempt: the one that failed first, then the others by number."""
    failed = next((a.first_failed for a in record.attempts if a.number == attempt), None)
    return sorted(run.logged_hosts(attempt), key=lambda host: (host != failed, host))


def last_words(path: Path) -> str | None:
    """Return the last line of a log that says something: of a traceback, the exception."""
    try:
        lines = read_tail(path, 1 << 16).decode(errors="replace").splitlines()[-200:]
    except FileNotFoundError:
        return None
    exceptions = [line for before, line in itertools.pairwise(lines) if before.startswith("  ") and line[:1].isalpha()]
    if exceptions and any(line.startswith("Traceback (most recent call last)") for line in lines):
        return exceptions[-1].strip()
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def show_logs(run: RunDir, attempt: int, hosts: list[int], write: Print, *, prefix: bool) -> None:
    """Write the logs of `hosts` in an attempt, one after the other, each line after `[host-<i>] ` if `prefix`."""
    for host in hosts:
        tail = _Tail(run.log(attempt, host), f"[host-{host}] " if prefix else "")
        tail.drain(write, to_the_end=True)


def follow_logs(
    run: RunDir,
    first_attempt: int,
    write: Print,
    announce: Print,
    *,
    host: int | None = None,
    prefix: bool,
    is_live: Callable[[], bool] | None = None,
) -> None:
    """Write lines of all attempts from `first_attempt` on as they come; return when nothing of the run lives.

    Args:
        announce: gets one line about each attempt after the first.
        host: show only this host; None for all.
        is_live: whether more is to come; None looks at the run.
    """
    tails: dict[Path, _Tail] = {}
    announced = {first_attempt}
    is_live = is_live or Watch(run)
    while True:
        live = is_live()  # before reading, so that the last lines are not missed
        for attempt in [number for number in run.attempts() if number >= first_attempt]:
            if attempt not in announced:
                for tail in tails.values():
                    tail.drain(write, to_the_end=True)
                announce(f"attempt {attempt} has started")
                announced.add(attempt)
            for index, size in sorted(run.log_sizes(attempt).items()):
                if host is None or index == host:
                    path = run.log(attempt, index)
                    tail = tails.setdefault(path, _Tail(path, f"[host-{index}] " if prefix else ""))
                    if size > tail.offset:
                        tail.drain(write, to_the_end=not live)
        if not live:
            return
        time.sleep(OBJECT_POLL_SECONDS if is_object(run.root) else POLL_SECONDS)


class _Tail:
    """A position in a growing log."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self.prefix = prefix
        self.offset = 0

    def drain(self, write: Print, *, to_the_end: bool) -> None:
        """Write the lines that are new; an unfinished one only if `to_the_end`."""
        with open_at(self.path, self.offset) as file:
            for line in file:
                if not line.endswith(b"\n") and not to_the_end:
                    return
                self.offset += len(line)
                write(self.prefix + line.decode(errors="replace").rstrip("\n"))
