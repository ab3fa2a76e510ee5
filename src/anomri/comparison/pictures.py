"""The pictures of a comparison: curves over the noise, and the maps of all methods side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anomri.comparison.jobs import MEDIAN
from anomri.comparison.tables import TITLES, Done
from anomri.reporting.pictures import TRUTH_COLOUR, grey, heat, outline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"noise_resolution": "noise resolution (pixels)", "noise_std": "noise standard deviation"}
"""What the axes of the curves are called, by setting."""


def noise_curve(setting: str, done: Done) -> Figure | None:
    """AUPRC over one setting of the noise: mean and standard deviation over seeds.

    ``None`` with fewer than two values of the setting.
    """
    from matplotlib.figure import Figure

    points = _points(setting, done)
    if len(points) < 2:
        return None
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    places = sorted(points)
    for name, label in (("plain", "without median"), ("median", f"{MEDIAN} x {MEDIAN} median")):
        seeds = [[figures[name]["auprc"][0] for figures in points[place]] for place in places]
        means = [np.mean(values) for values in seeds]
        spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in seeds]
        axes.errorbar(places, means, spread, marker="o", capsize=3, label=label)
    if setting == "noise_resolution":
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set(xlabel=LABELS[setting], ylabel="AUPRC", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _points(setting: str, done: Done) -> dict[float, list[dict[str, Any]]]:
    """The figures of each seed, by the value of the setting; none if it was not varied."""
    varied = [result for job, result in done if job.variant.startswith(f"dae-{setting}-")]
    if not varied:
        return {}
    points: dict[float, list[dict[str, Any]]] = {}
    for result in [*varied, *(result for job, result in done if job.variant == "dae")]:
        value = result["settings"].get(setting, _default(setting))
        if isinstance(value, int | float):  # a preset of varied noise has a list of them
            points.setdefault(float(value), []).append(result["figures"])
    return points


def _default(setting: str) -> float:
    from anomri.methods.dae import DAE

    return float(getattr(DAE(("flair",), [1, 1]), setting))


def examples(done: Done) -> Figure | None:
    """A row for each test patient: scan, truth, and the map of each method (first seed, median)."""
    from matplotlib.figure import Figure

    shown = [
        (job, result)
        for job, result in done
        if job.seed == 0 and job.variant == job.method and result["examples"]
    ]
    if not shown:
        return None
    names = [
        name
        for name in shown[0][1]["examples"]
        if all(name in result["examples"] for _, result in shown)
    ]
    columns = ["scan", "truth", *(TITLES.get(job.method, job.method) for job, _ in shown)]
    height = max(len(names), 1)
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * height + 0.3), layout="constrained")
    axes = figure.subplots(height, len(columns), squeeze=False)
    for column, (job, result) in enumerate(shown, start=2):
        with np.load(job.result.with_suffix(".npz")) as arrays:
            panels = {kind: arrays[kind] for kind in arrays.files}
        for row, name in enumerate(names):
            k = result["examples"].index(name)
            if column == 2:
                scan = grey(panels["scan"][k])
                axes[row, 0].imshow(_upright(scan))
                axes[row, 1].imshow(_upright(outline(scan, panels["truth"][k], TRUTH_COLOUR)))
            map_ = heat(panels["map"][k], 2 * result["best_threshold"])
            axes[row, column].imshow(_upright(map_))
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, title in zip(axes[0], columns, strict=True):
        panel.set_title(title, fontsize="small")
    return figure


def _upright(picture: NDArray[Any]) -> NDArray[Any]:
    """(columns, rows, colours) as (rows, columns, colours)."""
    return picture.transpose(1, 0, 2)
