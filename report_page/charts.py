"""Draws the pictures of a report: lines over optimizer steps, and heat maps of layers. A run has the same colour in
all of them.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from report_page.layer_errors import COLUMNS
from report_page.series import Chart, Drawing, HeatMap, is_log, smooth, smoothing_width, thin
from utils import printable

CHANCE = 0.25  # accuracy of guessing one of four answers
ROUND = [1, 2, 2.5, 5, 10]  # the ticks of an axis are multiples of these
# Distinguishable on white and on black.
COLOURS = ("#2f7ed8", "#e8743b", "#1f9e77", "#b05cc6", "#d6405f", "#8a7a2f", "#27a3b8", "#7d8590")
DASHES = ("-", "--", ":", "-.")  # the next one is taken when all colours are used
INK, LINES = "#57606b", "#d9dee4"
FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial"
STYLE: dict[Any, Any] = {
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "text.parse_math": False},
    **{"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": LINES},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": LINES, "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"ytick.minor.size": 0, "xtick.major.size": 3, "svg.fonttype": "none", "svg.hashsalt": "report"},
}
LEAST_SHARE = 0.05  # least top of an axis of shares, so that shares too small to matter look small
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}%")
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 4.8, 2.7, 0.62, 0.14, 0.46, 0.1  # inches


def colour_of(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def draw(drawing: Drawing, names: Sequence[str], span: tuple[float, float], kind: str) -> bytes:
    """Returns a picture in a file format. kind: "svg" has no title and takes the colours of the page around it, light
    or dark; "png" has title and legend. span: first and last step of the axis, the same for all charts of a page.
    """
    is_file = kind == "png"
    rows = math.ceil(len(names) / 3) if is_file and len(names) > 1 and isinstance(drawing, Chart) else 0
    top, bottom = TOP + 0.3 * is_file, BOTTOM + 0.2 * rows
    height = HEIGHT + 0.3 * is_file + 0.2 * rows
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        right = RIGHT + (0.78 if isinstance(drawing, HeatMap) else 0)
        place = (LEFT / WIDTH, bottom / height, (WIDTH - LEFT - right) / WIDTH, (height - top - bottom) / height)
        axes = figure.add_axes(place)
        if isinstance(drawing, Chart):
            _draw_lines(axes, drawing)
        else:
            _draw_heat_map(figure, axes, drawing, height, top, bottom)
        margin = 0.01 * (span[1] - span[0]) or 0.5
        axes.set_xlim(span[0] - margin, span[1] + margin)
        axes.set_xlabel("optimizer steps", fontsize=8, labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if is_file:
            unit = f" ({drawing.unit})" if drawing.unit else ""
            figure.text(
                LEFT / WIDTH, 1 - 0.12 / height, printable(drawing.title + unit), va="top", fontsize=10, color="black"
            )
        if rows:
            lines = [axes.plot([], [], color=colour_of(i), linestyle=dash_of(i))[0] for i in range(len(names))]
            figure.legend(
                lines,
                list(map(printable, names)),
                loc="lower center",
                ncols=3,
                frameon=False,
                fontsize=8,
                borderaxespad=0.2,
            )
        picture = io.BytesIO()
        with matplotlib.rc_context({"savefig.transparent": not is_file}):
            figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue() if is_file else _in_colours_of_the_page(picture.getvalue())


def dash_of(i: int) -> str:
    return DASHES[i // len(COLOURS) % len(DASHES)]


def _in_colours_of_the_page(svg: bytes) -> bytes:
    text = svg.decode().replace("'DejaVu Sans'", FONTS)
    text = text.replace(INK, "var(--ink)").replace(LINES, "var(--lines)")
    rules = f":root{{--ink:{INK};--lines:{LINES}}}"
    rules += "@media(prefers-color-scheme:dark){:root{--ink:#9aa4af;--lines:#30363d}}"
    return text.replace('<style type="text/css">', f'<style type="text/css">{rules}', 1).encode()


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for i, series in chart.series.items():
        line: dict[str, Any] = {"color": colour_of(i), "linestyle": dash_of(i)}
        points: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(series.step) == 1 or not chart.dense else {}
        if chart.smooth and smoothing_width(len(series.step)) > 1:
            axes.plot(*thin(series), linewidth=0.7, alpha=0.4, **line)
            axes.plot(*smooth(series), linewidth=1.7, zorder=3, **line)  # above the thin lines of all
        else:
            axes.plot(*thin(series), linewidth=1.5, **line, **points)
    for i, scores in chart.scores.items():
        for score in scores:
            assert score.step is not None
            error = 0.0 if math.isnan(score.stderr) else 1.96 * score.stderr
            axes.errorbar(score.step, score.acc, error, fmt="D", markersize=4.5, capsize=2.5, color=colour_of(i))
    if chart.key == "mmlu":
        axes.axhline(CHANCE, color=INK, linestyle="--", linewidth=0.8)
    values = np.concatenate([series.value for series in chart.series.values()] or [np.array([])])
    if is_log(values) and not chart.from_zero:
        axes.set_yscale("log")
        _tick_logarithm(axes)
    else:
        is_count = chart.key == "skipped"
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND, integer=is_count))
        if chart.from_zero:
            axes.set_ylim(0, max(axes.get_ylim()[1], LEAST_SHARE if chart.percent else 0) or 1)
    axes.yaxis.set_major_formatter(PERCENT if chart.percent else PLAIN)
    if chart.key == "tokens-per-s":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _tick_logarithm(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_heat_map(figure: Figure, axes: Axes, drawing: HeatMap, height: float, top: float, bottom: float) -> None:
    chosen = np.unique(np.linspace(0, len(drawing.layers.step) - 1, COLUMNS).astype(int))
    step, error = drawing.layers.step[chosen], drawing.layers.error[:, chosen]
    low, high = drawing.scale
    middles = (step[1:] + step[:-1]) / 2
    first, last = (middles[0], middles[-1]) if middles.size else (step[0] - 0.5, step[0] + 0.5)
    edges = np.array([2 * step[0] - first, *middles, 2 * step[-1] - last])
    layers = np.arange(len(error) + 1) - 0.5
    norm = LogNorm(low, high) if low > 0 else Normalize(low, high or 1.0)
    shown = axes.pcolormesh(edges, layers, np.maximum(error, low), norm=norm, cmap="viridis", rasterized=True)
    axes.grid(False)
    axes.set_ylabel("layer", fontsize=8, labelpad=2)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    marked = [layer for layer in drawing.marked if 0 <= layer < len(error)]
    axes.plot(
        *([1.02] * len(marked), marked), "<", color=INK, ms=3.5, transform=axes.get_yaxis_transform(), clip_on=False
    )
    place = ((WIDTH - 0.72) / WIDTH, bottom / height, 0.1 / WIDTH, (height - top - bottom) / height)
    bar = figure.colorbar(shown, cax=figure.add_axes(place))
    bar.outline.set_visible(False)  # type: ignore[operator]
    if low > 0:
        _tick_logarithm(bar.ax)
    bar.ax.yaxis.set_major_formatter(PLAIN)
