"""Runs of strangers, and runs that a disk has damaged: what cannot be read is one line, whichever of their files it is."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jasmine.errors import UserError
from jasmine.inspect import describe, open_checkpoint
from jasmine.training.run_files import read_lines, rewind_metrics
from jasmine.training.runs import load_run
from tests.fuzz import altered, damaged, odd_values, tries
from tests.jobs import Family

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def run_dir(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the module's own."""
    copy = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(family["vqvae"], copy)
    return copy


@contextlib.contextmanager
def one_line_at_most() -> Iterator[None]:
    """What goes wrong in the block is told in one line."""
    told = ""
    try:
        yield
    except UserError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 3000


def test_configs(run_dir: Path) -> None:
    path = run_dir / "config.json"
    whole = path.read_bytes()

    @tries(30)
    @given(st.one_of(damaged(whole), altered(json.loads(whole)).map(lambda value: json.dumps(value).encode())))
    def test(data: bytes) -> None:
        path.write_bytes(data)
        with one_line_at_most():
            load_run(str(run_dir), option="--run")
        with one_line_at_most():
            describe(epath.Path(run_dir), open_checkpoint(epath.Path(run_dir), None))

    try:
        test()
    finally:
        path.write_bytes(whole)
    assert load_run(str(run_dir), option="--run").job == "train_tokenizer_vqvae"


def test_checkpoints(run_dir: Path) -> None:
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdecimal() else -1)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)

    @tries(12)
    @given(st.sampled_from(files), st.data())
    def test(path: Path, data: st.DataObject) -> None:
        whole = path.read_bytes()
        try:
            path.write_bytes(data.draw(damaged(whole)))
            with one_line_at_most():
                assert load_run(str(run_dir), option="--run").params is not None
            with one_line_at_most():
                describe(epath.Path(run_dir), open_checkpoint(epath.Path(run_dir), None))
        finally:
            path.write_bytes(whole)

    test()
    assert load_run(str(run_dir), option="--run").params is not None


def test_metrics_of_a_run_that_goes_on(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in range(1, 6))
    path = tmp_path / "metrics.jsonl"

    @tries(100)
    @given(
        st.one_of(damaged(lines), odd_values.map(lambda value: json.dumps({"step": value}).encode() + b"\n" + lines))
    )
    def test(data: bytes) -> None:
        path.write_bytes(data)
        rewind_metrics(epath.Path(tmp_path), 3)
        assert not [line for line in read_lines(epath.Path(path)) if line.get("step") in (4, 5)]

    test()
