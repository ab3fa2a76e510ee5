"""Evaluation on a cohort with labels: every case is scored once, then all are pooled."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.evaluation.cases import choose_cases
from anomri.evaluation.pooling import Pool, spool
from anomri.evaluation.protocol import GRIDS, Protocol, dropped_words
from anomri.evaluation.report import EVALUATION, evaluation_report
from anomri.evaluation.result import Evaluation
from anomri.evaluation.scored import Scored, find_map, score_maps, score_with_model
from anomri.files import output_folder, read_json, write_text
from anomri.model.detector import Detector
from anomri.runs.case_names import with_usable_names
from anomri.runs.identity import ScanIdentity, identify
from anomri.runs.ledger import DAMAGED, PLAN, Ledger, Task, refuse_loss
from anomri.runs.shards import Shard
from anomri.runs.tables import LOGS
from anomri.runtime.folders import refuse_foreign_tables, sole_use
from anomri.runtime.processes import join_processes
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.own_results import without_own_results
from anomri.scoring.scores import describe
from anomri.spec import Score

SCORES = ".scores"
"""The folder in the output where scores and the ledger are kept until all cases are pooled."""
TABLES = ("metrics.json", "patients.tsv", "curve.tsv", "report.html")
Progress = Callable[[str, int, int], None]
"""Called with a case that is scored, how many are, and of how many."""


def evaluate(
    cohort: str | Path | Sequence[Case],
    out: str | Path | None = None,
    *,
    model: Detector | str | Path | None = None,
    maps: str | Path | None = None,
    grid: str = "model",
    split: str | None = None,
    threshold: float | None = None,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
    min_volume: float | None = None,
    channels: Sequence[str] | None = None,
    score: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda case, done, total: None,
) -> Evaluation:
    """Compare anomaly maps with lesion labels: those of a ``model``, or those in the folder
    ``maps``.

    ``grid`` is ``model`` (slices of the working grid, the paper's protocol) or ``input`` (the
    scan's own voxels). Maps are called ``<case>_anomaly.nii.gz`` or ``<case>.nii.gz`` and are
    always scored on the input's grid. Cases are those of ``split``, by default ``test``; if there
    is no such split, all that have a label, but none that the model was trained or validated on
    (see `cases.choose_cases`).

    ``threshold`` replaces the model's label-free one; ``sensitivity`` or ``false_positive_ml``
    choose another of its own. ``min_volume`` (mm3) says which components its masks keep,
    ``channels`` which of its channels are looked at, and ``score`` replaces the model's (``paper``
    is the paper's).

    The figures are exact, and memory holds one case and the scores of lesion voxels. With ``out``,
    tables and ``report.html`` are written there, and the same call resumes a run that was stopped
    or killed. An evaluation of other cases, or with other settings, is replaced with ``overwrite``,
    and an error without it. Several processes of torchrun or srun share the cases. Raises
    `AnomriError`.
    """
    work = plan(
        cohort,
        out,
        model=model,
        maps=maps,
        grid=grid,
        split=split,
        threshold=threshold,
        sensitivity=sensitivity,
        false_positive_ml=false_positive_ml,
        min_volume=min_volume,
        channels=channels,
        score=score,
    )
    team = join_processes(work.device)
    if out is None:
        if team.world_size > 1:
            raise AnomriError(
                "several processes need a folder that all of them see; name one for the results."
            )
        with tempfile.TemporaryDirectory(prefix=".scores-") as place:
            ledger = work.ledger(Path(place)).begin()
            work.score(work.cases, ledger, progress)
            return _pool(ledger)
    folder = Path(out)
    with team.sole_use(folder):
        team.run_on_main(lambda: _check_output(work, folder, overwrite))
        finished = team.run_on_main(lambda: _load_finished(folder, work.ledger(folder)))
        if finished is not None and not finished.failed:
            return finished
        ledger = team.run_on_main(work.ledger(folder).begin)
        team.run_on_all(lambda: work.score(team.share(work.cases), ledger, progress))
        return team.run_on_main(lambda: _pool_and_save(ledger))


def evaluate_shard(
    cohort: str | Path | Sequence[Case],
    out: str | Path,
    shard: str,
    progress: Progress = lambda case, done, total: None,
    overwrite: bool = False,
    **arguments: Any,
) -> int:
    """Score one share of the cases, such as ``3/40``, for `merge.merge`; returns how many failed.

    ``arguments`` are those of `evaluate`.
    """
    part, folder = Shard.parse(shard), Path(out)
    work = plan(cohort, out, **arguments)
    with part.sole_use(folder):
        _check_output(work, folder, overwrite)
        ledger = work.ledger(folder).begin()
        mine = part.process.share(work.cases)
        work.score(mine, ledger, progress)
        return sum(ledger.finished(case.name) is None for case in mine)


def merge_evaluations(folder: Path) -> Evaluation:
    """The evaluation of cases that were scored shard by shard; raises `AnomriError` if some are
    missing."""
    with sole_use(folder):
        if (folder / SCORES / PLAN).is_file():
            ledger = Ledger.open(folder, folder / SCORES)
            evaluation = _load_finished(folder, ledger)
            if evaluation is None or evaluation.failed:
                # Cases that failed may have been scored since.
                evaluation = _pool_and_save(ledger)
        else:
            evaluation = _load_finished(folder)
    if evaluation is None:
        raise AnomriError(
            f"{folder}: holds no evaluation; begin one with `anomri evaluate --shard K/N`."
        )
    return evaluation


def _check_output(work: Plan, folder: Path, overwrite: bool) -> None:
    """Raise `AnomriError` if others' files would be overwritten, or another evaluation is lost."""
    refuse_foreign_tables(folder, TABLES)
    if overwrite:
        return
    ledger = work.ledger(folder)
    ledger.refuse_changes(work.cases)
    try:
        stored = read_json(folder / LOGS / EVALUATION)
        changes = ledger.task.differences(stored["task"])
        if set(stored["scans"]) != set(ledger.scans):
            changes.append("other cases")
    except DAMAGED:
        return
    if changes:
        refuse_loss(folder, changes, "the finished evaluation")


@dataclass(frozen=True)
class Plan:
    """What an evaluation does: the ``cases``, how they are scored, and what its results depend
    on."""

    cases: list[Case]
    scored: Callable[[Sequence[Case]], Iterator[Scored]]
    protocol: Protocol
    task: Task
    scans: dict[str, ScanIdentity]
    device: str = "cpu"

    def ledger(self, folder: Path) -> Ledger:
        """The ledger of the scored cases in the output ``folder``."""
        facts = asdict(self.protocol)
        return Ledger(folder, folder / SCORES, self.task, self.scans, facts)

    def score(self, cases: Sequence[Case], ledger: Ledger, progress: Progress) -> None:
        """Score those of the ``cases`` that are not yet in the ledger, and note each one there."""
        waiting = []
        done = 0
        for case in cases:
            if ledger.finished(case.name) is None:
                waiting.append(case)
            else:
                done += 1
                progress(case.name, done, len(cases))
        for scored in self.scored(waiting):
            ledger.save(scored.case, spool(ledger.folder, scored))
            done += 1
            progress(scored.case, done, len(cases))


def plan(
    cohort: str | Path | Sequence[Case],
    out: str | Path | None = None,
    *,
    model: Detector | str | Path | None = None,
    maps: str | Path | None = None,
    grid: str = "model",
    split: str | None = None,
    threshold: float | None = None,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
    min_volume: float | None = None,
    channels: Sequence[str] | None = None,
    score: str | None = None,
) -> Plan:
    """What `evaluate` does with the same arguments; raises `AnomriError` if they do not fit each
    other."""
    if (model is None) == (maps is None):
        raise AnomriError("give either a model or a folder of maps to evaluate.")
    if maps is not None and (channels or score or min_volume is not None):
        raise AnomriError(
            "--channels, --score and --min-volume are a model's; maps are measured as they are."
        )
    of_model = sensitivity is not None or false_positive_ml is not None
    if of_model and (maps is not None or threshold is not None):
        raise AnomriError(
            "a sensitivity or false positive volume is the model's; give no threshold or maps beside it."
        )
    if grid not in GRIDS:
        raise AnomriError(f"there is no grid {grid!r}; the grids are {' and '.join(GRIDS)}.")
    threshold = None if threshold is None else float(threshold)
    cases = find_cases(cohort) if isinstance(cohort, str | Path) else list(cohort)
    cases = [without_own_results(case) for case in cases]
    folder = None if out is None else Path(out)
    if model is None:
        return _plan_for_maps(cases, Path(str(maps)), split, threshold, folder)
    base = model if isinstance(model, Detector) else Detector.load(model)
    settings = {
        "grid": grid,
        "threshold": threshold,
        "sensitivity": sensitivity,
        "false_positive_ml": false_positive_ml,
        "min_volume": min_volume,
        "channels": channels and list(channels),
        "score": score,
    }
    detector = base
    if score:
        paper = asdict(Score("absolute"))
        detector = detector.with_score(**(paper if score == "paper" else {"kind": score}))
    detector = detector.with_min_volume(min_volume)
    if channels:
        detector = detector.with_channels(channels)
    detector = detector.with_threshold(sensitivity, false_positive_ml)
    spec = detector.spec
    cases, chosen = choose_cases(cases, split, detector.splits)
    cases = with_usable_names(cases, folder)
    shown = threshold
    if threshold is None and detector.thresholds is not None:
        shown = detector.thresholds.threshold
    what = f"method {spec.method}, channels {', '.join(detector.channels)}, score {describe(spec.score)}"
    return Plan(
        cases,
        lambda some: score_with_model(detector, some, grid, folder, threshold),
        Protocol(what, chosen, grid, shown, threshold is not None, dropped_words(spec.score)),
        Task(base.fingerprint, settings),
        identify(cases, spec.channels),
        detector.device.type,
    )


def _plan_for_maps(
    cases: Sequence[Case],
    maps: Path,
    split: str | None,
    threshold: float | None,
    folder: Path | None,
) -> Plan:
    if not maps.is_dir():
        raise AnomriError(f"{maps}: no such folder; name the one that holds the maps.")
    chosen_cases, chosen = choose_cases(cases, split)
    chosen_cases = with_usable_names(chosen_cases, folder)
    with_maps = [
        replace(case, channels={"map": find_map(maps, case) or maps / case.name})
        for case in chosen_cases
    ]
    given = threshold is not None
    return Plan(
        chosen_cases,
        lambda some: score_maps(maps, some, folder, threshold),
        Protocol(f"maps of {maps}", chosen, "input", threshold, given, dropped_words(Score())),
        Task("none", {"maps": str(maps), "threshold": threshold}),
        identify(with_maps, ["map"]),
    )


def _pool(ledger: Ledger) -> Evaluation:
    """The figures of all cases in the ledger."""
    pool = Pool(ledger.folder)
    for entry in ledger.entries():
        pool.count(entry)
    if not pool.cases:
        raise AnomriError("no case could be evaluated:\n  " + "\n  ".join(pool.failed.values()))
    protocol = Protocol(**ledger.facts)
    table = protocol.table(pool.cases, len(pool.patients), pool.voxels, len(pool.failed))
    return pool.evaluate(table, protocol.threshold)


def _pool_and_save(ledger: Ledger) -> Evaluation:
    """The figures of all cases, written to the output; scores are removed if no case failed."""
    evaluation = _pool(ledger)
    stored = {**ledger.summary(), "facts": ledger.facts, "evaluation": asdict(evaluation)}
    # Before the scores go: from now on the same command finds that it is done.
    write_text(output_folder(ledger.root / LOGS) / EVALUATION, json.dumps(stored))
    _write_results(ledger.root, evaluation)
    return evaluation


def _load_finished(folder: Path, ledger: Ledger | None = None) -> Evaluation | None:
    """The evaluation that was finished in ``folder``, with its files written again.

    ``None`` if there is none, or if it is not the one of the ``ledger``.
    """
    try:
        stored = read_json(folder / LOGS / EVALUATION)
        evaluation = Evaluation.from_json(stored["evaluation"])
    except DAMAGED:
        return None
    if ledger is not None and not (ledger.is_of(stored) and stored.get("facts") == ledger.facts):
        return None
    _write_results(folder, evaluation)
    return evaluation


def _write_results(folder: Path, evaluation: Evaluation) -> None:
    evaluation.save(folder)
    evaluation_report(folder, evaluation)
    if (
        not evaluation.failed
    ):  # else the scores stay, and the same command tries only the failed cases
        shutil.rmtree(folder / SCORES, ignore_errors=True)
