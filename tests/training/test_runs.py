"""Opening what another run has trained."""

import json
import shutil

import jax
import numpy as np
import pytest

from jasmine.errors import UserError
from jasmine.training.runs import find_run, load_run
from tests import jobs
from tests.jobs import BASELINES, FAMILY

pytestmark = pytest.mark.slow


def test_a_run_is_found_by_its_folder_and_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "storage" / "tok").mkdir(parents=True)
    monkeypatch.setenv("JASMINE_STORAGE", str(tmp_path / "storage"))
    assert find_run("tok", "--x") == find_run(str(tmp_path / "storage" / "tok"), "--x")
    monkeypatch.delenv("JASMINE_STORAGE")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--x=tok: there is no such run"):
        find_run("tok", "--x")
    monkeypatch.setenv(
        "JASMINE_RUN_DIR", str(tmp_path / "storage" / "mine")
    )  # under the launcher: one beside this job's
    assert str(find_run("tok", "--x")) == str(tmp_path / "storage" / "tok")
    assert str(find_run("storage/tok", "--x")) == str(tmp_path / "storage" / "tok")


@pytest.mark.parametrize("name", FAMILY)
def test_every_baseline_s_run_opens_with_the_options_that_it_was_trained_with(family, name):
    run = load_run(str(family[name]), option="RUN")
    assert (run.job, run.step) == (FAMILY[name][0], 6)
    assert run.data.frame_shape == (16, 16, 3)
    assert run.data.num_actions == 4
    assert run.config.ckpt_dir == str(family[name])
    assert run.config.max_lr == (1e-4 if name == "lam" else 3e-3)
    shapes = jax.tree.map(lambda leaf: leaf.shape, run.params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, run.definition.shapes)
    frozen = {"vqvae": [], "mae": [], "lam": [], "causal": ["lam", "tokenizer"]}.get(name, ["tokenizer"])
    assert sorted(run.frozen()) == frozen
    for part in run.task.frozen.values():  # its own copies, not those that it was told of
        assert part.path.parent == run.path / "frozen"


def test_the_frozen_copy_is_the_model_that_was_named(family):
    run = load_run(str(family["causal"]), option="RUN")
    for part, source in (("tokenizer", "vqvae"), ("lam", "lam")):
        original = load_run(str(family[source]), option="RUN")
        assert run.task.frozen[part].fingerprint() == original.fingerprint()
        assert json.loads((run.path / "frozen" / part / "config.json").read_text())["pinned_from"] == str(
            family[source]
        )


def test_the_fingerprint_is_that_of_the_weights(family, tmp_path):
    first = load_run(str(family["vqvae"]), option="RUN").fingerprint()
    shutil.copytree(family["vqvae"], tmp_path / "moved")
    assert load_run(str(tmp_path / "moved"), option="RUN").fingerprint() == first
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "6")
    assert load_run(str(tmp_path / "moved"), option="RUN").step == 4
    assert load_run(str(tmp_path / "moved"), option="RUN").fingerprint() != first


def test_the_moving_average_is_what_is_opened(family, tmp_path):
    args = family.args("mae", tmp_path / "run", "--ema_decay", "0.5", "--stop_at_step", "2")
    jobs.run(args, script=BASELINES["train_tokenizer_mae"])
    plain = load_run(str(family["mae"]), option="RUN")
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(family["mae"], tmp_path / "copy")
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / step)
    plain = load_run(str(tmp_path / "copy"), option="RUN").params["mask_patch"]
    average = load_run(str(tmp_path / "run"), option="RUN").params["mask_patch"]
    assert (np.asarray(plain) != np.asarray(average)).any()
    np.testing.assert_allclose(plain, average, atol=0.02)  # two steps of at most 3e-3 lie between them


def test_a_checkpoint_that_does_not_fit_its_config_says_where(family, tmp_path):
    shutil.copytree(family["vqvae"], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["config"]["ffn_dim"] = 64
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"linear_in.*is \(1, 16, 32\) in the one and \(1, 16, 64\) by the other"):
        _ = load_run(str(tmp_path / "run"), option="RUN").params
    record["config"]["no_such_option"] = 1
    record["config"]["ffn_dim"] = "wide"
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="another version") as caught:
        load_run(str(tmp_path / "run"), option="RUN")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_torn_is_named(family, tmp_path):
    shutil.copytree(family["vqvae"], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read") as caught:
        _ = load_run(str(tmp_path / "run"), option="RUN").params
    assert str(tmp_path / "run" / "checkpoints" / "6") in str(caught.value)
    assert "\n" not in str(caught.value)
