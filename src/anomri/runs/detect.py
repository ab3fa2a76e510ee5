"""Detection over a cohort: one model, many scans; every file is written whole, and a bad scan
fails alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from anomri.errors import AnomriError
from anomri.model.detection import Detection, refuse_foreign_results, remove_results
from anomri.model.detector import Detector
from anomri.optional import import_extra
from anomri.runs.case_names import with_usable_names
from anomri.runs.identity import identify
from anomri.runs.ledger import Ledger, Task
from anomri.runs.pipeline import detect_each
from anomri.runs.report import write_run_tables
from anomri.runs.shards import Shard
from anomri.runs.stored_maps import map_facts, map_serves, stored_map
from anomri.runs.tables import (
    LOGS,
    CaseResult,
    cases_before,
    load_result,
    run_facts,
    write_dicom_seg,
)
from anomri.runtime.folders import refuse_foreign_tables, sole_use
from anomri.runtime.processes import ProcessGroup, join_processes
from anomri.scans.case import Case
from anomri.scans.intake import Intake, collect_cases
from anomri.scans.own_results import drop_own_results
from anomri.scans.prepare import Preparation

TABLES = ("cases.tsv", "lesions.tsv", "run.json", "report.html")


@dataclass(frozen=True)
class DicomOptions:
    """How a folder of DICOM files is read and written.

    ``series`` says by channel which series it is, by a part of its description.
    ``keep_identifiers`` names the case by its PatientID and not by a hash. ``segmentation`` writes
    the mask also as DICOM SEG.
    """

    series: Mapping[str, str] = field(default_factory=dict)
    keep_identifiers: bool = False
    segmentation: bool = False


def detect_cohort(
    cohort: str | Path | Mapping[str, str | Path] | Sequence[Case],
    out: str | Path,
    model: Detector | str | Path | None = None,
    *,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
    min_volume: float | None = None,
    channels: Sequence[str] | None = None,
    reconstruction: bool = False,
    preparation: Preparation = Preparation(),
    dicom: DicomOptions = DicomOptions(),
    overwrite: bool = False,
    shard: str | None = None,
    notify: Callable[[str], None] = lambda note: None,
    progress: Callable[[CaseResult, int], None] = lambda result, total: None,
) -> list[CaseResult]:
    """Detect in every case of ``cohort`` and write maps, masks, tables and ``report.html`` to the
    folder ``out``.

    ``cohort`` is a scan, a folder (also of DICOM files), a table of cases, the files of one scan by
    channel, or cases. ``model`` is by default the one in the package. ``sensitivity`` or
    ``false_positive_ml`` choose another of its thresholds (see `sensitivity.choose_threshold`),
    ``min_volume`` (mm3) which components its masks keep, and ``channels`` which of its channels are
    looked at. ``reconstruction`` also writes what the network takes for healthy. ``preparation`` is
    done to every scan.

    Memory holds a few scans, however many there are. A case that fails is noted in ``cases.tsv``,
    and the run goes on. ``notify`` is called with what the user should know, ``progress`` with each
    result and how many cases there are. What an earlier call with the same scans, model and
    settings finished in ``out`` is kept. Results of these cases with other settings are replaced
    with ``overwrite``, and an error without it.

    Where torchrun or srun started several processes, each calls this with the same arguments and
    they share the cases. ``shard``, as ``3/40``, does one share of the cases alone; `merge.merge`
    then writes the tables.

    Raises `AnomriError` if there is no case, model or such threshold, ``out`` cannot be written,
    files of others or results of another scan of the same name would be overwritten, or another run
    is writing to ``out``.
    """
    preparation.check_tools()
    if dicom.segmentation:
        import_extra("highdicom", "dicom", "--dicom-seg")
    folder, part = Path(out), Shard.parse(shard) if shard else None
    team = join_processes(model.device.type if isinstance(model, Detector) else "auto")
    base = model if isinstance(model, Detector) else Detector.load(model)
    detector = base.with_channels(channels) if channels else base
    detector = detector.with_threshold(sensitivity, false_positive_ml).with_min_volume(min_volume)
    if dicom.segmentation and detector.thresholds is None:
        raise AnomriError("--dicom-seg: this model has no threshold, so there is no mask to write.")
    say = notify if team.is_main else lambda note: None
    intake = team.run_on_main(lambda: _collect_cases(cohort, folder, detector, dicom, say))
    cases, notes = drop_own_results(intake.cases)
    for note in notes:
        say(note)
    if preparation.brain_mask is not None and len(cases) > 1:
        raise AnomriError(
            f"--brain-mask is the mask of one scan, but there are {len(cases)}; name masks in a TSV."
        )
    cases = with_usable_names(cases, folder)
    settings = {
        "sensitivity": sensitivity,
        "false_positive_ml": false_positive_ml,
        "min_volume": min_volume,
        "channels": detector.channels,
        "reconstruction": reconstruction,
        "skull_strip": preparation.skull_strip,
        "bias_correction": preparation.bias_correction,
        "register": preparation.register,
    }
    facts = {"started": time.time(), "run": run_facts(detector, len(cases), preparation)}
    scans = identify([_with_mask(case, preparation) for case in cases], detector.spec.channels)
    ledger = Ledger(folder, folder / LOGS, Task(base.fingerprint, settings), scans, facts)
    run = _Run(detector, ledger, preparation, reconstruction, overwrite, say, progress)
    if part:
        with part.sole_use(folder):
            mine = part.process.share(cases)
            run.check(mine)
            return run.detect(mine, ledger.begin())
    before = cases_before(folder, [case.name for case in cases])
    if before:
        say(
            f"{folder} has maps of {before} from another run; the tables and the report will be of this "
            f"run alone."
        )
    with team.sole_use(folder):
        results = run.share(cases, team)
    if dicom.segmentation and team.is_main:
        results = [write_dicom_seg(folder, one, intake.series, say) for one in results]
    return results


def merge_detections(folder: Path) -> list[CaseResult]:
    """Write the tables and the report of a run that was done shard by shard.

    Raises `AnomriError` if cases are missing.
    """
    with sole_use(folder):
        return _write_results(Ledger.open(folder, folder / LOGS))


def scans_from(folder: Path, case: Case) -> dict[str, str]:
    """The files of a case by channel, as paths from ``folder``, for `anomri view`."""
    # Links of files are not followed: their contents may be stored under other names.
    files = {name: path.parent.resolve() / path.name for name, path in case.channels.items()}
    try:
        return {name: os.path.relpath(path, folder.resolve()) for name, path in files.items()}
    except ValueError:  # on another drive
        return {name: str(path) for name, path in files.items()}


@dataclass(frozen=True)
class _Run:
    """The work on the cases of one call of `detect_cohort`."""

    detector: Detector
    ledger: Ledger
    preparation: Preparation
    reconstruction: bool
    overwrite: bool
    notify: Callable[[str], None]
    progress: Callable[[CaseResult, int], None]

    def check(self, cases: Sequence[Case]) -> None:
        """Raise `AnomriError` if results of the ``cases`` would overwrite others' files or
        another scan's results."""
        folder = self.ledger.root
        refuse_foreign_results(folder, cases)
        refuse_foreign_tables(folder, TABLES)
        self.ledger.refuse_other_scans(cases)
        in_maps = sum(map_serves(self.ledger, case.name) for case in cases)
        cost = ""
        if in_maps:
            cost = f"The stored maps of {in_maps} serve again: the network is not needed for them."
        if not self.overwrite:
            self.ledger.refuse_changes(cases, cost)
        changes, count = self.ledger.changes(cases)
        if count:
            self.notify(
                f"settings differ from those of an earlier run ({'; '.join(changes)}); {count} "
                f"{'case is' if count == 1 else 'cases are'} done again.{' ' * bool(cost)}{cost}"
            )

    def share(self, cases: Sequence[Case], team: ProcessGroup) -> list[CaseResult]:
        """Detect in all cases, shared among processes, and write the tables."""
        team.run_on_main(lambda: self.check(cases))
        ledger = team.run_on_main(self.ledger.begin)
        done: list[CaseResult] = []
        try:
            team.run_on_all(lambda: self.detect(team.share(cases), ledger, done))
        except BaseException:
            # Also after Ctrl-C: what is done is listed.
            if team.world_size == 1:
                write_run_tables(ledger.root, ledger, done)
            raise
        return team.run_on_main(lambda: _write_results(ledger))

    def detect(
        self, cases: Sequence[Case], ledger: Ledger, done: list[CaseResult] | None = None
    ) -> list[CaseResult]:
        """The result of each of the ``cases``; ``done`` collects them as they come, earlier ones
        first."""
        done = [] if done is None else done
        folder = ledger.root
        for case in cases:
            if result := load_result(ledger, case.name):
                done.append(result)
                self.progress(result, len(cases))
        finished = {result.case for result in done}
        waiting = [case for case in cases if case.name not in finished]
        results = detect_each(
            self.detector,
            waiting,
            lambda case: self.detector.read(case, self.preparation),
            partial(self._save, ledger),
            folder,
            lambda case, volume: stored_map(ledger, case.name, volume),
        )
        for case, result in zip(waiting, results, strict=True):
            done.append(result)
            remove_results(folder, case.name, result.files)
            ledger.save(case.name, self._record(result, case))
            self.progress(result, len(cases))
        by_name = {result.case: result for result in done}
        return [by_name[case.name] for case in cases]

    def _save(self, ledger: Ledger, case: Case, detection: Detection) -> list[Path]:
        folder, kept = ledger.root, []
        earlier = folder / f"{case.name}_reconstruction.nii.gz"
        if detection.reconstructed is None and earlier.is_file():
            # It belongs to the same map.
            kept.append(earlier)
        # A run that is killed while files are replaced leaves no entry that names them.
        ledger.forget(case.name)
        new = self.reconstruction and detection.reconstructed is not None
        return [*detection.save(folder, reconstruction=new), *kept]

    def _record(self, result: CaseResult, case: Case) -> dict[str, object]:
        folder = self.ledger.root
        record = result.to_record(folder) | {"scans": scans_from(folder, case)}
        if result.files:
            record["map"] = map_facts(result.files[0], folder)
        if any(file.name == f"{case.name}_reconstruction.nii.gz" for file in result.files):
            settings = {**self.ledger.task.settings, "reconstruction": True}
            record["task"] = replace(self.ledger.task, settings=settings).to_json()
        return record


def _collect_cases(
    cohort: str | Path | Mapping[str, str | Path] | Sequence[Case],
    folder: Path,
    detector: Detector,
    dicom: DicomOptions,
    notify: Callable[[str], None],
) -> Intake:
    if not isinstance(cohort, str | Path | Mapping):
        if dicom != DicomOptions():
            raise AnomriError(
                "the options of DICOM are for a folder of DICOM files, not for cases."
            )
        return Intake(list(cohort))
    return collect_cases(
        None if isinstance(cohort, Mapping) else Path(cohort),
        cohort if isinstance(cohort, Mapping) else {},
        folder,
        detector.find_cases,
        series=dicom.series,
        keep_identifiers=dicom.keep_identifiers,
        dicom_seg=dicom.segmentation,
        note=notify,
    )


def _with_mask(case: Case, preparation: Preparation) -> Case:
    """The case with the brain mask that its preparation brings, which its results depend on."""
    mask = preparation.brain_mask
    return case if mask is None else replace(case, mask=mask)


def _write_results(ledger: Ledger) -> list[CaseResult]:
    results = [CaseResult.from_record(entry, ledger.root) for entry in ledger.entries()]
    write_run_tables(ledger.root, ledger, results)
    return results
