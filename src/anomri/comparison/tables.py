"""The tables of a comparison: results in the paper's shape, all values, and costs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anomri.comparison.jobs import Job, read_result

Done = list[tuple[Job, dict[str, Any]]]
"""Jobs that are done, with what `jobs.evaluate_job` wrote."""
TITLES = {
    "thresholding": "Thresholding",
    "fanogan": "f-AnoGAN",
    "ae": "AE",
    "vae": "VAE reconstruction",
    "vae-restoration": "VAE restoration",
    "diffusion": "Diffusion",
    "dae": "DAE",
}
"""The paper's names of the methods, in its order; others follow under their own names."""
COLUMNS = (
    "method",
    "seeds",
    "AUPRC",
    "95 % interval",
    "ceil-Dice",
    "95 % interval ",
    "+ components",
)
COST_COLUMNS = (
    "method",
    "training, minutes",
    "training steps",
    "ms a step",
    "seconds a scan",
    "peak memory training, MB",
    "peak memory detection, MB",
    "threads",
    "device",
)
LONG_COLUMNS = ("variant", "median", "figure", "seeds", "mean", "sd", "low", "high", "values")


@dataclass(frozen=True)
class Row:
    """A method or setting, with (``median``) or without median filter: each figure for each seed.

    Figures are ``auprc``, ``ceil_dice`` and ``ceil_dice_components``, each (value, low, high).
    """

    variant: str
    median: bool
    figures: Mapping[str, Sequence[tuple[float, float | None, float | None]]]

    @property
    def title(self) -> str:
        """The row's name in the table."""
        method, _, setting = self.variant.partition("-noise_")
        title = TITLES.get(method, method)
        if setting:
            title += f", noise {setting.replace('-', ' ')}"
        return title + " + median" if self.median else title

    def values(self, figure: str) -> list[float]:
        """The figure of every seed."""
        return [value for value, _, _ in self.figures[figure]]

    def words(self, figure: str) -> str:
        """Mean and, with several seeds, sample standard deviation."""
        values = self.values(figure)
        deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{deviation}"

    def interval(self, figure: str) -> str:
        """The bounds of the intervals over patients, averaged over seeds."""
        bounds = [
            (low, high)
            for _, low, high in self.figures[figure]
            if low is not None and high is not None
        ]
        return "{:.3f} - {:.3f}".format(*np.mean(bounds, axis=0)) if bounds else ""

    def cells(self) -> tuple[str, ...]:
        """The row of the table, by `COLUMNS`."""
        return (
            self.title,
            str(len(self.figures["auprc"])),
            self.words("auprc"),
            self.interval("auprc"),
            self.words("ceil_dice"),
            self.interval("ceil_dice"),
            self.words("ceil_dice_components"),
        )


def read_done(jobs: Sequence[Job]) -> Done:
    """The jobs that are done, with their results, in the paper's order of methods."""
    done = [(job, result) for job in jobs if (result := read_result(job))]
    order = {method: place for place, method in enumerate(TITLES)}
    return sorted(done, key=lambda pair: order.get(pair[0].method, len(order)))


def result_rows(done: Done) -> list[Row]:
    """Two rows for each method or setting: without and with median filter."""
    rows = []
    for pairs in _by_variant(done).values():
        results = [result for _, result in pairs]
        for name in ("plain", "median"):
            figures = {
                key: [tuple(result["figures"][name][key]) for result in results]
                for key in results[0]["figures"][name]
            }
            rows.append(Row(pairs[0][0].variant, name == "median", figures))
    return rows


def cost_rows(done: Done) -> list[tuple[str, ...]]:
    """A row for each method or setting, by `COST_COLUMNS`."""
    return [_cost_row(variant, pairs) for variant, pairs in _by_variant(done).items()]


def _by_variant(done: Done) -> dict[str, Done]:
    grouped: dict[str, Done] = {}
    for job, result in done:
        grouped.setdefault(job.variant, []).append((job, result))
    return grouped


def _cost_row(variant: str, pairs: Done) -> tuple[str, ...]:
    results = [result for _, result in pairs]
    minutes, steps, pace = "", "", ""
    logs = [log for log in (_read_log(job.model) for job, _ in pairs) if log is not None]
    if logs:
        mean_steps, mean_seconds = np.mean(logs, axis=0)
        minutes, steps = f"{mean_seconds / 60:.1f}", f"{mean_steps:.0f}"
        pace = f"{1000 * mean_seconds / mean_steps:.0f}"
    costs = [job.model / "cost.json" for job, _ in pairs]
    training_mb = [
        json.loads(path.read_text())["peak_memory_mb"] for path in costs if path.is_file()
    ]
    return (
        Row(variant, False, {}).title,
        minutes,
        steps,
        pace,
        f"{np.mean([result['seconds_per_scan'] for result in results]):.2f}",
        f"{max(training_mb):.0f}" if training_mb else "",
        f"{max(result['peak_memory_mb'] for result in results):.0f}",
        str(results[0]["threads"]),
        results[0]["device"],
    )


def _read_log(model: Path) -> tuple[int, float] | None:
    """Steps and seconds of a training, from its log; ``None`` where nothing was trained."""
    if not (model / "log.csv").is_file():
        return None
    with (model / "log.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    return int(last["step"]), float(last["seconds"])


def long_rows(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    """A line for each figure of each row, by `LONG_COLUMNS`."""
    return [_long_row(row, figure) for row in rows for figure in row.figures]


def _long_row(row: Row, figure: str) -> tuple[object, ...]:
    values = row.values(figure)
    low, _, high = row.interval(figure).partition(" - ")
    return (
        row.variant,
        int(row.median),
        figure,
        len(values),
        f"{np.mean(values):.6f}",
        f"{np.std(values, ddof=1):.6f}" if len(values) > 1 else "",
        low,
        high,
        " ".join(f"{value:.6f}" for value in values),
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(("method", "AUPRC"), [("dae", "0.9")]), end="")
    | method | AUPRC |
    | --- | --- |
    | dae | 0.9 |
    """
    lines = [[name.strip() for name in columns], ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
