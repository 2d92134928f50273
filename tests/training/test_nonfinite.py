"""A loss that is not finite costs no checkpoint, names its records, and can be looked at, skipped or gone back from."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from jasmine.data.opening import open_dataset
from jasmine.data.pipeline import record_ids
from jasmine.data.sampling import batch_of
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import UserError
from jasmine.training import nonfinite
from jasmine.training.config import TrainConfig
from jasmine.training.mesh import MeshConfig, make_mesh
from jasmine.training.nonfinite import FiniteWatch, NotFinite, StateCheck
from tests import jobs
from tests.conftest import moving_squares

JOB = jobs.REPO / "tests" / "training" / "blank_job.py"
BLANK_EPISODE = 12
SEED, FIRST, SECOND = 8, 8, 40  # with this seed, the steps whose batches hold the blank clip
OPTIONS = [*jobs.TINY, "--seed", str(SEED), "--log_checkpoint_interval", "3", "--keep_checkpoints", "40"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tiny dataset, and an episode of a single window that is all white."""
    root = tmp_path_factory.mktemp("blank") / "data"
    rng = np.random.default_rng([7, 12])
    with EpisodeWriter(root / "train", frame_shape=(16, 16, 3), fps=15, encoding="raw", num_actions=4) as writer:
        for index in range(BLANK_EPISODE):
            writer.write(*moving_squares(rng, 20 + index))
        writer.write(np.full((4, 16, 16, 3), 255, np.uint8), np.zeros(4, np.int32))
    for step in range(1, 41):
        windows = record_ids(open_dataset(str(root)), seq_len=4, batch_size=8, seed=SEED, step=step - 1)
        assert any(window.episode == BLANK_EPISODE for window in windows) == (step in (FIRST, SECOND))
    return root


def train(data, run_dir, *more, **options):
    args = [*OPTIONS, "--data_dir", str(data), "--ckpt_dir", str(run_dir), *more]
    return jobs.run(args, script=JOB, **options)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run of two processes that has stopped at the blank clip, logging too rarely to see it at once."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    job = train(data, run_dir, "--log_interval", "50", processes=2, expect=65)
    return run_dir, job


@pytest.mark.slow
def test_it_stops_on_all_processes_with_its_records_and_saves_nothing_of_it(stopped, data):
    run_dir, job = stopped
    assert jobs.checkpoints(run_dir) == [3, 6]  # the save of step 9 was begun while the bad step was under way
    for process in range(2):
        (line,) = [line for line in job.output(process).splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: step {FIRST}: loss nan, grad_norm nan; the last good checkpoint is step 6. ")
        assert f"{run_dir}/nonfinite/step-{FIRST}.json; --replay_step={FIRST} shows" in line
    record = json.loads((run_dir / "nonfinite" / f"step-{FIRST}.json").read_text())
    assert (record["step"], record["loss"], record["action"]) == (FIRST, "nan", "stopped")
    windows = record_ids(open_dataset(str(data)), seq_len=4, batch_size=8, seed=SEED, step=FIRST - 1)
    assert [(one["file"], one["record"], one["episode"], one["start"]) for one in record["windows"]] == [
        (window.file, window.record, window.episode, window.start) for window in windows
    ]
    (event,) = jobs.events(run_dir, "nonfinite")
    assert (event["step"], event["action"], event["windows"]) == (FIRST, "stopped", record["windows"][:4])


@pytest.mark.slow
def test_replay_shows_where_it_goes_wrong_on_another_topology_and_writes_nothing(stopped, data, tmp_path):
    run_dir, _ = stopped
    before = content(run_dir)
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    under_launcher = {"JASMINE_ATTEMPT": "1", "JASMINE_RUN_DIR": str(tmp_path)}
    shown = train(data, run_dir, "--replay_step", str(FIRST), env=under_launcher).output()
    assert content(run_dir) == before
    # The last beat may be from a second before the end, while the step was taken apart; a watchdog sees the steps go by.
    beat = json.loads((tmp_path / "attempts" / "1" / "host-0.beat.json").read_text())
    assert beat["step"] in (FIRST - 1, FIRST)
    assert beat["doing"] in ("compiling", "stepping")
    assert f"replay of step {FIRST} of {run_dir}, from the checkpoint of step 6" in shown
    assert f"(episode {BLANK_EPISODE}, frame 0): actions 0 to 0, videos 255 to 255" in shown
    assert "not finite first: loss.loss" in shown
    assert f"first operation to make a NaN: div at {JOB}" in shown
    fine = train(data, run_dir, "--replay_step", str(FIRST - 1)).output()
    assert "everything that goes into the update is finite" in fine
    assert content(run_dir) == before


@pytest.mark.slow
def test_a_run_that_has_stopped_goes_on_with_skip_which_leaves_that_update_out_exactly(stopped, data, tmp_path):
    run_dir = tmp_path / "run"
    options = ["--on_nonfinite", "skip", "--log_checkpoint_interval", "1", "--stop_at_step", "10", "--ema_decay", "0.9"]
    train(data, run_dir, *options)
    before, skipped, after = (states(run_dir, step) for step in (FIRST - 1, FIRST, FIRST + 1))
    assert before.pop("step") + 1 == skipped.pop("step") == after.pop("step") - 1
    assert before.keys() == skipped.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], skipped[name])
    assert any((skipped[name] != after[name]).any() for name in after)
    assert jobs.metrics(run_dir, "skipped")[FIRST - 1] == 0
    assert jobs.metrics(run_dir, "skipped")[10] == 1
    assert math.isnan(jobs.metrics(run_dir, "loss")[FIRST])
    assert jobs.metrics(run_dir, "lr")[FIRST + 1] == jobs.metrics(run_dir, "lr")[FIRST]
    (event,) = jobs.events(run_dir, "nonfinite")
    assert event["action"] == "skipped"


def states(run_dir, step):
    tree = ocp.PyTreeCheckpointer().restore(run_dir / "checkpoints" / str(step) / "state")
    return {nonfinite.name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.slow
def test_rollback_leaves_the_batch_out_wherever_the_run_goes_on(data, tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    options = ["--on_nonfinite", "rollback"]
    job = train(data, cut, *options, "--max_rollbacks", "1", processes=2, expect=65)
    # One batch less: the other one that holds the clip comes a step earlier.
    assert f"error: step {SECOND - 1}: loss nan" in job.output()
    assert "(1 batches have been left out, --max_rollbacks)" in job.output()
    newest = jobs.checkpoints(cut)[-1]
    (cut / "checkpoints" / str(newest) / "state" / "_METADATA").unlink()  # so that it goes on from an older one
    again = train(data, cut, *options, "--max_rollbacks", "2")
    assert f"warning: checkpoint {newest}" in again.output()
    assert f"batches left out by rollbacks: {FIRST - 1}\n" in again.output()
    train(data, whole, *options)
    for run_dir in (cut, whole):
        assert json.loads((run_dir / "nonfinite" / "left_out.json").read_text()) == {"batches": [FIRST - 1, SECOND - 1]}
    back = jobs.events(whole, "rolled_back")
    assert [(event["back_from"], event["step"]) for event in back] == [(FIRST, 6), (SECOND - 1, SECOND - 4)]
    assert jobs.metrics(cut, "batch_checksum") == jobs.metrics(whole, "batch_checksum")
    losses, expected = jobs.metrics(cut, "loss"), jobs.metrics(whole, "loss")
    assert list(expected) == list(range(1, 41))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-4)


def test_batches_that_are_left_out_move_later_ones_up():
    assert [batch_of(step, ()) for step in range(4)] == [0, 1, 2, 3]
    assert [batch_of(step, (4, 1, 2)) for step in range(5)] == [0, 3, 5, 6, 7]
    # A step's first batch, whatever was left out for it or after it.
    left_out = (3, 4, 9)  # for steps 4, 4 again, and 8
    assert [nonfinite.left_out_before(step, left_out) for step in (3, 4, 5, 8, 9)] == [(), (), (3, 4), (3, 4), left_out]


def test_skipping_is_bounded_in_a_row():
    told = []
    watch = FiniteWatch(TrainConfig(on_nonfinite="skip", max_skipped=2), lambda found: told.append(found.step))
    for step, loss in enumerate([1, math.nan, math.inf, 1, math.nan, math.nan, math.nan, 1], 1):
        watch.add(step, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1)})
    watch.settle(ahead=2)
    assert told == [2, 3, 5, 6]
    with pytest.raises(NotFinite, match="step 7: loss nan, grad_norm 1"):
        watch.settle()


def test_a_gradient_alone_is_enough_and_steps_under_way_are_not_waited_for():
    watch = FiniteWatch(TrainConfig(), lambda found: None)
    watch.add(1, {"loss": jnp.float32(1), "grad_norm": jnp.float32(math.inf)})
    watch.settle(ahead=1)
    with pytest.raises(NotFinite, match="step 1: loss 1, grad_norm inf"):
        watch.settle(ahead=0)


def test_a_state_that_is_not_finite_is_named():
    check = StateCheck(make_mesh(MeshConfig()))
    state = {"params": {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)}, "count": jnp.int32(3)}
    assert check(state) == ""
    state["params"]["kernel"] = state["params"]["kernel"].at[5, 1].set(jnp.inf)
    assert check(state) == "params.kernel"


def test_a_damaged_list_of_left_out_batches_is_one_line(tmp_path):
    nonfinite.write_left_out(epath.Path(tmp_path), {5, 3})
    assert nonfinite.read_left_out(epath.Path(tmp_path)) == (3, 5)
    (tmp_path / "nonfinite" / "left_out.json").write_text('{"batches": [3,')
    with pytest.raises(UserError, match=r"left_out.json is damaged: expected"):
        nonfinite.read_left_out(epath.Path(tmp_path))
