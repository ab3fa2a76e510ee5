"""The report of an evaluation, and the report of whatever a folder holds."""

from __future__ import annotations

import json
import math
from pathlib import Path

from anomri.errors import AnomriError
from anomri.evaluation.result import Evaluation, PatientScores
from anomri.reporting.pages import CaseView, Page, Table, case_views, pictured, write_page
from anomri.reporting.plots import curves_plot, patients_plot
from anomri.runs.report import read_report
from anomri.runs.tables import LOGS

EVALUATION = "evaluation"
"""In ``logs``: the finished evaluation. Records of cases end in ``.json``."""
HEADLINES = {
    "Dice at the threshold, comp": "Dice at the threshold",
    "lesion-wise sensitivity, comp": "lesions detected",
}
"""How the names of figures begin that stand large on the page, and what they are called there."""


def report(folder: str | Path, note: str = "") -> Path:
    """Write ``report.html`` from what `detect_cohort` or `evaluate` left in ``folder``; returns its
    path.

    A folder that holds both gets the page of the later one. Raises `AnomriError` if it holds
    neither.
    """
    folder = Path(folder)
    writers = {folder / "metrics.json": read_evaluation_report, folder / "cases.tsv": read_report}
    present = [path for path in writers if path.is_file()]
    if not present:
        raise AnomriError(
            f"{folder}: holds neither cases.tsv nor metrics.json, so there is nothing to report; name the folder "
            f"that `anomri detect` or `anomri evaluate` wrote."
        )
    latest = max(present, key=lambda path: path.stat().st_mtime_ns)
    return writers[latest](folder, note)


def read_evaluation_report(folder: Path, note: str = "") -> Path:
    """Write the report again from the evaluation that is noted in ``logs``."""
    path = folder / LOGS / EVALUATION
    try:
        evaluation = Evaluation.from_json(json.loads(path.read_text("utf-8"))["evaluation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnomriError(f"{path}: cannot be read ({error}); run the evaluation again.") from error
    return evaluation_report(folder, evaluation, note)


def evaluation_report(folder: Path, evaluation: Evaluation, note: str = "") -> Path:
    """Write ``report.html`` of an evaluation, with the pictures in ``previews``; returns its
    path."""
    return write_page(folder / "report.html", _page(folder, evaluation, note))


def _page(folder: Path, evaluation: Evaluation, note: str) -> Page:
    figures, protocol = evaluation.figures, evaluation.protocol
    largest = sorted(evaluation.patients, key=lambda one: one.lesion_voxels, reverse=True)
    cases = [
        CaseView(place, preview, _caption(patient))
        for place, preview, patient in case_views(folder, {one.case: one for one in largest})
    ]
    headlines = [(figure.name, f"{figure.value:.3f}") for figure in figures[:2]]
    for start, name in HEADLINES.items():
        headlines += [(name, f"{one.value:.3f}") for one in figures if one.name.startswith(start)]
    return Page(
        title="Maps against labels",
        lead=f"{protocol['scored']}; cases: {protocol['cases']}.",
        note=note,
        errors=list(evaluation.failed.items()),
        facts=headlines,
        summary=[
            Table(
                "Result",
                ("figure", "value", "95 % interval"),
                [(one.name, f"{one.value:.3f}", one.interval) for one in figures],
            )
        ],
        plots=[
            curves_plot({"pooled": evaluation.curve}, {"pooled": evaluation.threshold}),
            patients_plot(_by_patient(evaluation)),
        ],
        cases=cases,
        pictured=pictured(len(cases), len(largest), "largest lesions first"),
        tables=[
            _patient_table(evaluation, cases),
            Table("Protocol", ("what", "how"), list(protocol.items())),
        ],
    )


def _by_patient(evaluation: Evaluation) -> dict[str, list[float]]:
    """The values of each figure that some scan has; NaN for the others."""
    figures = {
        "AUPRC": [one.average_precision for one in evaluation.patients],
        "ceil-Dice": [one.ceil_dice for one in evaluation.patients],
        "Dice": [math.nan if one.dice is None else one.dice for one in evaluation.patients],
    }
    return {name: values for name, values in figures.items() if not all(map(math.isnan, values))}


def _patient_table(evaluation: Evaluation, cases: list[CaseView]) -> Table:
    rows = [one.row() for one in evaluation.patients]
    return Table(
        "Patients",
        list(rows[0]),
        [list(row.values()) for row in rows],
        links={view.preview.name: view.place for view in cases},
    )


def _caption(patient: PatientScores) -> str:
    figures = {
        "AUPRC": patient.average_precision,
        "Dice": patient.dice,
        "best Dice": patient.ceil_dice,
    }
    known = [
        f"{name} {value:.3f}"
        for name, value in figures.items()
        if value is not None and not math.isnan(value)
    ]
    return ", ".join(known) or "no lesion is labelled"
