"""Chooses the charts of some runs and what each shows, and shortens long series for drawing: to their extremes, and to
a running median. A chart that would show nothing is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from report_page.layer_errors import MAPS, LayerErrors
from report_page.run_data import Run, Score, Series

BUCKETS = 400  # stretches of a thinned series; a chart is about as many pixels wide
PLACES = 300  # points of a smoothed curve
FEWEST_TO_SMOOTH = 30  # rows
TRIANGLES = "Triangles: layers taken over from the teacher."
LOG_FROM = 30  # an axis is logarithmic if its largest value is so many times its smallest


@dataclass
class Chart:
    """Shows lines over optimizer steps, one per run."""

    section: str
    key: str  # names its file
    title: str
    unit: str
    series: dict[int, Series]  # by the run's index
    dense: bool = False  # one value per step, so that long runs are thinned
    smooth: bool = False
    percent: bool = False
    from_zero: bool = False
    scores: dict[int, list[Score]] = field(default_factory=dict)  # points with error bars
    note: str = ""


@dataclass
class HeatMap:
    """Shows the errors of one run's layers over optimizer steps. All heat maps of a section share their scale."""

    section: str
    key: str
    title: str
    unit: str
    layers: LayerErrors
    marked: list[int]
    scale: tuple[float, float]
    note: str = ""


Drawing = Chart | HeatMap
ALIGNMENT = "Alignment"  # a section
RELATIVE = "relative to the attention's output"


def charts_of(runs: Sequence[Run]) -> list[Drawing]:
    """Returns the charts that show anything: of the alignment, the line charts of every stage, then the layer maps."""
    charts = [*_alignment_charts(runs), *_line_charts(runs)]
    lines = [chart for chart in charts if chart.scores or any(map(_shows, chart.series.values()))]
    return [*lines, *_alignment_maps(runs), *_heat_maps(runs)]


def _shows(series: Series) -> bool:
    """Says whether there is anything but zeros."""
    return bool(np.any(np.isfinite(series.value) & (series.value != 0)))


def _alignment_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yields the charts that runs of the stage `align` have alone: of these, the loss has another meaning."""
    found = {i: run.alignment for i, run in enumerate(runs) if run.alignment is not None}

    def chart(key: str, title: str, unit: str, values: dict[int, NDArray]) -> Chart:
        series = {i: Series(runs[i].step, value) for i, value in values.items()}
        return Chart(ALIGNMENT, key, title, unit, series, dense=True, smooth=True)

    yield chart("align-mean", "Error, mean of the layers", RELATIVE, {i: of.mean for i, of in found.items()})
    yield chart("align-worst", "Error, worst layer", RELATIVE, {i: of.worst for i, of in found.items()})
    squared = "squared errors, mean of the layers"
    yield chart("align-loss", "Loss", squared, {i: runs[i].columns["loss"] for i in found})


def _line_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    def every(section: str, key: str, title: str, unit: str, of: Callable[[Run], Series], **more: Any) -> Chart:
        return Chart(section, key, title, unit, {i: of(run) for i, run in enumerate(runs)}, dense=True, **more)

    def column(name: str) -> Callable[[Run], Series]:
        return lambda run: run.series(name)

    def share(name: str) -> Callable[[Run], Series]:
        return lambda run: Series(run.step, share_of_time(run, name))

    def some(section: str, key: str, title: str, unit: str, kind: str, name: str, percent: bool = False) -> Chart:
        series = {i: run.sometimes[kind][name] for i, run in enumerate(runs) if name in run.sometimes[kind]}
        return Chart(section, key, title, unit, series, percent=percent)

    nats = "nats per token"
    distilled = {i: run.series("loss") for i, run in enumerate(runs) if run.alignment is None}
    yield Chart("Training", "loss", "Loss", nats, distilled, dense=True, smooth=True)
    yield every("Training", "ce", "Cross entropy", nats, column("ce"), smooth=True)
    yield every("Training", "kl", "KL to the teacher", nats, column("kl"), smooth=True)
    yield every("Training", "grad-norm", "Gradient norm", "before clipping", column("grad_norm"), smooth=True)
    yield every("Training", "lr", "Learning rate", "", column("lr"), from_zero=True)
    yield every("Training", "skipped", "Skipped updates", "so far", column("skipped_updates"))
    held_out = "Evaluation"
    yield some(held_out, "eval-ce", "Held-out cross entropy", nats, "eval", "ce")
    yield some(held_out, "eval-kl", "Held-out KL to the teacher", nats, "eval", "kl")
    yield some(held_out, "eval-perplexity", "Held-out perplexity", "", "eval", "perplexity")
    yield some(held_out, "eval-agreement", "Agreement with the teacher", "share of tokens", "eval", "agreement", True)
    mmlu = some(held_out, "mmlu", "MMLU accuracy", "", "eval", "mmlu", True)
    mmlu.scores = {i: scores for i, run in enumerate(runs) if (scores := [s for s in run.scores if s.step is not None])}
    mmlu.note = "Dashed: chance."
    mmlu.note += " Diamonds: scored checkpoints, see Scores; bars are 95% intervals." if mmlu.scores else ""
    yield mmlu
    time, speed = "share of step time", "Speed and memory"
    yield every(
        speed, "tokens-per-s", "Throughput", "tokens per second", column("tokens_per_s"), smooth=True, from_zero=True
    )
    for key, title, name in (
        ("teacher-wait", "Waiting for the teacher", "teacher_wait_s"),
        ("data-wait", "Waiting for data", "data_wait_s"),
    ):
        yield every(speed, key, title, time, share(name), smooth=True, percent=True, from_zero=True)
    yield every(speed, "mfu", "MFU", "share of peak", column("mfu"), smooth=True, percent=True, from_zero=True)
    yield every(speed, "memory", "Peak memory", "GB, rank 0", column("memory_gb"), from_zero=True)
    for i, part in enumerate(dict.fromkeys(part for run in runs for part in run.sometimes["update_health"])):
        moved = some("Weights that moved", f"moved-{i}", part, "share of weights", "update_health", part, True)
        moved.from_zero = True
        yield moved


def share_of_time(run: Run, name: str) -> NDArray:
    """Returns a column in seconds as a share of each step's time: (n,), NaN where the time is not known."""
    time = run.columns["step_time_s"]
    with np.errstate(over="ignore"):
        return np.divide(run.columns[name], time, out=np.full_like(time, np.nan), where=time > 0)


def _heat_maps(runs: Sequence[Run]) -> Iterator[HeatMap]:
    scale = _scale_of([found for run in runs for found in run.layer_maps.values()])
    if scale is None:
        return
    titles = {"own": "Each layer alone", "stream": "All layers up to this one"}
    units = {
        "own": "error relative to what the teacher's layer adds",
        "stream": "distance relative to the teacher's norm",
    }
    for i, run in enumerate(runs):
        marked = _replaced_layers(run)
        for kind in MAPS:
            if kind in run.layer_maps:
                key, title = f"layers-{kind}", titles[kind]
                if len(runs) > 1:
                    key, title = f"{key}-{i}", f"{title}: {run.name}"
                note = TRIANGLES if marked else ""
                found = run.layer_maps[kind]
                yield HeatMap("Layers against the teacher", key, title, units[kind], found, marked, scale, note)


def _alignment_maps(runs: Sequence[Run]) -> Iterator[HeatMap]:
    found = {i: run.alignment.errors for i, run in enumerate(runs) if run.alignment is not None}
    scale = _scale_of(list(found.values()))
    if scale is None:
        return
    for i, errors in found.items():
        key, title, marked = "align-layers", "Error of each layer", _replaced_layers(runs[i])
        if len(runs) > 1:
            key, title = f"{key}-{i}", f"{title}: {runs[i].name}"
        note = TRIANGLES if marked else ""
        yield HeatMap(ALIGNMENT, key, title, RELATIVE, errors, marked, scale, note)


def _scale_of(maps: Sequence[LayerErrors]) -> tuple[float, float] | None:
    """Returns the lowest and highest error that have a colour; None if there is none."""
    errors = np.concatenate([found.error.ravel() for found in maps]) if maps else np.array([])
    errors = errors[np.isfinite(errors)]
    if not errors.size:
        return None
    # A layer taken over from the teacher has an error of 0, which a logarithmic scale cannot show: it gets the lowest
    # colour.
    high, positive = errors.max(), errors[errors > 0]
    return (max(positive.min(), high / 1000), high) if is_log(positive) else (0.0, high)


def _replaced_layers(run: Run) -> list[int]:
    layers = run.options.get("layers")
    return [layer for layer in layers if isinstance(layer, int)] if isinstance(layers, list) else []


# Long series


def thin(series: Series, buckets: int = BUCKETS) -> Series:
    """Splits a long series into `buckets` stretches and keeps the lowest and the highest point of each. A stretch
    without values keeps one point, which leaves a gap in the line.
    """
    if len(series.step) <= 2 * buckets:
        return series
    edges = np.linspace(0, len(series.step), buckets + 1).astype(int)
    kept: set[int] = set()
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        values = series.value[start:stop]
        if np.isfinite(values).any():
            kept |= {start + int(np.nanargmin(values)), start + int(np.nanargmax(values))}
        else:
            kept.add(int(start))
    places = sorted(kept)
    return Series(series.step[places], series.value[places])


def smoothing_width(n: int) -> int:
    """Returns the window of the running median for `n` rows, in steps; 1 for too few rows to smooth."""
    return 1 if n < FEWEST_TO_SMOOTH else max(9, n // 100 * 2 + 1)


def smooth(series: Series, places: int = PLACES) -> Series:
    """Returns the running median at up to `places` steps, the last one included. Unlike a running mean, a median does
    not widen a spike into a plateau.
    """
    n = len(series.step)
    half = smoothing_width(n) // 2
    if half == 0:
        return series
    chosen = np.unique(np.linspace(0, n - 1, min(n, places)).astype(int))
    windows = [series.value[max(0, i - half) : i + half + 1] for i in chosen]
    medians = [np.median(values) if (values := w[np.isfinite(w)]).size else math.nan for w in windows]
    return Series(series.step[chosen], np.array(medians))


def is_log(values: NDArray) -> bool:
    """Says whether to draw values on a logarithmic axis: they are all positive and far apart."""
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() >= LOG_FROM * values.min())


def span_of(runs: Sequence[Run]) -> tuple[float, float]:
    """Returns the first and the last step of all charts. The first is 0 unless more than 5% of the steps are missing
    before the first row.
    """
    first, last = min(run.step[0] for run in runs), max(run.step[-1] for run in runs)
    has_start = any(score.step == 0 for run in runs for score in run.scores)
    return (0.0 if has_start or first <= 0.05 * last else float(first)), float(last)
