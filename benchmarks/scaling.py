"""Compiles the real training step for Cloud TPU slices of growing size, and shows what a chip has to do and to hold.

    python benchmarks/scaling.py [--quick]

The default tokenizer and MaskGIT dynamics, four clips to a chip, on 16, 64 and 256 chips of v5e and on two slices of 256:
once data parallel, with all parameters on every chip, and once with parameters split over all chips of a slice (FSDP). No TPU
is needed: libtpu's compiler is asked as by `submit.py --preflight`, and its answers are remembered likewise.

What should come out: FLOPs of a chip do not depend on the number of chips, and the memory of parameters and optimizer falls
as one over fsdp. Writes `docs/scaling.md` and `docs/scaling.png`, unless `--quick`: a tiny model on 4 and 16 chips. The last
line is one JSON object.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from launch.options import find_job
from launch.preflight import Compiler, Target, state_bytes, tpu_target

DOCS = Path(__file__).resolve().parents[1] / "docs"
CLIPS_PER_CHIP = 4
JOBS = {"train_tokenizer_vqvae": [], "train_dynamics_maskgit": ["--tokenizer_checkpoint=none"]}
SIZES = (("v5litepod-16", 1), ("v5litepod-64", 1), ("v5litepod-256", 1), ("v5litepod-256", 2))
QUICK_SIZES = (("v5litepod-4", 1), ("v5litepod-16", 1))
TINY = ["--model_dim=64", "--ffn_dim=128", "--num_blocks=1", "--num_heads=2", "--seq_len=4"]

HEAD = """# Scaling

What one chip has to do and to hold in one training step, by libtpu's compiler: v5e, four clips to a chip, default options
otherwise. Made by `benchmarks/scaling.py`. FLOPs are those of matrix products in the compiled program, HBM traffic is what
its instructions read and write, and sent is what a chip gives to others, by ring algorithms.
"""

TAIL = """\
Parameters and optimizer fall as one over fsdp, but for what every chip keeps whole: at fsdp 256 the tokenizer's are 1.92 and
not 1.54 MiB, because each token is compared with the whole codebook (1,024 codes of 32 numbers; with both moments of Adam
they are 0.38 MiB); see the [lab notes](lab-notes.md).

![the same as a plot](scaling.png)
"""


def measure(job: str, arguments: list[str], target: Target, *, split: bool) -> dict[str, Any]:
    """What each chip has to do and to hold, in the default units: FLOPs and bytes."""
    where = Compiler(find_job(job, Path.cwd()), Path.cwd(), target, sys.executable, "runs", {})
    fsdp = target.chips_per_slice if split else 1
    batch = CLIPS_PER_CHIP * target.chips
    options = [*arguments, "--data_dir=none", f"--batch_size={batch}", f"--mesh.fsdp={fsdp}"]
    report, _ = where.ask(options, announce=f"{job}: compiling for {target.description}, fsdp {fsdp}")

    def sent(between_slices: bool) -> int:
        return sum(one["bytes"] for one in report["collectives"] if one["between_slices"] == between_slices)

    return {
        "job": job,
        "chips": target.chips,
        "slices": report["slices"],
        "fsdp": fsdp,
        "memory": report["memory"]["needed"],
        "state": state_bytes(report),
        "unsplit": sum(report["unsplit"].values()),
        "flops": report["flops"],
        "model_flops": report["model_flops"] / target.chips,
        "bytes_accessed": report["bytes_accessed"],
        "sent": sent(between_slices=False),
        "sent_between_slices": sent(between_slices=True),
        "compile_seconds": report["compile_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = ("job", "chips", "fsdp", "memory", "parameters, optimizer", "FLOPs (by the model)", "HBM traffic", "sent",
             "to other slices")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        chips = f"{row['chips']}" + (f" in {row['slices']} slices" if row["slices"] > 1 else "")
        lines.append(
            f"| `{row['job']}` | {chips} | {row['fsdp']} | {_mib(row['memory'])} | {_mib(row['state'])} | "
            f"{row['flops'] / 1e9:,.1f} G ({row['model_flops'] / 1e9:,.1f} G) | {_mib(row['bytes_accessed'])} | "
            f"{_mib(row['sent'])} | {_mib(row['sent_between_slices']) if row['slices'] > 1 else '–'} |"
        )
    return "\n".join(lines)


def _mib(number: float) -> str:
    mib = number / 2**20
    return f"{mib:,.0f} MiB" if mib >= 10 else f"{mib:,.2f} MiB"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """State, FLOPs and bytes sent of a chip against the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    panels = (
        ("parameters and optimizer, MiB a chip", lambda row: row["state"] / 2**20),
        ("FLOPs a chip and step, G", lambda row: row["flops"] / 1e9),
        ("sent by a chip in a step, MiB", lambda row: (row["sent"] + row["sent_between_slices"]) / 2**20),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for job in JOBS:
            for split in (False, True):
                mine = [row for row in rows if row["job"] == job and (row["fsdp"] > 1) == split]
                label = f"{job.removeprefix('train_')}, {'FSDP' if split else 'data parallel'}"
                # Where both are equal, the hollow squares are seen around the points.
                axis.plot(
                    [row["chips"] for row in mine],
                    [value(row) for row in mine],
                    "o-" if split else "s--",
                    markersize=5 if split else 10,
                    fillstyle="full" if split else "none",
                    label=label,
                )
        axis.set(title=title, xlabel="chips", xscale="log")
        axis.set_xticks(
            sorted({row["chips"] for row in rows}), [str(n) for n in sorted({row["chips"] for row in rows})]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the tokenizer alone, tiny, on 4 and 16 chips; writes nothing"
    )
    options = parser.parse_args()
    rows = []
    for job, arguments in list(JOBS.items())[: 1 if options.quick else None]:
        for split in (False, True):
            for accelerator, slices in QUICK_SIZES if options.quick else SIZES:
                target = tpu_target(accelerator, slices)
                more = TINY if options.quick else []
                rows.append(measure(job, [*arguments, *more], target, split=split))
    print(table(rows))
    if not options.quick:
        (DOCS / "scaling.md").write_text(f"{HEAD}\n{table(rows)}\n\n{TAIL}")
        plot(rows, DOCS / "scaling.png")
    print(json.dumps({"chips": rows}))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
