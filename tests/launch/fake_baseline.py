"""A stand-in for a baseline, without jax: steps, saves, and fails in every way that the launcher has to deal with.

Its "checkpoint" is a file with the number of finished steps; its "agreement" to stop is a file that all processes watch.
"""

import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jasmine.training.config import VERSION, TrainConfig
from launch.objects import is_object, place
from launch.run_dir import append, write_atomically


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Defaults make a run of half a second."""

    step_seconds: float = 0.05
    crash_at: int = -1
    crash_host: int = 0
    crash_code: int = 1
    crash_attempts: int = 1
    hang_at: int = -1
    hang_host: int = -1
    hang_attempts: int = 99
    deaf: int = 0
    leave_child: int = 0


def beat(run: Path, attempt: int, host: int, step: int) -> None:
    """Say how far this process is, as every training process does."""
    path = run / "attempts" / str(attempt) / f"host-{host}.beat.json"
    write_atomically(path, json.dumps({"time": time.time(), "step": step, "doing": "stepping"}))


def main() -> int:
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    options = dict(zip(words[::2], words[1::2], strict=True))
    config = Config(
        **{k.removeprefix("--"): type(getattr(Config, k.removeprefix("--")))(v) for k, v in options.items()}
    )
    run = place(os.environ["JASMINE_RUN_DIR"])
    attempt, host = (
        int(os.environ["JASMINE_ATTEMPT"]),
        int(os.environ.get("JASMINE_HOST") or os.environ.get("JAX_PROCESS_ID", "0")),
    )
    leave = run / f"leave-{attempt}"
    signal.signal(signal.SIGTERM, lambda *_: None if config.deaf else leave.touch())
    checkpoint = run / f"step-{host}"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print(f"version {VERSION}, attempt {attempt}, from step {step}, in {os.getcwd()}", flush=True)
    if config.leave_child:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run / "child.pid").write_text(str(child.pid))
    stacks = run / "attempts" / str(attempt) / f"host-{host}.stacks"
    if is_object(stacks):  # then they go to the log
        stacks.touch()
    faulthandler.register(signal.SIGQUIT, file=sys.stderr if is_object(stacks) else stacks.open("w"))
    while step < config.num_steps:
        if step == config.crash_at and host == config.crash_host and attempt <= config.crash_attempts:
            if config.crash_code == 1:
                raise ValueError(f"no more at step {step}")
            os._exit(config.crash_code)
        # The others run a step ahead of one that is stuck, as far as a collective lets them.
        stuck_at = config.hang_at + (config.hang_host not in (-1, host))
        while step == stuck_at and config.hang_at >= 0 and attempt <= config.hang_attempts:
            beat(run, attempt, host, step)
            time.sleep(0.2)
        time.sleep(config.step_seconds)
        step += 1
        if host == 0:
            line = {"step": step, "loss": 1 / step, "lr": 1e-3, "step_time": 0.05, "frames_per_second": 1234.5}
            append(run / "metrics.jsonl", json.dumps(line) + "\n")
        print(f"step {step}", flush=True)
        beat(run, attempt, host, step)
        if leave.exists():
            checkpoint.write_text(str(step))
            print(f"saved at step {step}", flush=True)
            return 75
    checkpoint.write_text(str(step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
