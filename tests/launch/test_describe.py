"""How far a run is said to be, and when it will be done."""

import json
from pathlib import Path

import pytest

from launch.describe import progress_line
from launch.plan import Plan
from launch.record import RunRecord
from launch.run_dir import RunDir
from launch.snapshot import Code


def progress(directory: Path, *arguments: str, config: str | None, state: str = "running") -> str:
    """Return the line about a run at step 400 that takes half a second a step, whose job noted `config`."""
    run = RunDir(directory / "r")
    run.root.mkdir()
    lines = [{"step": step, "loss": 0.25, "step_time": 0.5, "frames_per_second": 96.0} for step in range(50, 450, 50)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        run.config.write_text(config)
    command, settings = ("python", "train_lam.py", *arguments), {"backend": "local", "env": {}}
    plan = Plan(
        "r", str(run.root), "train_lam", command, "/", "local", settings, Code("abc", 1, 2, None, None), 1, {}, ()
    )
    record = RunRecord(name="r", job="train_lam", state=state, changed=0.0)  # type: ignore[arg-type]
    return progress_line(run, record, plan)


def noted(**options: object) -> str:
    return json.dumps({"job": "train_lam", "config": options, "data": {}})


def test_the_schedule_is_the_jobs_own_where_none_was_typed(tmp_path: Path) -> None:
    line = progress(tmp_path, "--batch_size", "48", config=noted(num_steps=22_000, stop_at_step=0))
    assert line == "step 400 of 22000, loss 0.25, 96 frames/s, 2 steps/s, about 3 h to go"


@pytest.mark.parametrize(
    ("arguments", "config", "total"),
    [
        (["--num_steps=1000"], noted(num_steps=20_000, stop_at_step=500), 1000),
        (["--num-steps", "1000", "--num_steps", "2000"], None, 2000),
        (["--num_steps", "1000", "--stop_at_step", "600"], None, 600),
        (["--num_steps", "1000", "--stop_at_step", "0"], None, 1000),
        (["--stop_at_step", "600"], noted(num_steps=20_000, stop_at_step=600), 600),
        ([], noted(num_steps=20_000, stop_at_step=500), 500),
    ],
)
def test_what_was_typed_comes_first(tmp_path: Path, arguments: list[str], config: str | None, total: int) -> None:
    assert progress(tmp_path, *arguments, config=config).startswith(f"step 400 of {total}, ")


@pytest.mark.parametrize(
    "config",
    [
        None, "", "{", "[]", "{}", '{"config": 3}', noted(num_steps="many"), noted(num_steps=-5), noted(num_steps=True),
        noted(num_steps=10**400), noted(num_steps=[1]), '{"config": {"num_steps": NaN}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_without_a_schedule_only_the_pace_is_told(tmp_path: Path, config: str | None) -> None:
    assert progress(tmp_path, config=config) == "step 400, loss 0.25, 96 frames/s, 2 steps/s"


def test_a_run_that_has_ended_has_nothing_to_go(tmp_path: Path) -> None:
    assert (
        progress(tmp_path, config=noted(num_steps=400), state="finished") == "step 400 of 400, loss 0.25, 96 frames/s"
    )
