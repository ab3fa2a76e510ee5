"""``report.html``: pictures a person looks at first, numbers after, in one file that needs no network."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import write_text
from anomri.model.sensitivity import describe
from anomri.reporting.plots import Plot, curves_plot, patients_plot
from anomri.reporting.previews import Picture, Preview, read_preview
from anomri.scoring.metrics import Figure
from anomri.spec import Thresholds

MAX_PICTURES = 60
"""Cases with pictures on a page; those of the others lie in ``previews``."""
MAX_PICTURE_BYTES = 12_000_000
"""Of all pictures on a page (base64), so that it stays small enough to open."""
MAX_LESIONS = 1000
"""Rows of the page's table of lesions; the others are in ``lesions.tsv``."""
MAX_LESIONS_BY_PICTURE = 8


@dataclass(frozen=True)
class Table:
    """A titled table; columns whose every value reads as a number are set right-aligned.

    ``links`` leads from values of the first column to places on the page.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def numeric(self) -> set[int]:
        """Numbers of the columns that hold numbers only."""
        return {
            k
            for k in range(len(self.columns))
            if self.rows and all(_is_number(row[k]) for row in self.rows)
        }


@dataclass(frozen=True)
class CaseView:
    """One case on the page: its place there, what is to be said of it, its pictures and its lesions."""

    place: str
    preview: Preview
    caption: str = ""
    lesions: Table | None = None


@dataclass(frozen=True)
class Page:
    """What a report shows, from the top down; ``facts`` are the few values that stand large, with their names."""

    title: str
    lead: str = ""
    note: str = ""
    facts: Sequence[tuple[str, str]] = ()
    summary: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    cases: Sequence[CaseView] = ()
    pictured: str = ""
    tables: Sequence[Table] = ()
    footer: str = ""
    pictures: Sequence[Picture] = ()


def report(folder: str | Path, note: str = "") -> Path:
    """Write ``report.html`` from the files that `detect_cohort` or `evaluate` left in ``folder``; returns its path.

    A folder that holds both gets the page of the later one. Raises `AnomriError` if it holds neither.
    """
    folder = Path(folder)
    pages = {folder / "metrics.json": evaluation_report, folder / "cases.tsv": detection_report}
    present = [path for path in pages if path.is_file()]
    if not present:
        raise AnomriError(
            f"{folder}: holds neither cases.tsv nor metrics.json; there is nothing to report."
        )
    return pages[max(present, key=lambda path: path.stat().st_mtime_ns)](folder, note)


def detection_report(folder: Path, note: str = "") -> Path:
    """Write the report of a detection run."""
    return write_page(folder / "report.html", _detection_page(folder, note))


def evaluation_report(folder: Path, note: str = "") -> Path:
    """Write the report of an evaluation."""
    return write_page(folder / "report.html", _evaluation_page(folder, note))


def write_page(path: Path, page: Page) -> Path:
    """Write a page as self-contained HTML; everything that comes from files is escaped, one script may run."""
    from jinja2 import Environment, PackageLoader  # slow to import
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("anomri"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script, style = (
        (files("anomri") / "templates" / f"report.{kind}").read_text("utf-8")
        for kind in ("js", "css")
    )
    text = environment.get_template("report.html.j2").render(
        page=page,
        version=version("anomri"),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        svg=Markup,
    )
    write_text(path, text)
    return path


def case_views(
    folder: Path,
    names: Sequence[str],
    captions: Mapping[str, str],
    lesions: Mapping[str, Table] | None = None,
) -> list[CaseView]:
    """What is to be shown of the cases ``names``, as far as `MAX_PICTURES` and `MAX_PICTURE_BYTES` allow."""
    views: list[CaseView] = []
    size = 0
    for name in names:
        preview = read_preview(folder, name) if len(views) < MAX_PICTURES else None
        if preview is None:
            continue
        size += sum(len(picture.data) for picture in preview.pictures)
        if size > MAX_PICTURE_BYTES:
            break
        views.append(
            CaseView(
                f"case-{len(views) + 1}", preview, captions.get(name, ""), (lesions or {}).get(name)
            )
        )
    return views


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
    done.sort(key=lambda row: -float(row[place["lesion_volume_mm3"]] or 0))
    captions = {
        row[0]: _found(row[place["lesions"]], row[place["lesion_volume_mm3"]]) for row in done
    }
    lesion_columns, lesions = read_tsv(folder / "lesions.tsv")
    cases = case_views(
        folder, [row[0] for row in done], captions, _lesions_by_case(lesion_columns, lesions)
    )
    volumes = [float(volume) / 1000 for row in done if (volume := row[place["lesion_volume_mm3"]])]
    facts = [("scans", f"{len(done)}" + (f" of {len(rows)}" if len(done) < len(rows) else ""))]
    if volumes:
        facts += [
            ("with a finding", f"{sum(volume > 0 for volume in volumes)}"),
            ("findings", f"{len(lesions)}"),
        ]
        facts += [("median volume", f"{statistics.median(volumes):.1f} ml")]
    fewer = "channels" in place and any(
        row[place["channels"]] != ",".join(run["channels"]) for row in done
    )
    others = (
        " Scans with fewer channels have thresholds of their own, in the table." if fewer else ""
    )
    kept = [k for k in range(len(columns)) if columns[k] != "error" or len(done) < len(rows)]
    shown = [[row[k] for k in kept] for row in rows]
    table = Table(
        "Scans",
        [columns[k] for k in kept],
        shown,
        links={view.preview.name: view.place for view in cases},
    )
    more = (
        f"The first {MAX_LESIONS} of {len(lesions)}; all are in lesions.tsv."
        if len(lesions) > MAX_LESIONS
        else ""
    )
    return Page(
        title="Anomalies found",
        lead=f"Method {run['method']} on {', '.join(run['channels'])}. Threshold: {_threshold(run)}."
        + others,
        note=note,
        facts=facts,
        summary=[table],
        cases=cases,
        pictured=_pictured(len(cases), len(done), "largest volumes first"),
        tables=[Table("Findings", lesion_columns, lesions[:MAX_LESIONS], more)],
        footer=run["citation"],
    )


def _evaluation_page(folder: Path, note: str) -> Page:
    facts: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    columns, rows = read_tsv(folder / "patients.tsv")
    place = {name: k for k, name in enumerate(columns)}
    named = {"AUPRC": "average_precision", "Dice": "dice", "best Dice": "ceil_dice"}
    captions = {
        row[0]: ", ".join(
            f"{name} {float(row[place[key]]):.3f}" for name, key in named.items() if row[place[key]]
        )
        or "no lesion is labelled"
        for row in rows
    }
    _, curve = read_tsv(folder / "curve.tsv")
    points = [[float(value) for value in row] for row in curve]
    figures = [Figure(**fields) for fields in facts["figures"]]
    failed = [("failed", f"{name}: {error}") for name, error in facts["failed"].items()]
    by_patient = {
        name: [float(row[place[key]] or "nan") for row in rows]
        for name, key in {
            "AUPRC": "average_precision",
            "ceil-Dice": "ceil_dice",
            "Dice": "dice",
        }.items()
        if any(row[place[key]] for row in rows)
    }
    largest = sorted(rows, key=lambda row: -int(row[place["lesion_voxels"]]))
    cases = case_views(folder, [row[0] for row in largest], captions)
    return Page(
        title="Maps against labels",
        lead=f"{facts['protocol']['scored']}; cases: {facts['protocol']['cases']}.",
        note=note,
        facts=[(figure.name, f"{figure.value:.3f}") for figure in figures[:2]]
        + _at_threshold(figures),
        summary=[
            Table(
                "Result",
                ("figure", "value", "95 % interval"),
                [(f.name, f"{f.value:.3f}", f.interval) for f in figures],
            )
        ],
        plots=[
            curves_plot({"pooled": points}, {"pooled": facts["threshold"]}),
            patients_plot(by_patient),
        ],
        cases=cases,
        pictured=_pictured(len(cases), len(rows), "largest lesions first"),
        tables=[
            Table(
                "Patients", columns, rows, links={view.preview.name: view.place for view in cases}
            ),
            Table("Protocol", ("what", "how"), [*facts["protocol"].items(), *failed]),
        ],
    )


def _at_threshold(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    short = {
        "Dice at the threshold, comp": "Dice at the threshold",
        "lesion-wise sensitivity, comp": "lesions detected",
    }
    return [
        (name, f"{f.value:.3f}")
        for start, name in short.items()
        for f in figures
        if f.name.startswith(start)
    ]


def _found(lesions: str, volume_mm3: str) -> str:
    if not lesions:
        return "no threshold, so no mask"
    found = f"{lesions} finding{'s' * (lesions != '1')}, {float(volume_mm3) / 1000:.1f} ml"
    return found if int(lesions) else "nothing found"


def _pictured(shown: int, cases: int, order: str) -> str:
    if shown == cases:
        return f"All {cases}, {order}." if cases > 1 else ""
    return f"{shown} of {cases}, {order}; pictures of the others lie in the folder previews."


def _lesions_by_case(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Table]:
    found: dict[str, list[Sequence[str]]] = {}
    for row in rows:
        one = dict(zip(columns, row, strict=True))
        place = ", ".join(f"{float(one[axis]):.0f}" for axis in ("x_mm", "y_mm", "z_mm"))
        scores = [f"{float(one[name]):.3f}" for name in ("peak", "mean")]
        # Tables of an earlier run lack the last two.
        known = [
            f"{float(one[name]):.{digits}f}" if one.get(name) else ""
            for name, digits in (("confidence", 2), ("edge_distance_mm", 1))
        ]
        found.setdefault(row[0], []).append(
            [one["lesion"], f"{float(one['volume_mm3']) / 1000:.2f}", place, *scores, *known]
        )
    return {
        name: Table(
            "Findings",
            ("#", "ml", "x, y, z (mm)", "peak", "mean", "confidence", "from edge (mm)"),
            lesions[:MAX_LESIONS_BY_PICTURE],
            f"and {len(lesions) - MAX_LESIONS_BY_PICTURE} smaller ones"
            if len(lesions) > MAX_LESIONS_BY_PICTURE
            else "",
        )
        for name, lesions in found.items()
    }


def _threshold(run: Mapping[str, Any]) -> str:
    facts = run["thresholds"]
    if not facts:
        return "none"
    names = ("false_positive_rate", "value", "chosen", "healthy_slices", "healthy_cases")
    thresholds = Thresholds(
        **{name: facts[name] for name in names}, chosen_ml=facts.get("chosen_ml")
    )
    value = f"{run['threshold']:.4g}; " if run.get("threshold") is not None else ""
    return f"{value}{describe(thresholds)} ({thresholds.healthy_cases} healthy held-out scans)"


def _is_number(value: object) -> bool:
    try:
        float(str(value) or "0")
    except ValueError:
        return False
    return True
