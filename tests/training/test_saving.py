"""When a run is saved, and which of its checkpoints stay."""

import errno
import json
import math
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath
from gcsfs.retry import HttpError
from google.api_core import exceptions as google_errors
from google.auth.exceptions import DefaultCredentialsError, RefreshError

from jasmine.errors import ClusterError, UserError
from jasmine.training import checkpoint, objects, run_files
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.config import TrainConfig
from jasmine.training.save_clock import SaveClock
from jasmine.training.state import TrainState
from tests import jobs
from tests.jobs import TINY

STATE = TrainState(step=jnp.int32(0), params={"kernel": jnp.ones(8)}, opt_state={}, ema=None)


def keep(directory, metrics: dict[int, float | None], **options) -> list[int]:
    """The steps that are there after saves at the steps of `metrics`, by a checkpointer of its own."""
    checkpoints = Checkpointer(epath.Path(directory), TrainConfig(data_dir="unused", **options))
    for step, value in metrics.items():
        given = {"val_loss": value, "other": -step} if value is not None else None
        assert checkpoints.save(step, STATE, {"step": step}, given)
        assert checkpoints.wait()
        assert checkpoints.steps()[-1] == step  # the newest one stays, however bad it is
    checkpoints.close()
    return Checkpointer(epath.Path(directory), TrainConfig(data_dir="unused")).steps()


def test_how_a_save_has_ended_is_noticed_without_waiting_for_it(tmp_path, monkeypatch, capfd):
    finalize = ocp.StandardCheckpointHandler.finalize

    def finalize_on_a_full_disk(self, directory):
        if not directory.parent.name.startswith("1."):
            raise error_of(errno.ENOSPC)
        finalize(self, directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize_on_a_full_disk)
    saved: list[int] = []
    checkpoints = Checkpointer(epath.Path(tmp_path), TrainConfig(data_dir="unused"), on_saved=saved.append)
    output = ""

    def noticed(how_often: int) -> bool:
        nonlocal output
        checkpoints.poll()
        output += capfd.readouterr().out
        return len(saved) + output.count("No space left on device") == how_often

    for step in (1, 2, 3, 4):
        assert checkpoints.save(step, STATE, {})
        jobs.wait_until(lambda: noticed(step))  # noqa: B023  # it is called in this round
        checkpoints.poll()  # what is known is not news
        assert checkpoints.wait() == (step == 1)
    assert saved == [1]
    assert "step 4 could not be saved in" in output.splitlines()[-1]
    assert output.endswith("No space left on device; 3 saves in a row failed. The last good one: step 1\n")
    with pytest.raises(ClusterError, match="3 saves in a row failed"):
        checkpoints.save(5, STATE, {})


@pytest.mark.parametrize("where", ["disk", pytest.param("gs", marks=pytest.mark.slow)])
def test_every_reason_to_keep_a_checkpoint_holds_after_a_resume_too(where, tmp_path, request):
    if where == "gs":
        request.getfixturevalue("gcs")
    directory = tmp_path if where == "disk" else "gs://bucket/runs/r/checkpoints"
    options = {"keep_checkpoints": 2, "keep_best": 2, "log_checkpoint_keep_period": 5}
    metrics = {1: 3.0, 2: 1.0, 3: math.nan, 4: None, 5: 9.0, 6: 2.0, 7: -math.inf, 8: 4.0}
    assert keep(directory, metrics, **options) == [2, 5, 6, 7, 8]
    assert keep(directory, {9: 1.5, 10: 8.0}, **options) == [2, 5, 9, 10]
    assert keep(directory, {11: 7.0}, **options | {"keep_best": 0, "keep_checkpoints": 1}) == [5, 10, 11]


def test_the_best_may_be_the_largest(tmp_path):
    options = {"keep_checkpoints": 1, "keep_best": 2, "best_mode": "max", "log_checkpoint_keep_period": 0}
    assert keep(tmp_path, {1: 5.0, 2: 7.0, 3: 1.0, 4: 6.0, 5: None, 6: 2.0}, **options) == [2, 4, 6]


def test_saves_by_the_clock_count_from_the_last_save_of_any_kind():
    now = 100.0
    clock = SaveClock(2.0, clock=lambda: now)
    assert not clock.due(1)
    now += 119.0
    assert not clock.due(2)
    now += 2.0
    assert clock.due(3)
    assert clock.due(4)  # as long as nobody saves
    clock.saved()
    now += 119.0
    assert not clock.due(5)
    never = SaveClock(0.0, clock=lambda: now)
    now += 1e9
    assert not never.due(6)


@pytest.mark.slow
def test_the_clock_leaves_few_words_with_the_coordinator():
    code = f"""
        import jax
        from jasmine.training import distributed
        from jasmine.training.save_clock import SaveClock
        jax.distributed.initialize("127.0.0.1:{jobs.free_port()}", 1, 0)
        jax.process_count = lambda: 2  # the other one is never asked anything
        now = 0.0
        clock = SaveClock(1.0, clock=lambda: now)
        for step in range(100):
            now += 10.0
            clock.due(step)
        print(len(distributed.coordination_client().key_value_dir_get("jasmine/save")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=jobs.REPO, timeout=120
    )
    assert done.stdout.strip() == "8", done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_save_by_the_clock_and_keep_the_best_wherever_the_run_goes_on(tiny_data, tmp_path):
    run_dir = tmp_path / "run"
    args = [*TINY, "--data_dir", str(tiny_data), "--val_data_dir", str(tiny_data), "--ckpt_dir", str(run_dir)]
    args += ["--num_steps", "40", "--val_interval", "8", "--val_steps", "1", "--log_checkpoint_interval", "1000"]
    args += ["--log_checkpoint_keep_period", "0", "--keep_checkpoints", "1", "--keep_best", "2", "--max_lr", "0.1"]
    jobs.run([*args, "--stop_at_step", "24", "--save_every_minutes", "0.002"], processes=2)
    begun = [event["step"] for event in jobs.events(run_dir, "checkpoint")]
    assert {8, 16, 24} < set(begun)  # those of evaluations, and others
    assert begun == sorted(set(begun))
    jobs.run(args)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert len(losses) == 5
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert jobs.checkpoints(run_dir) == sorted({*best, 40})


@pytest.mark.slow
def test_a_metric_that_there_will_not_be_is_refused_before_the_first_step(tiny_data, tmp_path):
    args = [*TINY, "--data_dir", str(tiny_data), "--val_data_dir", str(tiny_data), "--ckpt_dir", str(tmp_path / "run")]
    job = jobs.run([*args, "--keep_best", "1", "--best_metric", "val_los"], expect=2)
    assert "error: --best_metric=val_los: there is no such metric; did you mean val_loss? (there are " in job.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def error_of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def wrapped(error: Exception) -> Exception:
    """As a library hands it on."""
    outer = RuntimeError("a save failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *[
            (error_of(getattr(errno, f"E{name}")), True)
            for name in ("NOSPC", "IO", "DQUOT", "STALE", "TIMEDOUT", "AGAIN")
        ],
        *[
            (error_of(getattr(errno, f"E{name}")), False)
            for name in ("ACCES", "PERM", "ROFS", "NOTDIR", "NOENT", "ISDIR")
        ],
        *[(HttpError({"code": code, "message": "no"}), True) for code in (408, 429, 500, "503")],
        *[(HttpError({"code": code, "message": "no"}), False) for code in (400, 401, 403, "412")],
        (FileNotFoundError("bucket/o/name"), False),  # of a bucket
        (google_errors.ServiceUnavailable("no"), True),
        (google_errors.Forbidden("no"), False),
        (google_errors.NotFound("The specified bucket does not exist."), False),
        (RefreshError("the metadata server is away"), True),
        (DefaultCredentialsError("nobody is logged in"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), True),
        (TimeoutError(), True),
        (ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device [os_error_code='28']"), True),
        (ValueError("PERMISSION_DENIED: Failed to open x: Permission denied [os_error_code='13']"), False),
        (ValueError("ABORTED: All 32 retry attempts failed"), True),
        (ValueError("DATA_LOSS: Error opening x: CRC-32C checksum verification failed"), False),
        (KeyError("params"), False),
    ],
    ids=repr,
)
def test_a_storage_error_may_pass_or_is_the_users_to_mend(error, passes):
    for one in (error, wrapped(error)):
        assert objects.may_pass(one) == passes
        assert isinstance(objects.storage_error("no", one), ClusterError if passes else UserError)
        assert "\n" not in str(objects.storage_error("no", one))


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, ClusterError), (errno.EACCES, UserError)])
def test_a_folder_that_cannot_be_written_now_is_not_the_users_mistake(number, expected, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise error_of(number)

    run_dir = epath.Path(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(type(run_dir), "write_text", refuse)
        patched.setattr(type(run_dir), "write_bytes", refuse)
        patched.setattr("builtins.open", refuse)
        patched.setattr("orbax.checkpoint.CheckpointManager", refuse)
        for write in (
            lambda: run_files.prepare(run_dir),
            lambda: run_files.write_atomically(run_dir / "config.json", b""),
            lambda: run_files.log_event(run_dir, "init"),
            lambda: Checkpointer(run_dir / "checkpoints", TrainConfig(data_dir="unused")),
        ):
            with pytest.raises(expected, match=os.strerror(number)):
                write()


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Two checkpoints, of steps 1 and 2; a function has the next readings of a step fail, and returns how they went."""
    keep(tmp_path / "checkpoints", {1: None, 2: None}, keep_checkpoints=2)
    read, pauses, failures = ocp.StandardCheckpointHandler.restore, [], {1: [], 2: []}

    def restore(self, directory, *args, **kwargs):
        if failing := failures[int(directory.parent.name)]:
            raise failing.pop(0)
        return read(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)

    def resume(**failing) -> tuple[int, list[int], bool]:
        failures.update({1: failing.get("first", []), 2: failing.get("second", [])})
        restored = Checkpointer(epath.Path(tmp_path / "checkpoints"), TrainConfig(data_dir="unused")).restore(STATE)
        return restored.meta["step"], list(pauses), (tmp_path / "unreadable_checkpoints" / "2").exists()

    return resume


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_resumed_from(storage):
    assert storage(second=[error_of(errno.EIO), wrapped(error_of(errno.ESTALE))]) == (2, [1, 2], False)


def test_a_checkpoint_that_cannot_be_read_for_a_minute_is_passed_over(storage):
    assert storage(second=[error_of(errno.EIO)] * 100) == (1, [1, 2, 4, 8, 15, 30], True)


def test_a_damaged_checkpoint_is_passed_over_at_once(storage):
    damage = ValueError("DATA_LOSS: Error opening x: CRC-32C checksum verification failed")
    assert storage(second=[damage]) == (1, [], True)


def test_checkpoints_that_nobody_can_read_now_stay_where_they_are(storage, tmp_path):
    failing = [error_of(errno.EIO)] * 100
    with pytest.raises(ClusterError, match=r"can be read now \(tried steps 2, 1\): Input/output error"):
        storage(first=failing, second=list(failing))
    assert not (tmp_path / "unreadable_checkpoints").exists()
    with pytest.raises(UserError, match=r"can be read \(tried steps 2, 1\); move the folder away"):
        storage(first=[ValueError("torn")], second=[ValueError("torn")])
    assert storage() == (2, [1, 2, 4, 8, 15, 30], False)
