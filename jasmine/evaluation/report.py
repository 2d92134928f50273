"""An evaluation as a file for programs and a page for people.

`evaluation.json` is strict JSON (what has no value is null). `evaluation.html` needs no other file and no network: pictures
stand in it as data URIs. Both say which run, step and options they are of; an evaluation never replaces one of other options.
"""

import base64
import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jasmine.errors import UserError
from jasmine.training.run_files import write_atomically

JSON_NAME, HTML_NAME = "evaluation.json", "evaluation.html"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        key: its name in the JSON file.
        label: its name for people.
        value: NaN where it could not be measured.
        meaning: a sentence on what it says and which way is good.
        unit: "" for none.
        error: standard error over clips; NaN where the number is not a mean over clips.
    """

    key: str
    label: str
    value: float
    meaning: str
    unit: str = ""
    error: float = math.nan

    def text(self) -> str:
        """Value, error and unit, with as many digits as tell."""
        if not math.isfinite(self.value):
            return "–"
        digits = 2 if self.unit in ("dB", "%") else 4 if abs(self.value) <= 1 else 2 if abs(self.value) < 1000 else 0
        error = f" ± {self.error:.{digits}f}" if math.isfinite(self.error) else ""
        value = round(self.value, digits) + 0.0  # no "-0.00"
        return f"{value:.{digits}f}{error}" + (f" {self.unit}" if self.unit else "")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded picture: `data` of type `mime` ("image/png", "image/gif"); `caption` is one sentence."""

    caption: str
    mime: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Table:
    """Counts, int (rows, columns), shown as shares of their row."""

    key: str
    caption: str
    counts: np.ndarray
    row_names: Sequence[str]
    column_names: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        curves: by key, one number a frame, (S,) float; NaN where there is none.
        notes: what a reader must know to read the numbers right, a sentence or two each.
    """

    measures: Sequence[Measure]
    curves: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and how.

    Attributes:
        run, job, step: the run, its baseline, and the checkpoint's step.
        weights: fingerprint of the model.
        data: the data, for people.
        options: every option that the findings depend on; two evaluations are the same if these, job, step and weights are.
    """

    run: str
    job: str
    step: int
    weights: str
    data: str
    options: Mapping[str, Any]


def check_free(output_dir: epath.Path, evaluation: Evaluation) -> None:
    """Raises UserError if `output_dir` holds another evaluation; says what differs."""
    path = output_dir / JSON_NAME
    if not path.exists():
        if (output_dir / HTML_NAME).exists():
            raise UserError(f"{output_dir} holds an {HTML_NAME} without its {JSON_NAME}: name another --output_dir")
        return
    try:
        before = _identity(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the result of an evaluation: name another --output_dir") from error
    now = _identity(json.loads(json.dumps(dataclasses.asdict(evaluation))))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{output_dir} holds an evaluation with {name} {before.get(name)}, not {now.get(name)}: "
                "name another --output_dir, or delete it"
            )


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("job", "step", "weights")} | record["options"]


def write(output_dir: epath.Path, evaluation: Evaluation, findings: Findings) -> None:
    """Writes both files. Raises UserError where they cannot be written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output_dir}: {error.strerror or error}") from error
    write_atomically(output_dir / JSON_NAME, to_json(evaluation, findings).encode())
    write_atomically(output_dir / HTML_NAME, to_html(evaluation, findings).encode())


def to_json(evaluation: Evaluation, findings: Findings) -> str:
    """The JSON file's text: `metrics` and `standard_errors` by key, `curves`, `tables`, and what they are of."""
    measured = [m for m in findings.measures if math.isfinite(m.error)]
    record = {
        **dataclasses.asdict(evaluation),
        "metrics": {measure.key: _number(measure.value) for measure in findings.measures},
        "standard_errors": {measure.key: _number(measure.error) for measure in measured},
        "curves": {name: [_number(value) for value in curve] for name, curve in findings.curves.items()},
        "tables": {
            table.key: {
                "rows": list(table.row_names),
                "columns": list(table.column_names),
                "counts": table.counts.tolist(),
            }
            for table in findings.tables
        },
        "notes": list(findings.notes),
    }
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def to_html(evaluation: Evaluation, findings: Findings) -> str:
    """The page's text."""
    title = f"{evaluation.job} · step {evaluation.step:,}"
    parts = [
        f"<h1>{_escaped(title)}</h1>",
        f'<p class="sub">{_escaped(evaluation.run)}<br>{_escaped(evaluation.data)}</p>',
        '<table class="measures">',
        *(
            f'<tr><th>{_escaped(m.label)}</th><td class="value">{_escaped(m.text())}</td>'
            f'<td class="meaning">{_escaped(m.meaning)}</td></tr>'
            for m in findings.measures
        ),
        "</table>",
        *(f'<p class="note">{_escaped(note)}</p>' for note in findings.notes),
        *(
            f'<figure><img src="data:{p.mime};base64,{base64.b64encode(p.data).decode()}" alt="{_escaped(p.caption)}">'
            f"<figcaption>{_escaped(p.caption)}</figcaption></figure>"
            for p in findings.pictures
        ),
        *map(_table, findings.tables),
        "<h2>Options</h2>",
        '<p class="options">',
        *(
            f"<code>--{_escaped(name)} {_escaped(str(value))}</code> "
            for name, value in evaluation.options.items()
            if value != ""
        ),
        "</p>",
    ]
    return _PAGE.replace("{title}", _escaped(title)).replace("{body}", "\n".join(parts))


def _table(table: Table) -> str:
    head = "".join(f"<th>{_escaped(name)}</th>" for name in table.column_names)
    rows = []
    for name, counts in zip(table.row_names, table.counts, strict=True):
        shares = counts / max(1, counts.sum())
        cells = "".join(
            f'<td style="background:rgba(31,119,180,{share:.2f});color:{"#fff" if share > 0.5 else "inherit"}">'
            f"{f'{share:.0%}' if count else ''}</td>"
            for share, count in zip(shares, counts, strict=True)
        )
        rows.append(f"<tr><th>{_escaped(name)}</th>{cells}<td>{int(counts.sum()):,}</td></tr>")
    return (
        f'<figure><div class="scroll"><table class="counts"><tr><th></th>{head}<th>count</th></tr>{"".join(rows)}'
        f"</table></div><figcaption>{_escaped(table.caption)}</figcaption></figure>"
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; color: #1c1c20; background: #faf9f7; }
body { max-width: 66rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
.sub, .meaning, .note, figcaption { color: #6b6964; font-size: .88rem; }
.sub { margin: .2rem 0 1.2rem; overflow-wrap: anywhere; }
.measures { border-collapse: collapse; width: 100%; }
.measures tr { border-top: 1px solid #e3e1dc; }
.measures th { text-align: left; font-weight: 600; padding: .45rem .8rem .45rem 0; }
.value { white-space: nowrap; font-variant-numeric: tabular-nums; padding: .45rem .8rem .45rem 0; }
.note { border-left: 3px solid #d8a24a; padding-left: .7rem; }
figure { margin: 1.6rem 0; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.counts { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
.counts th, .counts td { padding: .25rem .5rem; text-align: right; font-weight: 400; white-space: nowrap; }
code { font-size: .82rem; background: #efede8; border-radius: 3px; padding: .1rem .3rem; overflow-wrap: anywhere; }
.options { line-height: 2; }
@media (max-width: 40rem) {
  .measures tr { display: block; padding: .5rem 0; }
  .measures th, .measures td { display: inline; padding: 0 .5rem 0 0; }
  .measures .meaning { display: block; }
}
</style>
<body>
{body}
</body>
</html>
"""
