"""The reader of option names agrees with tyro, on what it reads, and keeps out of what it cannot."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro

from jasmine.baselines import train_lam
from jasmine.baselines.maskgit import sample_maskgit
from jasmine.command_line import parse
from jasmine.errors import UserError as JasmineUserError
from launch.errors import UserError, notice_once
from launch.options import Job, baselines, check_batch, check_options, check_required, known_options
from launch.request import Request, check_devices, requests_for
from launch.submission import recorded

SCRIPT = """
import dataclasses
from typing import ClassVar, Literal

import base_module
from base_module import Base


@dataclasses.dataclass(frozen=True)
class Inner:
    deep: int = 1
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Config(Base):
    registry: ClassVar[int] = 0
    batch_size: int = 3
    mode: Literal["a", "b"] = "a"
    maybe: int | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)
    mesh: base_module.Mesh = dataclasses.field(default_factory=base_module.Mesh)
    hidden: int = dataclasses.field(init=False, default=0)
"""
BASE = """
import dataclasses


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = 1


@dataclasses.dataclass(frozen=True)
class Base:
    data_dir: str = ""
    log: bool = False
"""


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_read_is_what_tyro_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "base_module.py").write_text(BASE)
    script = tmp_path / "options_script.py"
    script.write_text(SCRIPT)
    names = known_options(script, tmp_path)
    assert names == {
        *("data_dir", "log", "no_log", "batch_size", "mode", "maybe", "mesh.data"),
        *("inner.deep", "inner.flag", "inner.no_flag"),
    }
    config = _load(script).Config
    for name in names:
        value = (
            [] if name.rpartition(".")[2] in ("log", "no_log", "flag", "no_flag") else ["a" if name == "mode" else "1"]
        )
        tyro.cli(config, args=[f"--{name}", *value])
    for wrong in ("registry", "hidden", "inner"):
        with pytest.raises(SystemExit):
            tyro.cli(config, args=[f"--{wrong}", "1"], console_outputs=False)


@pytest.mark.parametrize(
    "source",
    [
        "print('a script')",
        "class Config:\n    a: int = 1",
        "from elsewhere import Base\nimport dataclasses\n@dataclasses.dataclass\nclass Config(Base):\n    a: int = 1",
        "import dataclasses, tyro\n@dataclasses.dataclass\nclass Config:\n    a: tyro.conf.Positional[int] = 1",
        "from dataclasses import dataclass\n@dataclass\nclass A: ...\n@dataclass\nclass Config:\n    a: A | None = None",
        "not python at all(",
    ],
)
def test_what_cannot_be_read_for_certain_is_left_to_the_job(tmp_path: Path, source: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(source)
    assert known_options(script, tmp_path) is None


@pytest.mark.parametrize("name", sorted(baselines()))
def test_every_baseline_can_be_read(name: str) -> None:
    names = known_options(baselines()[name])
    assert names is not None
    assert {"data_dir", "num_steps", "batch_size", "mesh.fsdp"} <= names or not name.startswith("train_")
    assert {"data_dir", "seed"} <= names


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_lam", "--data_dir d --batch_size 8 --max_lr=3e-4 --max_grad_norm -1 --log --no-restore_ckpt", None),
        ("train_lam", "--tags a b --warmup_steps None --num-kv-heads 2 --dtype float32 --seed -1", None),
        ("sample_maskgit", "RUN --num_frames 4 --temperature 0.5", None),
        ("train_lam", "--batch_size abc", "--batch_size=abc: expected a whole number"),
        ("train_lam", "--num_kv_heads=two", "--num_kv_heads=two: expected a whole number"),
        ("train_lam", "--seq_len 1.5", "--seq_len=1.5: expected a whole number"),
        ("train_lam", "--mesh.fsdp x", "--mesh.fsdp=x: expected a whole number"),
        ("train_lam", "--max_lr", "--max_lr: its value is missing; expected a number"),
        ("train_lam", "--seed --log", "--seed: its value is missing"),
        ("train_lam", "--dtype float16", "--dtype=float16: expected one of bfloat16, float32; did you mean 'bfloat16'?"),
        ("train_lam", "--remat ful", "--remat=ful: expected one of none, dots, full, offload; did you mean 'full'?"),
        ("train_lam", "--log yes", "unexpected 'yes'"),
        ("sample_maskgit", "RUN other", "unexpected 'other'"),
    ],
)  # fmt: skip
def test_what_is_refused_is_what_the_job_would_refuse(name: str, arguments: str, message: str | None) -> None:
    job, words = Job(name, baselines()[name]), arguments.split()
    config: Any = {"train_lam": train_lam, "sample_maskgit": sample_maskgit}[name].Config
    mine = words[1:] if name.startswith("sample_") else words
    if message is None:
        check_options(job, words)
        parse(config, mine)
        return
    check_options(Job("mine.py", job.script), words)  # which may read its command line in another way
    with pytest.raises(UserError) as refusal:
        check_options(job, words)
    assert message in str(refusal.value)
    with pytest.raises(JasmineUserError):
        parse(config, mine)


def test_what_a_baseline_cannot_do_without() -> None:
    for name in baselines():
        job = Job(name, baselines()[name])
        needs = ["--data_dir"] if name.startswith("train_") else []
        needs += ["--tokenizer_checkpoint"] if name.startswith("train_dynamics_") else []
        given = [word for option in needs for word in (option, "x")]
        check_required(job, given)
        for index, option in enumerate(needs):
            with pytest.raises(UserError, match=f"{name} needs {option}"):
                check_required(job, given[: 2 * index])


@pytest.mark.parametrize(
    ("devices", "arguments", "message"),
    [
        (16, [], None),
        (256, ["--batch_size=512"], None),
        (256, ["--batch-size", "512", "--mesh.fsdp", "64"], None),
        (256, ["--mesh.tensor=16"], None),  # 48 clips over 16 parts
        (256, [], "--batch_size=48 does not split over the 256 data-parallel devices of this cluster; the"),
        (16, ["--batch_size", "40"], "the nearest that does: 32 or 48"),
        (16, ["--grad_accumulation_steps=2"], "× 2 accumulation steps; the nearest that does: 32 or 64"),
        (16, ["--mesh.fsdp=3"], "mesh --mesh.data=-1 --mesh.fsdp=3 --mesh.tensor=1 does not make the 16 devices"),
        (16, ["--mesh.data=8"], "does not make the 16 devices"),
        (256, ["--batch_size=many"], None),  # the job has the word
    ],
)  # fmt: skip
def test_a_batch_that_does_not_split_is_refused(devices: int, arguments: list[str], message: str | None) -> None:
    name = "train_tokenizer_vqvae"
    job = Job(name, baselines()[name])
    if message is None:
        check_batch(job, arguments, devices)
        check_batch(Job("mine.py", job.script), ["--batch_size=1"], devices)
        return
    with pytest.raises(UserError) as refusal:
        check_batch(job, arguments, devices)
    assert message in str(refusal.value)
    dynamics = Job("train_dynamics_maskgit", baselines()["train_dynamics_maskgit"])
    with pytest.raises(UserError, match="--batch_size=36 "):  # the default of a nearer class
        check_batch(dynamics, [], 16)


@pytest.fixture
def request_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    """Makes the request for the run `r` in storage of the test's own."""
    monkeypatch.setenv("JASMINE_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "lab")
    notice_once.cache_clear()

    def make(cluster: str, *words: str, overrides: Sequence[str] = ()) -> Request:
        options = {"overrides": overrides, "name": "r", "sweep": (), "after": (), "cwd": tmp_path, "reserved": ()}
        (request,) = requests_for(words, cluster=cluster, **options)  # type: ignore[arg-type]
        return request

    return make


def test_a_default_batch_is_made_to_split_and_stays_what_it_was(
    request_for: Callable[..., Request], capsys: pytest.CaptureFixture[str]
) -> None:
    first = request_for("tpu-v5-256", "train_tokenizer_vqvae", "--data_dir=D")
    assert first.arguments == ("--data_dir=D", "--batch_size=256")
    default = "the default of train_tokenizer_vqvae, 48, does not split over the 256 devices of this cluster"
    assert capsys.readouterr().err == f"--batch_size=256 is added: {default}\n"
    check_devices(first)
    assert "# job: train_tokenizer_vqvae --data_dir=D --batch_size=256\n" in first.backend.preview([first.plan()])
    job = "train_tokenizer_vqvae"
    assert request_for("tpu-v5-256", job, "--grad_accumulation_steps", "3").arguments[-1] == "--batch_size=768"
    assert request_for("tpu-v5-256", job, "--mesh.tensor=16").arguments == ("--mesh.tensor=16",)  # 48 over 16 parts
    assert request_for("tpu-v5-16").arguments == ()
    assert request_for("local", overrides=["processes=5"]).arguments == ("--batch_size=50",)
    told = request_for("tpu-v5-256", job, "--data_dir=D", "--batch-size", "100")
    assert told.arguments == ("--data_dir=D", "--batch-size", "100")  # whoever asks for it hears why it does not do
    with pytest.raises(UserError, match="--batch_size=100 does not split"):
        check_devices(told)

    with recorded([first]):
        pass
    capsys.readouterr()
    assert request_for("tpu-v5-16", job).arguments == ("--batch_size=256",)
    assert capsys.readouterr().err == "--batch_size=256 is added: what the run was submitted with before\n"
    assert request_for("tpu-v5-16", job, "--batch_size", "64").arguments == ("--batch_size", "64")


def test_the_batch_of_a_run_that_there_is_is_not_chosen_anew(
    request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JASMINE_DATA_DIR", "D")
    with recorded([request_for("tpu-v5-16")]):
        pass
    moved = request_for("tpu-v5-256")
    assert moved.arguments == ("--data_dir=D",)
    with pytest.raises(UserError, match="--batch_size=48 does not split"):
        check_devices(moved)


def test_a_cluster_alone_is_a_whole_command_where_it_is_known_which_data(
    request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match="needs --data_dir: give it after train_tokenizer_vqvae, or export JASMINE_DATA_DIR"
    ):
        check_devices(request_for("local"))
    monkeypatch.setenv("JASMINE_DATA_DIR", "/data/of the shell")
    request = request_for("local")
    check_devices(request)
    assert request.plan().arguments == ("--data_dir=/data/of the shell",)
    assert capsys.readouterr().err == "--data_dir=/data/of the shell is added: JASMINE_DATA_DIR says so\n"
    by_cluster = request_for("local", overrides=["env.JASMINE_DATA_DIR=/data/of the cluster"])
    assert by_cluster.arguments == ("--data_dir=/data/of the cluster",)
    assert request_for("local", "train_lam", "--data_dir", "D").arguments == ("--data_dir", "D")
    assert request_for("local", "sample_maskgit", "RUN").arguments == ("RUN",)


def test_all_runs_of_a_sweep_get_the_same_batch(tmp_path: Path) -> None:
    requests = requests_for(
        ["train_lam", "--data_dir=D"], cluster="local", overrides=["processes=16", f"storage={tmp_path}"], name="s",
        sweep=["mesh.tensor=1,8"], after=(), cwd=tmp_path, reserved=(),
    )  # fmt: skip
    assert [request.arguments[-1] for request in requests] == ["--batch_size=48"] * 2


@pytest.mark.parametrize(
    ("mesh", "fits"),
    [("--mesh.fsdp=-1", False), ("--mesh.data=1 --mesh.fsdp=-1", True), ("--mesh.data=1 --mesh.tensor=-1", True)],
)
def test_a_mesh_is_read_as_the_job_reads_it(mesh: str, fits: bool) -> None:
    job = Job("train_lam", baselines()["train_lam"])
    arguments = [*mesh.split(), "--batch_size=40"]
    if fits:
        check_batch(job, arguments, devices=8)
    else:
        with pytest.raises(UserError, match="only one size can be -1"):
            check_batch(job, arguments, devices=8)
