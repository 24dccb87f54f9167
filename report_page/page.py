"""Writes the HTML of a report: what it contains and in which order. The page is one file, has no scripts and is not
allowed to load anything. Everything that comes from a run is escaped.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from report_page.charts import colour_of, dash_of
from report_page.lenient import LARGEST
from report_page.run_data import Run, Score, Series
from report_page.series import ALIGNMENT, Drawing, HeatMap, smoothing_width
from report_page.style import CSS
from report_page.tables import (
    Table,
    alignment_table,
    facts_of,
    measure_table,
    option_tables,
    scores_of_runs,
    summary_table,
    warning_table,
)
from utils import boot_id


def make_page(runs: Sequence[Run], drawings: Sequence[Drawing], pictures: Sequence[bytes]) -> str:
    """Returns the HTML. pictures: one SVG per drawing."""
    title = " · ".join(run.name for run in runs)
    body = [
        _header(runs),
        *(_note(text) for run in runs for text in _remarks(run)),
        _section("Summary", _summary(runs)),
        *_charts(runs, drawings, pictures),
        _section("Scores", _table(scores_of_runs(runs)) + _table(measure_table(runs))),
        _section("Options", _options(runs)),
        _section("Warnings", _table(warning_table(runs), "texts")),
        "<footer>Made by report.py from metrics.jsonl and the files beside it.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _header(runs: Sequence[Run]) -> str:
    names = [f"{_swatch(i) if len(runs) > 1 else ''}{escape(run.name)} {_pill(run)}" for i, run in enumerate(runs)]
    if len(runs) == 1:
        return f'<header><h1>{names[0]}</h1><p class="path">{escape(str(runs[0].folder))}</p></header>'
    legend = "".join(f"<span>{name}</span>" for name in names)
    return f'<header><h1>{len(runs)} runs</h1></header>\n<nav class="legend">{legend}</nav>'


def _pill(run: Run) -> str:
    status = str(run.status.get("status", "not recorded"))
    known = status if status in ("complete", "running", "stopped", "diverged") else "unknown"
    return f'<span class="pill {known}">{escape(status)}</span>'


def _swatch(i: int) -> str:
    """Returns a stroke in the colour and dash of the run's lines in the charts, as SVG."""
    dash = {"--": ' stroke-dasharray="5 3"', ":": ' stroke-dasharray="2 3"', "-.": ' stroke-dasharray="6 2 2 2"'}
    line = f'<line x1="0" y1="5" x2="18" y2="5" stroke="{colour_of(i)}" stroke-width="3"{dash.get(dash_of(i), "")}/>'
    return f'<svg class="swatch" width="18" height="10" aria-hidden="true">{line}</svg>'


def _remarks(run: Run) -> list[str]:
    """Returns what a reader has to know before trusting the numbers, in sentences."""
    found = []
    if run.status.get("status") == "running":
        found.append(f"has not reported its end: {_where(run.status)}")
    if run.is_cut:
        found.append("the last line of metrics.jsonl is left out: it is cut short, as a crash leaves it")
    if run.damaged:
        found.append(f"{run.damaged} lines of metrics.jsonl are left out: they cannot be read")
    if run.repeated:
        found.append(f"{run.repeated} rows of metrics.jsonl are left out: a later row has the same step")
    if run.missing:
        found.append(f"{run.missing:,} steps between the first row and the last have no row")
    if run.too_large:
        found.append(f"{run.too_large} numbers are left out: they are beyond {LARGEST:g}, and no chart can show them")
    if run.abandoned:
        found.append(f"{run.abandoned} rows were computed again after a resume; the earlier ones are left out")
    return [f"{run.name}: {text}." for text in found]


def _where(status: dict[str, Any]) -> str:
    """Returns what is known of a process that has not reported its end."""
    pid, boot = status.get("pid"), status.get("boot")
    is_number = type(pid) is int and 0 < pid < 2**31
    if is_number and not Path(f"/proc/{pid}").exists():
        return f"it was killed, or runs on another machine; there is no process {pid} on this one"
    if is_number and boot and boot == boot_id():
        return f"a process {pid} is running"  # which may be another one by now
    return "it is still running, or was killed"


def _note(text: str) -> str:
    return f'<p class="remark">{escape(text)}</p>'


def _summary(runs: Sequence[Run]) -> str:
    widths = sorted({width for run in runs if (width := smoothing_width(len(run.step))) > 1})
    steps = " or ".join(f"{width:,}" for width in widths)
    text = f"Losses here, and thick lines below, are running medians of {steps} steps. Thin lines show every step."
    note = f'\n<p class="note">{text}</p>' if widths else ""
    if len(runs) > 1:
        return _table(summary_table(runs)) + note
    items = (f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in facts_of(runs[0]).items())
    return f'<dl class="facts">{"".join(items)}</dl>{note}'


def _options(runs: Sequence[Run]) -> str:
    parts = []
    for title, table in option_tables(runs).items():
        shown = _table(table) if len(table) > 1 else '<p class="note">None.</p>'
        is_long = title.startswith("All")
        parts.append(_details(title, table) if is_long else f"<h3>{title}</h3>\n{shown}")
    return "\n".join(parts) or "<p>Not recorded: there is no args.yaml, and no checkpoint.</p>"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _details(title: str, table: Table) -> str:
    """Returns a table that a click on its title shows; nothing for an empty one."""
    return f"<details><summary>{title}</summary>{_table(table)}</details>" if table else ""


def _table(table: Table, kind: str = "") -> str:
    lines = [_row(row, "td" if i else "th") for i, row in enumerate(table)]
    return f'<div class="scroll"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>" if table else ""


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


# Charts


def _charts(runs: Sequence[Run], drawings: Sequence[Drawing], pictures: Sequence[bytes]) -> list[str]:
    figures: dict[str, list[str]] = {}
    for drawing, picture in zip(drawings, pictures, strict=True):
        figures.setdefault(drawing.section, []).append(_figure_of(drawing, picture, runs))
    with_pairs = {drawing.section for drawing in drawings if isinstance(drawing, HeatMap)}
    tables = {ALIGNMENT: _details("Each layer", alignment_table(runs))}
    return [
        _section(section, _grid(members, section in with_pairs) + tables.get(section, ""))
        for section, members in figures.items()
    ]


def _grid(members: list[str], has_pairs: bool) -> str:
    return f'<div class="charts{" pairs" if has_pairs else ""}">\n' + "\n".join(members) + "\n</div>"


def _figure_of(drawing: Drawing, picture: bytes, runs: Sequence[Run]) -> str:
    unit = f" <span>{escape(drawing.unit)}</span>" if drawing.unit else ""
    note = f'<p class="note">{escape(drawing.note)}</p>' if drawing.note else ""
    source = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
    return (
        f"<figure><figcaption>{escape(drawing.title)}{unit}</figcaption>"
        f'<img src="{source}" alt="{escape(alt_text(drawing, runs))}" width="480" height="270">{note}</figure>'
    )


def alt_text(drawing: Drawing, runs: Sequence[Run]) -> str:
    """Describes a drawing in words, for readers who cannot see it."""
    if isinstance(drawing, HeatMap):
        layers, n = drawing.layers.error.shape
        last = drawing.layers.error[:, -1]
        worst = (
            f"; at the end layer {np.nanargmax(last)} is furthest from the teacher" if np.isfinite(last).any() else ""
        )
        return f"Heat map: {drawing.title} ({drawing.unit}), {layers} layers at {n} steps{worst}."
    lines = [
        f"{runs[i].name} {_course(found)}" for i, found in drawing.series.items() if np.isfinite(found.value).any()
    ]
    points = [f"{runs[i].name} {_point(score)}" for i, scores in drawing.scores.items() for score in scores]
    return f"{drawing.title} over optimizer steps: {'; '.join(lines + points)}."


def _course(series: Series) -> str:
    values = series.value[np.isfinite(series.value)]
    return f"from {values[0]:.4g} to {values[-1]:.4g}, between {values.min():.4g} and {values.max():.4g}"


def _point(score: Score) -> str:
    return f"{score.model} {score.acc:.4f} at step {score.step:,.0f}"
