"""The report of a run as a page: one file that needs no other and no network, for a screen, light or dark, and for paper.

All that comes from the run is escaped, and the page forbids itself to load or run anything. However long the run was, the
page stays small: what is drawn is thinned out to what the eye can tell apart.
"""

import base64
import time
from collections.abc import Sequence
from pathlib import Path

from launch.charts import MOST_ROWS, escaped, loss_curve, shares, step_times, timeline
from launch.errors import UserError
from launch.goodput import BUCKETS, Account
from launch.report import AttemptView, Picture, Report, precise
from launch.run_dir import write_atomically

GENERATOR = "jasmine jobs.py report"


def check_free(path: Path) -> None:
    """Make sure that the page can be written to a path without a loss.

    Raises:
        UserError: there is something else, or no directory for it.
    """
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise UserError(f"--out {path} is a directory: name a file in it")
    try:
        if path.exists() and GENERATOR.encode() not in path.read_bytes()[:1000]:
            raise UserError(f"--out {path} exists and is not such a report: name another file")
    except OSError as error:
        raise UserError(f"--out {path} cannot be read: {error.strerror}") from error


def write_page(path: Path, report: Report) -> None:
    """Write the page of a report, or leave what was there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, page(report))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}; name another file, or --no-html") from error


def page(report: Report) -> str:
    """Return the page's text."""
    record, went = report.record, report.account
    parts = [
        f"<h1>{escaped(record.name)} <span class='state {record.state}'>{record.state}</span></h1>",
        f'<p class="sub">{escaped(record.job)} on {escaped(report.cluster)}; {escaped(report.progress)}</p>',
        f'<p class="sub">{escaped(record.reason)}</p>' if record.reason else "",
        _facts(report),
    ]
    if went.wall > 0:
        parts += ["<h2>Where the time went</h2>", shares(went), _buckets(went)]
        parts += ["<h2>Attempts</h2>", timeline(went, report.attempts, report.faults), _attempts(report.attempts)]
    if report.faults:
        parts += ["<h2>Faults</h2>", _faults(report)]
    if report.curve.kept or report.curve.not_finite:
        parts += ["<h2>Loss</h2>", loss_curve(report.curve, report.attempts)]
    if report.hosts:
        parts += [f"<h2>Steps by host, in attempt {report.hosts_of}</h2>", step_times(report.hosts)]
    if report.findings:
        parts += ['<ul class="findings">', *(f"<li>{escaped(line)}</li>" for line in report.findings), "</ul>"]
    elif report.hosts:
        parts.append('<p class="quiet">No host is slow, or waits for its data more than the others.</p>')
    if report.pictures:
        parts += ["<h2>Pictures</h2>", *map(_picture, report.pictures)]
    parts += [f'<p class="note">{escaped(note)}</p>' for note in report.notes]
    looked = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(report.now))
    parts.append(f'<p class="sub">{escaped(looked)} · <code>{escaped(report.command)}</code></p>')
    return _PAGE.format(
        title=escaped(f"{record.name} · {record.state}"), generator=GENERATOR, style=_style(), body="\n".join(parts)
    )


# --- time -------------------------------------------------------------------------------------------------------


def _facts(report: Report) -> str:
    went = report.account
    lost = sum(went.lost_steps.values())
    facts = [
        ("goodput", f"{went.goodput:.1%}" if went.goodput is not None else "–"),
        ("wall time", precise(went.wall)),
        ("attempts", str(len(report.attempts))),
        ("steps lost", f"{lost:,}"),
        ("waited to start", precise(report.queued) if report.queued is not None else "–"),
    ]
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>"


def _buckets(went: Account) -> str:
    rows = [
        f'<tr><td><i class="swatch b-{bucket.key}"></i>{bucket.label}</td><td class="n">{seconds / went.wall:.1%}</td>'
        f'<td class="n">{precise(seconds)}</td><td class="quiet">{bucket.meaning}</td>'
        f'<td class="quiet"><code>{bucket.other_name}</code></td></tr>'
        for bucket in BUCKETS.values()
        if (seconds := went.seconds()[bucket.key]) > 0
    ]
    head = '<tr><th></th><th class="n">share</th><th class="n">time</th><th></th><th>ml-goodput-measurement</th></tr>'
    total = (
        f'<tr class="total"><td>wall time</td><td></td><td class="n">{precise(went.wall)}</td><td></td><td></td></tr>'
    )
    return f'<div class="scroll"><table>{head}{"".join(rows)}{total}</table></div>'


def _attempts(views: Sequence[AttemptView]) -> str:
    def steps(view: AttemptView) -> str:
        if view.begun is None:
            return "–"
        reached = f"{view.begun:,} → {view.at:,}" if view.at is not None else f"{view.begun:,} →"
        return reached + (f" ({view.lost_steps:,} lost)" if view.lost_steps else "")

    rows = [
        f'<tr><td class="n">{view.attempt.number}</td><td>{escaped(view.cluster)}</td>'
        f'<td class="one">{escaped(view.topology)}</td><td class="n">{steps(view)}</td>'
        f'<td>{escaped(view.outcome)}</td><td class="quiet">{escaped(view.cause)}</td></tr>'
        for view in views[-10 * MOST_ROWS :]
    ]
    head = '<tr><th class="n"></th><th>cluster</th><th>topology</th><th class="n">steps</th><th>outcome</th>'
    table = f'<div class="scroll"><table>{head}<th></th></tr>{"".join(rows)}</table></div>'
    if len(views) <= 10:
        return table
    return f"<details><summary>{len(views)} attempts</summary>{table}</details>"


def _faults(report: Report) -> str:
    items = [
        f"<li>attempt {fault.attempt}, {time.strftime('%m-%d %H:%M:%S', time.localtime(fault.time))}: "
        f"{escaped(fault.text)}</li>"
        for fault in report.faults[-5 * MOST_ROWS :]
    ]
    listed = f'<ul class="faults">{"".join(items)}</ul>'
    return listed if len(items) <= 10 else f"<details><summary>{len(report.faults)} faults</summary>{listed}</details>"


def _picture(picture: Picture) -> str:
    caption = escaped(picture.caption)
    data = base64.b64encode(picture.data).decode()
    return f'<figure><img src="data:{picture.mime};base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


# Light and dark.
_COLOURS = {
    "text": ("#1c1c20", "#e9e7e2"),
    "quiet": ("#6b6964", "#a19e97"),
    "line": ("#e3e1dc", "#33343a"),
    "back": ("#faf9f7", "#17181b"),
    "card": ("#f1efea", "#212227"),
    "loss": ("#2b6cb0", "#6aa9ea"),
    "bad": ("#c0392b", "#ee6c5e"),
}
_BUCKET_COLOURS = {
    "steps": ("#3f8f6b", "#4fa981"),
    "init": ("#8d99ae", "#7c889e"),
    "prep": ("#b3bccb", "#5f6a7e"),
    "restore": ("#6ea8c9", "#5b94b5"),
    "compile": ("#a08bc4", "#9280bb"),
    "data": ("#e0a53f", "#e0a53f"),
    "checkpoint": ("#4878b8", "#5a8bcc"),
    "evaluation": ("#5cc0b4", "#4faea3"),
    "wasted": ("#cf5148", "#dc6259"),
    "down": ("#4a4d55", "#a3a7b0"),
    "other": ("#d9d6cf", "#3d3f46"),
    "works": ("#b5654a", "#c9775b"),
    "devices": ("#cfd8d3", "#3a4540"),
}

_STYLE = """
:root { color-scheme: light dark; COLOURS }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); }
body { max-width: 66rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.state { font-size: .85rem; font-weight: 600; vertical-align: .2em; padding: .1rem .55rem; }
.state { border-radius: 1rem; background: var(--card); }
.state.finished { color: var(--steps); }
.state.failed, .state.lost { color: var(--bad); }
.state.running { color: var(--loss); }
.sub, .note, .legend, .quiet, figcaption { color: var(--quiet); font-size: .88rem; }
.sub { margin: .2rem 0; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .5rem .9rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts div:first-child dd { color: var(--steps); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
tr + tr { border-top: 1px solid var(--line); }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: .8rem; }
th, td { padding: .3rem .8rem .3rem 0; vertical-align: top; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child, .one { white-space: nowrap; }
.total td { font-weight: 600; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; margin: .4rem 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg rect { shape-rendering: crispEdges; }
.grid { stroke: var(--line); }
.resume { stroke: var(--bad); stroke-dasharray: 4 3; opacity: .7; }
.resume.many { opacity: .3; }
.fault { fill: var(--bad); stroke: var(--back); stroke-width: 1.5; }
.step { fill: var(--loss); }
polyline { fill: none; stroke-linejoin: round; }
polyline.loss { stroke: var(--loss); stroke-width: 1.8; }
polyline.lost { stroke: var(--bad); stroke-width: 6; opacity: .35; }
.range { fill: var(--loss); opacity: .16; }
circle.validation { fill: var(--steps); }
.legend { margin: .2rem 0 0; }
.legend span { margin-right: 1.2rem; }
.swatch { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .5rem; }
.key { display: inline-block; width: 1.1rem; height: 0; border-top: 2px solid; vertical-align: middle; margin-right: .4rem; }
.key.loss { color: var(--loss); }
.key.lost { color: var(--bad); opacity: .35; border-top-width: 6px; }
.key.resume { color: var(--bad); border-top-style: dashed; }
.key.validation { width: .5rem; height: .5rem; border: 0; border-radius: 50%; background: var(--steps); }
.note { border-left: 3px solid var(--data); padding-left: .7rem; margin: .6rem 0; }
.findings li { color: var(--bad); }
.findings, .faults { padding-left: 1.1rem; font-size: .9rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
code { font-size: .82rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); }
@media print {
  :root { color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; }
  svg, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def _style() -> str:
    colours = {**_COLOURS, **_BUCKET_COLOURS}
    variables = " ".join(f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in colours.items())
    classes = "".join(f".b-{name} {{ fill: var(--{name}); background: var(--{name}); }}\n" for name in _BUCKET_COLOURS)
    return _STYLE.replace("COLOURS", variables) + classes


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
<body>
{body}
</body>
</html>
"""
