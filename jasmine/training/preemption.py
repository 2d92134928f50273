"""Save and leave: SIGTERM, SIGUSR1 or SIGUSR2 to any process makes all of them stop after the same step.

A cluster may warn one process, some or all, at any moment, and the processes' host loops are a few steps apart. The
agreement goes through jax's coordination service: the warned process announces; a thread in each process answers with
the step its loop is in, while holding the loop at its next boundary; the stop is one step after the largest answer,
which no loop can have passed. A loop that is held waits only for threads, never for a device, so nothing deadlocks.
Cost in the hot path: one uncontended lock a step.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

import jax

from jasmine.errors import EXIT_FAILED, EXIT_SAVED
from jasmine.training import distributed

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_SECONDS = 10
_KEY = "jasmine/stop"
_END = "end of job"
_ANSWER_SECONDS = 120


class StopSignal:
    """Turns the three signals into one agreed step. Make it before anything slow; signals are never lost after that."""

    def __init__(self) -> None:
        # The kernel's handler writes to this pipe even while the main thread is inside a long device call.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _ignore)
        self._lock = threading.Lock()
        self._step = 0
        self._stop_at: int | None = None
        self._received = threading.Event()
        self._started = threading.Event()
        self._closed = threading.Event()
        self.received_signal: str | None = None
        self._answering: threading.Thread | None = None
        threading.Thread(target=self._listen, name="stop-signal", daemon=True).start()

    def start(self) -> None:
        """Begins to exchange with the peers. Call it when the job has met: until then, with nothing to save, a signal ends
        the process at once."""
        self._started.set()
        if jax.process_count() == 1:
            return
        threading.Thread(target=self._announce, name="stop-announce", daemon=True).start()
        self._answering = threading.Thread(target=self._answer, name="stop-answer", daemon=True)
        self._answering.start()

    def reached(self, step: int) -> bool:
        """True when the run must be saved and left now. Call it at every step boundary with finished updates so far."""
        with self._lock:
            self._step = step
            if jax.process_count() == 1:
                return self._received.is_set()
            return self._stop_at is not None and step >= self._stop_at

    def close(self) -> None:
        """Ends the threads. Call it on every process when its steps are done; signals are ignored from then on."""
        self._closed.set()
        if self._answering is not None:
            # A thread that waits inside the coordination client while Python shuts down would abort the process.
            # A peer that has just been told to stop still gets its answer: nobody waits for one that has finished.
            client = distributed.coordination_client()
            with contextlib.suppress(Exception):
                client.key_value_set(f"{_KEY}/at/{jax.process_index()}", str(self._step), allow_overwrite=True)
                client.key_value_set(_KEY, _END)
            self._answering.join(_POLL_SECONDS + 1)
        signal.set_wakeup_fd(-1)
        self._writer.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            received = self._reader.recv(16)
            if not received:
                return
            for number in received:
                if number in SIGNALS:
                    self.received_signal = signal.Signals(number).name
                    self._received.set()
                    if not self._started.is_set():
                        print(f"{self.received_signal} before the job has met: nothing to save, leaving", flush=True)
                        os._exit(EXIT_SAVED)

    def _announce(self) -> None:
        self._received.wait()
        client = distributed.coordination_client()
        try:
            client.key_value_set(_KEY, f"process {jax.process_index()}", allow_overwrite=True)
        except Exception as error:  # the service ends with the job; then there is nobody to tell
            logger.debug("stop not announced: %r", error)

    def _answer(self) -> None:
        client = distributed.coordination_client()
        while True:
            try:
                origin = client.blocking_key_value_get(_KEY, _POLL_SECONDS * 1000)
                break
            except Exception as error:
                if self._closed.is_set() or "DEADLINE_EXCEEDED" not in str(error):
                    return
        if self._closed.is_set() or origin == _END:
            return
        try:
            self._agree(client, origin)
        except Exception as error:
            if not self._closed.is_set():
                # Peers that have agreed will leave at their step; going on alone would hang in the next collective.
                print(f"error: could not agree with the other processes on a step to stop at: {error}", flush=True)
                os._exit(EXIT_FAILED)

    def _agree(self, client: Any, origin: str) -> None:
        with self._lock:  # holds the loop at its next boundary until the stop is known
            client.key_value_set(f"{_KEY}/at/{jax.process_index()}", str(self._step), allow_overwrite=True)
            steps = [
                int(client.blocking_key_value_get(f"{_KEY}/at/{p}", _ANSWER_SECONDS * 1000))
                for p in range(jax.process_count())
            ]
            self._stop_at = max(steps) + 1
            if self.received_signal is None:
                self.received_signal = f"signal to {origin}"


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python needs a handler for its wake-up pipe to be written to; the work is done by the thread that reads it."""
