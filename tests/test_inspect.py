"""`python -m jasmine.inspect`: what it says of a real run, of a stranger's checkpoint, and of folders that are neither."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from jasmine import inspect
from jasmine.training.run_files import log_event
from tests import jobs


def save(run: Path, step: int, tree: dict, item: str = "state") -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(run / "checkpoints" / str(step) / item, tree)


def snapshot(root: Path) -> dict[Path, tuple[float, int]]:
    return {path: (path.stat().st_mtime, path.stat().st_size) for path in root.rglob("*")}


def pictures(page: str) -> int:
    """Pictures of arrays in a page. Fails where it is not well formed, or needs anything from elsewhere."""

    class Parser(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            for name, value in attributes:
                assert name not in ("src", "href") or (value or "").startswith(("data:", "#")), (tag, name, value)
            if tag in ("html", "head", "body"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag in ("html", "head", "body"):
                assert self.open.pop() == tag

    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    assert page.startswith("<!doctype html>")
    assert re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?https?:", page) is None
    return page.count('class="arrayviz_container"')


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A run of a script that leaves nothing but checkpoints, in containers of its own."""
    run = tmp_path / "stranger"
    weights = {"net": [np.ones((4, 6), np.float32), np.zeros(3, jax.numpy.bfloat16)], "scale": np.float32(2)}
    for step in (5, 100):
        save(run, step, weights, item="default")
    return run


@pytest.mark.slow
def test_a_run_is_described(tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*jobs.TINY, "--data_dir", str(tiny_data), "--ckpt_dir", str(run), "--ema_decay", "0.9"]
    jobs.run([*arguments, "--stop_at_step", "20"])
    job = jobs.run(arguments)
    before = snapshot(run)
    assert inspect.main([str(run)]) == 0
    assert snapshot(run) == before
    text = capsys.readouterr().out
    assert text.startswith("train_tokenizer_vqvae, step 40 of 40\n")
    assert "frames of 16×16×3, 4 actions" in text
    assert re.search(r"moving average kept", text)
    assert re.search(r"\n    codebook +128  0\.00  float32  16×8\n", text)
    counted = re.search(r"^parameters: .* total ([\d,]+)$", job.output(), re.MULTILINE)[1]  # by the job, as it began
    assert re.search(rf"\n  total +{counted} ", text)
    assert re.search(r"started at step 0 on 1 process, 1 device; finished at step 20 after (\d+m)?\d+s\n", text)
    assert re.search(r"resumed at step 20 on 1 process, 1 device; finished at step 40 after (\d+m)?\d+s\n", text)

    assert inspect.main([str(run), "--step", "20", "--html"]) == 0
    assert capsys.readouterr().out.startswith("train_tokenizer_vqvae, step 20 of 40\n")
    page = (run / "inspect.html").read_text()
    assert "params.vq.codebook" in page
    assert pictures(page) >= 2 * page.count("\nparams.")  # and as many moving averages
    assert snapshot(run).keys() - before.keys() == {run / "inspect.html"}


def test_a_checkpoint_of_any_script_is_described(stranger, capsys):
    assert inspect.main([str(stranger)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("an unknown script, step 100\n")
    assert "checkpoints    5, 100" in text
    assert re.search(r"\nnet\n.*\n  0 +24  0\.00  float32 +4×6\n  1 +3  0\.00  bfloat16 +3\n", text)
    assert re.search(r"\nscale\n.*\n  total +1  0\.00  float32  scalar\n", text)
    assert "whole checkpoint: 28 numbers" in text


def test_frozen_parts_are_named(stranger, capsys):
    part = stranger / "frozen" / "tokenizer"
    save(part, 7, {"params": {"w": np.zeros((10, 10), np.float32)}})
    (part / "config.json").write_text(json.dumps({"job": "train_tokenizer_vqvae", "pinned_from": "runs/tok"}))
    assert inspect.main([str(stranger)]) == 0
    expected = "tokenizer: train_tokenizer_vqvae, step 7, 100 parameters, taken from runs/tok"
    assert expected in capsys.readouterr().out


def test_history_tells_how_each_attempt_ended(tmp_path):
    topology = {"processes": 2, "devices": 8}
    for record in (
        {"event": "started", "step": 0, **topology},
        {"event": "signalled", "step": 30, "signal": "SIGTERM"},
        {"event": "saved", "step": 30},
        {"event": "resumed", "step": 30, **topology},
        {"event": "checkpoint", "step": 50},
    ):
        log_event(epath.Path(tmp_path), **record)
    first, second = inspect.history(epath.Path(tmp_path))
    assert "started at step 0 on 2 processes, 8 devices; left at step 30 on SIGTERM after" in first
    assert "resumed at step 30 on 2 processes, 8 devices; no end recorded; last heard of at step 50 after" in second


def test_long_histories_are_short(tmp_path):
    for step in range(40):
        log_event(epath.Path(tmp_path), event="resumed" if step else "started", step=step)
    lines = inspect.history(epath.Path(tmp_path))
    assert len(lines) < 20
    assert "started at step 0" in lines[0]
    assert "resumed at step 39" in lines[-1]


def test_dead_and_exploded_weights_stand_out(tmp_path, capsys):
    healthy = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    exploded = np.where(np.arange(4096).reshape(64, 64) == 2080, np.nan, healthy * 1e7).astype(np.float32)
    save(tmp_path, 1, {"params": {"healthy": healthy, "dead": np.zeros((64, 64), np.float32), "exploded": exploded}})
    assert inspect.main([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert not (tmp_path / "inspect.html").exists()
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"params\.dead +64×64 +0 +0 +100\.0%", page)
    assert re.search(r"params\.healthy +64×64 +(1|0\.99\d|1\.0\d) +[34]\.\d+ +0\.0%</pre>", page)
    assert re.search(r"params\.exploded +64×64 +\S+e\+06 +\S+e\+07 +0\.0% +1 not finite\n", page)
    assert pictures(page) == 3


def test_page_of_a_large_model_is_small(tmp_path, capsys):
    rng = np.random.default_rng(0)
    blocks = {f"linear_{i}": {"kernel": rng.normal(size=(4, 512, 512)).astype(np.float32)} for i in range(10)}
    save(tmp_path, 1, {"params": {"blocks": blocks, "table": np.zeros((50_000, 4), np.float32)}})
    assert inspect.main([str(tmp_path), "--html"]) == 0
    assert "10,685,760" in capsys.readouterr().out
    page = (tmp_path / "inspect.html").read_text()
    assert pictures(page) == 11
    assert len(page) < 2e6


# --- errors ------------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert inspect.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    return captured.err


def test_folders_that_are_no_runs_are_refused(tmp_path, capsys):
    assert "there is no such run" in refused([str(tmp_path / "nowhere")], capsys)
    assert "not a run directory" in refused([str(tmp_path)], capsys)
    (tmp_path / "checkpoints").mkdir()
    assert "no finished checkpoint" in refused([str(tmp_path)], capsys)
    (tmp_path / "checkpoints" / "7").mkdir()
    assert "no checkpoint in" in refused([str(tmp_path)], capsys)


def test_a_step_that_is_not_there_is_refused(stranger, capsys):
    assert "--step=6: " in (message := refused([str(stranger), "--step", "6"], capsys))
    assert "steps 5, 100" in message


def test_damaged_checkpoints_are_refused(stranger, capsys):
    metadata = stranger / "checkpoints" / "100" / "default" / "_METADATA"
    metadata.write_text(metadata.read_text()[:50])
    assert "checkpoints/100 cannot be read" in refused([str(stranger), "--step", "100"], capsys)
    assert inspect.main([str(stranger)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("an unknown script, step 5\n")
    assert re.fullmatch(r"warning: step 5 is the newest in [^\n]+ that can be read \(step 100: [^\n]+\)\n", shown.err)
    for path in (stranger / "checkpoints" / "5").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    assert inspect.main([str(stranger), "--step", "5", "--html"]) == 2
    assert re.fullmatch(r"error: [^\n]+checkpoints/5[^\n]+cannot be read[^\n]+\n", capsys.readouterr().err)
    assert "no checkpoint in" in refused([str(stranger), "--html"], capsys)
    assert not (stranger / "inspect.html").exists()


def test_a_page_that_cannot_be_written_is_refused(stranger, capsys):
    assert inspect.main([str(stranger), "--html", str(stranger / "no" / "such" / "page.html")]) == 2
    assert re.fullmatch(r"error: cannot write --html=[^\n]+page\.html: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_prints_nothing_else(stranger):
    command = [sys.executable, "-m", "jasmine.inspect", str(stranger)]
    environment = os.environ | {"PYTHONPATH": str(jobs.REPO)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stderr == ""
    assert result.stdout.startswith("an unknown script, step 100\n")


def test_a_wrong_option_is_one_line(capsys):
    assert inspect.main(["run", "--step", "last"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --step: invalid int value: 'last'")
    assert error.count("\n") == 1
