"""What `--preflight` tells, remembers and refuses."""

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
from launch.preflight import Compiler, bound, check, fits, nearest, preflight, relevant, show, target_of, tpu_target
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
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1}, "batch_size": 64, "batch_shards": 16, "fits": True,
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


def test_settings_to_try_begin_with_the_smallest_split_that_should_do():
    full = report(fits=False, memory={"needed": 18 * 10**9, "limit": 15 * 10**9, "temporaries": None})
    tried = [" ".join(change) for change in nearest(full, tpu_target("v5litepod-16"))]
    assert tried[:2] == ["--mesh.fsdp=2", "--mesh.fsdp=16"]  # 6 GB of state and 6 of the rest
    assert "--remat=full" in tried
    assert tried[-1] == "--mesh.fsdp=16 --remat=full --batch_size=16"  # one clip a chip, and no further


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
