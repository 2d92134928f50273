"""The ways in which people have Slurm run something: sweeps, pipelines, their own scripts, interactively, in containers."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from launch.record import read_record
from tests.clusters.slurm import SlurmCluster
from tests.launch.checkouts import Checkout, as_on_a_terminal, wait_until
from tests.launch.slurm_login import at_step, job_id, steps, submit


@pytest.mark.slow
def test_a_sweep_is_one_array_whose_elements_are_runs(here: Checkout, slurm: SlurmCluster) -> None:
    sweep = ["--sweep", "num_steps=3,4", "--sweep", "step_seconds=0.01,0.02"]
    told = submit(here, "--set", "processes_per_node=1", "--set", "gpus_per_node=0", *sweep, "train_lam")
    assert "r: 4 runs submitted" in told
    names = [f"r.{index}" for index in range(4)]
    assert {here.end(name, seconds=90).state for name in names} == {"finished"}
    assert [len(steps(here, name)) for name in names] == [3, 3, 4, 4]
    assert [len(here.directory(name).logged_hosts(1)) for name in names] == [2] * 4
    assert len({job_id(here, name).partition("_")[0] for name in names}) == 1
    table = here.jobs("status", "r").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["run", *names]


@pytest.mark.slow
def test_an_element_of_a_sweep_goes_on_without_the_others(here: Checkout, slurm: SlurmCluster) -> None:
    """The last one to start has the job id of the whole array."""
    submit(here, "--set", "nodes=1", "--sweep", "num_steps=3,300", "train_lam")
    assert here.end("r.0").state == "finished"
    at_step(here, 2, name="r.1")
    os.kill(here.job_pid(host=1, name="r.1"), signal.SIGKILL)
    record = here.end("r.1", seconds=90)
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]
    known = [slurm.command("scontrol", "-o", "show", "job", job_id(here, f"r.{index}")) for index in range(2)]
    assert [" Restarts=0 " in one for one in known] == [True, False], "what had finished was put into the queue again"
    assert len(here.end("r.0").attempts) == 1


def test_cancelling_a_sweep_ends_all_of_it(here: Checkout) -> None:
    submit(here, "--set", "nodes=4", "--set", "extra=['--exclusive']", "--sweep", "num_steps=2000,2001", "train_lam")
    wait_until(lambda: any(here.directory(f"r.{index}").attempts() for index in range(2)), 30)
    assert here.jobs("cancel", "r").returncode == 0
    assert {read_record(here.directory(f"r.{index}")).state for index in range(2)} == {"cancelled"}  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_run_waits_for_another_and_a_pipeline_is_wired(here: Checkout, slurm: SlurmCluster) -> None:
    (here.home / "see.py").write_text(
        "import os, sys\nprint(sys.argv, os.path.exists(sys.argv[2] + '/metrics.jsonl'))\n"
    )
    (here.home / "p.yaml").write_text(
        "name: p\n"
        "stages:\n"
        "  first: {job: train_lam, args: --num_steps 200}\n"
        "  second: {job: see.py, args: --made_by {first}, set: [nodes=1, processes_per_node=1]}\n".replace(
            "{first}", '"{first}"'
        )
        .replace("args: --made_by", "args: [--made_by,")
        .replace('"{first}"', '"{first}"]')
    )
    dry = here.run("submit", "--cluster", "slurm.yaml", "--pipeline", "p.yaml", "--dry-run")
    assert "afterok:<job of p-first>" in dry.stdout, dry.stderr
    done = here.run("submit", "--cluster", "slurm.yaml", "--pipeline", "p.yaml")
    assert done.returncode == 0, done.stderr
    shown = here.jobs("status", "p-second").stdout
    assert "it waits for the run before it to finish" in shown
    after = here.run(
        "submit", "--cluster", "slurm.yaml", "--name", "third", "--after", "p-second", "train_lam", "--num_steps", "1"
    )
    assert after.returncode == 0, after.stderr
    assert here.end("third", seconds=90).state == "finished"
    first, second = (read_record(here.directory(name)) for name in ("p-first", "p-second"))
    assert first is not None
    assert second is not None
    assert first.attempts[0].ended <= second.attempts[0].started  # type: ignore[operator]
    assert here.directory("p-second").log(1, 0).read_text().split()[-1] == "True"
    assert here.run("submit", "--cluster", "slurm.yaml", "--after", "none", "train_lam").returncode == 2


PIPELINE = """\
name: p
stages:
  one: {job: train_lam, args: --num_steps 2000}
  two: {job: train_lam, args: --num_steps 2, after: [one], set: [partition=PARTITION]}
"""


def test_a_pipeline_is_submitted_whole_or_not_at_all(here: Checkout, slurm: SlurmCluster) -> None:
    pipeline = here.home / "p.yaml"
    pipeline.write_text(PIPELINE.replace("PARTITION", "mian"))
    submission = ["submit", "--cluster", "slurm.yaml", "--pipeline", "p.yaml"]
    for option in (["--export-sbatch", "x.sbatch"], ["--interactive"], ["--wait"]):
        refused = here.run(*submission, *option)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert f"{option[0]} is for one run, not for a pipeline" in refused.stderr
    refused = here.run(*submission)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[0] == "p-one: cancelled"
    assert "invalid partition specified: mian" in refused.stderr.splitlines()[1]
    assert here.end("p-one", seconds=60).state == "cancelled"
    assert not here.directory("p-two").root.exists()
    pipeline.write_text(PIPELINE.replace("PARTITION", "main").replace("2000", "3"))
    assert here.run(*submission).returncode == 0
    assert here.end("p-two", seconds=90).state == "finished"


@pytest.mark.slow
def test_an_exported_script_and_the_shipped_ones_need_no_launcher(here: Checkout, slurm: SlurmCluster) -> None:
    job = here.home / "by hand.py"
    job.write_text(
        "import os, pathlib, sys\n"
        "run = pathlib.Path(os.environ.get('JASMINE_RUN_DIR') or sys.argv[-1])\n"
        "seen = run / f\"seen-{os.environ['SLURM_PROCID']}-{os.environ.get('SLURM_RESTART_COUNT', 0)}\"\n"
        "seen.write_text(' '.join(sys.argv[1:]))\n"
        "sys.exit(75 if os.environ.get('SLURM_RESTART_COUNT', '0') == '0' else 0)\n"
    )
    settings = ["--cluster", "slurm.yaml", "--set", "heartbeat_timeout=17"]
    exported = [*settings, "--name", "by-hand", "--export-sbatch", "x.sbatch", "by hand.py"]
    assert here.run("submit", *exported).returncode == 0
    again = here.run("submit", *exported)
    assert (again.returncode, "it exists" in again.stderr) == (2, True)
    assert "\nexport JASMINE_HEARTBEAT_TIMEOUT=17\n" in (here.home / "x.sbatch").read_text()
    one_node = ["--set", "nodes=1", "--name", "swept", "--sweep", "word=a b,c", "--export-sbatch", "s.sbatch"]
    assert here.run("submit", *settings, *one_node, "by hand.py").returncode == 0
    in_container = ["--set", "container=image.sif", "--export-sbatch", "c.sbatch", "by hand.py"]
    assert here.run("submit", *settings, *in_container).returncode == 0
    assert "    apptainer exec --nv " in (here.home / "c.sbatch").read_text()

    def submitted_by_hand(*argv: str) -> str:
        done = subprocess.run(
            ["sbatch", "--parsable", *argv], cwd=here.home, env=here.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    wrappers = here.root / "launch" / "sbatch"
    (here.home / ".venv" / "bin").mkdir(parents=True)
    (here.home / ".venv" / "bin" / "python").symlink_to(sys.executable)
    ids = {"x": submitted_by_hand("x.sbatch")}
    array = submitted_by_hand("s.sbatch")
    ids |= {f"s{element}": f"{array}_{element}" for element in range(2)}
    for name in ("single_node", "multi_node", "multi_node_requeue"):
        (here.home / name).mkdir()
        ids[name] = submitted_by_hand(
            "--gpus-per-node=1", "--cpus-per-task=1", str(wrappers / f"{name}.sbatch"), str(job), name
        )
    state = {
        "x": "COMPLETED",
        "s0": "COMPLETED",
        "s1": "COMPLETED",
        "single_node": "FAILED",
        "multi_node": "FAILED",
        "multi_node_requeue": "COMPLETED",
    }
    for name, expected in state.items():
        wait_until(lambda name=name, expected=expected: slurm.job_state(ids[name]) == expected, 60)  # type: ignore[misc]
    assert sorted(p.name for p in here.directory("by-hand").root.glob("seen-*")) == [
        f"seen-{process}-{restart}" for process in range(4) for restart in range(2)
    ]
    for element, word in enumerate(["a b", "c"]):
        swept = here.directory(f"swept.{element}").root
        assert (swept / "seen-1-1").read_text() == f"--word {word}"
    assert sorted(p.name for p in (here.home / "multi_node_requeue").iterdir()) == [
        "seen-0-0",
        "seen-0-1",
        "seen-1-0",
        "seen-1-1",
    ]
    assert sorted(p.name for p in (here.home / "multi_node").iterdir()) == ["seen-0-0", "seen-1-0"]


def test_an_interactive_run_shows_its_output_and_returns_its_code(here: Checkout, slurm: SlurmCluster) -> None:
    interactive = ["--cluster", "slurm.yaml", "--set", "processes_per_node=1", "--interactive"]
    done = here.run("submit", *interactive, "--name", "salloc", "train_lam", "--num_steps", "3")
    assert done.returncode == 0, done.stderr + here.directory("salloc").supervisor_log.read_text()
    assert "[host-1] step 3" in done.stdout
    assert "salloc: finished" in done.stderr

    inside = here.argv(
        "submit", *interactive, "--name", "inside", "train_lam", "--crash_at", "1", "--crash_attempts", "9"
    )
    in_allocation = ["salloc", "-N2", "--ntasks-per-node=1", "--cpus-per-task=4", "--gpus-per-node=4", *inside]
    crashed = subprocess.run(in_allocation, cwd=here.home, env=here.env, capture_output=True, text=True)
    assert crashed.returncode == 1, crashed.stderr
    assert "ValueError: no more at step 1" in crashed.stdout
    assert read_record(here.directory("inside")).state == "failed"  # type: ignore[union-attr]
    assert len(here.directory("inside").attempts()) == 1


def interactively(here: Checkout, *arguments: str) -> "subprocess.Popen[str]":
    command = here.argv("submit", "--cluster", "slurm.yaml", "--interactive", "--name", "r", *arguments, "train_lam")
    return subprocess.Popen(
        command,
        cwd=here.home,
        env=here.env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_on_a_terminal,
    )


def test_an_interactive_run_waits_where_one_sees_it_and_leaves_nothing_if_it_does_not_start(
    here: Checkout, slurm: SlurmCluster
) -> None:
    dry = here.run("submit", "--cluster", "slurm.yaml", "--interactive", "--dry-run", "--name", "r", "train_lam")
    assert dry.stdout.startswith("salloc --")
    assert "slurm_attempt.py" in dry.stdout
    refused = interactively(here, "--set", "partition=mian")
    said = refused.communicate(timeout=60)[1]
    assert refused.returncode == 2
    assert "salloc: error:" in said
    assert said.splitlines()[-1] == "error: r: no allocation to run in; Slurm says why above"
    assert not here.directory().root.exists()

    busy = ["sbatch", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600"]
    slurm.command(*busy)
    for how in ("Ctrl-C", "closed terminal", "cancel"):
        waiting = interactively(here)
        wait_until(lambda: len(slurm.command("squeue", "-h").splitlines()) == 2)
        assert "r: submitted" in here.jobs("status", "r").stdout
        assert "in use" in here.run("submit", "--cluster", "slurm.yaml", "--name", "r", "train_lam").stderr
        if how == "cancel":
            assert "r: cancelled" in here.jobs("cancel", "r").stdout
        else:
            waiting.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGHUP)
        said = waiting.communicate(timeout=30)[1]
        assert "salloc: Pending job allocation" in said
        assert len(slurm.command("squeue", "-h").splitlines()) == 1, how
        assert (waiting.returncode, here.directory().root.exists()) == ((75, True) if how == "cancel" else (2, False))


def test_a_container_gets_the_job_its_storage_and_its_gpus(here: Checkout) -> None:
    fake = here.home / "bin" / "apptainer"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/bash\nprintf \'%s\\n\' "$@" > "$JASMINE_RUN_DIR/apptainer-$SLURM_PROCID"\n'
        'while [[ $1 != image.sif ]]; do shift; done; shift; exec "$@"\n'
    )
    fake.chmod(0o755)
    here.env["PATH"] = f"{fake.parent}:{here.env['PATH']}"
    container = ["container=image.sif", "container_mounts=[/data:/d]", f"python={sys.executable}"]
    submit(here, *(part for key in container for part in ("--set", key)), "train_lam", "--num_steps", "2")
    assert here.end().state == "finished", here.directory().supervisor_log.read_text()
    said = (here.directory().root / "apptainer-3").read_text().splitlines()
    runs = str(here.home / "runs")
    assert said[:5] == ["exec", "--nv", f"--bind={runs}:{runs}", f"--bind={here.home}:{here.home}", "--bind=/data:/d"]


def test_pyxis_gets_its_options_in_the_call_of_srun(here: Checkout) -> None:
    """Debian has no pyxis: an srun that takes the options away stands in for one that the plugin has taught them."""
    fake = here.home / "bin" / "srun"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/bash\nkept=()\n"
        'for word in "$@"; do\n'
        '    if [[ $word == --*container-* ]]; then echo "$word" >> "$JASMINE_RUN_DIR/pyxis"; else kept+=("$word"); fi\n'
        "done\n"
        f'exec {shutil.which("srun")} "${{kept[@]}}"\n'
    )
    fake.chmod(0o755)
    here.env["PATH"] = f"{fake.parent}:{here.env['PATH']}"
    keys = ["container=nvcr.io#nvidia/jax:25.10", "container_runtime=pyxis", "container_mounts=[/data:/d]"]
    keys += [f"python={sys.executable}", "processes_per_node=1"]
    submit(here, *(part for key in keys for part in ("--set", key)), "train_lam", "--num_steps", "2")
    assert here.end().state == "finished", here.directory().supervisor_log.read_text()
    runs = str(here.home / "runs")
    assert (here.directory().root / "pyxis").read_text().splitlines() == [
        "--container-image=nvcr.io#nvidia/jax:25.10",
        f"--container-mounts={runs}:{runs},{here.home}:{here.home},/data:/d",
        "--no-container-mount-home",
    ]
