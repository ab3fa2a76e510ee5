"""Evaluation on a cohort with labels: which cases, which voxels, which table; intervals by patient."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from anomri.cases import SUFFIXES, Case, find_cases
from anomri.detection import CASE_ERRORS, problem, read_ahead
from anomri.detector import Detector
from anomri.files import output_folder
from anomri.pooling import Evaluation, Pool, Scored
from anomri.previews import save_preview
from anomri.reporting import evaluation_report
from anomri.slices import pixels_per_voxel
from anomri.spec import AnomriError, Grid, Score
from anomri.volume import read_label, read_map

GRIDS = {
    "model": "every pixel of the slices with brain, on the model's working grid",
    "input": "every voxel of the scan's own grid",
}


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
    progress: Callable[[str, int, int], None] = lambda case, done, total: None,
) -> Evaluation:
    """Compare anomaly maps with lesion labels, of a ``model`` or of the folder ``maps``; exact, in bounded memory.

    ``grid`` is ``model`` (slices of the working grid, the paper's protocol) or ``input`` (the scan's own voxels);
    maps, ``<case>_anomaly.nii.gz`` or ``<case>.nii.gz``, are always scored on the input's. Cases are those of
    ``split``; without it, those of the split ``test`` if there are any, else all that have a label, but none that
    the model was trained or validated on. ``threshold``
    replaces the label-free one of the model; ``sensitivity`` or ``false_positive_ml`` choose another of its own.
    Scores are spooled to disk; memory holds one case and the scores of
    lesion voxels. With ``out``, tables and ``report.html`` are written there. Raises `AnomriError`.
    """
    if (model is None) == (maps is None):
        raise AnomriError("give either a model or a folder of maps to evaluate.")
    if (sensitivity, false_positive_ml) != (None, None) and (maps is not None or threshold is not None):
        raise AnomriError("a sensitivity or false positive volume is the model's; give no threshold or maps beside it.")
    if grid not in GRIDS:
        raise AnomriError(f"there is no grid {grid!r}; the grids are {' and '.join(GRIDS)}.")
    folder = None if out is None else output_folder(Path(out))
    cases = find_cases(cohort) if isinstance(cohort, str | Path) else list(cohort)
    given = threshold is not None
    if model is not None:
        detector = model if isinstance(model, Detector) else Detector.load(model)
        detector = detector.with_threshold(sensitivity, false_positive_ml)
        cases, chosen = choose_cases(cases, split, detector.splits)
        if threshold is None and detector.spec.thresholds is not None:
            threshold = detector.spec.thresholds.threshold
        dropped = detector.spec.score.max_dropped_voxels
        source = _detected(detector, cases, grid, folder)
        what = f"method {detector.spec.method}, channels {', '.join(detector.spec.channels)}"
    else:
        cases, chosen = choose_cases(cases, split)
        dropped = Score().max_dropped_voxels
        source, what, grid = _read_maps(Path(str(maps)), cases), f"maps of {maps}", "input"
    with tempfile.TemporaryDirectory(prefix=".scores-", dir=folder) as spool:
        pooled = Pool(Path(spool))
        for done, scored in enumerate(source, start=1):
            pooled.add(scored)
            progress(scored.case, done, len(cases))
        if not pooled.cases:
            raise AnomriError("no case could be evaluated:\n  " + "\n  ".join(pooled.failed.values()))
        protocol = _protocol(what, chosen, grid, pooled)
        if threshold is not None:
            protocol["threshold"] = f"{threshold:.5g}, " + (
                "given by the user" if given else "the model's, without labels"
            )
        protocol["components"] = (
            f"26-connected ones of at most {dropped} voxels of the working grid are dropped where filtered"
        )
        evaluation = pooled.evaluate(protocol, threshold)
    if folder is not None:
        evaluation.save(folder)
        evaluation_report(folder)
    return evaluation


def choose_cases(
    cases: Sequence[Case], split: str | None, seen: Mapping[str, str] | None = None
) -> tuple[list[Case], str]:
    """The labelled cases of a split and how they were chosen, in words; raises `AnomriError` if there are none.

    ``seen`` gives the split that cases had when the model was trained; unless a split is asked for, those of its
    training and validation are left out.
    """
    known: set[str] = set()
    if split is None:
        known = {case.name for case in cases if (seen or {}).get(case.name) in ("train", "val")}
        if any(case.split == "test" and case.name not in known for case in cases):
            split, known = "test", {case.name for case in cases if case.split == "test"} & known
    in_split = [case for case in cases if (split is None or case.split == split) and case.name not in known]
    if known and not in_split:
        raise AnomriError(
            f"the model was trained or validated on all {len(cases)} cases; evaluate on others, or ask for "
            f"--split val, knowing that those chose the model."
        )
    labelled = [case for case in in_split if case.label is not None]
    if not labelled:
        where = f"split {split!r}" if split else "cohort"
        raise AnomriError(f"no case of the {where} has a label (<case>_seg.nii.gz); there is nothing to compare with.")
    words = f"split {split}" if split else "all cases"
    unlabelled = len(in_split) - len(labelled)
    words += f", without {unlabelled} that have no label" if unlabelled else ""
    return labelled, words + (f", without {len(known)} that the model was trained or validated on" if known else "")


def _detected(detector: Detector, cases: Sequence[Case], grid: str, folder: Path | None) -> Iterator[Scored]:
    for case, volume, _ in read_ahead(cases, detector.read):
        try:
            if isinstance(volume, AnomriError):
                raise volume
            detection = detector.detect(volume)
            if folder is not None:
                save_preview(detection, folder)
            dropped = float(detector.spec.score.max_dropped_voxels)
            if grid == "model":
                assert detection.stack.label is not None
                yield Scored(case.name, detection.scores, detection.stack.label.numpy(), dropped)
            else:
                dropped *= pixels_per_voxel(volume.geometry, detector.spec.grid)
                yield Scored(case.name, detection.anomaly_map, volume.label, dropped)
        except CASE_ERRORS as error:
            yield Scored(case.name, error=problem(case, error))


def _read_maps(maps: Path, cases: Sequence[Case]) -> Iterator[Scored]:
    for case in cases:
        names = [case.name + ending + suffix for ending in ("_anomaly", "") for suffix in SUFFIXES]
        path = next((maps / name for name in names if (maps / name).is_file()), None)
        try:
            if path is None:
                raise AnomriError(f"{maps}: holds no {names[0]} or {names[2]}.")
            label, geometry = read_label(case)
            assert case.label is not None
            scores = read_map(path, case.label, geometry)
            dropped = Score().max_dropped_voxels * pixels_per_voxel(geometry, Grid())
            yield Scored(case.name, scores, label, dropped)
        except CASE_ERRORS as error:
            yield Scored(case.name, error=problem(case, error))


def _protocol(what: str, chosen: str, grid: str, pool: Pool) -> dict[str, str]:
    return {
        "scored": what,
        "cases": f"{len(pool.cases)} ({chosen})" + (f"; {len(pool.failed)} failed" if pool.failed else ""),
        "voxels": f"{GRIDS[grid]}, background counted: {pool.voxels:,}",
        "lesion": "every label above zero is one class",
        "AUPRC": "average precision over all voxels, every distinct score a threshold",
        "ceil-Dice": "best Dice over all thresholds, chosen on these labels: an upper bound",
        "threshold": "none",
        "lesion-wise": "26-connected lesions; detected if one voxel is in the mask",
        "intervals": "95 %, 2,000 bootstrap resamples of patients",
    }
