"""Shows what a run has trained: `python -m jasmine.inspect RUN [--step N] [--html [FILE]]`.

Prints what kind of model it is, how many parameters each part has, what it builds on and how the run went; `--html` writes
a page with a picture and the statistics of every weight, in which dead and exploded ones stand out. Shapes come from the
checkpoint's own metadata, so that runs of scripts that this package does not know can be looked at too. Weights are read
for the page only, into host memory: no accelerator is taken from the job that may be training in the run. Nothing of the
run is changed.
"""

import functools
import html
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import treescope
from etils import epath

from jasmine.command_line import Parser
from jasmine.errors import EXIT_USER_ERROR, UserError
from jasmine.training import checksums
from jasmine.training.objects import may_pass, reason
from jasmine.training.run_files import read_lines, seconds
from jasmine.training.runs import CONFIG_NAME, find_run

SHOWN_ELEMENTS = 4000  # of each array, from its edges inwards
SHOWN_ATTEMPTS = 12
PAGE_NAME = "inspect.html"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint of a run, not read yet.

    Attributes:
        steps: of all finished checkpoints of the run, ascending.
        step: of this one.
        path: the folder of its arrays.
        tree: nested containers whose leaves have `shape` and `dtype`.
        meta: what was written beside the arrays; empty where nothing was.
    """

    steps: list[int]
    step: int
    path: epath.Path
    tree: Any
    meta: Mapping[str, Any]

    def parts(self) -> dict[str, Any]:
        """The parameters and, where kept, their moving average; of a checkpoint that names neither, all there is."""
        if not isinstance(self.tree, Mapping):
            return {"checkpoint": self.tree}
        return {name: self.tree[name] for name in ("params", "ema") if self.tree.get(name)} or dict(self.tree)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """The arrays of `parts` as numpy arrays.

        Raises:
            UserError: they are not what was saved.
            Exception: they cannot be read.
        """
        chosen = self.parts() if isinstance(self.tree, Mapping) else self.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), chosen)
        arguments = ocp.args.PyTreeRestore(item=chosen, restore_args=how, partial_restore=True)
        restored = ocp.PyTreeCheckpointer().restore(self.path, args=arguments)
        if checksums.KEY in self.meta and not checksums.agree(checksums.checksums_on_host(restored), self.meta):
            raise UserError("its contents are not those that were saved")
        # Restored in the order of names; a page shows parameters before their average.
        return {name: restored[name] for name in chosen} if isinstance(self.tree, Mapping) else {"checkpoint": restored}


def open_checkpoint(run_dir: epath.Path, step: int | None = None, *, weights: bool = False) -> Checkpoint:
    """The checkpoint of a step; by default the newest that can be read, after a warning where it is not the newest of all.

    Args:
        weights: also reads the weights.

    Raises:
        UserError: the run has none, or not of this step, or it cannot be read.
    """
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir} is not a run directory: it has no folder `checkpoints`")
    steps = sorted(ocp.utils.checkpoint_steps(folder))
    if not steps:
        raise UserError(f"{folder} holds no finished checkpoint")
    if step is not None and step not in steps:
        raise UserError(
            f"--step={step}: {folder} has a checkpoint of {'steps' if steps[1:] else 'step'} {_listed(steps)}"
        )
    damaged: list[str] = []
    for one in reversed(steps) if step is None else [step]:
        try:
            checkpoint = _open(folder / str(one), one, steps)
            if weights:
                _ = checkpoint.weights
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else reason(error)
            if step is not None or may_pass(error):
                raise UserError(f"the checkpoint {folder / str(one)} cannot be read: {why}") from error
            damaged.append(f"step {one}: {why}")
            continue
        if damaged:
            print(
                f"warning: step {one} is the newest in {folder} that can be read ({'; '.join(damaged)})",
                file=sys.stderr,
            )
        return checkpoint
    raise UserError(f"no checkpoint in {folder} can be read ({'; '.join(damaged)})")


def _open(root: epath.Path, step: int, steps: list[int]) -> Checkpoint:
    # A job saves `state`; other scripts may name the item otherwise, or save without naming any.
    items = sorted((path.parent for path in root.glob("*/_METADATA")), key=lambda path: path.name != "state")
    path = items[0] if items else root
    tree = ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree
    return Checkpoint(steps, step, path, tree, _read_json(root / "meta" / "metadata"))


def count(tree: Any) -> int:
    """Elements of all arrays of a tree."""
    return sum(_elements(leaf) for _, leaf in _arrays(tree))


def table(tree: Any) -> list[str]:
    """Names, counts, sizes, dtypes and shapes of the parts of a tree, two levels deep, and their total."""
    rows = [("", "parameters", "MiB", "dtype", "shape")]

    def add(name: str, part: Any, depth: int) -> None:
        arrays = [leaf for _, leaf in _arrays(part)]
        size = sum(_elements(leaf) * np.dtype(leaf.dtype).itemsize for leaf in arrays)
        dtypes = ", ".join(sorted({str(np.dtype(leaf.dtype)) for leaf in arrays}))
        shape = _shape(max(arrays, key=_elements)) if arrays else ""
        shape = shape if len(arrays) < 2 else f"{len(arrays)} arrays, the largest {shape}"
        rows.append(("  " * depth + name, f"{count(part):,}", f"{size / 2**20:,.2f}", dtypes, shape))

    for name, part in _children(tree):
        add(name, part, 1)
        for inner_name, inner in _children(part):
            add(inner_name, inner, 2)
    add("total", tree, 1)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{name:<{widths[0]}}  {number:>{widths[1]}}  {size:>{widths[2]}}  {dtype:<{widths[3]}}  {shape}".rstrip()
        for name, number, size, dtype, shape in rows
    ]


def history(run_dir: epath.Path) -> list[str]:
    """A line for each time that the run was started: when, from which step, on what, and how it ended."""
    attempts: list[list[dict[str, Any]]] = []
    for record in read_lines(run_dir / "events.jsonl"):
        if record.get("event") in ("started", "resumed"):
            attempts.append([])
        if attempts and "step" in record:
            attempts[-1].append(record)
    lines = []
    for events in attempts:
        first, last = events[0], events[-1]
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(first.get("time", 0)))
        where = f"{_plural(first.get('processes'), 'process')}, {_plural(first.get('devices'), 'device')}"
        ends = {record["event"]: record for record in events}
        if "finished" in ends:
            end = f"finished at step {ends['finished']['step']}"
        elif "saved" in ends:
            signal = ends.get("signalled", {}).get("signal", "a signal")
            end = f"left at step {ends['saved']['step']} on {signal}"
        else:
            end = f"no end recorded; last heard of at step {last['step']}"
        lasted = seconds(last.get("time", 0) - first.get("time", 0))
        lines.append(f"  {begun}  {first['event']} at step {first['step']} on {where}; {end} after {lasted}")
    if len(lines) > SHOWN_ATTEMPTS:
        hidden = len(lines) - SHOWN_ATTEMPTS
        lines = [lines[0], f"  … {hidden} more …", *lines[hidden + 1 :]]
    return lines


def describe(run_dir: epath.Path, checkpoint: Checkpoint) -> list[str]:
    """All that the command prints of a run."""
    record = _read_json(run_dir / CONFIG_NAME)
    config = record.get("config") or checkpoint.meta.get("config") or {}
    job = record.get("job") or checkpoint.meta.get("job") or "an unknown script"
    data = record.get("data") or {}
    lines = [f"{job}, step {checkpoint.step}" + (f" of {config['num_steps']}" if "num_steps" in config else "")]
    lines.append(f"  run directory  {run_dir}")
    lines.append(f"  checkpoints    {_listed(checkpoint.steps)}")
    if data.get("frame_shape"):
        actions = f", {data['num_actions']} actions" if data.get("num_actions") else ""
        lines.append(f"  trained on     frames of {'×'.join(map(str, data['frame_shape']))}{actions}")
    for part in sorted((run_dir / "frozen").glob("*")):
        lines.append(f"  frozen         {_describe_frozen(part)}")
    parts = checkpoint.parts()
    if "ema" in parts and "params" in parts:
        lines.append("  moving average kept as `ema`, of the same shapes")
        del parts["ema"]
    for name, part in parts.items():
        lines += ["", name, *table(part)]
    lines += ["", f"whole checkpoint: {count(checkpoint.tree):,} numbers"]
    attempts = history(run_dir)
    return [*lines, "", "history", *attempts] if attempts else lines


def _describe_frozen(part: epath.Path) -> str:
    record = _read_json(part / CONFIG_NAME)
    source = f", taken from {record['pinned_from']}" if "pinned_from" in record else ""
    try:
        checkpoint = open_checkpoint(part)
        what = f"step {checkpoint.step}, {sum(map(count, checkpoint.parts().values())):,} parameters"
    except UserError:
        what = "its checkpoint cannot be read"
    return f"{part.name}: {record.get('job', 'an unknown script')}, {what}{source}"


def statistics(tree: Any) -> list[str]:
    """A line for each array: root mean square, largest magnitude, share of zeros, and how many numbers are not finite."""
    rows = [("array", "shape", "rms", "largest", "zeros", "")]
    for name, array in _arrays(tree):
        values = np.asarray(array)
        if not values.size or not np.can_cast(values.dtype, np.complex64, "same_kind"):
            continue
        values = values.astype(np.float32)
        finite = np.isfinite(values)
        good = values[finite].astype(np.float64)
        bad = values.size - good.size
        rows.append(
            (
                name,
                _shape(values),
                f"{np.sqrt(np.square(good).mean()):.3g}" if good.size else "",
                f"{np.abs(good).max():.3g}" if good.size else "",
                f"{np.mean(values == 0):.1%}",
                f"{bad:,} not finite" if bad else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def page(title: str, description: Sequence[str], weights: Any) -> str:
    """A page of HTML that needs nothing else: the description, and a picture and the statistics of every array."""
    visualizer = treescope.ArrayAutovisualizer(maximum_size=SHOWN_ELEMENTS)
    with treescope.active_autovisualizer.set_scoped(visualizer), treescope.using_expansion_strategy(max_height=None):
        pictures = treescope.render_to_html(weights, compressed=False)
    heading, text, figures = (
        html.escape(part) for part in (title, "\n".join(description), "\n".join(statistics(weights)))
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{heading}</title></head>\n<body>\n'
        f"<h1>{heading}</h1>\n<pre>{text}</pre>\n<h2>Statistics</h2>\n<pre>{figures}</pre>\n"
        f"<h2>Weights</h2>\n<p>Of large arrays only the edges are shown.</p>\n{pictures}\n</body>\n</html>\n"
    )


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    """Named direct parts of a container; of anything else none."""
    if isinstance(tree, Mapping):
        yield from ((str(name), part) for name, part in tree.items() if part is not None)
    elif isinstance(tree, list | tuple):
        yield from ((str(index), part) for index, part in enumerate(tree) if part is not None)


def _arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves of the arrays of nested containers."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield "", tree
    for name, part in _children(tree):
        yield from ((f"{name}.{inner}".rstrip("."), leaf) for inner, leaf in _arrays(part))


def _elements(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))


def _shape(leaf: Any) -> str:
    return "×".join(map(str, leaf.shape)) or "scalar"


def _plural(number: Any, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number if number is not None else '?'} {what if number == 1 else plural}"


def _listed(steps: Sequence[int]) -> str:
    shown = [*steps[:2], "…", *steps[-6:]] if len(steps) > 9 else steps
    return ", ".join(map(str, shown))


def _read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object; {} where there is none to read: a run is shown as far as it can be."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser("python -m jasmine.inspect", description=summary, epilog=details)
    parser.add_argument("run", metavar="RUN", help="a run directory, or a run's name under the storage root")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint to show; by default the newest")
    parser.add_argument(
        "--html", nargs="?", const="", metavar="FILE", help=f"write a page of the weights; by default RUN/{PAGE_NAME}"
    )
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files that the folders it reads never have
    try:
        options = parser.parse_args(arguments)
        run_dir = find_run(options.run, "RUN")
        checkpoint = open_checkpoint(run_dir, options.step, weights=options.html is not None)
        description = describe(run_dir, checkpoint)
        print("\n".join(description))
        if options.html is not None:
            target = epath.Path(options.html) if options.html else run_dir / PAGE_NAME
            text = page(f"{run_dir.name}, step {checkpoint.step}", description, checkpoint.weights)
            try:
                target.write_text(text)
            except OSError as error:
                raise UserError(f"cannot write --html={target}: {error.strerror or error}") from error
            print(f"\nwrote {target} ({len(text.encode()) / 2**20:.1f} MiB)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
