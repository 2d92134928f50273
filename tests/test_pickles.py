"""No pickle from data, checkpoints or run directories is executed, and an honest run has none that are.

The interpreter itself says when an unpickler looks up a name (`sys.audit`), in every process that a command starts.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import jobs
from tests.jobs import REPO

HOOK = """\
import os, sys

def note(event, arguments):
    if event == "pickle.find_class":
        with open(os.environ["UNPICKLED"], "a") as file:
            file.write(f"{sys.argv[:1]} {arguments[:2]}\\n")

sys.addaudithook(note)
"""
OPTIONS = [*jobs.SMALL, "--patch_size", "8", "--latent_dim", "8", "--num_latents", "16"]
pytestmark = pytest.mark.slow


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.canary}",))


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """Variables under which a process writes down what it unpickles."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "unpickled"
    env = {"PYTHONPATH": f"{tmp_path / 'hook'}:{REPO}", "UNPICKLED": str(log)}
    load = "import pickle; pickle.loads(pickle.dumps(print))"
    subprocess.run([sys.executable, "-c", load], env=os.environ | env, check=True)
    assert "print" in log.read_text(), "the hook does not work"
    log.unlink()
    return env


def run(module: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *(["-m", module] if not module.endswith(".py") else [str(REPO / module)]), *arguments]
    return subprocess.run(argv, env=os.environ | env, capture_output=True, text=True, cwd=REPO)


def test_training_resuming_and_looking_at_a_run_unpickle_nothing(
    tiny_data: Path, tmp_path: Path, watched: dict[str, str]
) -> None:
    run_dir, canary = tmp_path / "run", tmp_path / "canary"
    arguments = [*OPTIONS, "--data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    jobs.run([*arguments, "--stop_at_step", "4"], env=watched)
    evil = pickle.dumps(Evil(canary))
    for folder in [run_dir, *(path for path in run_dir.rglob("*") if path.is_dir() and "checkpoints" in str(path))]:
        for name in ("state.pkl", "checkpoint.pkl", "data.pickle", "a_0_result.pkl"):
            (folder / name).write_bytes(evil)
        np.save(folder / "state.npy", np.array([Evil(canary)], dtype=object), allow_pickle=True)
    again = jobs.run(arguments, env=watched)
    assert "resumed from the checkpoint of step 4" in again.output()
    assert run("jasmine.inspect", str(run_dir), env=watched).returncode == 0
    assert not Path(watched["UNPICKLED"]).exists(), Path(watched["UNPICKLED"]).read_text()
    assert not canary.exists()


def test_pickles_in_the_place_of_files_are_damage(tiny_data: Path, tmp_path: Path, watched: dict[str, str]) -> None:
    canary = tmp_path / "canary"
    evil = pickle.dumps(Evil(canary))
    whole = tmp_path / "whole"
    arguments = [*OPTIONS, "--data_dir", str(tiny_data), "--num_steps", "2", "--ckpt_dir"]
    jobs.run([*arguments, str(whole)])
    # A checkpoint of which every file is a pickle; what is left to go on from is nothing.
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in (run_dir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(evil)
    job = jobs.start([*arguments, str(run_dir), "--num_steps", "3"], env=watched)
    assert job.finish() != [0] or "resumed" not in job.output()
    for command in ("list", "status", "explain", "logs"):
        for name in ("run.json", "events.jsonl", "metrics.jsonl", "attempts/1/host-0.log"):
            run_dir.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).write_bytes(evil)
        done = run(
            "launch/jobs.py", command, "--storage", str(tmp_path), *([] if command == "list" else ["run"]), env=watched
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "damaged" in done.stderr
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    index = json.loads((data / "train" / "index.json").read_text())
    shard = data / "train" / index["shards"][0]["file"]
    shard.write_bytes(evil.ljust(index["shards"][0]["size"], b"."))
    for module in ("jasmine.data.inspect", "jasmine.data.verify", "jasmine.data.duplicates"):
        done = run(module, str(data), env=watched)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr, done.stderr
    (data / "train" / "index.json").write_bytes(evil)
    assert run("jasmine.data.inspect", str(data), env=watched).returncode == 2
    assert not Path(watched["UNPICKLED"]).exists(), Path(watched["UNPICKLED"]).read_text()
    assert not canary.exists()
