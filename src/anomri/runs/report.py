"""The report of a detection run: what was found in each scan, for a person to look at."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomri.files import read_json
from anomri.model.lesions import EDGE_MM, Lesion, healthy_scans, lesion_columns, page_row
from anomri.model.sensitivity import false_positive_words
from anomri.reporting.pages import CaseView, Page, Table, case_views, pictured, write_page
from anomri.runs.ledger import Ledger
from anomri.runs.tables import CaseResult, read_results, write_run, write_tables

MAX_LESIONS = 8
"""Rows of a case's table; its smaller lesions are in ``lesions.tsv``."""
GLOSSARY = (
    (
        "anomaly score",
        "how unlike healthy brains a voxel looks to the model; one scale for all scans, not a probability",
    ),
    ("threshold", "the score above which a voxel is part of a finding"),
    ("finding", "voxels above the threshold that touch; small ones are dropped"),
    ("peak, mean", "highest and mean anomaly score of a finding"),
    (
        "above healthy scans",
        "how many of the healthy scans that the model was tested on have a lower peak in all of the brain",
    ),
    ("from edge", "distance from the surface of the brain; artefacts often lie there"),
    ("at edge", f"how much of a finding lies within {EDGE_MM:g} mm or one slice of that surface"),
)


def write_run_tables(folder: Path, ledger: Ledger, results: Sequence[CaseResult]) -> None:
    """Write the tables, ``run.json`` and the report of a run."""
    write_tables(folder, results)
    write_run(folder, ledger.facts["run"], ledger.facts["started"])
    detection_report(folder, results, ledger.facts["run"])


def read_report(folder: Path, note: str = "") -> Path:
    """Write the report again from the records that a run left in ``folder``."""
    return detection_report(folder, read_results(folder), read_json(folder / "run.json"), note)


def detection_report(
    folder: Path, results: Sequence[CaseResult], run: Mapping[str, Any], note: str = ""
) -> Path:
    """Write ``report.html``, with the pictures in ``previews``; ``run`` is what ``run.json`` says.
    Returns its path."""
    return write_page(folder / "report.html", _page(folder, results, run, note))


def _page(folder: Path, results: Sequence[CaseResult], run: Mapping[str, Any], note: str) -> Page:
    done = sorted((one for one in results if one.summary), key=_volume_mm3, reverse=True)
    failed = [(one.case, one.error or "") for one in results if not one.summary]
    cases = [
        CaseView(
            place,
            preview,
            _found(result),
            _details(result),
            _lesion_table(result.lesions, healthy_scans(run)),
        )
        for place, preview, result in case_views(folder, {one.case: one for one in done})
    ]
    places = {view.preview.name: view.place for view in cases}
    order = "largest volumes first"
    return Page(
        title=_title(done),
        lead=_lead(done, run),
        note=note,
        errors=failed,
        facts=_facts(done, failed),
        summary=[_case_table(done, places)] if len(done) > 1 else [],
        cases=cases,
        pictured=pictured(len(cases), len(done), order),
        glossary=GLOSSARY if done else (),
        footer=run["citation"],
    )


def _title(done: Sequence[CaseResult]) -> str:
    if not done:
        return "No scan could be read"
    if len(done) == 1:
        return f"Anomalies in the scan {done[0].case}"
    return f"Anomalies in {len(done)} scans"


def _lead(done: Sequence[CaseResult], run: Mapping[str, Any]) -> str:
    """What the scans have in common: the method, and their channels and threshold if these are the
    same."""
    words = f"Method {run['method']}."
    settings = {(_channels(one), _threshold(one)) for one in done}
    if len(settings) == 1:
        channels, threshold = settings.pop()
        return f"{words} Channels: {channels}. Threshold: {threshold}."
    if settings:
        words += " Channels and threshold differ from scan to scan, and are named with each."
    return words


def _facts(done: Sequence[CaseResult], failed: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    facts = [("scans", f"{len(done)} of {len(done) + len(failed)}" if failed else f"{len(done)}")]
    searched = [one for one in done if _has_mask(one)]
    if searched:
        volumes = [_volume_mm3(one) / 1000 for one in searched]
        facts += [
            ("with a finding", f"{sum(volume > 0 for volume in volumes)}"),
            ("findings", f"{sum(len(one.lesions) for one in searched)}"),
            ("median volume", f"{statistics.median(volumes):.1f} ml"),
        ]
    return facts


def _case_table(done: Sequence[CaseResult], places: Mapping[str, str]) -> Table:
    rows = []
    for one in done:
        found = (len(one.lesions), f"{_volume_mm3(one) / 1000:.1f}") if _has_mask(one) else ("", "")
        summary: Mapping[str, Any] = one.summary or {}
        threshold = "" if summary["threshold"] is None else f"{summary['threshold']:.2f}"
        rows.append((one.case, *found, f"{summary['peak']:.2f}", threshold, _channels(one)))
    columns = ("scan", "findings", "ml", "peak", "threshold", "channels")
    return Table("Scans", columns, rows, links=places)


def _lesion_table(lesions: Sequence[Lesion], compared_with: int | None) -> Table | None:
    if not lesions:
        return None
    columns = lesion_columns().values()
    smaller = len(lesions) - MAX_LESIONS
    return Table(
        "Findings",
        [one.heading for one in columns],
        [page_row(one, compared_with) for one in lesions[:MAX_LESIONS]],
        f"and {smaller} smaller, in lesions.tsv" if smaller > 0 else "",
        descriptions=[one.description for one in columns],
    )


def _details(result: CaseResult) -> list[str]:
    """What should be known of one scan: channels, threshold, notes."""
    summary: Mapping[str, Any] = result.summary or {}
    return [
        f"Channels: {_channels(result)}. Threshold: {_threshold(result)}.",
        *_note_edge(result.lesions),
        *(f"Note: {text}" for text in summary["notes"]),
    ]


def _note_edge(lesions: Sequence[Lesion]) -> list[str]:
    """A warning if findings lie where a rim of the skull may be left."""
    at_edge = [f"{one.lesion}" for one in lesions if one.at_edge]
    if not at_edge:
        return []
    shown = ", ".join(at_edge[:MAX_LESIONS]) + (", ..." if len(at_edge) > MAX_LESIONS else "")
    lie, are = ("lies", "finding") if len(at_edge) == 1 else ("lie", "findings")
    of_all = "finding" if len(lesions) == 1 else "findings"
    return [
        f"{len(at_edge)} of {len(lesions)} {of_all} {lie} at the edge of the brain, where what is "
        f"left of the skull is often taken for a lesion: {are} {shown}."
    ]


def _found(result: CaseResult) -> str:
    if not _has_mask(result):
        return "no threshold, so no mask"
    count = len(result.lesions)
    if not count:
        return "nothing found"
    return f"{count} finding{'s' * (count != 1)}, {_volume_mm3(result) / 1000:.1f} ml"


def _channels(result: CaseResult) -> str:
    return ", ".join((result.summary or {})["channels"])  # type: ignore[arg-type]


def _threshold(result: CaseResult) -> str:
    """The score that made the mask, and how often healthy tissue exceeds it, in words."""
    summary: Mapping[str, Any] = result.summary or {}
    if summary["threshold"] is None:
        return "none"
    words = false_positive_words(summary["voxel_false_positive_rate"], summary["false_positive_ml"])
    return f"{summary['threshold']:.4g}" + (f" ({words})" if words else "")


def _has_mask(result: CaseResult) -> bool:
    return (result.summary or {}).get("threshold") is not None


def _volume_mm3(result: CaseResult) -> float:
    return float((result.summary or {})["lesion_volume_mm3"])  # type: ignore[arg-type]
