"""Campaigns as Markdown, between markers of a file that others write to as well."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.faults import FAULTS

BEGIN, END = "<!-- chaos {name}: written by python -m tests.chaos -->", "<!-- end of chaos {name} -->"


def name_of(result: dict[str, Any]) -> str:
    """What tells the table of one kind of campaign from others."""
    return f"{result['backend']} {'bucket' if result['bucket'] else 'disk'}"


def markdown(result: dict[str, Any]) -> str:
    """A campaign's table, with a line above that says what came of it."""
    faults: Sequence[dict[str, Any]] = result["faults"]
    where = "in Cloud Storage" if result["bucket"] else "on a disk"
    verdict = "everything held" if not result["problems"] else f"**{len(result['problems'])} problem(s)**"
    told = [
        f"**`{result['backend']}`, the run {where}**: {len(faults)} faults (seed {result['seed']}), {result['moves']} moves",
        f"to another topology, {result.get('steps', 0):,} steps in {result['minutes']:.0f} min: {verdict}.",
        f"The {result.get('steps_bit_identical', 0):,} steps before the first move are bit for bit as if never disturbed,",
        f"all losses are within {result.get('worst_relative_loss', math.nan):.1g}.",
    ]
    lines = [
        " ".join(told),
        "",
        "| fault | | times | median s to recover | longest | steps lost at most | by hand |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, fault in FAULTS.items():
        some = [one for one in faults if one["name"] == name]
        if not some:
            continue
        seconds = [one["seconds"] for one in some if not math.isnan(one["seconds"])]
        median = f"{statistics.median(seconds):.1f}" if seconds else "–"
        longest = f"{max(seconds):.1f}" if seconds else "–"
        by_hand = sum(bool(one["by_hand"]) for one in some)
        lost = max(one["lost"] for one in some)
        lines.append(f"| `{name}` | {fault.what} | {len(some)} | {median} | {longest} | {lost} | {by_hand or ''} |")
    lines += [f"- {problem}" for problem in result["problems"]]
    return "\n".join(lines) + "\n"


def write(path: Path, result: dict[str, Any]) -> None:
    """Put a campaign's table in the place of the one before it, or at the end."""
    begin, end = (marker.format(name=name_of(result)) for marker in (BEGIN, END))
    text = path.read_text() if path.exists() else "# Reliability\n"
    block = f"{begin}\n{markdown(result)}{end}\n"
    before, there, rest = text.partition(begin + "\n")
    if there:
        path.write_text(before + block + rest.partition(end + "\n")[2])
    else:
        path.write_text(f"{text.rstrip()}\n\n{block}")
