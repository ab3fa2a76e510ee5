"""What a run over a cohort leaves beside its maps: a result a case, the tables, and
``run.json``."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import read_json, write_text
from anomri.model.detector import Detector
from anomri.model.lesions import Lesion, read_lesion, table_columns, table_row
from anomri.runs.ledger import Ledger
from anomri.scans.case import Case
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.seg import write_segmentation
from anomri.scans.prepare import Preparation
from anomri.scans.read import read_label

LOGS = "logs"
"""The folder in a run's output that holds a record of each case."""
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


@dataclass(frozen=True)
class CaseResult:
    """What became of one case: its `Detection.summary`, or the error that kept it from having
    one."""

    case: str
    seconds: float
    summary: dict[str, object] | None = None
    error: str | None = None
    files: tuple[Path, ...] = ()
    """What was written of it: by `Detection.save`, `write_dicom_seg`."""
    export_error: str | None = None
    """Why its DICOM SEG could not be written; the case itself is done."""

    @property
    def lesions(self) -> tuple[Lesion, ...]:
        """The lesions of the mask, the largest first; empty if the case failed or has no mask."""
        facts: Any = (self.summary or {}).get("lesions", ())
        return tuple(read_lesion(one) for one in facts)

    def to_json(self) -> dict[str, object]:
        """Status, summary and absolute paths of the files, as plain numbers and strings."""
        facts: dict[str, object] = {"case": self.case, "status": "failed" if self.error else "done"}
        facts |= {"seconds": round(self.seconds, 2)} | (self.summary or {})
        if self.error:
            return facts | {"error": self.error}
        if self.export_error:
            facts["export_error"] = self.export_error
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


def write_dicom_seg(
    folder: Path,
    result: CaseResult,
    series: Mapping[str, Series],
    notify: Callable[[str], None] = lambda note: None,
) -> CaseResult:
    """Write ``<case>_mask.dcm`` beside the mask of a case in ``folder``, on its source ``series``.

    Returns the result with that file, or with the ``export_error`` that kept it from being
    written. A case without a mask is returned as it is.
    """
    made: Mapping[str, Any] = result.summary or {}
    mask, path = (folder / f"{result.case}_mask{ending}" for ending in (".nii.gz", ".dcm"))
    if mask not in result.files:
        return result
    parameters = {name: made[name] for name in ("method", "threshold")}
    try:
        label, geometry = read_label(Case(result.case, {}, label=mask))
        emptied = write_segmentation(
            path, label.lesion, geometry, series[made["channels"][0]], parameters=parameters
        )
    except AnomriError as error:
        return replace(result, export_error=str(error))
    if emptied:
        notify(
            f"{result.case}: the DICOM SEG leaves {', '.join(emptied)} empty: the series holds "
            f"values there that the standard forbids."
        )
    return replace(result, files=(*result.files, path))


def write_tsv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as tab-separated text."""
    text = StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def read_results(folder: Path) -> list[CaseResult]:
    """What a run noted of each case in ``logs``; in the order of its plan, if there is one."""
    logs = folder / LOGS
    try:
        names = list(Ledger.open(folder, logs).scans)
    except AnomriError:
        names = sorted(path.stem for path in logs.glob("*.json"))
    records = [read_json(path) for name in names if (path := logs / f"{name}.json").is_file()]
    return [CaseResult.from_record(record, folder) for record in records]


def load_result(ledger: Ledger, case: str) -> CaseResult | None:
    """The result of a case that an earlier run finished; ``None`` if there is none that counts."""
    entry = ledger.finished(case)
    return None if entry is None else CaseResult.from_record(entry, ledger.root)


def cases_before(folder: Path, cases: Sequence[str]) -> str:
    """Which other cases a run before this one left in ``folder``, in words; empty if there are
    none."""
    maps = sorted(
        path.name.removesuffix("_anomaly.nii.gz") for path in folder.glob("*_anomaly.nii.gz")
    )
    others = [name for name in maps if name not in cases]
    return ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")


def write_tables(folder: Path, results: Sequence[CaseResult]) -> None:
    """Write ``cases.tsv`` and ``lesions.tsv``."""
    cases = [_case_row(result) for result in results]
    lesions = [[result.case, *table_row(lesion)] for result in results for lesion in result.lesions]
    rows = [[row.get(column, "") for column in CASE_COLUMNS] for row in cases]
    write_tsv(folder / "cases.tsv", CASE_COLUMNS, rows)
    write_tsv(folder / "lesions.tsv", ["case", *table_columns()], lesions)


def _case_row(result: CaseResult) -> dict[str, object]:
    """One case by `CASE_COLUMNS`, which stay empty where nothing is known."""
    row: dict[str, object] = {"case": result.case, "seconds": f"{result.seconds:.2f}"}
    if result.summary is None:
        return row | {"status": "failed", "error": " ".join((result.error or "").split())}
    summary: Mapping[str, Any] = result.summary
    row |= {
        "status": "done",
        "channels": ",".join(summary["channels"]),
        "peak": f"{summary['peak']:.5g}",
        "notes": " ".join(" ".join(summary["notes"]).split()),
    }
    if summary["threshold"] is not None:
        # Without a threshold nothing was looked for, which is not the same as nothing found.
        row |= {
            "threshold": f"{summary['threshold']:.5g}",
            "lesions": len(summary["lesions"]),
            "lesion_volume_mm3": f"{summary['lesion_volume_mm3']:.1f}",
        }
    return row


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
