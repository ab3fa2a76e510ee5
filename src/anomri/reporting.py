"""``report.html``: pictures a person looks at first, numbers after, in one file that needs no network."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomri.files import write_text
from anomri.metrics import Figure
from anomri.spec import AnomriError

MAX_PICTURES = 60
"""A page stays small enough to open; the other pictures lie in ``previews``."""


@dataclass(frozen=True)
class Table:
    """A titled table; columns whose every value reads as a number are set right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def numeric(self) -> set[int]:
        """Numbers of the columns that hold numbers only."""
        return {k for k in range(len(self.columns)) if self.rows and all(_is_number(row[k]) for row in self.rows)}


@dataclass(frozen=True)
class Picture:
    """A PNG (base64) with a title, a caption, the names of the columns it shows side by side, and its width."""

    title: str
    png: str
    caption: str = ""
    columns: Sequence[str] = ()
    width: int = 960


@dataclass(frozen=True)
class Page:
    """What a report shows, from the top down."""

    title: str
    lead: str = ""
    note: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Picture] = ()
    footer: str = ""


def report(folder: str | Path, note: str = "") -> Path:
    """Write ``report.html`` from the files that `detect_cohort` or `evaluate` left in ``folder``; returns its path.

    A folder that holds both gets the page of the later one. Raises `AnomriError` if it holds neither.
    """
    folder = Path(folder)
    pages = {folder / "metrics.json": evaluation_report, folder / "cases.tsv": detection_report}
    present = [path for path in pages if path.is_file()]
    if not present:
        raise AnomriError(f"{folder}: holds neither cases.tsv nor metrics.json; there is nothing to report.")
    return pages[max(present, key=lambda path: path.stat().st_mtime_ns)](folder, note)


def detection_report(folder: Path, note: str = "") -> Path:
    """Write the report of a detection run."""
    return write_page(folder / "report.html", _detection_page(folder, note))


def evaluation_report(folder: Path, note: str = "") -> Path:
    """Write the report of an evaluation."""
    return write_page(folder / "report.html", _evaluation_page(folder, note))


def write_page(path: Path, page: Page) -> Path:
    """Write a page as self-contained HTML; everything that comes from files is escaped."""
    from jinja2 import Environment, PackageLoader  # slow to import

    environment = Environment(loader=PackageLoader("anomri"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template("report.html.j2").render(page=page, version=version("anomri")))
    return path


def previews(folder: Path, names: Sequence[str], captions: Mapping[str, str]) -> list[Picture]:
    """The pictures that lie in ``previews`` of the cases ``names``, at most `MAX_PICTURES`."""
    from anomri.pictures import COLUMNS

    pictures: list[Picture] = []
    for name in names:
        path = folder / "previews" / f"{name}.png"
        if path.is_file() and len(pictures) < MAX_PICTURES:
            content = path.read_bytes()
            # Width and height stand in the first chunk of a PNG; the panels are square.
            width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
            png = base64.b64encode(content).decode()
            pictures.append(Picture(name, png, captions.get(name, ""), COLUMNS[: width // height], width))
    return pictures


def curves_plot(curves: Mapping[str, Sequence[Sequence[float]]], thresholds: Mapping[str, float | None]) -> Picture:
    """Precision against recall, and Dice against threshold, of one or more evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        if not points:
            continue
        threshold, recall, precision, dice = zip(*points, strict=True)
        (line,) = left.plot(recall, precision, label=name)
        right.plot(threshold, dice, label=name, color=line.get_color())
        chosen = thresholds.get(name)
        if chosen is not None:
            right.axvline(chosen, color=line.get_color(), linestyle=":", label=f"{name}: label-free threshold")
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="threshold (anomaly score)", ylabel="Dice", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150)
    return Picture("Precision and recall; Dice and threshold", base64.b64encode(target.getvalue()).decode())


def read_tsv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of a table; nothing if there is no such file."""
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file, delimiter="\t")
    return columns, rows


def _detection_page(folder: Path, note: str) -> Page:
    columns, rows = read_tsv(folder / "cases.tsv")
    run: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    place = {name: k for k, name in enumerate(columns)}
    done = [row for row in rows if row[place["status"]] == "done"]
    done.sort(key=lambda row: -float(row[place["lesion_volume_mm3"]]))
    captions = {
        row[0]: f"{row[place['lesions']]} found, {float(row[place['lesion_volume_mm3']]) / 1000:.1f} ml" for row in done
    }
    thresholds = run["thresholds"]
    rate = f"{thresholds['chosen']:.1%} of healthy held-out voxels score above it" if thresholds else "none"
    return Page(
        title="Anomalies found",
        lead=f"{len(done)} of {len(rows)} scans, method {run['method']}, threshold: {rate}.",
        note=note,
        pictures=previews(folder, [row[0] for row in done], captions),
        tables=[Table("Scans", columns, rows), Table("Lesions", *read_tsv(folder / "lesions.tsv"))],
        footer=run["citation"],
    )


def _evaluation_page(folder: Path, note: str) -> Page:
    facts: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    columns, rows = read_tsv(folder / "patients.tsv")
    place = {name: k for k, name in enumerate(columns)}
    captions = {row[0]: f"AUPRC {row[place['average_precision']] or 'undefined, no lesion'}" for row in rows}
    _, curve = read_tsv(folder / "curve.tsv")
    points = [[float(value) for value in row] for row in curve]
    figures = [(f.name, f"{f.value:.3f}", f.interval) for f in (Figure(**fields) for fields in facts["figures"])]
    failed = [("failed", f"{name}: {error}") for name, error in facts["failed"].items()]
    return Page(
        title="Maps against labels",
        lead=f"{facts['protocol']['scored']}; cases: {facts['protocol']['cases']}.",
        note=note,
        pictures=previews(folder, [row[0] for row in rows], captions),
        tables=[
            Table("Result", ("figure", "value", "95 % interval"), figures),
            Table("Patients", columns, rows),
            Table("Protocol", ("what", "how"), [*facts["protocol"].items(), *failed]),
        ],
        plots=[curves_plot({"pooled": points}, {"pooled": facts["threshold"]})],
    )


def _is_number(value: object) -> bool:
    try:
        float(str(value) or "0")
    except ValueError:
        return False
    return True
