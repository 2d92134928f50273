"""A campaign: a real job that is disturbed again and again, moved from topology to topology, and then held to account.

Everything that is drawn comes from the seed; moments also depend on how fast the machine is, so a repeated campaign has the
same faults in the same order, at about the same places.
"""

import contextlib
import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import UserError
from launch.run_dir import RunDir, last_json_lines, read_json_lines
from launch.standing import Watch, is_live
from tests.chaos.backends import Backend, Topology
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.processes import Process, processes_of

# How long a fault may keep training from going on.
RECOVERY_SECONDS = 600.0
# How much further it has to be before a fault counts as one that training did not notice.
UNDISTURBED_STEPS, UNDISTURBED_SECONDS = 3, 3.0

RECOVERING = ("recovering", "restoring")


class Failed(Exception):
    """The run is not what was promised."""


@dataclass
class Injected:
    """One fault: when it struck, and what it cost.

    Attributes:
        time: in Unix seconds.
        moment: stepping, saving, deleting; recovering from the one before, or restoring in the course of that.
        last_step: the last step that was logged before training stopped; `first_step`: the first one after that.
        seconds: from the fault to that first step; 0 where training did not notice.
        lost: steps that were computed twice.
        by_hand: whether the run had to be resumed by hand, and in which state it was then.
    """

    number: int
    name: str
    moment: str
    topology: str
    time: float
    last_step: int = 0
    first_step: int = 0
    seconds: float = 0.0
    lost: int = 0
    by_hand: str = ""
    notes: list[str] = field(default_factory=list)


class Campaign:
    """The state of one campaign. Faults use its attributes, and `note` what they have drawn."""

    def __init__(self, backend: Backend, seed: int, *, only: Sequence[str] = (), stay: int | None = None) -> None:
        """
        Args:
            only: names of faults to draw from; all that the backend can have, if empty.
            stay: how many faults there are before the run moves for the first time; None: it never does.
        """
        self.backend, self.seed, self.stay = backend, seed, stay
        self.random = random.Random(seed)
        names = only or [name for name, fault in FAULTS.items() if fault.possible(backend)]
        self.faults = [FAULTS[name] for name in names]
        self.run: RunDir = backend.run
        self.topology: Topology = backend.topologies[0]
        self.injected: list[Injected] = []
        self.moves = 0
        self.stayed_until: int | None = None  # the last attempt before the topology changed for the first time
        self.problems: list[str] = []
        self._bag: list[Fault] = []

    # --- what faults use -----------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Keep a detail of the fault that is being injected."""
        self.injected[-1].notes.append(text)

    def say(self, text: str) -> None:
        """Print a line of the campaign's log."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def processes(self, *roles: str) -> list[Process]:
        """What lives of the run in some roles, or at all."""
        found = sorted(processes_of(str(self.run.root)), key=lambda process: process.pid)
        return [process for process in found if not roles or process.role in roles]

    def wait_for_processes(self, *roles: str, seconds: float = 300) -> list[Process]:
        """The same, once there is one. What the fault before may have ended meanwhile is resumed."""
        deadline = time.monotonic() + seconds
        while not (found := self.processes(*roles)):
            if time.monotonic() > deadline:
                raise Failed(f"not within {seconds:.0f} s: a {' or '.join(roles)}")
            if not self.lives():
                before = self.injected[-2] if len(self.injected) > 1 else self.injected[-1]
                self._resume_after(before)
            time.sleep(0.1)
        return found

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something holds.

        Raises:
            Failed: it does not in time.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.05)

    def command(self, *words: str, may_fail: bool = False) -> str:
        """Run a command of the launcher and return what it printed.

        Raises:
            Failed: its exit code is not 0, or it ended with a traceback.
        """
        done = self.backend.command(*words)
        printed = done.stdout + done.stderr
        if "Traceback" in printed or (done.returncode and not may_fail):
            raise Failed(f"`{' '.join(words[:2])}` ended with code {done.returncode}:\n{printed[-2000:]}")
        return printed

    def cancel(self) -> None:
        """Stop the run, if it lives, as a user does."""
        for _ in range(3):
            if not self.lives():
                return
            self.command("jobs", "cancel", self.backend.run_name, may_fail=True)
        self.until(lambda: not self.lives(), 60, "a cancelled run to end")

    def lives(self) -> bool:
        """Whether anything of the run waits or lives; storage that does not answer says yes."""
        try:
            return is_live(self.run)
        except OSError:
            return True

    def checkpoints(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        folder = self.run.root / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []

    def newest(self) -> tuple[int, int]:
        """Attempt and step of the last line of metrics; zeros before there is any."""
        try:
            lines = last_json_lines(self.run.metrics, 3)
        except OSError:
            return 0, 0
        return (int(lines[-1]["attempt"]), int(lines[-1]["step"])) if lines else (0, 0)

    # --- a campaign ----------------------------------------------------------------------------------------------

    def carry_out(self, count: int, seconds: float) -> None:
        """Submit the job, disturb it `count` times, or for so long, and let it finish."""
        deadline = time.monotonic() + seconds
        self.command(*self.backend.submission(self.topology))
        self.until(lambda: self.newest()[1] >= 5, 600, "the first steps")
        recovering = False
        for number in range(1, count + 1):
            fault = self._draw()
            moment = self._moment(fault, recovering)
            last = number == count or time.monotonic() > deadline
            recovering = self._disturb(number, fault, moment, last=last)
            if last:
                break
        self.finish()

    def _draw(self) -> Fault:
        """Take a fault out of a bag that holds each once, and is filled again when it is empty."""
        if not self._bag:
            self._bag = self.random.sample(self.faults, len(self.faults))
        return self._bag.pop()

    def _moment(self, fault: Fault, recovering: bool) -> str:
        if not recovering:
            return self.random.choice(fault.moments)
        starts_again = not FAULTS[self.injected[-1].name].unnoticed
        return self.random.choice(["recovering", "restoring"]) if starts_again else "recovering"

    def _disturb(self, number: int, fault: Fault, moment: str, *, last: bool) -> bool:
        """Inject one fault and see the run recover; return whether that was left to the next fault."""
        before = self.newest()
        with self._at(moment):
            before = self.newest()
            one = Injected(number, fault.name, moment, self.topology.name, time.time(), last_step=before[1])
            self.injected.append(one)
            begun = time.monotonic()
            fault.inject(self)
        next_one_hits = moment not in RECOVERING and not last and self.random.random() < 0.15
        self.say(
            f"{number:3} {fault.name} while {moment} at step {before[1]} on {self.topology.name} {'; '.join(one.notes)}"
        )
        if next_one_hits:
            if not self.lives():
                self._resume_after(one)
            one.notes.append("the next fault struck before it was over")
            one.seconds = float("nan")
            return True
        self._recover(one, fault, before, begun)
        if self.stay is not None and number >= self.stay and not one.by_hand:
            self.cancel()
            before_move = max(self.run.attempts(), default=0)
            self._resume()
            self.until(lambda: self.newest()[0] > before_move, RECOVERY_SECONDS, "a step of a run that was moved")
        return False

    @contextlib.contextmanager
    def _at(self, moment: str) -> Iterator[None]:
        """Hold the job at a moment, in which the block injects a fault."""
        if moment == "stepping":
            time.sleep(self.random.uniform(0.2, 2.5))
        elif moment == "recovering":
            time.sleep(self.random.uniform(0.0, 5.0))
        if moment in ("stepping", "recovering"):
            yield
            return
        armed, held = (self.backend.chaos / f"{word}-{moment}" for word in ("arm", "held"))
        armed.touch()
        try:
            deadline, lives = time.monotonic() + RECOVERY_SECONDS, Watch(self.run, seconds=1.0)
            while not held.exists():
                with contextlib.suppress(OSError, UserError):
                    if moment == "restoring" and not lives():  # the fault before has ended the run after all
                        self._resume_after(self.injected[-1])
                if time.monotonic() > deadline:
                    raise Failed(f"not within {RECOVERY_SECONDS:.0f} s: the job to be {moment}")
                time.sleep(0.01)
            yield
        finally:
            armed.unlink(missing_ok=True)
            held.unlink(missing_ok=True)

    def _recover(self, one: Injected, fault: Fault, before: tuple[int, int], begun: float) -> None:
        """Wait until training goes on, and write down what the fault cost; resume the run if it has ended."""
        lives = Watch(self.run, seconds=1.0)
        deadline = begun + RECOVERY_SECONDS
        while True:
            attempt, step = self.newest()
            elapsed = time.monotonic() - begun
            if attempt > before[0]:
                one.seconds = elapsed
                break
            if fault.unnoticed and step >= before[1] + UNDISTURBED_STEPS and elapsed > UNDISTURBED_SECONDS:
                return
            with contextlib.suppress(OSError, UserError):
                if not lives():
                    self._resume_after(one)
            if time.monotonic() > deadline:
                raise Failed(f"no step within {RECOVERY_SECONDS:.0f} s after fault {one.number} ({fault.name})")
            time.sleep(0.1)
        self._cost(one, attempt)

    def _cost(self, one: Injected, attempt: int) -> None:
        lines = [*self._lines("metrics.jsonl"), *self._lines("metrics.superseded.jsonl")]
        one.last_step = max([one.last_step, *(line["step"] for line in lines if line["attempt"] < attempt)])
        one.first_step = min(line["step"] for line in lines if line["attempt"] == attempt)
        one.lost = max(0, one.last_step - one.first_step + 1)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return read_json_lines(self.run.root / name)

    def _state(self) -> str:
        return self.command("jobs", "explain", self.backend.run_name, may_fail=True).strip()[:400]

    def _resume_after(self, one: Injected) -> None:
        """Resume a run that a fault has ended, which only some may do."""
        # Where the next fault strikes before a run has recovered, either may have been what ended it.
        struck = [FAULTS[one.name], *(FAULTS[other.name] for other in self.injected if other.number == one.number - 1)]
        if not any(fault.ends for fault in (struck if one.moment in RECOVERING else struck[:1])):
            self.problems.append(f"fault {one.number} ({one.name}) ended the run: {self._state()}")
        one.by_hand = one.by_hand or self.state()
        self._resume()

    def _resume(self) -> None:
        """Let a run that has ended go on, somewhere else if it is time for that."""
        if self.stay is not None and len(self.injected) >= self.stay:
            if self.stayed_until is None:
                self.stayed_until = max(self.run.attempts(), default=0)
            others = [topology for topology in self.backend.topologies if topology is not self.topology]
            self.topology = self.random.choice(others)
            self.moves += 1
        for _ in range(5):
            printed = self.command(*self.backend.resumption(self.topology), may_fail=True)
            if self.lives():
                return
            time.sleep(1)
        raise Failed(f"the run cannot be resumed: {printed[-1000:]}")

    def state(self) -> str:
        """The run's state, as `jobs.py` tells it."""
        printed = self.command("jobs", "status", self.backend.run_name, may_fail=True)
        return printed.partition(": ")[2].split(",")[0].split(" ")[0].strip() if ": " in printed else "unknown"

    def finish(self) -> None:
        """Stop the run, and let it finish a few steps later."""
        self.until(lambda: self.newest()[1] > 0, RECOVERY_SECONDS, "a step")
        self.cancel()
        self.last_step = max(self.newest()[1], *self.checkpoints()) + 10
        arguments = self.backend.resumption(self.topology, "--stop_at_step", str(self.last_step))
        words = [*arguments[:3], "--wait", *arguments[3:]]
        self.command(*words)

    def to_json(self) -> dict[str, Any]:
        """What there is to be told."""
        return {
            "backend": self.backend.name,
            "bucket": self.backend.bucket is not None,
            "seed": self.seed,
            "moves": self.moves,
            "problems": self.problems,
            "faults": [asdict(one) for one in self.injected],
        }

    def write(self, path: Path) -> None:
        """Keep it."""
        path.write_text(json.dumps(self.to_json(), indent=1))

    def end_everything(self) -> None:
        """Leave nothing running, whatever happened."""
        with contextlib.suppress(Exception):
            for process in self.processes("rank"):
                process.send(signal.SIGCONT)
            self.cancel()
        for process in self.processes():
            process.send(signal.SIGKILL)
