"""What a comparison shows: the table in the paper's shape, what each method cost, curves, and maps side by side."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomri.comparison.jobs import MEDIAN, Job, result_of
from anomri.files import whole_file, write_text
from anomri.reporting.pages import Page, Table, write_page
from anomri.reporting.pictures import TRUTH_COLOUR, grey, heat, outline
from anomri.reporting.previews import Picture
from anomri.runs.tables import write_tsv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "thresholding": "Thresholding",
    "fanogan": "f-AnoGAN",
    "ae": "AE",
    "vae": "VAE reconstruction",
    "vae-restoration": "VAE restoration",
    "diffusion": "Diffusion",
    "dae": "DAE",
}
"""In the paper's order; a method that is not here is called by its name and comes after."""
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
CURVES = {"noise_resolution": "noise resolution (pixels)", "noise_std": "noise standard deviation"}
HOW = (
    "Mean ± standard deviation over seeds; 95 % bootstrap intervals over test patients, their bounds averaged over seeds. "
    "ceil-Dice chooses its threshold on the test labels: an upper bound. + components: those of at most 20 voxels, were they "
    "1 mm high, are dropped at that threshold. Training time is the loop's, without packing and interruptions; seconds a scan "
    "are those from slices to the filtered map, mean of the test scans; peak memory is the largest resident size of the "
    "process that trained (since its last start) or evaluated, which did nothing else."
)


@dataclass(frozen=True)
class Row:
    """A method or setting, with (``median``) or without the median filter: values by figure, one a seed.

    Figures are ``auprc``, ``ceil_dice``, ``ceil_dice_components``, each (value, low, high) of a seed.
    """

    variant: str
    median: bool
    figures: Mapping[str, Sequence[tuple[float, float | None, float | None]]]

    @property
    def title(self) -> str:
        """The row's name in the table."""
        method, _, setting = self.variant.partition("-noise_")
        name = TITLES.get(method, method) + (
            f", noise {setting.replace('-', ' ')}" if setting else ""
        )
        return name + (" + median" if self.median else "")

    def values(self, figure: str) -> list[float]:
        """The figure of every seed."""
        return [value for value, _, _ in self.figures[figure]]

    def words(self, figure: str) -> str:
        """Mean and, with several seeds, sample standard deviation."""
        values = self.values(figure)
        return f"{np.mean(values):.3f}" + (
            f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        )

    def interval(self, figure: str) -> str:
        """The bounds of the intervals by patient, averaged over seeds."""
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


def write_comparison(
    folder: Path, jobs: Sequence[Job], protocol: Mapping[str, str], failed: Mapping[str, str]
) -> tuple[Path, list[Row]]:
    """Write all tables and pictures of the jobs that are done; returns the report's path and the table's rows.

    ``table.tsv`` (every value of every seed), ``table.md``, ``cost.tsv``, ``noise_*.png``, ``examples.png``,
    ``report.html``; the pictures where there is something to show.
    """
    done = [(job, result) for job in jobs if (result := result_of(job))]
    order = list(TITLES)
    done.sort(
        key=lambda pair: order.index(pair[0].method) if pair[0].method in order else len(order)
    )
    rows = _rows(done)
    costs = _costs(done)
    write_tsv(folder / "table.tsv", LONG_COLUMNS, _long_table(rows))
    write_text(folder / "table.md", _markdown(COLUMNS, [row.cells() for row in rows]))
    write_tsv(folder / "cost.tsv", COST_COLUMNS, costs)
    pictures = []
    for setting, label in CURVES.items():
        figure = _curve(setting, label, done)
        if figure is not None:
            pictures.append(_saved(figure, folder / f"{setting}.png", f"DAE: AUPRC and {label}"))
    examples = _examples(done)
    if examples is not None:
        title = "Maps side by side; the middle of each method's colours is its ceil-Dice threshold"
        pictures.append(_saved(examples, folder / "examples.png", title))
    facts = {**protocol, "jobs": f"{len(done)} of {len(jobs)} done", "measured": HOW}
    problems = [(f"failed: {name}", error) for name, error in failed.items()]
    for job, result in done:
        problems += [
            (f"failed: {job.name}, {case}", error) for case, error in result["failed"].items()
        ]
    page = Page(
        title="Methods compared",
        lead=f"Preset {protocol['preset']}; test cases: {protocol['cases']}; {len(done)} of {len(jobs)} jobs done.",
        tables=[
            Table("Result", COLUMNS, [row.cells() for row in rows]),
            Table("Cost", COST_COLUMNS, costs),
            Table("Protocol", ("what", "how"), [*facts.items(), *problems]),
        ],
        pictures=pictures,
    )
    return write_page(folder / "report.html", page), rows


Done = list[tuple[Job, dict[str, Any]]]


def _rows(done: Done) -> list[Row]:
    rows = []
    for variant in dict.fromkeys(job.variant for job, _ in done):
        results = [result for job, result in done if job.variant == variant]
        for name in ("plain", "median"):
            figures = {
                key: [tuple(result["figures"][name][key]) for result in results]
                for key in results[0]["figures"][name]
            }
            rows.append(Row(variant, name == "median", figures))
    return rows


def _costs(done: Done) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for variant in dict.fromkeys(job.variant for job, _ in done):
        pairs = [(job, result) for job, result in done if job.variant == variant]
        logs = [log for log in (_log(job.model) for job, _ in pairs) if log is not None]
        training = [
            json.loads(path.read_text())
            for job, _ in pairs
            if (path := job.model / "cost.json").is_file()
        ]
        minutes, steps, pace = "", "", ""
        if logs:
            mean_steps, mean_seconds = np.mean(logs, axis=0)
            minutes, steps = f"{mean_seconds / 60:.1f}", f"{mean_steps:.0f}"
            pace = f"{1000 * mean_seconds / mean_steps:.0f}"
        rows.append(
            (
                Row(variant, False, {}).title,
                minutes,
                steps,
                pace,
                f"{np.mean([result['seconds_per_scan'] for _, result in pairs]):.2f}",
                f"{max(cost['peak_memory_mb'] for cost in training):.0f}" if training else "",
                f"{max(result['peak_memory_mb'] for _, result in pairs):.0f}",
                str(pairs[0][1]["threads"]),
                pairs[0][1]["device"],
            )
        )
    return rows


def _log(model: Path) -> tuple[int, float] | None:
    """Steps and seconds of a training, from its log; ``None`` where nothing was trained."""
    if not (model / "log.csv").is_file():
        return None
    with (model / "log.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    return int(last["step"]), float(last["seconds"])


def _long_table(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    """A line for each figure of each row, by `LONG_COLUMNS`."""
    lines: list[tuple[object, ...]] = []
    for row in rows:
        for figure in row.figures:
            values = row.values(figure)
            low, _, high = row.interval(figure).partition(" - ")
            sd = f"{np.std(values, ddof=1):.6f}" if len(values) > 1 else ""
            each = " ".join(f"{value:.6f}" for value in values)
            cells = (
                int(row.median),
                figure,
                len(values),
                f"{np.mean(values):.6f}",
                sd,
                low,
                high,
                each,
            )
            lines.append((row.variant, *cells))
    return lines


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[name.strip() for name in columns], ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _curve(setting: str, label: str, done: Done) -> Figure | None:
    """AUPRC against one setting of the noise, mean and standard deviation over seeds; nothing below two points."""
    from matplotlib.figure import Figure

    variants = {job.variant for job, _ in done if job.variant.startswith(f"dae-{setting}-")}
    results = [result for job, result in done if job.variant in {*variants, "dae"} and variants]
    points: dict[float, list[dict[str, Any]]] = {}
    for result in results:
        value = result["settings"].get(setting, _default(setting))
        if isinstance(value, int | float):  # a preset of varied noise has a list of them
            points.setdefault(float(value), []).append(result["figures"])
    if len(points) < 2:
        return None
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    places = sorted(points)
    for name, words in (("plain", "without median"), ("median", f"{MEDIAN} x {MEDIAN} median")):
        seeds = [[figures[name]["auprc"][0] for figures in points[place]] for place in places]
        spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in seeds]
        axes.errorbar(
            places,
            [np.mean(values) for values in seeds],
            spread,
            marker="o",
            capsize=3,
            label=words,
        )
    if setting == "noise_resolution":
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set(xlabel=label, ylabel="AUPRC", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _default(setting: str) -> float:
    from anomri.methods.dae import DAE

    return float(getattr(DAE(("flair",), [1, 1]), setting))


def _examples(done: Done) -> Figure | None:
    """One row a test patient: scan, truth, and the map of each method (its first seed, with median)."""
    from matplotlib.figure import Figure

    shown = [(job, result) for job, result in done if job.seed == 0 and job.variant == job.method]
    shown = [pair for pair in shown if pair[1]["examples"]]
    if not shown:
        return None
    names = [
        name
        for name in shown[0][1]["examples"]
        if all(name in result["examples"] for _, result in shown)
    ]
    columns = ["scan", "truth", *(TITLES.get(job.method, job.method) for job, _ in shown)]
    figure = Figure(
        figsize=(1.6 * len(columns), 1.6 * max(len(names), 1) + 0.3), layout="constrained"
    )
    axes = figure.subplots(max(len(names), 1), len(columns), squeeze=False)
    for column, (job, result) in enumerate(shown, start=2):
        with np.load(job.result.with_suffix(".npz")) as arrays:
            panels = {kind: arrays[kind] for kind in arrays.files}
        for row, name in enumerate(names):
            k = result["examples"].index(name)
            scan = grey(panels["scan"][k])
            if column == 2:
                axes[row, 0].imshow(scan.transpose(1, 0, 2))
                axes[row, 1].imshow(
                    outline(scan, panels["truth"][k], TRUTH_COLOUR).transpose(1, 0, 2)
                )
            axes[row, column].imshow(
                heat(panels["map"][k], 2 * result["best_threshold"]).transpose(1, 0, 2)
            )
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, title in zip(axes[0], columns, strict=True):
        panel.set_title(title, fontsize="small")
    return figure


def _saved(figure: Figure, path: Path, title: str) -> Picture:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150)
    with whole_file(path) as partial:
        partial.write_bytes(target.getvalue())
    return Picture(title, base64.b64encode(target.getvalue()).decode(), format="png")
