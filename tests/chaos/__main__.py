"""Disturbs a real training job until it is done, and holds the result against the uninterrupted run.

    python -m tests.chaos --backend local|slurm|cloud_tpu [--bucket] [--faults 100] [--seed 1] [--write docs/reliability.md]

Exit code 0 if all that was promised held. Otherwise it prints the seed and all faults, and keeps its folder.
"""

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from jasmine.data.writer import EpisodeWriter
from tests.chaos import checks, table
from tests.chaos.backends import Backend, environment, running_backend
from tests.chaos.campaign import Campaign
from tests.chaos.faults import FAULTS
from tests.jobs import REPO


def main() -> int:
    """Carry out one campaign; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=str(__doc__).splitlines()[0])
    parser.add_argument("--backend", choices=("local", "slurm", "cloud_tpu"), required=True)
    parser.add_argument("--bucket", action="store_true", help="the run is in (a fake) Cloud Storage")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end earlier, after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="NAME,…", default="", help=f"of {', '.join(FAULTS)}")
    parser.add_argument(
        "--stay", type=int, help="faults before the first move; default: a quarter of them, -1: never move"
    )
    parser.add_argument("--step_seconds", type=float, default=0.25, help="how long a step takes at least")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this Markdown file")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in; kept. Default: a temporary one")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # at the end this process reads checkpoints
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax has something to say of each
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that clusters are stopped
    only = [name for name in options.only.split(",") if name]
    if unknown := [name for name in only if name not in FAULTS]:
        parser.error(f"--only {unknown[0]}: there is no such fault (there are: {', '.join(FAULTS)})")
    root = options.folder or Path(tempfile.mkdtemp(prefix=f"chaos-{options.backend}-"))
    root.mkdir(exist_ok=True)
    make_data(root / "data")
    stay = options.faults // 4 if options.stay is None else None if options.stay < 0 else options.stay
    cache = Path("~/.cache/jasmine/chaos").expanduser()
    begun = time.monotonic()
    where = {"bucket": options.bucket, "step_seconds": options.step_seconds, "cache": cache}
    with running_backend(options.backend, root, **where) as backend:
        environment(backend.env)
        if impossible := [name for name in only if not FAULTS[name].possible(backend)]:
            parser.error(f"--only {impossible[0]}: cannot be done here: {FAULTS[impossible[0]].what}")
        campaign = Campaign(backend, options.seed, only=only, stay=stay)
        result = _result(campaign, backend, options, begun, cache)
        (root / "result.json").write_text(json.dumps(result, indent=1))
    print(table.markdown(result))
    if options.write is not None:
        table.write(options.write, result)
    if not result["problems"] and options.folder is None:
        shutil.rmtree(root, ignore_errors=True)
        return 0
    if result["problems"]:
        _complain(campaign, root, options.faults)
    return 1 if result["problems"] else 0


def _result(
    campaign: Campaign, backend: Backend, options: argparse.Namespace, begun: float, cache: Path
) -> dict[str, object]:
    figures: dict[str, object] = {}
    try:
        campaign.carry_out(options.faults, 60 * options.minutes)
        figures["minutes"] = (time.monotonic() - begun) / 60
        campaign.problems += checks.readable(campaign)
        campaign.problems += checks.nothing_left(campaign)
        straight = checks.uninterrupted(backend, campaign.last_step, {"JASMINE_COMPILATION_CACHE_DIR": str(cache)})
        problems, compared = checks.curves(campaign, straight)
        campaign.problems += problems
        figures |= compared
    except Exception as error:
        traceback.print_exc()
        campaign.problems.append(f"{type(error).__name__}: {error}"[:2000])
    finally:
        campaign.end_everything()
    figures.setdefault("minutes", (time.monotonic() - begun) / 60)
    return campaign.to_json() | figures


def _complain(campaign: Campaign, root: Path, faults: int) -> None:
    print(f"\nFAILED with seed {campaign.seed}; its folder is kept: {root}")
    for one in campaign.injected:
        where = f"while {one.moment}, on {one.topology}, step {one.last_step}"
        print(f"  {one.number:3} {one.name} {where} {'; '.join(one.notes)}")
    for problem in campaign.problems:
        print(f"  problem: {problem}")
    print(f"again: python -m tests.chaos --backend {campaign.backend.name} --faults {faults} --seed {campaign.seed}"
          f"{' --bucket' if campaign.backend.bucket else ''}")  # fmt: skip


def make_data(folder: Path) -> None:
    """A dataset of noise: 12 episodes of 16×16 frames, each frame unlike all others."""
    rng = np.random.default_rng(7)
    with EpisodeWriter(folder / "train", frame_shape=(16, 16, 3), fps=15, encoding="raw", num_actions=4) as writer:
        for index in range(12):
            frames = 20 + index
            writer.write(
                rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8), rng.integers(0, 4, frames).astype(np.int32)
            )


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    sys.exit(main())
