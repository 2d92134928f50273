"""Tells the launcher, from every process, how far it is; ends a process that a newer attempt has replaced.

jax's own heartbeats see a process that died, not one that is alive but stuck. Under the launcher (`JASMINE_ATTEMPT`), each
process writes its step, what it is doing and where its time goes (`jasmine.training.pace`) into
`attempts/<k>/host-<i>.beat.json` once a second, from a thread, and gives the stacks of its threads (`host-<i>.stacks`) when
it gets SIGQUIT, however stuck it is. Whoever compares the beats of all processes can name the one that holds up, or merely
slows down, the others; summaries of its steps (`host-<i>.steps.jsonl`) stay for whoever looks later.

The same thread reads `attempt` in the run directory, the number of the newest attempt. After a network partition the
processes of the attempt before live on beside the new ones; those who find themselves replaced leave at once.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from jasmine.errors import ClusterError, UserError
from jasmine.training import objects, run_files
from jasmine.training.pace import Pace, Recent

SECONDS = 1.0
# In Cloud Storage, which takes one write a second to an object, and is paid for each.
OBJECT_SECONDS = 3.0


class Heartbeat:
    """One process's sign of life. Without a launcher it does nothing."""

    def __init__(self, run_dir: epath.Path):
        self.step = 0
        self._doing = "starting"
        self._closed = threading.Event()
        self._pace: Pace | None = None
        self._recent: Recent | None = None
        self._run_dir = run_dir
        folder = f"attempts/{run_files.attempt()}"
        directory = run_dir / folder
        self._enabled = "JASMINE_ATTEMPT" in os.environ and directory.is_dir()
        if not self._enabled:
            return
        stem = f"host-{os.environ.get('JASMINE_HOST') or os.environ.get('JAX_PROCESS_ID', '0')}"
        self._path = directory / f"{stem}.beat.json"
        self._steps = run_files.JsonLines(run_dir, f"{folder}/{stem}.steps.jsonl")
        self._in_cloud = objects.is_object(run_dir)
        if self._in_cloud:  # stacks go to the log, which somebody else brings there: this process may not be able to
            (directory / f"{stem}.stacks").write_text(f"in {stem}.log\n")
            self._stacks = sys.stderr
        else:
            # Appended to: the launcher notes there that the process is stopped, if it is, before it can answer.
            self._stacks = (directory / f"{stem}.stacks").open("a")
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True, chain=False)
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def doing(self, what: str) -> None:
        """Says what the process is at: joining, preflight, restoring, compiling, stepping, fetching data, evaluating,
        saving."""
        self._doing = what

    def pace(self) -> Pace:
        """What the process, which begins to train, is to keep its accounts with; beats tell them from now on."""
        self._pace = Pace(self._summary)
        self._recent = Recent(self._pace)
        return self._pace

    def close(self) -> None:
        """Ends the thread, so that it does not hold up the end of the process."""
        self._closed.set()

    def _summary(self, record: Mapping[str, Any]) -> None:
        if self._enabled:
            with contextlib.suppress(ClusterError, UserError):  # a disk that is full stops training where it matters
                self._steps.write(record)

    def _beat(self) -> None:
        while not self._closed.wait(OBJECT_SECONDS if self._in_cloud else SECONDS):
            run_files.leave_if_replaced(self._run_dir)
            self._write()

    def _write(self) -> None:
        beat: dict[str, Any] = {"time": time.time(), "step": self.step, "doing": self._doing}
        if self._pace is not None and self._recent is not None:
            spent = {what: round(seconds, 3) for what, seconds in self._pace.spent.items()}
            beat |= {"spent": spent, "recent": self._recent.look()}
        try:
            if self._in_cloud:
                self._path.write_text(json.dumps(beat))
            else:
                temporary = self._path.with_suffix(".partial")
                temporary.write_text(json.dumps(beat))
                temporary.replace(self._path)
        except objects.errors(self._path):
            pass  # storage that is away for a moment is no reason to stop training
