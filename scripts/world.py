"""`make world`: from nothing to a video that was never played, in a few minutes on a laptop's CPU.

Makes episodes of one CoinRun level, trains a tokenizer, a latent action model and a diffusion dynamics model on them, one
after the other, each small enough for two cores, and lets the last of them dream. Every step is a command that is printed,
and that you can type yourself.
"""

import argparse
import os
import shlex
import time
from pathlib import Path

from demo import console, run, title

ROOT = Path(__file__).resolve().parent.parent
# One level, and every fourth frame: a world that can be learned in minutes, in which actions show.
DATA = "--num_levels 1 --frame_skip 4 --num_episodes_train 600 --num_episodes_val 20 --num_episodes_test 10 --seed 0"
TRAINING = (
    "--batch_size 8 --seq_len 8 --model_dim 128 --ffn_dim 512 --num_heads 4 --dtype float32 --warmup_steps 20 "
    "--log_interval 50 --val_steps 4"
)
TOKENIZER = "--patch_size 16 --num_blocks 1 --latent_dim 32 --max_lr 3e-3 --num_steps 1000"
LAM = "--patch_size 16 --num_blocks 2 --latent_dim 16 --num_latents 6 --max_lr 2e-3 --num_steps 500"
DYNAMICS = "--num_blocks 2 --max_lr 2e-3 --diffusion_denoise_steps 8 --num_steps 1500"
VIDEO = "--num_frames 24 --prompt_frames 4 --num_clips 4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data_dir", default="data/world-coinrun", help="where the episodes go; kept for the next time"
    )
    parser.add_argument(
        "--name", default=time.strftime("world-%Y%m%d-%H%M%S"), help="what the names of the runs begin with"
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    begin = time.monotonic()
    data, name = shlex.quote(options.data_dir), options.name
    tokenizer, lam, dynamics = f"{name}-tokenizer", f"{name}-lam", f"{name}-dynamics"

    title("1. Real data: episodes of one CoinRun level")
    run(f"python -m jasmine.data.make coinrun --output_dir {data} {DATA}")

    title("2. Video tokenizer: frames to 16 latent tokens each, and back")
    train(tokenizer, "train_tokenizer_mae", f"--data_dir {data} --val_data_dir {data} {TOKENIZER}")

    title("3. Latent actions: what a player did, learned without being told")
    train(lam, "train_lam", f"--data_dir {data} --val_data_dir {data} {LAM}")

    title("4. Dynamics: the next frame, from those before it and an action")
    parts = f"--tokenizer_checkpoint {tokenizer} --lam_checkpoint {lam}"
    train(dynamics, "train_dynamics_diffusion", f"{parts} --data_dir {data} --val_data_dir {data} {DYNAMICS}")

    title("5. A video: four real frames, the rest is made")
    run(f"python jasmine/baselines/diffusion/sample_diffusion.py {dynamics} {VIDEO}")
    console.print(f"\n{time.monotonic() - begin:.0f} s in all. What to do next:")
    sample = f"python jasmine/baselines/diffusion/sample_diffusion.py {dynamics}"
    console.print(f"  {sample} --actions 3x8,0x8   [dim]play: action 3 for 8 frames, then 0[/]")
    console.print(f"  python -m jasmine.evaluate {dynamics} --data {data}   [dim]numbers and pictures on one page[/]")


def train(name: str, job: str, options: str) -> None:
    """Runs a baseline to its end under the launcher."""
    run(f"python launch/submit.py --cluster local --name {name} --wait {job} {options} {TRAINING}")


if __name__ == "__main__":
    main()
