"""`make demo`: the whole of Jasmine in a few minutes on a laptop's CPU.

Makes CoinRun episodes, trains a small video tokenizer on them as a job of two processes with two devices each, takes the
machine away half-way as a cluster would (SIGTERM), goes on with one process and one device, and shows the result. Every
step is a command that is printed, and that you can type yourself.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.record import ACTIVE
from launch.run_dir import RunDir
from launch.standing import read_standing

ROOT = Path(__file__).resolve().parent.parent
STEPS = 800
DATA = "--num_episodes_train 400 --num_episodes_val 20 --num_episodes_test 10 --seed 0"
MODEL = (
    "--patch_size 4 --model_dim 64 --ffn_dim 256 --num_blocks 1 --num_heads 2 --latent_dim 8 --num_latents 512 "
    "--vq_revival 1.0"
)
TRAINING = (
    f"--batch_size 8 --seq_len 4 --num_steps {STEPS} --max_lr 2e-3 --warmup_steps 20 --dtype float32 --log_interval 10 "
    "--val_interval 200 --val_steps 4 --log_checkpoint_interval 100"
)

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="data/demo-coinrun", help="where the episodes go; kept for the next demo")
    parser.add_argument("--name", default=time.strftime("demo-%Y%m%d-%H%M%S"), help="name of the run")
    options = parser.parse_args()
    os.chdir(ROOT)
    begin = time.monotonic()

    title("1. Real data: CoinRun episodes")
    run(f"python -m jasmine.data.make coinrun --output_dir {shlex.quote(options.data_dir)} {DATA}")

    title("2. Train a video tokenizer: 2 processes × 2 devices, a real multi-host job on this machine")
    data = shlex.quote(options.data_dir)
    run(
        f"python launch/submit.py --cluster local --name {options.name} --set processes=2 --set devices_per_process=2 "
        f"train_tokenizer_vqvae --data_dir {data} --val_data_dir {data} {MODEL} {TRAINING}"
    )
    run_dir = Path(os.environ.get("JASMINE_STORAGE", "runs")) / options.name
    follow(run_dir, until=STEPS // 2)

    title("3. The cluster wants its machines back: SIGTERM, in the middle of the run")
    supervisor = json.loads((run_dir / "run.json").read_text())["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGTERM)
    wait_for_end(run_dir, "saving")
    run(f"python launch/jobs.py status {options.name}")

    title("4. Go on elsewhere: 1 process × 1 device, same run, same curve")
    run(f"python launch/jobs.py resume {options.name} --set processes=1 --set devices_per_process=1")
    follow(run_dir, until=STEPS)
    wait_for_end(run_dir, "finishing")
    if state(run_dir) != "finished":
        explain_and_exit(run_dir)

    title("5. The result")
    run(f"python -m jasmine.evaluation.curves {shlex.quote(str(run_dir))}")
    psnr = last_metric(run_dir, "val_psnr")
    console.print(
        f"validation PSNR [bold green]{psnr:.1f} dB[/] after {STEPS} steps; {time.monotonic() - begin:.0f} s in all"
    )
    for what, where in [
        ("true frames above reconstructed ones", "reconstruction.png"),
        ("loss curve, with the place where it was resumed", "loss.png"),
        ("every step's numbers", "metrics.jsonl"),
        ("checkpoints", "checkpoints/"),
        ("what happened, and when", "events.jsonl"),
    ]:
        console.print(f"  {run_dir / where}  [dim]{what}[/]")
    console.print("\nWhat to do next:")
    console.print("  python launch/jobs.py list                 [dim]your runs[/]")
    console.print(f"  python launch/jobs.py logs {options.name}  [dim]what they printed[/]")
    console.print("  python -m jasmine.data.make --help         [dim]more games, or your own videos[/]")
    console.print("  python jasmine/baselines/maskgit/train_tokenizer_vqvae.py --help   [dim]every option[/]")


def title(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def run(command: str) -> None:
    """Shows a command and runs it with this Python; ends the demo if it fails."""
    console.print(f"[cyan]$ {command}[/]")
    arguments = shlex.split(command)
    code = subprocess.run([sys.executable, *arguments[1:]]).returncode
    if code:
        console.print(f"[red]that failed (exit code {code})[/]")
        sys.exit(code)


def state(run_dir: Path) -> str:
    """The run's state, as the launcher tells it: `lost` too, if its supervisor died."""
    return read_standing(RunDir(run_dir)).record.state


def last_metric(run_dir: Path, name: str) -> float:
    """The newest value of a metric; NaN while there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return float("nan")
    values = [record[name] for record in map(json.loads, lines) if name in record]
    return values[-1] if values else float("nan")


def follow(run_dir: Path, until: int) -> None:
    """A progress bar of the run's steps until it passes `until`; ends the demo if the run dies."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting and compiling", total=STEPS)
        step = last_metric(run_dir, "step")
        while not step >= until:
            if state(run_dir) not in (*ACTIVE, "finished"):
                progress.stop()
                explain_and_exit(run_dir)
            time.sleep(0.5)
            new = last_metric(run_dir, "step")
            if new == new and new != step:
                step = new
                progress.update(task, completed=step, description=f"loss {last_metric(run_dir, 'loss'):.4f}")


def wait_for_end(run_dir: Path, what: str) -> None:
    """Waits until nothing of the run lives."""
    with console.status(what):
        while state(run_dir) in ACTIVE:
            time.sleep(0.2)


def explain_and_exit(run_dir: Path) -> NoReturn:
    """Ends the demo with the launcher's word on why the run ended."""
    run(f"python launch/jobs.py explain {run_dir.name}")
    sys.exit(1)


if __name__ == "__main__":
    main()
