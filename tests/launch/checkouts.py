"""What the launcher's tests do over and over: type commands in a checkout, and wait."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.events import problem
from launch.objects import place
from launch.record import RunRecord
from launch.run_dir import RunDir
from launch.standing import Watch, read_standing


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Return once `condition()` is true; fail the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def as_on_a_terminal() -> None:
    """Tests in the background, or under nohup, ignore these, and so would what they start."""
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def check_events(run: RunDir) -> None:
    """Fail the test if an event of the run is not what the schema says."""
    wrong = [(found, event) for event in run.events() if (found := problem(event)) is not None]
    assert not wrong


@dataclasses.dataclass
class Checkout:
    """A copy of the repository with runs in `home/runs`, where its commands are typed."""

    root: Path
    home: Path
    env: dict[str, str]

    def run(self, command: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python launch/<command>.py` and return its exit code and output."""
        return subprocess.run(
            self.argv(command, *arguments), cwd=cwd or self.home, env=self.env, capture_output=True, text=True
        )

    def argv(self, command: str, *arguments: str) -> list[str]:
        """The command line that `run` runs."""
        return [sys.executable, str(self.root / "launch" / f"{command}.py"), *arguments]

    def submit(self, *arguments: str, name: str = "r", cluster: str = "local") -> subprocess.CompletedProcess[str]:
        """Submit, and fail the test if that is refused."""
        done = self.run("submit", "--cluster", cluster, "--name", name, *arguments)
        assert done.returncode == 0, done.stderr
        return done

    def jobs(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run jobs.py."""
        return self.run("jobs", *arguments)

    def directory(self, name: str = "r") -> RunDir:
        """The run's directory."""
        return RunDir(place(self.env.get("JASMINE_STORAGE", str(self.home / "runs"))) / name)

    def end(self, name: str = "r", seconds: float = 180) -> RunRecord:
        """Wait until nothing of the run lives; return its record."""
        run = self.directory(name)
        lives = Watch(run, seconds=0.2)
        wait_until(lambda: not lives(), seconds)
        check_events(run)
        return read_standing(run).record

    def at_step(self, step: int, name: str = "r", host: int = 0) -> None:
        """Wait until a process of the run's first attempt has finished a step."""
        log = self.directory(name).log(1, host)
        wait_until(lambda: log.exists() and f"step {step}\n" in log.read_text())

    def job_pid(self, host: int = 0, attempt: int = 1, name: str = "r") -> int:
        """The process id of one job process."""
        path = self.directory(name).pid_file(attempt, host)
        wait_until(path.exists)
        return int(path.read_text())
