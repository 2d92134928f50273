"""Opening what another run has trained."""

import json
import shutil

import jax
import numpy as np
import pytest

from jasmine import inspect
from jasmine.errors import UserError
from jasmine.training import checksums
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


def test_of_checkpoints_that_are_torn_the_one_before_is_opened(family, tmp_path, capfd):
    shutil.copytree(family["vqvae"], tmp_path / "run")
    tear(tmp_path / "run" / "checkpoints" / "6" / "state")
    assert load_run(str(tmp_path / "run"), option="RUN").step == 4
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "step 4 is the newest" in warning
    assert "(step 6: " in warning
    for step in ("2", "4"):
        tear(tmp_path / "run" / "checkpoints" / step / "state")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read") as caught:
        _ = load_run(str(tmp_path / "run"), option="RUN").params
    assert str(tmp_path / "run" / "checkpoints") in str(caught.value)
    assert "\n" not in str(caught.value)


def tear(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_of_checkpoints_with_one_wrong_bit_the_one_before_is_opened_and_nothing_is_moved(
    tiny_data, tmp_path, capfd, monkeypatch
):
    run = tmp_path / "run"
    args = [*jobs.TINY, *jobs.WIDE, "--data_dir", str(tiny_data), "--ckpt_dir", str(run)]
    jobs.run([*args, "--stop_at_step", "2", "--log_checkpoint_interval", "1"])
    good = load_run(str(run), option="RUN")
    assert good.step == 2

    def is_wrong_unnoticed() -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "agree", lambda found, meta: True)
            opened = load_run(str(run), option="RUN")
            return opened.step == 2 and opened.fingerprint() != good.fingerprint()

    def damage_step_2() -> None:
        """Flips one bit, in one place after another, until it is one of a parameter.

        How Orbax parts the arrays among files differs from save to save: the largest may have no parameters at all.
        """
        files = [path for path in (run / "checkpoints" / "2" / "state").rglob("d/*") if path.is_file()]
        for part in range(1, 50):
            for path in sorted(files, key=lambda path: path.stat().st_size, reverse=True):
                whole = path.read_bytes()
                at = len(whole) * part // 50
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                if is_wrong_unnoticed():
                    return
                path.write_bytes(whole)
        raise AssertionError("no bit of a parameter is found")

    damage_step_2()
    there = sorted(run.rglob("*"))
    capfd.readouterr()
    assert load_run(str(run), option="RUN").step == 1
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    newest = f"step 1 is the newest in {run / 'checkpoints'} that can be read"
    assert f"{newest} (step 2: its contents are not those that were saved)" in warning
    assert inspect.main([str(run), "--html", str(tmp_path / "page.html")]) == 0
    shown = capfd.readouterr()
    assert newest in shown.err
    assert shown.out.startswith("train_tokenizer_vqvae, step 1 of 40\n")
    assert inspect.main([str(run), "--step", "2", "--html", str(tmp_path / "page.html")]) == 2
    assert "checkpoints/2 cannot be read: its contents are not those that were saved" in capfd.readouterr().err
    tear(run / "checkpoints" / "1" / "state")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(step 2: its contents .*; step 1: "):
        _ = load_run(str(run), option="RUN").step
    assert sorted(run.rglob("*")) == there


def test_a_frozen_copy_with_one_wrong_bit_is_one_line(family, tmp_path):
    shutil.copytree(family["causal"], tmp_path / "run")
    (meta,) = (tmp_path / "run" / "frozen" / "tokenizer" / "checkpoints").glob("*/meta/metadata")
    record = json.loads(meta.read_text())
    record["checksums"]["params"] ^= 1  # as if the arrays were others
    meta.write_text(json.dumps(record))
    args = family.args("causal", tmp_path / "run", "--num_steps", "7")
    job = jobs.run(args, script=BASELINES["train_dynamics_causal"], expect=2)
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert "frozen/tokenizer/checkpoints can be read (step 6: its contents are not those that were saved)" in line


def test_checkpoints_of_before_there_were_checksums_of_parts_are_read(family, tmp_path):
    shutil.copytree(family["vqvae"], tmp_path / "run")
    meta = tmp_path / "run" / "checkpoints" / "6" / "meta" / "metadata"
    record = json.loads(meta.read_text())
    whole = sum(record.pop("checksums").values()) % 2**32
    meta.write_text(json.dumps(record | {"checksum": whole}))
    assert load_run(str(tmp_path / "run"), option="RUN").step == 6
    args = family.args("vqvae", tmp_path / "run", "--num_steps", "7")
    assert "resumed from the checkpoint of step 6" in jobs.run(args).output()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "7")
    meta.write_text(json.dumps(record | {"checksum": whole ^ 1}))
    assert "resumed from the checkpoint of step 4" in jobs.run(args).output()
