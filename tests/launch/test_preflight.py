"""What `--preflight` tells, remembers and refuses."""

import dataclasses
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.config import SlurmCluster
from launch.errors import UserError
from launch.options import find_job
from launch.preflight import Compiler, bound, check, fits, preflight, relevant, show, target_of, tpu_target
from launch.request import checked_plan, requests_for
from launch.topology import find_gpu

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = shlex.split(
    "--seq_len 4 --batch_size 8 --model_dim 16 --ffn_dim 32 --num_blocks 1 --num_heads 2 --patch_size 8 --num_latents 16 "
    "--latent_dim 8"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JASMINE_PREFLIGHT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(target, cwd, job="train_tokenizer_vqvae"):
    return find_job(job, cwd), Compiler(find_job(job, cwd), cwd, target, sys.executable, str(cwd / "runs"), {})


def report(**changes):
    """A compiled step, as `jasmine.compile` describes it."""
    stored = {"count": 10**9, "bytes": 4 * 10**9, "bytes_per_device": 4 * 10**9}
    nothing = {"count": 0, "bytes": 0, "bytes_per_device": 0}
    return {
        "job": "train_lam", "platform": "tpu", "device_kind": "TPU v5 lite", "devices": 16, "slices": 1,
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1}, "batch_size": 64, "batch_shards": 16, "accumulation": 1, "fits": True,
        "memory": {
            "needed": 14 * 10**9, "limit": None, "arguments": 12 * 10**9, "outputs": 12 * 10**9,
            "temporaries": 2 * 10**9, "aliased": 12 * 10**9,
        },
        "model_flops": 16 * 197e12, "flops": 197e12, "bytes_accessed": 819e9 / 4, "collectives": [
            {"kind": "all-reduce", "count": 3, "bytes": 50 * 10**9, "between_slices": False},
            {"kind": "all-reduce", "count": 1, "bytes": 10**9, "between_slices": True},
        ],
        "parameters": stored, "frozen_parameters": nothing, "average": nothing,
        "optimizer_state": {"count": 2 * 10**9, "bytes": 8 * 10**9, "bytes_per_device": 8 * 10**9},
        "unsplit": {}, "assumed": [], "compile_seconds": 1.0, "versions": {"jax": "0.10.2"},
    } | changes  # fmt: skip


def test_the_bound_is_the_slowest_of_all_there_is_to_do():
    least = bound(report(), tpu_target("v5litepod-16"))
    # A second of arithmetic, a quarter of HBM; what is sent is received too; four chips share a host's network.
    assert (least.compute, least.memory, least.links, least.between_slices) == (1.0, 0.25, 0.5, 4 * 1e9 / 12.5e9)
    assert least.step == 1.0
    text = show("train_lam", report(), tpu_target("v5litepod-16"), remembered=False)
    assert "step       at least 1.00 s (arithmetic 1.00 s, memory 0.25 s" in text.replace("250 ms", "0.25 s")
    assert "MFU at most 100%" in text


def test_what_should_make_one_think_is_said():
    pod = tpu_target("v5litepod-16")
    assert "every chip holds all 11.18 GiB of parameters and optimizer state" in show("j", report(), pod, False)
    split = report(mesh={"data": 1, "fsdp": 16, "tensor": 1}, unsplit={"params.vq.codebook": 2**21})
    text = show("j", split, pod, False)
    assert "fsdp is 16, but every chip has 1 large array whole (2 MiB); the largest is params.vq.codebook" in text
    assert "too little to keep it busy" in show("j", report(flops=1e9), pod, False)
    busy = [{"kind": "all-reduce", "count": 1, "bytes": 10**12, "between_slices": False}]
    assert "exchange between chips takes longer" in show("j", report(collectives=busy), pod, False)


class Compilations:
    """Stands for `jasmine.compile`: a step of so many bytes of state, and so many for each clip on a chip. It refuses what a
    job refuses, and counts what it is asked."""

    def __init__(self, monkeypatch, target, state, clip, *, limit=15.75e9, remat=0.5, batch=64):
        self.target, self.state, self.clip, self.limit, self.remat, self.batch = (
            target,
            state,
            clip,
            limit,
            remat,
            batch,
        )
        self.asked: list[str] = []
        monkeypatch.setattr(Compiler, "_compile", lambda _, arguments: self.compile(arguments))

    def compile(self, arguments):
        self.asked.append(" ".join(arguments))
        given = dict(word[2:].split("=") for word in arguments)
        mesh = {
            axis: int(given.get(f"mesh.{axis}", default))
            for axis, default in (("data", -1), ("fsdp", 1), ("tensor", 1))
        }
        fixed = -math.prod(mesh.values()) if -1 in mesh.values() else math.prod(mesh.values())
        if self.target.chips % fixed or (-1 not in mesh.values() and fixed != self.target.chips):
            raise UserError(f"mesh {mesh} is {fixed} devices, but the job has {self.target.chips}")
        mesh = {axis: self.target.chips // fixed if size == -1 else size for axis, size in mesh.items()}
        batch, parts = int(given.get("batch_size", self.batch)), int(given.get("grad_accumulation_steps", 1))
        shards = mesh["data"] * mesh["fsdp"]
        if batch % (shards * parts):
            raise UserError(f"--batch_size={batch} does not split over {shards} data-parallel devices × {parts}")
        if float(given.get("max_lr", 1)) > 1e6:
            raise UserError("--max_lr: too large")
        state = int(self.state / mesh["fsdp"])
        scale = self.remat if given.get("remat") == "full" else 1.0
        needed = int(state + self.clip * scale * batch / shards / parts)
        fit = needed <= self.limit
        nothing = {"count": 0, "bytes": 0, "bytes_per_device": 0}
        memory = {"needed": needed, "limit": None if fit else int(self.limit), "arguments": None, "temporaries": None}
        return report(
            fits=fit, mesh=mesh, batch_size=batch, batch_shards=shards, accumulation=parts, memory=memory,
            optimizer_state=nothing, parameters=nothing | {"bytes_per_device": state}, devices=self.target.chips,
            flops=197e12 if fit else None,
        )  # fmt: skip


def refusal(monkeypatch, tmp_path, arguments, target=None, **sizes):
    """What a user is told of a job that does not fit, and which programs were compiled for it."""
    monkeypatch.setenv("JASMINE_PREFLIGHT_CACHE_DIR", "")
    target = target or tpu_target("v5litepod-16")
    stub = Compilations(monkeypatch, target, **sizes)
    job, where = compiler(target, tmp_path)
    with pytest.raises(UserError) as refused:
        check(job, arguments, target, where)
    assert "\n" not in str(refused.value)
    return str(refused.value), stub.asked


def test_the_smallest_split_that_should_do_comes_first(monkeypatch, tmp_path):
    said, asked = refusal(monkeypatch, tmp_path, [], state=24e9, clip=1e9)
    assert "does not fit v5litepod-16, 16 v5e chips on 4 VMs: 26.08 GiB of 14.67 GiB on each chip" in said
    assert "; with --mesh.fsdp=4 it does, in 9.31 GiB" in said
    assert asked == ["", "--mesh.fsdp=4"]


def test_a_far_smaller_batch_is_found_at_once(monkeypatch, tmp_path):
    said, asked = refusal(monkeypatch, tmp_path, ["--batch_size=4096"], state=12e9, clip=1e9)
    # 256 clips a chip: half a gigabyte each when computed again; 16 of them fit beside the rest, and 32 do not.
    assert "with --mesh.fsdp=16 --remat=full --batch_size=256 it does" in said
    assert len(asked) == 5  # the job's own, the split, computing again, both, and then the batch that fits
    _, asked = refusal(monkeypatch, tmp_path, ["--batch_size=4096", "--remat=full"], state=12e9, clip=1e9)
    assert len(asked) == 3  # nothing is compiled twice


def test_a_guess_that_was_wrong_is_corrected_down_to_a_clip_on_each_chip(monkeypatch, tmp_path):
    stubborn = {"state": 1e9, "clip": 13e9, "remat": 1.0, "limit": 15.75e9}
    said, asked = refusal(monkeypatch, tmp_path, ["--batch_size=1024"], **stubborn)
    assert "with --mesh.fsdp=16 --remat=full --batch_size=16 it does" in said
    assert len(asked) <= 7

    # What the compiler says of a program that does not fit may be far less than it takes.
    class Vague(Compilations):
        def compile(self, arguments):
            found = super().compile(arguments)
            least = int(found["parameters"]["bytes_per_device"] * 1.1)
            return found if found["fits"] else found | {"memory": found["memory"] | {"needed": least}}

    target = tpu_target("v5litepod-8")
    stub = Vague(monkeypatch, target, state=1e9, clip=13e9, remat=1.0)
    job, where = compiler(target, tmp_path)
    with pytest.raises(UserError, match=r"with --mesh.fsdp=8 --remat=full --batch_size=8 it does"):
        check(job, ["--batch_size=1024"], target, where)
    assert len(stub.asked) <= 8


def test_that_nothing_fits_is_said_after_the_least_there_is(monkeypatch, tmp_path):
    said, asked = refusal(monkeypatch, tmp_path, ["--batch_size=64"], state=1e9, clip=40e9)
    assert "and neither does it with --mesh.fsdp=16 --remat=full --batch_size=16; take chips with more memory" in said
    assert asked[-1] == "--batch_size=64 --mesh.fsdp=16 --remat=full --batch_size=16"
    # Where a slice cannot hold the state, no batch can help, and no minutes are spent on one.
    said, asked = refusal(monkeypatch, tmp_path, ["--batch_size=128"], state=900e9, clip=1e6)
    assert said.endswith("and no other setting makes it fit; take chips with more memory, or a smaller model")
    assert asked == ["--batch_size=128"]


def test_a_split_is_advised_in_words_that_the_job_takes(monkeypatch, tmp_path):
    said, asked = refusal(monkeypatch, tmp_path, ["--mesh.data=16"], state=24e9, clip=1e9)
    assert "with --mesh.fsdp=4 --mesh.data=-1 it does" in said
    assert len(asked) == 2
    said, _ = refusal(monkeypatch, tmp_path, ["--mesh.data=8", "--mesh.tensor=-1"], state=24e9, clip=1e9)
    assert "with --mesh.fsdp=4 --mesh.data=-1 --mesh.tensor=2 it does" in said


def test_advice_that_the_job_refuses_is_not_what_the_user_is_told(monkeypatch, tmp_path):
    class NoSplit(Compilations):
        def compile(self, arguments):
            if any(word.startswith("--mesh.fsdp") for word in arguments):
                raise UserError("mesh fsdp=4: this model cannot be split")
            return super().compile(arguments)

    target = tpu_target("v5litepod-16")
    NoSplit(monkeypatch, target, state=10e9, clip=4e9)
    job, where = compiler(target, tmp_path)
    with pytest.raises(UserError, match=r"does not fit .*; with --remat=full --batch_size=32 it does") as refused:
        check(job, [], target, where)
    assert "cannot be split" not in str(refused.value)


def test_an_advised_batch_splits_over_accumulation_too(monkeypatch, tmp_path):
    arguments = ["--batch_size=480", "--grad_accumulation_steps=3"]
    said, _ = refusal(monkeypatch, tmp_path, arguments, state=1e9, clip=6e9)
    # Ten clips on each chip in each part. Five are too many even so; 480 / 4 does not split over 16 × 3, but 96 does.
    assert "with --mesh.fsdp=16 --remat=full --batch_size=96 it does" in said
    said, asked = refusal(monkeypatch, tmp_path, arguments, state=1e9, clip=40e9)
    assert asked[-1].endswith("--remat=full --batch_size=48")  # a clip in each part on each chip
    assert "neither does it with --mesh.fsdp=16 --remat=full --batch_size=48;" in said


def test_an_estimate_looks_only_for_a_split(monkeypatch, tmp_path):
    target = target_of(SlurmCluster(backend="slurm", nodes=2, gpus_per_node=8, gpu_type="l40s"))

    class OfDevices(Compilations):
        def compile(self, arguments):
            found = super().compile(arguments)
            return found | {"fits": None, "memory": found["memory"] | {"limit": None}}

    OfDevices(monkeypatch, target, state=100e9, clip=1e9)
    job, where = compiler(target, tmp_path)
    with pytest.raises(
        UserError, match=r"93.13 GiB of 45.00 GiB on each device; with --mesh.fsdp=4 it does, in 23.28 GiB"
    ):
        check(job, [], target, where)


def test_an_estimate_refuses_only_what_is_certain():
    slurm = SlurmCluster(backend="slurm", nodes=2, gpus_per_node=8, gpu_type="l40s")
    target = target_of(slurm)
    assert (target.arguments, target.chips, target.estimate) == (("--devices", "16"), 16, True)
    assert "16 l40s GPUs on 2 nodes" in target.description
    guess = report(fits=None, memory=report()["memory"] | {"needed": 10**12})
    assert fits(guess, target)  # temporaries of a CPU's program prove nothing
    huge = {"count": 1, "bytes": 10**11, "bytes_per_device": 10**11}
    assert not fits(report(fits=None, parameters=huge), target)
    unknown = target_of(slurm.model_copy(update={"gpu_type": "gtx"}))
    assert fits(report(fits=None, parameters=huge), unknown)
    assert [find_gpu(name).name for name in ("H100", "nvidia_a100-sxm4-80gb", "a100")] == ["h100", "a100-80gb", "a100"]


def test_the_program_does_not_depend_on_these():
    one = relevant(["--batch-size", "8", "--seed=3", "--log", "--ckpt_dir", "x", "--mesh.fsdp=2", "--batch_size=16"])
    assert one == relevant(["--mesh.fsdp", "2", "--batch_size", "16", "--max_lr=1", "--tags", "a", "b", "--no_log"])
    assert one == [("batch_size", "16"), ("mesh.fsdp", "2")]


def test_an_option_counts_as_it_was_given_last():
    assert relevant(["--qk_norm", "--no_qk_norm"]) == relevant(["--no-qk-norm"]) == [("no_qk_norm",)]
    assert relevant(["--no_qk_norm", "--qk_norm"]) == relevant(["--qk-norm"]) == [("qk_norm",)]
    assert relevant(["--part.no_x", "--part.x"]) == [("part.x",)]


@pytest.mark.parametrize(
    "wrong",
    [
        "--max_lr abc", "--max_lr", "--seed 3.5", "--num_steps 0", "--keep_checkpoints=-1", "--log yes", "--lr_schedule wds",
        "--best_mode most", "--profile_steps 10", "--seed 3 4", "junk", "--weight_decay nan",
    ],
)  # fmt: skip
def test_a_wrong_value_is_not_answered_from_memory(monkeypatch, tmp_path, wrong):
    """Of an option that does not change the program, too: the job is asked, which refuses it."""
    right = ["--batch_size=64", "--max_lr=1e-3", "--seed", "7", "--log", "--lr_schedule=cos"]
    target = tpu_target("v5litepod-16")
    asked = []
    monkeypatch.setattr(Compiler, "_compile", lambda _, arguments: asked.append(arguments) or report())
    _, where = compiler(target, tmp_path)
    assert not where.ask(right, announce="")[1]
    assert where.ask(["--batch_size=64", "--max_lr", ".5", "--profile_steps=10:12", "--tags", "a", "b"], announce="")[1]
    assert not where.ask([*right, *wrong.split()], announce="")[1]
    assert len(asked) == 2


def test_another_environment_is_another_program(monkeypatch, tmp_path):
    monkeypatch.setattr(Compiler, "_compile", lambda *_: report())
    _, where = compiler(tpu_target("v5litepod-16"), tmp_path)
    answers = [
        {}, {"LIBTPU_INIT_ARGS": "--xla_x=1"}, {"JAX_ENABLE_X64": "1"}, {"JASMINE_KERNEL": "a"}, {"JASMINE_KERNEL": "b"},
        {"OF_A_SCRIPT": "1"},
    ]  # fmt: skip
    for env in answers:
        with_it = dataclasses.replace(where, env=env)
        assert not with_it.ask([], announce="")[1], env
        assert with_it.ask([], announce="")[1], env
    assert dataclasses.replace(where, env={"JAX_PLATFORMS": "tpu"}).ask([], announce="")[1]  # is not passed on
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    assert not where.ask([], announce="")[1]
    monkeypatch.setenv("EDITOR", "ed")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_this_shell")  # nor is this
    assert where.ask([], announce="")[1]


def test_an_interpreter_of_the_vms_is_not_run_here(monkeypatch, tmp_path):
    used = []

    def remembering(compiler, arguments):
        used.append(compiler.python)
        return report()

    monkeypatch.setattr(Compiler, "_compile", remembering)
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    other.chmod(0o755)
    for cluster in ("tpu-v5-16", "slurm-h100"):
        requests = requests_for(
            ["train_lam"], cluster=cluster, overrides=[f"python={other}", f"storage={tmp_path}/runs"], name="r", sweep=[],
            after=[], cwd=tmp_path, reserved=[],
        )  # fmt: skip
        preflight(requests)
    assert used == [sys.executable, str(other)]


def test_storage_that_cannot_be_read_is_no_reason_not_to_compile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launch.request.unreachable", lambda root: "no Google credentials here")
    asked = []
    monkeypatch.setattr("launch.preflight.check", lambda *what: asked.append(what))
    words, given = ["train_tokenizer_vqvae", "--batch_size=256"], ["storage=gs://somebody-s/runs"]
    options = {"name": "r", "sweep": (), "after": ["other"], "cwd": tmp_path, "reserved": ()}
    requests = requests_for(words, cluster="tpu-v5-256", overrides=given, **options)
    preflight(requests)
    assert len(asked) == 1
    warning = (
        "warning: storage gs://somebody-s/runs: cannot be read: no Google credentials here; taken for one without runs"
    )
    assert capsys.readouterr().err.splitlines() == [warning]
    with pytest.raises(UserError, match=r"^storage gs://somebody-s/runs: cannot be read: no Google credentials here$"):
        checked_plan(requests[0])


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_what_does(tmp_path, capsys):
    job, where = compiler(tpu_target("v5litepod-4"), tmp_path)
    size = shlex.split("--model_dim=2048 --ffn_dim=8192 --num_blocks=8 --batch_size=4 --seq_len=2 --data_dir=away")
    with pytest.raises(UserError) as refused:
        check(job, size, where.target, where)
    said = str(refused.value)
    assert "does not fit v5litepod-4, 4 v5e chips on 1 VM: 16.2" in said
    assert "with --mesh.fsdp=2 it does" in said
    assert len(said.splitlines()) == 1
    assert "every chip holds all 12.04 GiB" in capsys.readouterr().out
    # Twelve gigabytes of state were never made.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 6e9
    found, remembered = where.ask([*size, "--mesh.fsdp=2"], announce="")
    assert remembered
    assert fits(found, where.target)


def submit(cluster, *arguments, cwd):
    """Submits in a process of its own; its last line says whether it has loaded jax."""
    program = "import sys; from launch.submit import main; main(sys.argv[1:]); print('jax' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JASMINE_STORAGE": str(cwd / "runs")}
    command = [sys.executable, "-c", program, "--cluster", cluster, "--preflight", "--dry-run", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def remembered_at_once(first, *arguments, cwd):
    """Asks again, and checks that the answer is the same and took no compilation."""
    began = time.perf_counter()
    second = submit(*arguments, cwd=cwd)
    seconds = time.perf_counter() - began
    assert second.stdout.splitlines()[:5] == first.stdout.splitlines()[:5]
    assert "before, with jax" in second.stdout
    assert second.stdout.splitlines()[-1] == "False"  # jax was not needed to know
    assert second.stderr == ""
    assert seconds < 10  # half a second, but for a busy machine; a compilation takes longer


@pytest.mark.slow
def test_a_pod_of_256_chips(tmp_path, own_cache):
    arguments = ["tpu-v5-256", "train_tokenizer_vqvae", *TINY, "--data_dir=/mnt/on_the_pod", "--batch_size=256"]
    first = submit(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "preflight for v5litepod-256, 256 v5e chips on 64 VMs (compiled for it)" in first.stdout
    assert "256 clips, 1 to each of 256 parts; mesh data 256 × fsdp 1 × tensor 1" in first.stdout
    assert "--data_dir /mnt/on_the_pod is not on this machine: taken for frames of 64×64×3" in first.stdout
    remembered_at_once(first, *arguments, "--seed=5", cwd=tmp_path)
    refused = submit(*arguments[:-1], cwd=tmp_path)
    assert refused.returncode != 0
    assert "--batch_size=8 does not split over 256 data-parallel devices; the nearest that does: 256" in refused.stderr
    assert len(list(own_cache.iterdir())) == 1  # a refusal is not remembered


@pytest.mark.slow
def test_this_machine_gets_an_estimate(tmp_path):
    arguments = ["local", "--set", "processes=2", "train_tokenizer_vqvae", *TINY, "--data_dir", "away"]
    first = submit(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "2 devices of this machine (an estimate from a program of CPU devices)" in first.stdout
    assert "8 clips, 4 to each of 2 parts" in first.stdout
    assert not (tmp_path / "runs").exists()
    remembered_at_once(first, *arguments, cwd=tmp_path)
