"""Evaluation on a cohort with labels: which cases, which voxels, which table; intervals by patient."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anomri.cases import SUFFIXES, Case, find_cases
from anomri.detection import read_ahead, save_preview
from anomri.detector import Detector
from anomri.files import output_folder
from anomri.pooling import Evaluation, Pool, Scored
from anomri.reporting import report
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
    progress: Callable[[str, int, int], None] = lambda case, done, total: None,
) -> Evaluation:
    """Compare anomaly maps with lesion labels, of a ``model`` or of the folder ``maps``; exact, in bounded memory.

    ``grid`` is ``model`` (slices of the working grid, the paper's protocol) or ``input`` (the scan's own voxels);
    maps, ``<case>_anomaly.nii.gz`` or ``<case>.nii.gz``, are always scored on the input's. Cases are those of
    ``split``; without it, those of the split ``test`` if there are any, else all that have a label. ``threshold``
    replaces the label-free one of the model. Scores are spooled to disk; memory holds one case and the scores of
    lesion voxels. With ``out``, tables and ``report.html`` are written there. Raises `AnomriError`.
    """
    if (model is None) == (maps is None):
        raise AnomriError("give either a model or a folder of maps to evaluate.")
    if grid not in GRIDS:
        raise AnomriError(f"there is no grid {grid!r}; the grids are {' and '.join(GRIDS)}.")
    folder = None if out is None else output_folder(Path(out))
    cases, chosen = choose_cases(find_cases(cohort) if isinstance(cohort, str | Path) else cohort, split)
    if model is not None:
        detector = model if isinstance(model, Detector) else Detector.load(model)
        if threshold is None and detector.spec.thresholds is not None:
            threshold = detector.spec.thresholds.threshold
        source = _detected(detector, cases, grid, folder)
        what = f"method {detector.spec.method}, channels {', '.join(detector.spec.channels)}"
    else:
        source, what, grid = _read_maps(Path(str(maps)), cases), f"maps of {maps}", "input"
    with tempfile.TemporaryDirectory(prefix=".scores-", dir=folder) as spool:
        pooled = Pool(Path(spool))
        for done, scored in enumerate(source, start=1):
            pooled.add(scored)
            progress(scored.case, done, len(cases))
        if not pooled.cases:
            raise AnomriError("no case could be evaluated:\n  " + "\n  ".join(pooled.failed.values()))
        protocol = _protocol(what, chosen, grid, threshold, pooled)
        evaluation = pooled.evaluate(protocol, threshold)
    if folder is not None:
        evaluation.save(folder)
        report(folder)
    return evaluation


def choose_cases(cases: Sequence[Case], split: str | None) -> tuple[list[Case], str]:
    """The labelled cases of a split and how they were chosen, in words; raises `AnomriError` if there are none."""
    if split is None and any(case.split == "test" for case in cases):
        split = "test"
    in_split = [case for case in cases if split is None or case.split == split]
    labelled = [case for case in in_split if case.label is not None]
    if not labelled:
        where = f"split {split!r}" if split else "cohort"
        raise AnomriError(f"no case of the {where} has a label (<case>_seg.nii.gz); there is nothing to compare with.")
    words = f"split {split}" if split else "all cases"
    unlabelled = len(in_split) - len(labelled)
    return labelled, words + (f", without {unlabelled} that have no label" if unlabelled else "")


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
        except AnomriError as error:
            yield Scored(case.name, error=str(error))


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
        except AnomriError as error:
            yield Scored(case.name, error=str(error))


def _protocol(what: str, chosen: str, grid: str, threshold: float | None, pool: Pool) -> dict[str, str]:
    return {
        "scored": what,
        "cases": f"{len(pool.cases)} ({chosen})" + (f"; {len(pool.failed)} failed" if pool.failed else ""),
        "voxels": f"{GRIDS[grid]}, background counted: {pool.voxels:,}",
        "lesion": "every label above zero is one class",
        "AUPRC": "average precision over all voxels, every distinct score a threshold",
        "ceil-Dice": "best Dice over all thresholds, chosen on these labels: an upper bound",
        "threshold": f"{threshold:.5g}, without labels" if threshold is not None else "none",
        "components": "26-connected ones of at most 20 voxels of the working grid are dropped where filtered",
        "lesion-wise": "26-connected lesions; detected if one voxel is in the mask",
        "intervals": "95 %, 2,000 bootstrap resamples of patients",
    }
