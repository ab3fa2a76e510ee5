"""Detection over a cohort: one model, many scans, every file whole, one bad scan no reason to stop."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from anomri.errors import AnomriError
from anomri.model.detection import (
    Detection,
    refuse_foreign_results,
    remove_results,
    without_own_results,
)
from anomri.model.detector import Detector
from anomri.reporting.previews import save_preview
from anomri.runs.records import Records, Shard, check_same_scans, keys_of, origin_of
from anomri.runs.report import write_run_tables
from anomri.runs.tables import LOGS, CaseResult, run_facts
from anomri.runtime.folders import refuse_foreign_tables, sole_use
from anomri.runtime.launch import usable_processors
from anomri.runtime.processes import ProcessGroup, join_processes
from anomri.runtime.threads import divide_torch_threads
from anomri.scans.case import Case
from anomri.scans.prepare import Preparation
from anomri.scans.volume import Volume

TABLES = ("cases.tsv", "lesions.tsv", "run.json", "report.html")
MOST_SCANS = 8
"""How many scans are worked on side by side beside a GPU: each takes some hundred megabytes."""
T = TypeVar("T")


def detect_cohort(
    cohort: str | Path | Sequence[Case],
    out: str | Path,
    model: Detector | str | Path,
    *,
    reconstruction: bool = False,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
    preparation: Preparation = Preparation(),
    shard: str | None = None,
    progress: Callable[[CaseResult, int], None] = lambda result, total: None,
) -> list[CaseResult]:
    """Detect in every case of ``cohort`` and write maps, tables and ``report.html`` to the folder ``out``.

    ``preparation`` is done to every case. A case that fails is noted in ``case.tsv`` and the run goes on. Scans are
    worked on as `detect_each` says, so memory holds a few of them, however many there are.
    ``sensitivity`` or ``false_positive_ml`` choose another of the model's thresholds, as `sensitivity.choose_threshold`
    says.

    What an earlier call with the same scans, model and settings finished in ``out`` is kept; what another one left of
    these cases is replaced. Where torchrun or srun started several processes, each calls this with the same arguments
    and they share the cases. ``shard``, as ``3/40``, does one share of the cases alone; `merge.merge` then writes the
    tables of all.

    Raises `AnomriError` if there is no case, model or such threshold, ``out`` cannot be written or holds files, or
    results of another scan of the same name, that results would replace, or another run is writing to it.
    """
    folder, part = Path(out), Shard.parse(shard)
    team = ProcessGroup(part.number - 1, part.count) if part else join_processes(_device_of(model))
    detector = model if isinstance(model, Detector) else Detector.load(model)
    detector = detector.with_threshold(sensitivity, false_positive_ml)
    listed = detector.find_cases(cohort) if isinstance(cohort, str | Path) else cohort
    cases = [without_own_results(case) for case in listed]
    keys = keys_of(
        cases, detector.spec.channels, detector.fingerprint, _settings(preparation), reconstruction
    )
    with part.sole_use(folder) if part else team.sole_use(folder):
        facts = {"started": time.time(), "run": run_facts(detector, len(cases), preparation)}
        begin = partial(Records.begin, folder / LOGS, keys, facts)
        mine = team.share(cases)

        def check() -> None:
            of_this_run = mine if part else cases
            refuse_foreign_results(folder, of_this_run)
            refuse_foreign_tables(folder, TABLES)
            check_same_scans(folder / LOGS, of_this_run)

        check() if part else team.run_on_main(check)
        records = begin() if part else team.run_on_main(begin)
        results = {
            case.name: result for case in mine if (result := finished(records, case.name, folder))
        }

        def detect() -> None:
            for result in results.values():
                progress(result, len(mine))
            waiting = [case for case in mine if case.name not in results]
            found = detect_each(
                detector,
                waiting,
                lambda case: detector.read(case, preparation),
                lambda case, detection: detection.save(folder, reconstruction=reconstruction),
                folder,
            )
            for case, result in zip(waiting, found, strict=True):
                results[result.case] = result
                remove_results(folder, result.case, result.files)
                origin: dict[str, Any] = {}
                if not result.error:
                    origin = {"origin": origin_of(case), "scans": scans_from(folder, case)}
                records.save(result.case, result.to_record(folder) | origin)
                progress(result, len(mine))

        if part:
            detect()
            return [results[case.name] for case in mine]
        try:
            team.run_on_all(detect)
        except BaseException:
            # Also after Ctrl-C: what is done is listed.
            if team.world_size == 1:
                write_run_tables(folder, records, list(results.values()))
            raise
        return team.run_on_main(lambda: _collected(folder, records))


def merge_detections(folder: Path) -> list[CaseResult]:
    """Write the tables and report of a run whose cases were done shard by shard; raises `AnomriError` if some are missing."""
    with sole_use(folder):
        return _collected(folder, Records.open(folder / LOGS))


def _collected(folder: Path, records: Records) -> list[CaseResult]:
    results = [CaseResult.from_record(record, folder) for record in records.all()]
    write_run_tables(folder, records, results)
    return results


def _device_of(model: Detector | str | Path) -> str:
    return model.device.type if isinstance(model, Detector) else "auto"


def scans_from(folder: Path, case: Case) -> dict[str, str]:
    """The files of a case by channel, as paths from ``folder``, for `anomri view`."""
    # Links of files are not followed: their contents may be stored under other names.
    files = {name: path.parent.resolve() / path.name for name, path in case.channels.items()}
    try:
        return {name: os.path.relpath(path, folder.resolve()) for name, path in files.items()}
    except ValueError:  # on another drive
        return {name: str(path) for name, path in files.items()}


def _settings(preparation: Preparation) -> list[object]:
    """A preparation as what a case's key is made of; a brain mask counts by its content's age."""
    mask = preparation.brain_mask
    return [asdict(preparation), mask and mask.exists() and mask.stat().st_mtime_ns]


def finished(records: Records, case: str, folder: Path) -> CaseResult | None:
    """What a run before this one found in a case; ``None`` if it did not come to it, failed, or its files are gone."""
    record = records.load(case)
    if record is None or record["error"]:
        return None
    result = CaseResult.from_record(record, folder)
    return result if all(path.is_file() for path in result.files) else None


def detect_each(
    detector: Detector,
    cases: Sequence[Case],
    read: Callable[[Case], Volume],
    save: Callable[[Case, Detection], Sequence[Path] | None],
    folder: Path,
) -> Iterator[CaseResult]:
    """What becomes of each case as soon as that is known: ``read``, detected, ``save`` called, its preview in ``folder``.

    Beside a GPU of CUDA, whose part is short, several scans are read, searched and written side by side; else one after
    another, each read while the network works on the one before.
    """
    workers = (
        min(usable_processors() // 2, MOST_SCANS, len(cases))
        if detector.device.type == "cuda"
        else 1
    )
    if workers < 2:
        for case, volume, begun in read_ahead(cases, read):
            yield _detect_case(detector, case, volume, begun, save, folder)
        return

    def work(case: Case) -> CaseResult:
        return _detect_case(detector, *_attempt(case, read), save, folder)

    with divide_torch_threads(workers):
        yield from _ahead((partial(work, case) for case in cases), workers - 1)


def read_ahead(
    cases: Sequence[Case], read: Callable[[Case], Volume]
) -> Iterator[tuple[Case, Volume | AnomriError, float]]:
    """Each case with its volume (or why there is none) and when work on it began; one is read ahead."""
    return _ahead((partial(_attempt, case, read) for case in cases), 1)


def _ahead(works: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """The results of ``works`` in their order, with so many of those after it begun before each is given."""
    begun = deque[Future[T]]()
    for work in works:
        begun.append(_in_background(work))
        if len(begun) > count:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _attempt(
    case: Case, read: Callable[[Case], Volume]
) -> tuple[Case, Volume | AnomriError, float]:
    begun = time.monotonic()
    try:
        return case, read(case), begun
    except Exception as error:  # whatever a library makes of an odd scan: a run over many goes on
        return case, AnomriError(problem(case, error)), begun


def _in_background(work: Callable[[], T]) -> Future[T]:
    """The result of ``work``, done in a thread that nobody waits for when the process is asked to end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _detect_case(
    detector: Detector,
    case: Case,
    volume: Volume | AnomriError,
    begun: float,
    save: Callable[[Case, Detection], Sequence[Path] | None],
    folder: Path,
) -> CaseResult:
    try:
        if isinstance(volume, AnomriError):
            raise volume
        detection = detector.detect(volume)
        files = tuple(save(case, detection) or ())
        save_preview(detection, folder)
        return CaseResult(case.name, time.monotonic() - begun, detection.summary(), files=files)
    except Exception as error:
        return CaseResult(case.name, time.monotonic() - begun, error=problem(case, error))


def problem(case: Case, error: BaseException) -> str:
    """An error of one case in words that name the case or its file."""
    if isinstance(error, AnomriError):
        return str(error)
    return f"{case.name}: {type(error).__name__}: {' '.join(str(error).split()) or 'not enough memory'}"
