"""What a run over a cohort leaves beside its maps: a result a case, the tables, and ``run.json``."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import write_text
from anomri.model.detector import Detector
from anomri.reporting.pages import detection_report
from anomri.runs.records import Records
from anomri.scans.case import Case
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.seg import write_segmentation
from anomri.scans.prepare import Preparation
from anomri.scans.volume import read_label

CASE_COLUMNS = (
    "case",
    "status",
    "channels",
    "threshold",
    "lesions",
    "lesion_volume_mm3",
    "peak",
    "seconds",
    "error",
    "notes",
)
LESION_COLUMNS = (
    "case",
    "lesion",
    "volume_mm3",
    "x_mm",
    "y_mm",
    "z_mm",
    "peak",
    "mean",
    "confidence",
    "edge_distance_mm",
)


@dataclass(frozen=True)
class CaseResult:
    """What became of one case: its `Detection.summary`, or the error that kept it from having one."""

    case: str
    seconds: float
    summary: dict[str, object] | None = None
    error: str | None = None
    files: tuple[Path, ...] = ()
    """What was written of it: by `Detection.save`, `write_dicom_seg`."""

    def to_json(self) -> dict[str, object]:
        """Status, summary and absolute paths of the files, as plain numbers and strings."""
        facts: dict[str, object] = {"case": self.case, "status": "failed" if self.error else "done"}
        facts |= {"seconds": round(self.seconds, 2)} | (self.summary or {})
        if self.error:
            return facts | {"error": self.error}
        return facts | {"files": {self._kind(file): str(file.resolve()) for file in self.files}}

    def _kind(self, file: Path) -> str:
        if file.suffix == ".dcm":
            return "dicom_seg"
        return file.name.removeprefix(self.case).split(".")[0].strip("_") or "summary"

    def to_record(self, folder: Path) -> dict[str, object]:
        """All of it as what JSON holds, files by their places in ``folder``."""
        return {
            **asdict(self),
            "files": [file.relative_to(folder).as_posix() for file in self.files],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path) -> CaseResult:
        """What `to_record` gave, with files in ``folder``."""
        known = {name: record[name] for name in ("case", "seconds", "summary", "error")}
        return cls(**known, files=tuple(folder / name for name in record["files"]))


def write_dicom_seg(folder: Path, result: CaseResult, series: Mapping[str, Series]) -> CaseResult:
    """The result with ``<case>_mask.dcm`` beside its mask in ``folder``, on a series that this was made from.

    What keeps it from being written is the result's error; a case without a mask has none.
    """
    made: Mapping[str, Any] = result.summary or {}
    mask, path = (folder / f"{result.case}_mask{ending}" for ending in (".nii.gz", ".dcm"))
    if mask not in result.files:
        return result
    parameters = {name: made[name] for name in ("method", "threshold")}
    try:
        label, geometry, _ = read_label(Case(result.case, {}, label=mask))
        write_segmentation(
            path, label, geometry, series[made["channels"][0]], parameters=parameters
        )
    except AnomriError as error:
        return replace(result, error=str(error))
    return replace(result, files=(*result.files, path))


def tsv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as tab-separated text."""
    text = StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def cases_before(folder: Path, cases: Sequence[str]) -> str:
    """Which other cases a run before this one left in ``folder``, in words; empty if there are none."""
    maps = sorted(
        path.name.removesuffix("_anomaly.nii.gz") for path in folder.glob("*_anomaly.nii.gz")
    )
    others = [name for name in maps if name not in cases]
    return ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")


def write_tables(folder: Path, results: Sequence[CaseResult]) -> None:
    """Write ``case.tsv`` and ``lesions.tsv``."""
    case_rows: list[tuple[object, ...]] = []
    lesion_rows: list[tuple[object, ...]] = []
    for result in results:
        seconds = f"{result.seconds:.2f}"
        if result.summary is None:
            case_rows.append(
                (
                    result.case,
                    "failed",
                    "",
                    "",
                    "",
                    "",
                    "",
                    seconds,
                    " ".join((result.error or "").split()),
                    "",
                )
            )
            continue
        summary = result.summary
        lesions: list[dict[str, object]] = summary["lesions"]  # type: ignore[assignment]
        notes: list[str] = summary["notes"]  # type: ignore[assignment]
        volume, peak = f"{summary['lesion_volume_mm3']:.1f}", f"{summary['peak']:.5g}"
        threshold = "" if summary["threshold"] is None else f"{summary['threshold']:.5g}"
        channels = ",".join(summary["channels"])  # type: ignore[arg-type]
        # Without a threshold nothing was looked for: that is not the same as nothing found.
        counted = ("", "") if summary["threshold"] is None else (len(lesions), volume)
        found = (*counted, peak, seconds, "", " ".join(notes))
        case_rows.append((result.case, "done", channels, threshold, *found))
        for lesion in lesions:
            centroid: tuple[float, ...] = lesion["centroid_mm"]  # type: ignore[assignment]
            scores = (f"{lesion['peak']:.5g}", f"{lesion['mean']:.5g}")
            known = (
                "" if lesion.get(name) is None else f"{lesion[name]:.4g}"
                for name in ("confidence", "edge_distance_mm")
            )
            lesion_rows.append(
                (result.case, lesion["lesion"], lesion["volume_mm3"], *centroid, *scores, *known)
            )
    write_text(folder / "cases.tsv", tsv(CASE_COLUMNS, case_rows))
    write_text(folder / "lesions.tsv", tsv(LESION_COLUMNS, lesion_rows))


def write_run_tables(folder: Path, records: Records, results: Sequence[CaseResult]) -> None:
    """Write the tables, ``run.json`` and the report of a run."""
    write_tables(folder, results)
    write_run(folder, records.facts["run"], records.facts["started"])
    detection_report(folder)


def run_facts(
    detector: Detector, cases: int, preparation: Preparation = Preparation()
) -> dict[str, object]:
    """What ``run.json`` says beside times."""
    spec, thresholds = detector.spec, detector.thresholds
    return {
        "anomri": version("anomri"),
        "command": "detection",
        "cases": cases,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "method": spec.method,
        "channels": detector.channels,
        # The maps by position are the model's, and long.
        "score": asdict(replace(spec.score, healthy_maps="")),
        "preparation": {name: str(value) for name, value in asdict(preparation).items() if value},
        "thresholds": thresholds and asdict(thresholds),
        "threshold": thresholds and thresholds.threshold,
        "model_cohort": spec.cohort and asdict(spec.cohort),
        "citation": spec.citation,
    }


def write_run(folder: Path, facts: Mapping[str, object], started: float) -> None:
    """Write ``run.json``: the `run_facts`, and times; ``started`` is in seconds since the epoch."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started))
    # From the beginning, with pauses, if it was gone on with.
    facts = {**facts, "started": when, "seconds": round(time.time() - started, 1)}
    write_text(folder / "run.json", json.dumps(facts, indent=2) + "\n")
