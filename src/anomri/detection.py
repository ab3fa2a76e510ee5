"""Detection over a cohort: one model, many scans, every file whole, one bad scan no reason to stop."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path

from anomri.cases import Case
from anomri.detector import Detection, Detector
from anomri.files import output_folder, write_text
from anomri.preparation import Preparation
from anomri.previews import save_preview
from anomri.reporting import detection_report
from anomri.spec import AnomriError
from anomri.volume import Volume

CASE_ERRORS = (AnomriError, RuntimeError, ValueError, OverflowError, MemoryError)
"""What one odd scan may raise (torch runs out of memory with a RuntimeError) without ending a run over many."""
CASE_COLUMNS = ("case", "status", "lesions", "lesion_volume_mm3", "peak", "seconds", "error", "notes")
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
    """What `Detection.save` wrote of it."""

    def to_json(self) -> dict[str, object]:
        """Status, summary and absolute paths of the files, as plain numbers and strings."""
        facts: dict[str, object] = {"case": self.case, "status": "failed" if self.error else "done"}
        facts |= {"seconds": round(self.seconds, 2)} | (self.summary or {})
        if self.error:
            return facts | {"error": self.error}
        kinds = ((file, file.name.removeprefix(self.case).split(".")[0]) for file in self.files)
        return facts | {"files": {kind.strip("_") or "summary": str(file.resolve()) for file, kind in kinds}}


def detect_cohort(
    cohort: str | Path | Sequence[Case],
    out: str | Path,
    model: Detector | str | Path,
    *,
    reconstruction: bool = False,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
    preparation: Preparation = Preparation(),
    progress: Callable[[CaseResult, int], None] = lambda result, total: None,
) -> list[CaseResult]:
    """Detect in every case of ``cohort`` and write maps, tables and ``report.html`` to the folder ``out``.

    ``preparation`` is done to every case. A case that fails is noted in ``cases.tsv`` and the run goes on. The next
    scan is read while the network works on this one, so memory holds a few scans, however many there are.
    ``sensitivity`` or ``false_positive_ml`` choose another of the model's thresholds, as `sensitivity.choose_threshold`
    says. Raises `AnomriError` if there is no case, model or such threshold, or ``out`` cannot be written.
    """
    folder = output_folder(Path(out))
    detector = model if isinstance(model, Detector) else Detector.load(model)
    detector = detector.with_threshold(sensitivity, false_positive_ml)
    cases = detector.find_cases(cohort) if isinstance(cohort, str | Path) else list(cohort)
    started, results = time.time(), list[CaseResult]()
    save = partial(Detection.save, folder=folder, reconstruction=reconstruction)
    try:
        for case, volume, begun in read_ahead(cases, lambda case: detector.read(case, preparation)):
            results.append(detect_case(detector, case, volume, begun, folder, save))
            progress(results[-1], len(cases))
    finally:
        # Also after Ctrl-C: what is done is listed.
        write_tables(folder, results)
        write_run(folder, detector, len(cases), started)
        detection_report(folder)
    return results


def read_ahead(
    cases: Sequence[Case], read: Callable[[Case], Volume]
) -> Iterator[tuple[Case, Volume | AnomriError, float]]:
    """Each case with its volume (or why there is none) and when work on it began; one is read ahead."""

    def attempt(case: Case) -> tuple[Case, Volume | AnomriError, float]:
        begun = time.monotonic()
        try:
            return case, read(case), begun
        except CASE_ERRORS as error:
            return case, AnomriError(problem(case, error)), begun

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for case in cases:
            upcoming = pool.submit(attempt, case)
            if waiting is not None:
                yield waiting.result()
            waiting = upcoming
        if waiting is not None:
            yield waiting.result()


def detect_case(
    detector: Detector,
    case: Case,
    volume: Volume | AnomriError,
    begun: float,
    folder: Path,
    save: Callable[[Detection], Sequence[Path] | None],
) -> CaseResult:
    """Detect in what `read_ahead` gave of a case, ``save`` it and its preview; an error becomes the result's."""
    try:
        if isinstance(volume, AnomriError):
            raise volume
        detection = detector.detect(volume)
        files = tuple(save(detection) or ())
        save_preview(detection, folder)
        return CaseResult(case.name, time.monotonic() - begun, detection.summary(), files=files)
    except CASE_ERRORS as error:
        return CaseResult(case.name, time.monotonic() - begun, error=problem(case, error))


def problem(case: Case, error: BaseException) -> str:
    """An error of one case in words that name the case or its file."""
    if isinstance(error, AnomriError):
        return str(error)
    return f"{case.name}: {type(error).__name__}: {' '.join(str(error).split()) or 'not enough memory'}"


def tsv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as tab-separated text."""
    text = StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def write_tables(folder: Path, results: Sequence[CaseResult]) -> None:
    """Write ``cases.tsv`` and ``lesions.tsv``."""
    case_rows: list[tuple[object, ...]] = []
    lesion_rows: list[tuple[object, ...]] = []
    for result in results:
        seconds = f"{result.seconds:.2f}"
        if result.summary is None:
            case_rows.append((result.case, "failed", "", "", "", seconds, " ".join((result.error or "").split()), ""))
            continue
        summary = result.summary
        lesions: list[dict[str, object]] = summary["lesions"]  # type: ignore[assignment]
        notes: list[str] = summary["notes"]  # type: ignore[assignment]
        volume, peak = f"{summary['lesion_volume_mm3']:.1f}", f"{summary['peak']:.5g}"
        case_rows.append((result.case, "done", len(lesions), volume, peak, seconds, "", " ".join(notes)))
        for lesion in lesions:
            centroid: tuple[float, ...] = lesion["centroid_mm"]  # type: ignore[assignment]
            scores = (f"{lesion['peak']:.5g}", f"{lesion['mean']:.5g}")
            known = (
                "" if lesion.get(name) is None else f"{lesion[name]:.4g}" for name in ("confidence", "edge_distance_mm")
            )
            lesion_rows.append((result.case, lesion["lesion"], lesion["volume_mm3"], *centroid, *scores, *known))
    write_text(folder / "cases.tsv", tsv(CASE_COLUMNS, case_rows))
    write_text(folder / "lesions.tsv", tsv(LESION_COLUMNS, lesion_rows))


def write_run(folder: Path, detector: Detector, cases: int, started: float) -> None:
    """Write ``run.json``; ``started`` is in seconds since the epoch."""
    spec = detector.spec
    facts = {
        "anomri": version("anomri"),
        "command": "detection",
        "cases": cases,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": round(time.time() - started, 1),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "method": spec.method,
        "channels": spec.channels,
        "score": asdict(spec.score),
        "thresholds": spec.thresholds and asdict(spec.thresholds),
        "threshold": spec.thresholds and spec.thresholds.threshold,
        "model_cohort": spec.cohort and asdict(spec.cohort),
        "citation": spec.citation,
    }
    write_text(folder / "run.json", json.dumps(facts, indent=2) + "\n")
