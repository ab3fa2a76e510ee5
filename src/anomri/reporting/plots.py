"""Plots of a report as SVG that takes the page's colours: curves, values by patient, a histogram of
scores."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Drawn in place of the page's ink, which is dark or light as the reader likes it."""
COLOURS = ("#d1603d", "#3f7fbf", "#4f9d69", "#9467bd", "#b8912e")
DECADES = 5


@dataclass(frozen=True)
class Plot:
    """An SVG with a title and what it shows in words."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Histogram:
    """Outlines of a histogram for a picture of 100 x 40: scan and healthy scans, and where the
    threshold stands."""

    scan: str
    healthy: str
    threshold: float | None
    top: float


def curves_plot(
    curves: Mapping[str, Sequence[Sequence[float]]], thresholds: Mapping[str, float | None]
) -> Plot:
    """Precision against recall, and Dice against threshold, of one or more evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        if not points:
            continue
        threshold, recall, precision, dice = zip(*points, strict=True)
        left.plot(recall, precision, label=name, color=colour)
        right.plot(threshold, dice, label=name, color=colour)
        chosen = thresholds.get(name)
        if chosen is not None:
            right.axvline(chosen, color=colour, linestyle=":", label=f"{name}: threshold in use")
    left.set(
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title="Precision and recall",
    )
    right.set(
        xlabel="threshold (anomaly score)",
        ylabel="Dice",
        ylim=(0, 1.02),
        title="Dice and threshold",
    )
    for axes in (left, right):
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(fontsize="small", frameon=False)
    return Plot("Curves", _svg(figure, "curves"), "All voxels of all patients pooled.")


def patients_plot(values: Mapping[str, Sequence[float]]) -> Plot:
    """Every scan's value of one or more figures from 0 to 1 as points, over boxes of their
    quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.7 + 0.62 * len(values)), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for place, ((_, ofone), colour) in enumerate(
        zip(values.items(), _colours(len(values)), strict=True)
    ):
        known = np.asarray([value for value in ofone if np.isfinite(value)])
        if not known.size:
            continue
        line: dict[str, Any] = {"color": INK, "alpha": 0.55, "linewidth": 1}
        axes.boxplot(
            known, positions=[-place], orientation="horizontal", widths=0.5, showfliers=False,
            boxprops=line, whiskerprops=line, capprops=line, medianprops={"color": INK, "linewidth": 2},
        )  # fmt: skip
        axes.plot(
            known,
            -place + rng.uniform(-0.15, 0.15, known.size),
            "o",
            color=colour,
            alpha=0.7,
            markersize=5,
        )
    axes.set(
        xlim=(-0.02, 1.02),
        yticks=[-place for place in range(len(values))],
        yticklabels=list(values),
    )
    axes.set(ylim=(0.6 - len(values), 0.6))
    axes.grid(axis="x", alpha=0.25)
    return Plot(
        "By patient", _svg(figure, "patients"), "A point is a scan; box: quartiles and median."
    )


def histogram(
    scan: Sequence[int], healthy: Sequence[int], tops: tuple[float, float], threshold: float | None
) -> Histogram:
    """Outlines of two histograms with bins of equal width from 0 to their ``tops``, as densities on
    a log scale."""
    top = max(*tops, threshold or 0, 1e-6)
    densities = [
        np.asarray(c) / max(sum(c), 1) * len(c) / max(t, 1e-6)
        for c, t in zip((scan, healthy), tops, strict=True)
    ]
    highest = max((float(d.max()) for d in densities if d.size), default=1.0) or 1.0
    outlines = [_outline(d / highest, 100 * t / top) for d, t in zip(densities, tops, strict=True)]
    return Histogram(
        outlines[0],
        outlines[1],
        None if threshold is None else round(100 * threshold / top, 2),
        top,
    )


def _outline(share: np.ndarray[Any, Any], width: float) -> str:
    # Heights from 0 to 40: five decades below the highest bin.
    if not share.size:
        return ""
    with np.errstate(divide="ignore"):
        heights = 40 * np.clip(1 + np.log10(share) / DECADES, 0, 1)
    edges = np.linspace(0, width, len(share) + 1)
    steps = [
        f"V{40 - height:.1f}H{edge:.2f}" for height, edge in zip(heights, edges[1:], strict=True)
    ]
    return "M0 40" + "".join(steps) + "V40"


def _colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an ``<svg>`` element with text as text; names in it are escaped by
    matplotlib."""
    import matplotlib

    for axes in figure.axes:
        axes.tick_params(colors=INK, labelcolor=INK)
        axes.patch.set_visible(False)
        for item in (axes.title, axes.xaxis.label, axes.yaxis.label, *_legend_texts(axes)):
            item.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
    target = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    ):
        figure.savefig(
            target, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = target.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _legend_texts(axes: Any) -> list[Any]:
    legend = axes.get_legend()
    return list(legend.get_texts()) if legend else []
