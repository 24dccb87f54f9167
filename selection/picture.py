"""The picture choice.svg of a choice: what each head of the teacher does for the probes, and what a hybrid costs and
has by how many layers it keeps.
"""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from report_page.charts import PERCENT, PLAIN, STYLE, colour_of, dash_of

WIDTH, HEIGHT = 4.6, 2.8  # inches, of a panel
MB = 1e6
WAYS = {"keep": "from all recurrent", "recur": "from none recurrent"}


def picture(choice: dict[str, Any]) -> bytes:
    """Returns the picture as SVG."""
    probes = list(choice["teacher"]["probes"])
    n_curves = 2 + len(probes)
    has_heads = choice["ablation"] is not None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * (n_curves + has_heads), HEIGHT), layout="constrained")
        panels = list(figure.subplots(1, n_curves + has_heads, squeeze=False)[0])
        if has_heads:
            _draw_heads(figure, panels.pop(0), choice)
        _draw_curve(panels[0], choice, "KL to the teacher", lambda row: row["kl"])
        for axes, name in zip(panels[1:-1], probes, strict=True):
            _draw_curve(axes, choice, f"{name}: right answers", lambda row, name=name: row["probes"][name]["acc"])
            axes.axhline(choice["teacher"]["probes"][name]["acc"]["mean"], linestyle=":", linewidth=0.9)
            axes.yaxis.set_major_formatter(PERCENT)
        _draw_caches(panels[-1], choice)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _draw_heads(figure: Figure, axes: Axes, choice: dict[str, Any]) -> None:
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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    bar: Any = figure.colorbar(shown, ax=axes)
    bar.outline.set_visible(False)


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
