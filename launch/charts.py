"""Drawings of a run for its report, as SVG text that takes its colours from the page around it.

Classes `b-<bucket>` are the colours of uses of time. All texts are escaped here. However much there is to draw, a drawing has
a bounded number of parts: what falls onto one place is drawn as one.
"""

import bisect
import html
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from launch.goodput import BUCKETS, Account, Span
from launch.report import AttemptView, Curve, Fault, precise
from launch.stragglers import BIN, Pace
from launch.text import printable

WIDTH = 960  # of drawings, in their own units
MOST_ROWS = 40  # of attempts, and of hosts
CELLS = 240  # of a time line
POINTS = 480  # of a curve
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
TIME_TICKS = [
    *(1, 2, 5, 10, 20, 30),
    *(n * _MINUTE for n in (1, 2, 5, 10, 20, 30)),
    *(n * _HOUR for n in (1, 2, 6, 12)),
    *(n * _DAY for n in (1, 2, 5, 10, 20, 50, 100)),
]


def shares(went: Account) -> str:
    x, rects = 0.0, []
    for key, seconds in went.seconds().items():
        width = WIDTH * seconds / went.wall
        if width > 0:
            title = f"{BUCKETS[key].label}: {precise(seconds)}, {seconds / went.wall:.1%}"
            rects.append(_rect(x, 0, width, 28, key, title))
        x += width
    return _svg(28, rects, "shares of the wall time")


def timeline(went: Account, views: Sequence[AttemptView], faults: Sequence[Fault]) -> str:
    """Draw all of the wall time in one row, and below it each attempt in its own; faults are marks."""
    left, top, row = 250, 26, 18
    scale = (WIDTH - left) / went.wall
    starts = [span.start for span in went.spans]
    places = [
        0.0,
        *itertools.accumulate(span.seconds for span in went.spans),
    ]  # in wall time: what does not count is out

    def x(moment: float) -> float:
        index = max(0, bisect.bisect_right(starts, moment) - 1)
        return left + scale * min(places[index + 1], places[index] + max(0.0, moment - starts[index]))

    shown = views[-MOST_ROWS:]
    height = top + row * (len(shown) + 1) + 8
    drawn = [_text(left - 8, top + 13, "all", "end")]
    size = next((size for size in TIME_TICKS if went.wall / size <= 7), math.ceil(went.wall / 7))
    for seconds in range(0, math.floor(went.wall) + 1, size):
        drawn.append(f'<line class="grid" x1="{left + scale * seconds:.1f}" x2="{left + scale * seconds:.1f}" '
                     f'y1="{top - 4}" y2="{height - 4}"/>')  # fmt: skip
        anchor = "end" if seconds > 0.97 * went.wall else "middle"
        drawn.append(_text(left + scale * seconds, top - 8, _time(seconds), anchor))
    drawn += _strip(went.spans, x, scale, top + 2, row - 4)
    for index, view in enumerate(shown, 1):
        y = top + row * index
        mine = [span for span in went.spans if span.attempt == view.attempt.number]
        label = f"{view.attempt.number}: {view.topology}"
        drawn.append(_text(left - 8, y + 13, label if len(label) < 40 else f"{label[:38]}…", "end"))
        drawn.append(f'<line class="grid" x1="{left}" x2="{WIDTH}" y1="{y}" y2="{y}"/>')
        drawn += _strip(mine, x, scale, y + 2, row - 4)
    rows = {view.attempt.number: top + row * index for index, view in enumerate(shown, 1)}
    for fault in faults[-10 * MOST_ROWS :]:
        if fault.attempt in rows:
            title = f"<title>{escaped(fault.text)}</title>"
            drawn.append(
                f'<circle class="fault" cx="{x(fault.time):.1f}" cy="{rows[fault.attempt] + 9}" r="4.5">{title}</circle>'
            )
    hidden = len(views) - len(shown)
    note = f'<p class="note">The newest {len(shown)} of {len(views)} attempts.</p>' if hidden else ""
    return _svg(height, drawn, "time line of the attempts") + note


def _strip(spans: Iterable[Span], x: Callable[[float], float], scale: float, y: float, height: float) -> Iterator[str]:
    """Draw spans side by side; where several fall into one cell of the drawing, one above the other by their shares."""
    size = WIDTH / CELLS
    cells: dict[int, tuple[float, dict[str, float]]] = {}  # where what is in it begins, and how wide each bucket is
    for span in spans:
        begin = x(span.start)
        end = begin + scale * span.seconds
        while begin < end:
            cell = int(begin // size)
            until = max(min(end, (cell + 1) * size), begin + 1e-6)
            _, widths = cells.setdefault(cell, (begin, {}))
            widths[span.bucket] = widths.get(span.bucket, 0.0) + until - begin
            begin = until
    for begin, widths in cells.values():
        total, under = sum(widths.values()), 0.0
        for key in BUCKETS:
            if share := widths.get(key, 0.0) / total:
                yield _rect(begin, y + under * height, total + 0.3, share * height, key)
                under += share


# --- loss -------------------------------------------------------------------------------------------------------


def loss_curve(curve: Curve, views: Sequence[AttemptView]) -> str:
    """Draw losses, each point the median of its neighbours within their range; lost ones faint, resumes as dashed lines."""
    left, right, top, bottom, height = 58, 12, 12, 26, 320
    points = [*curve.kept, *curve.lost, *curve.validation]
    if not points:
        return f'<p class="note">None of the losses is a number: {len(curve.not_finite):,} are NaN or infinite.</p>'
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    log = low > 0 and high / low > 5
    scaled = math.log10 if log else float
    low_y, high_y = scaled(low), scaled(high)
    margin = 0.04 * (high_y - low_y) or max(abs(high_y), 1.0) * 0.1
    low_y, high_y = low_y - margin, high_y + margin

    def x(step: float) -> float:
        return left + (WIDTH - left - right) * ((step - first) / (last - first) if last > first else 0.5)

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (high_y - scaled(loss)) / (high_y - low_y)

    drawn = []
    for value in _log_ticks(low_y, high_y) if log else _ticks(low_y, high_y, 5):
        drawn.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        drawn.append(_text(left - 8, y(value) + 4, f"{value:.4g}", "end"))
    for step in _ticks(first, last, 8):
        drawn.append(_text(x(step), height - 8, f"{step:,.0f}", "end" if x(step) > WIDTH - 40 else "middle"))
    drawn.append(_text(WIDTH - right, height - bottom - 6, "step", "end"))
    resumed = [(view.begun, view) for view in views if view.begun]
    many = len(resumed) > 12
    for step, view in resumed[-10 * MOST_ROWS :]:
        if first <= step <= last:
            title = f"<title>{escaped(f'attempt {view.attempt.number}, from step {step:,}: {view.topology}')}</title>"
            place = f'x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{top}" y2="{height - bottom}"'
            drawn.append(f'<line class="resume{" many" * many}" {place}>{title}</line>')
            if not many:
                drawn.append(_text(x(step) + 3, top + 10, str(view.attempt.number), "start"))
    groups = _grouped(curve.kept, first, last)
    if any(len(group) > 2 for group in groups):
        upper = [f"{x(_middle(group)):.1f},{y(max(loss for _, loss in group)):.1f}" for group in groups]
        lower = [f"{x(_middle(group)):.1f},{y(min(loss for _, loss in group)):.1f}" for group in groups]
        drawn.append(f'<polygon class="range" points="{" ".join([*upper, *reversed(lower)])}"/>')
    for piece in _pieces(curve.lost):
        drawn.append(_line("lost", ((x(s), y(v)) for s, v in _thinned(piece, first, last))))
    drawn.append(_line("loss", ((x(s), y(v)) for s, v in _thinned(curve.kept, first, last))))
    for step, loss in _thinned(curve.validation, first, last):
        title = f"<title>{escaped(f'validation at step {step:,.0f}: {loss:.5g}')}</title>"
        drawn.append(f'<circle class="validation" cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3">{title}</circle>')
    for step in curve.not_finite[:POINTS]:
        if first <= step <= last:
            drawn.append(f'<path class="fault" d="M{x(step) - 4:.1f} {top}h8l-4 7z"/>')
    legend = ['<i class="key loss"></i>training']
    legend += ['<i class="key validation"></i>validation'] if curve.validation else []
    legend += ['<i class="key lost"></i>steps that were made again'] if curve.lost else []
    legend += ['<i class="key resume"></i>resumed, by the attempt of that number'] if resumed else []
    legend += [f"▼ {len(curve.not_finite):,} losses that are NaN or infinite"] if curve.not_finite else []
    return (
        _svg(height, drawn, "loss over steps")
        + f'<p class="legend">{" ".join(f"<span>{it}</span>" for it in legend)}</p>'
    )


def _grouped(points: Sequence[tuple[int, float]], first: int, last: int) -> list[list[tuple[int, float]]]:
    """Return points in groups that fall onto one place of the drawing."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        groups.setdefault((step - first) * POINTS // max(1, last - first), []).append((step, loss))
    return list(groups.values())


def _thinned(points: Sequence[tuple[int, float]], first: int, last: int) -> list[tuple[float, float]]:
    return [(_middle(group), statistics.median(loss for _, loss in group)) for group in _grouped(points, first, last)]


def _middle(group: Sequence[tuple[int, float]]) -> float:
    return (group[0][0] + group[-1][0]) / 2


def _pieces(points: Sequence[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """Return lost steps in pieces, so that no line is drawn over the steps between them."""
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(points)]
    usual = statistics.median(gaps) if gaps else 0
    pieces: list[list[tuple[int, float]]] = []
    for point in points:
        if not pieces or point[0] - pieces[-1][-1][0] > 3 * max(1, usual):
            pieces.append([])
        pieces[-1].append(point)
    return pieces


# --- hosts ------------------------------------------------------------------------------------------------------


def step_times(paces: Sequence[Pace]) -> str:
    """Draw for each host how its step times are distributed, and what it does in a step."""
    shown = sorted(paces, key=lambda pace: -pace.waits - pace.works)[:MOST_ROWS]
    shown.sort(key=lambda pace: pace.host)
    low = min(min(pace.histogram, default=0) for pace in shown)
    high = max(max(pace.histogram, default=0) for pace in shown) + 1
    left, numbers, strip, row, top = 150, 250, 330, 30, 34
    second = left + strip + numbers
    width = WIDTH - second

    def x(n: float) -> float:
        return left + strip * (n - low) / (high - low)

    drawn = [_text(left, 12, "step time", "start"), _text(second, 12, "of its time", "start")]
    for seconds in _log_ticks(low * math.log10(BIN), high * math.log10(BIN), few=1.5):
        at = x(math.log(seconds, BIN))
        drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="{top + row * len(shown)}"/>')
        drawn.append(_text(at, 28, _step_time(seconds)))
    for index, pace in enumerate(shown):
        y, most = top + row * index, max(pace.histogram.values(), default=1)
        drawn.append(_text(left - 10, y + 20, pace.name if len(pace.name) < 26 else f"{pace.name[:24]}…", "end"))
        for n, count in sorted(pace.histogram.items()):
            tall = max(0.6, (row - 8) * count / most)
            place = (
                f'x="{x(n):.1f}" y="{y + row - 4 - tall:.1f}" width="{strip / (high - low):.2f}" height="{tall:.1f}"'
            )
            drawn.append(f'<rect class="step" {place}/>')
        median, tail = pace.quantile(0.5), pace.quantile(0.9)
        text = f"{_step_time(median)}, 90 % {_step_time(tail)}, max {_step_time(pace.longest)}"
        drawn.append(_text(left + strip + 10, y + 20, text, "start"))
        at = float(second)
        for key, share, title in (
            ("data", pace.waits, "waits for data"),
            ("works", pace.works, "is busy itself"),
            ("devices", pace.idles, "waits for its devices, and for the others"),
        ):
            drawn.append(_rect(at, y + 8, width * share, row - 14, key, f"{pace.name} {title}: {share:.1%}"))
            at += width * share
    legend = "".join(
        f'<span><i class="swatch b-{key}"></i>{label}</span> '
        for key, label in (
            ("data", "waits for data"),
            ("works", "is busy itself"),
            ("devices", "waits for its devices, and thereby for the others"),
        )
    )
    hidden = f" The {len(shown)} most conspicuous of {len(paces)} hosts." if len(shown) < len(paces) else ""
    return _svg(top + row * len(shown) + 4, drawn, "step times by host") + f'<p class="legend">{legend}{hidden}</p>'


def _time(seconds: int) -> str:
    for unit, length in (("d", _DAY), ("h", _HOUR), ("min", _MINUTE)):
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s" if seconds else "0"


def _step_time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} µs"
    )


# --- drawing ----------------------------------------------------------------------------------------------------


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escaped(label)}">{"".join(parts)}</svg>'


def _rect(x: float, y: float, width: float, height: float, bucket: str, title: str = "") -> str:
    inside = f"<title>{escaped(title)}</title>" if title else ""
    return f'<rect class="b-{bucket}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}">{inside}</rect>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _line(kind: str, points: Iterable[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers between two, about `count` of them."""
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    size *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= count)
    return [n * size for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _log_ticks(low: float, high: float, few: float = 3.0) -> list[float]:
    """Return round numbers from 10**low to 10**high, three for each power of ten if these are `few`."""
    steps = (1, 2, 5) if high - low < few else (1,)
    found = [s * 10.0**n for n in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    return [value for value in found if low <= math.log10(value) <= high][:: max(1, math.ceil((high - low) / 10))]


def escaped(text: str) -> str:
    """Return a text for a page: it is no markup, and UTF-8 has all of it."""
    return html.escape(printable(text), quote=True)
