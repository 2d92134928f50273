"""Draws a run's curves: loss over steps, validation PSNR where there is one, and where the run was resumed on what.

    python -m jasmine.evaluation.curves RUN [--out FILE]

RUN is a run directory; the picture goes to `RUN/loss.png` unless `--out` names another file.
"""

import dataclasses
import io
import sys
from typing import Any

import numpy as np
from etils import epath

from jasmine.errors import UserError
from jasmine.training import cli
from jasmine.training.run_files import read_lines, write_atomically


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw, and where to."""

    out: str = ""
    """The picture. Default: loss.png in the run directory."""


def draw(run_dir: epath.Path, out: epath.Path) -> None:
    """Writes the picture of a run: each logged loss, faint, and the median of its neighbours.

    Raises:
        UserError: the run has no metrics yet.
    """
    metrics = [record for record in read_lines(run_dir / "metrics.jsonl") if "loss" in record]
    if not metrics:
        raise UserError(f"{run_dir} has no metrics.jsonl with a loss: is it a run directory that has trained?")
    # Without a display, and without touching the state that pyplot keeps.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in metrics], np.array([r["loss"] for r in metrics])
    around = min(4, len(losses) // 8)
    trend = [np.median(losses[max(0, k - around) : k + around + 1]) for k in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1)
    axes.plot(steps, trend, color="tab:blue", linewidth=2)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=run_dir.name)
    axes.grid(alpha=0.3, which="both")
    validated = [r for r in metrics if "val_psnr" in r]
    if validated:
        right = axes.twinx()
        right.plot([r["step"] for r in validated], [r["val_psnr"] for r in validated], "o-", color="tab:green")
        right.set_ylabel("validation PSNR (dB)", color="tab:green")
    starts = [r for r in read_lines(run_dir / "events.jsonl") if r.get("event") in ("started", "resumed")]
    for start in starts:
        resumed = start["event"] == "resumed"
        if resumed:
            axes.axvline(start["step"], color="tab:red", linestyle="--")
        label = f"resumed at step {start['step']} on\n{_topology(start)}" if resumed else _topology(start)
        axes.annotate(label, (start["step"], 0.03), xycoords=("data", "axes fraction"), xytext=(5, 0), va="bottom",
                      textcoords="offset points", fontsize=9, color="tab:red" if resumed else "tab:gray")  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(out, buffer.getvalue())


def _topology(start: dict[str, Any]) -> str:
    processes, devices = start.get("processes", 1), start.get("devices", 1)
    return f"{processes} process{'es' * (processes != 1)} × {devices // processes} device{'s' * (devices != processes)}"


def main(argv: list[str]) -> None:
    """The command line."""
    if not argv or argv[0].startswith("-"):
        raise UserError("name a run directory: python -m jasmine.evaluation.curves RUN [--out FILE]")
    options = cli.parse(Options, argv[1:], __doc__ or "")
    run_dir = epath.Path(argv[0])
    out = epath.Path(options.out) if options.out else run_dir / "loss.png"
    draw(run_dir, out)
    print(out)


if __name__ == "__main__":
    with cli.exit_with_job():
        main(sys.argv[1:])
