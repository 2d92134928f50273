"""Mistakes are refused with one clear line, before anything is created."""

from pathlib import Path

import pytest

from launch.record import write_record
from tests.launch.checkouts import Checkout


def _refused(checkout: Checkout, *arguments: str) -> str:
    before = sorted(checkout.home.rglob("*"))
    done = checkout.run("submit", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(checkout.home.rglob("*")) == before, "something was created"
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cluster", "locl"], ["unknown cluster 'locl'", "did you mean 'local'?", "there are: local"]),
        (["--cluster", "none/such.yaml"], ["none/such.yaml does not exist", "local"]),
        ([], ["--cluster is missing"]),
        (["--cluster"], ["expected one argument"]),
        (["--cluster", "local", "--set", "proceses=2"], ["--set proceses", "did you mean 'processes'?", "keys: "]),
        (["--cluster", "local", "--set", "processes=two"], ["--set processes", "'two'", "a whole number, at least 1"]),
        (["--cluster", "local", "--set", "processes=0"], ["a whole number, at least 1"]),
        (["--cluster", "local", "--set", "processes"], ["expected KEY=VALUE"]),
        (["--cluster", "local", "--set", "env.JAX_PROCESS_ID=1"], ["JAX_PROCESS_ID is set by the launcher"]),
        (["--cluster", "local", "--set", "env.A=true"], ["env.A is True", "quote true"]),
        (
            ["--cluster", "local", "--set", "processes=2", "--set", "devices_per_process=auto"],
            ["'auto' is for 1 process, not 2"],
        ),
        (["--cluster", "local", "--set", "storage=$NOT_SET_ANYWHERE/x"], ["$NOT_SET_ANYWHERE is not set"]),
        (["--cluster", "local", "--set", "python=/no/python"], ["python: /no/python is not an executable file"]),
        (["--cluster", "local", "--nmae", "x"], ["unknown option --nmae", "did you mean '--name'?", "--dry-run"]),
        (
            ["--cluster", "local", "--num_steps", "5"],
            ["--num_steps is an option of the job", "train_tokenizer_vqvae --num_steps"],
        ),
        (
            ["--cluster", "local", "train_tokeniser_vqvae"],
            ["unknown job", "did you mean 'train_tokenizer_vqvae'?", "train_lam"],
        ),
        (["--cluster", "local", "no/such/script.py"], ["no/such/script.py: there is no such file"]),
        (
            ["--cluster", "local", "train_lam", "--num_step", "5"],
            ["no option --num_step", "did you mean '--num_steps'?"],
        ),
        (
            ["--cluster", "local", "train_lam", "--mesh.fdsp=5"],
            ["no option --mesh.fdsp", "did you mean '--mesh.fsdp'?"],
        ),
        (["--cluster", "local", "train_lam", "--wait"], ["--wait is an option of the launcher", "before train_lam"]),
        (
            ["--cluster", "local", "train_lam", "--num_steps", "abc"],
            ["train_lam: --num_steps=abc: expected a whole number"],
        ),
        (["--cluster", "local", "train_lam", "--max_lr=fast"], ["--max_lr=fast: expected a number"]),
        (["--cluster", "local", "train_lam", "--num_steps"], ["--num_steps: its value is missing"]),
        (["--cluster", "local", "train_lam", "--data_dir", "--log"], ["--data_dir: its value is missing"]),
        (["--cluster", "local", "train_lam", "--mesh.fsdp", "all"], ["--mesh.fsdp=all: expected a whole number"]),
        (["--cluster", "local", "train_lam", "--log=True"], ["--log takes no value", "'True'"]),
        (["--cluster", "local", "train_lam", "extra_word"], ["unexpected 'extra_word'", "--name value"]),
        (
            ["--cluster", "local", "--sweep", "num_steps=1,two", "train_lam"],
            ["--num_steps=two: expected a whole number"],
        ),
        (["--cluster", "local", "--sweep", "num_steps=0..", "train_lam"], ["--sweep num_steps=0..", "FIRST..LAST"]),
        (["--cluster", "local", "--sweep", "num_steps=a..b", "train_lam"], ["--sweep num_steps=a..b", "FIRST..LAST"]),
        (["--cluster", "local", "--sweep", "num_steps=1,3..5", "train_lam"], ["a range stands alone"]),
        (["--cluster", "local", "--sweep", "num_steps=7,7", "train_lam"], ["7 is given twice"]),
        (
            ["--cluster", "local", "--sweep", "num_steps=1,2", "--sweep", "num-steps=3,4", "train_lam"],
            ["--sweep num_steps: it is swept twice"],
        ),
        (["--cluster", "local", "--cluster", "local"], ["--cluster is given twice"]),
        (["--cluster", "local", "--name", "../x"], ["'../x'", "1 to 63 letters"]),
        (["--cluster", "local", "--name", ""], ["1 to 63 letters"]),
    ],
)
def test_the_command_line(checkout: Checkout, arguments: list[str], expected: list[str]) -> None:
    line = _refused(checkout, *arguments)
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "backend: local\nproceses: 2\n",
            ["c.yaml:2", "unknown key 'proceses'", "did you mean 'processes'?", "grace_seconds"],
        ),
        ("backend: local\nprocesses: two\n", ["c.yaml:2", "processes is 'two'", "a whole number, at least 1"]),
        ("backend: local\n\nmax_failures: 1.5\n", ["c.yaml:3", "max_failures is 1.5", "whole number"]),
        ("backend: local\nenv: [A]\n", ["c.yaml:2", "env is ['A']", "NAME: text"]),
        ("backend: local\nprocesses: 1\nprocesses: 2\n", ["c.yaml:3", "given twice", "line 2"]),
        ("backend: local\n  processes: [1\n", ["c.yaml:2", "not valid YAML"]),
        ("backend: loca\n", ["c.yaml:1", "'loca'", "did you mean 'local'?"]),
        ("processes: 2\n", ["c.yaml", "backend: the key is missing", "local"]),
        ("", ["c.yaml", "backend: local"]),
        ("- a list\n", ["c.yaml", "key: value"]),
    ],
)
def test_the_cluster_file(checkout: Checkout, text: str, expected: list[str]) -> None:
    (checkout.home / "c.yaml").write_text(text)
    line = _refused(checkout, "--cluster", "c.yaml")
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            "  first: {job: train_lam, arg: --log}\n",
            ["stages.first.arg: unknown key; did you mean 'args'?", "job, args"],
        ),
        ("  first: {args: --log}\n", ["stages.first.job: the key is missing"]),
        ("  first: {job: train_lma}\n", ["stage 'first': unknown job 'train_lma'; did you mean 'train_lam'?"]),
        ("  first: {job: train_lam, args: --num_step 3}\n", ["stage 'first': train_lam has no option --num_step"]),
        (
            "  first: {job: train_lam, set: [proceses=2]}\n",
            ["stage 'first': --set proceses", "did you mean 'processes'?"],
        ),
    ],
)
def test_the_pipeline_file(checkout: Checkout, stages: str, expected: list[str]) -> None:
    (checkout.home / "p.yaml").write_text(f"name: p\nstages:\n{stages}")
    line = _refused(checkout, "--cluster", "local", "--pipeline", "p.yaml")
    for part in ["--pipeline p.yaml", *expected]:
        assert part in line
    (checkout.home / "p.yaml").write_text(f"name: A/B\nstages:\n{stages}")
    if "unknown key" not in line:
        assert "name is 'A/B'; expected letters" in _refused(checkout, "--cluster", "local", "--pipeline", "p.yaml")


def test_a_key_that_is_missing(checkout: Checkout) -> None:
    (checkout.home / "c.yaml").write_text(
        "backend: cloud_tpu\nproject: p\naccelerator_type: v5litepod-8\nstorage: /mnt/r\n"
    )
    assert "c.yaml: the key zone is missing; expected" in _refused(checkout, "--cluster", "c.yaml")


def test_an_option_that_the_job_cannot_do_without(checkout: Checkout) -> None:
    config = checkout.root / "jasmine" / "training" / "config.py"
    needs = "    REQUIRED: ClassVar[tuple[str, ...]] = ('data_dir',)\n    num_steps"
    config.write_text("from typing import ClassVar\n" + config.read_text().replace("    num_steps", needs, 1))
    assert "train_lam needs --data_dir" in _refused(checkout, "--cluster", "local", "train_lam")
    dry = checkout.run("submit", "--cluster", "local", "--dry-run", "train_lam")
    assert dry.returncode == 0
    needs = "train_lam needs --data_dir: give it after train_lam, or export JASMINE_DATA_DIR"
    assert dry.stderr == f"warning: this would be refused: {needs}\n"
    slurm = ["submit", "--cluster", "slurm-h100", "--set", "storage=runs", "--export-sbatch", "job.sbatch", "train_lam"]
    exported = checkout.run(*slurm)
    assert (exported.returncode, exported.stderr) == (0, dry.stderr)
    given = checkout.run("submit", "--cluster", "local", "--dry-run", "train_lam", "--data-dir=d")
    assert (given.returncode, given.stderr) == (0, "")


def test_a_name_that_is_the_jobs_is_noted(checkout: Checkout) -> None:
    config = checkout.root / "jasmine" / "training" / "config.py"
    config.write_text(config.read_text().replace("    num_steps", '    name: str = ""\n    num_steps', 1))
    dry = ["submit", "--cluster", "local", "--dry-run"]
    noted = checkout.run(*dry, "train_lam", "--name", "mine").stderr
    assert noted.startswith("note: --name after train_lam is the job's own")
    assert noted.count("\n") == 1
    assert checkout.run(*dry, "--name", "r", "train_lam", "--name", "mine").stderr == ""


def test_storage_that_cannot_be_written(checkout: Checkout) -> None:
    (checkout.home / "file").touch()
    for dry in ([], ["--dry-run"]):
        line = _refused(checkout, "--cluster", "local", "--set", "storage=file/runs", *dry)
        assert str(checkout.home / "file") in line
        assert "not a directory" in line
    assert "/proc" in _refused(checkout, "--cluster", "local", "--set", "storage=/proc/runs")


def test_a_directory_that_is_not_a_run(checkout: Checkout) -> None:
    mine = checkout.home / "runs" / "mine"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("precious")
    assert "is not a run directory" in _refused(checkout, "--cluster", "local", "--name", "mine")
    assert (mine / "thesis.txt").read_text() == "precious"


def test_a_name_in_use(checkout: Checkout) -> None:
    checkout.submit("train_lam", "--num_steps", "2000")
    checkout.at_step(1)
    for command in (["submit", "--cluster", "local", "--name", "r", "train_lam"], ["jobs", "resume", "r"]):
        done = checkout.run(*command)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "'r' is in use" in done.stderr
        assert "another --name" in done.stderr
    events = [event["event"] for event in checkout.directory().events()]
    assert events == ["submitted", "scheduled", "attempt_started"], "the live run was changed"


def test_code_too_large_to_be_code(checkout: Checkout) -> None:
    with (checkout.root / "weights.bin").open("wb") as file:
        file.truncate(300 * 1024**2)
    line = _refused(checkout, "--cluster", "local")
    assert "weights.bin (300 MiB)" in line
    assert ".gitignore" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stauts", "r"], ["unknown command 'stauts'", "did you mean 'status'?", "resume"]),
        (["status", "rum-1"], ["no run 'rum-1'", "did you mean 'run-1'?"]),
        (["status"], ["RUN"]),
        (["list", "--wiat"], ["--wiat"]),
        (["cancel", "run-1"], ["not running", "finished"]),
        (["resume", "run-1", "train_lam", "--num_steps", "9"], ["train_lam: resume takes options", "--OPTION VALUE"]),
        (["resume", "run-1", "--num_steps", "many"], ["--num_steps=many: expected a whole number"]),
        (["resume", "run-1", "--set", "processes=2"], ["'run-1' has finished", "resume run-1", "--num_steps N"]),
        (["logs", "run"], ["'run' is a sweep: name one of its runs: run.0, run.1"]),
        (["resume", "run-1", "--num_step", "9"], ["no option --num_step", "did you mean '--num_steps'?"]),
        (["resume", "run-1", "--num_steps", "2", "--set", "proceses=9"], ["did you mean 'processes'?"]),
        (["resume", "run-1", "--num_steps", "2", "--cluster", "locl"], ["did you mean 'local'?"]),
    ],
)
def test_jobs(checkout: Checkout, arguments: list[str], expected: list[str]) -> None:
    checkout.submit("train_lam", "--num_steps", "1", name="run-1")
    record = checkout.end("run-1")
    for element in ("run.0", "run.1"):
        checkout.directory(element).root.mkdir()
        write_record(checkout.directory(element), record.model_copy(update={"name": element}))
    done = checkout.jobs(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    for part in expected:
        assert part in done.stderr


def test_a_damaged_record_names_its_file(checkout: Checkout) -> None:
    checkout.submit("train_lam", "--num_steps", "1")
    checkout.end()
    checkout.directory().record.write_text("{")
    done = checkout.jobs("status", "r")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run.json: damaged" in done.stderr
    assert "damaged" in checkout.jobs("list").stderr


def test_nothing_of_jax_or_jasmine_is_imported() -> None:
    sources = Path(__file__).resolve().parents[2].joinpath("launch").rglob("*.py")
    for source in sources:
        lines = source.read_text().splitlines()
        assert not [
            line
            for line in lines
            if line.lstrip().startswith(("import jax", "from jax", "import jasmine", "from jasmine"))
        ]
