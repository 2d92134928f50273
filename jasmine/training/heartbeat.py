"""Tells the launcher, from every process, how far it is; ends a process that a newer attempt has replaced.

jax's own heartbeats see a process that died, not one that is alive but stuck. Under the launcher (`JASMINE_ATTEMPT`), each
process writes its step and what it is doing into `attempts/<k>/host-<i>.beat.json` once a second, from a thread, and gives
the stacks of its threads (`host-<i>.stacks`) when it gets SIGQUIT, however stuck it is. Whoever compares the beats of
all processes can name the one that holds up the others.

The same thread reads `attempt` in the run directory, the number of the newest attempt. After a network partition the
processes of the attempt before live on beside the new ones; those who find themselves replaced leave at once.
"""

import faulthandler
import json
import os
import signal
import threading
import time
from pathlib import Path

from etils import epath

from jasmine.training import run_files

SECONDS = 1.0


class Heartbeat:
    """One process's sign of life. Without a launcher, or with a run directory that is no local path, it does nothing."""

    def __init__(self, run_dir: epath.Path):
        self.step = 0
        self._doing = "starting"
        self._closed = threading.Event()
        self._run_dir = run_dir
        directory = Path(run_dir) / "attempts" / str(run_files.attempt())
        self._enabled = "JASMINE_ATTEMPT" in os.environ and "://" not in str(run_dir) and directory.is_dir()
        if not self._enabled:
            return
        stem = f"host-{os.environ.get('JAX_PROCESS_ID', '0')}"
        self._path = directory / f"{stem}.beat.json"
        # Appended to: the launcher notes there that the process is stopped, if it is, before it can answer.
        self._stacks = (directory / f"{stem}.stacks").open("a")
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True, chain=False)
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def doing(self, what: str) -> None:
        """Says what the process is at: joining, preflight, restoring, compiling, stepping, evaluating, saving."""
        self._doing = what

    def close(self) -> None:
        """Ends the thread, so that it does not hold up the end of the process."""
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(SECONDS):
            run_files.leave_if_replaced(self._run_dir)
            self._write()

    def _write(self) -> None:
        beat = {"time": time.time(), "step": self.step, "doing": self._doing}
        temporary = self._path.with_suffix(".partial")
        try:
            temporary.write_text(json.dumps(beat))
            temporary.replace(self._path)
        except OSError:
            pass  # storage that is away for a moment is no reason to stop training
