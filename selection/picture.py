"""The picture choice.svg of a choice: what each head of the teacher does for the probes, what is left of them with few
that see far, and what a hybrid costs and has by how many layers it keeps.
"""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inputs.teacher_parts import parse_heads
from report_page.charts import PERCENT, PLAIN, STYLE, colour_of, dash_of

WIDTH, HEIGHT = 4.6, 2.8  # inches, of a panel
MB = 1e6
WAYS = {"keep": "from all recurrent", "recur": "from none recurrent"}


def picture(choice: dict[str, Any]) -> bytes:
    """Returns the picture as SVG."""
    panels = list(_panels(choice))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, choice)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _panels(choice: dict[str, Any]) -> Iterator[Callable[[Axes, dict[str, Any]], None]]:
    """Yields what draws each panel."""
    if choice["ablation"] is not None:
        yield _draw_ablation
    if choice["heads"] is not None and choice["heads"]["sets"]:
        yield _draw_far_heads
    if choice["n_kept"]:
        yield functools.partial(_draw_curve, title="KL to the teacher", figure_of=lambda row: row["kl"])
        for name in choice["teacher"]["probes"]:
            yield functools.partial(_draw_probe, name=name)
    yield _draw_caches


def _draw_ablation(axes: Axes, choice: dict[str, Any]) -> None:
    heads = choice["ablation"]["heads"]
    scores = np.zeros((choice["n_layers"], 1 + max(row["place"][1] for row in heads)))
    for row in heads:
        scores[tuple(row["place"])] = row["score"]
    shown = axes.imshow(scores, aspect="auto", cmap="viridis", origin="lower", interpolation="nearest")
    axes.grid(False)
    axes.set_title("probes' loss without a head, nats more", fontsize=9)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    for layer in choice["layers"]:
        axes.plot(1.02, layer, "<", ms=3.5, color=colour_of(0), transform=axes.get_yaxis_transform(), clip_on=False)
    for layer, kept in parse_heads(choice["heads"]["names"] if choice["heads"] else []).items():
        axes.plot(kept, [layer] * len(kept), "s", ms=3.5, mfc="none", color="white")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    figure: Any = axes.get_figure()
    bar = figure.colorbar(shown, ax=axes)
    bar.outline.set_visible(False)


def _draw_far_heads(axes: Axes, choice: dict[str, Any]) -> None:
    sets = choice["heads"]["sets"]
    for i, name in enumerate(sets[0]["probes"]):
        found = [one["probes"][name]["acc"] for one in sets]
        axes.errorbar(
            [one["n_groups"] for one in sets], [acc["mean"] for acc in found], [acc["half"] or 0.0 for acc in found],
            color=colour_of(i), linestyle=dash_of(i), marker="o", ms=3, capsize=2, label=name,
        )  # fmt: skip
    axes.set_title("right answers, others short-sighted", fontsize=9)
    axes.set_xlabel("key/value heads that see all tokens", fontsize=8)
    axes.axvline(sets[-2]["n_groups"], linewidth=0.8, linestyle=":")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(frameon=False, fontsize=7)


def _draw_probe(axes: Axes, choice: dict[str, Any], name: str) -> None:
    _draw_curve(axes, choice, f"{name}: right answers", lambda row: row["probes"][name]["acc"])
    axes.axhline(choice["teacher"]["probes"][name]["acc"]["mean"], linestyle=":", linewidth=0.9)
    axes.yaxis.set_major_formatter(PERCENT)


def _draw_curve(axes: Axes, choice: dict[str, Any], title: str, figure_of: Any) -> None:
    for i, (way, label) in enumerate(WAYS.items()):
        rows = sorted((row for row in choice["sets"] if row["by"] == way), key=lambda row: len(row["kept"]))
        means = [figure_of(row)["mean"] for row in rows]
        halves = [figure_of(row)["half"] or 0.0 for row in rows]
        kept = [len(row["kept"]) for row in rows]
        axes.errorbar(
            kept, means, halves, color=colour_of(i), linestyle=dash_of(i), marker="o", ms=3, capsize=2, label=label
        )
    axes.set_title(title, fontsize=9)
    _mark_budget(axes, choice)
    axes.legend(frameon=False, fontsize=7)


def _draw_caches(axes: Axes, choice: dict[str, Any]) -> None:
    axes.plot([size / MB for size in choice["cache_bytes"]], color=colour_of(2), marker="o", ms=3)
    axes.set_title(f"MB of the cache at {choice['context_length']} tokens", fontsize=9)
    _mark_budget(axes, choice)


def _mark_budget(axes: Axes, choice: dict[str, Any]) -> None:
    axes.axvline(len(choice["layers"]), linewidth=0.8, linestyle=":")
    axes.set_xlabel("layers of the teacher's", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(PLAIN)
