"""Scores and label of each case: of a model's detections, or of maps that lie in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.evaluation.maps import check_map, check_map_place
from anomri.model.detector import Detector
from anomri.reporting.previews import remove_preview, save_preview
from anomri.runs.pipeline import describe_error, read_ahead
from anomri.scans.case import Case
from anomri.scans.masks import check_lesion_alone
from anomri.scans.names import SUFFIXES
from anomri.scans.read import read_label, read_map
from anomri.scans.volume import Volume
from anomri.scoring.metrics import Scores, count_components
from anomri.slices import mask_on_published_grid, on_published_grid
from anomri.spec import Score

PUBLISHED_MM = (1.0, 240 / 128, 240 / 128)
"""Voxels of the paper's working grid on BraTS in mm: slices, rows and columns."""


@dataclass
class Scored:
    """Scores and label of one case on the same grid, or the ``error`` that kept it from having
    them.

    ``threshold`` is the score above which its mask lies, if there is one. Components of at most
    ``max_dropped`` voxels are dropped where filtered. ``patient`` is by default the case itself.
    ``notes`` are about its label, ``scan_notes`` about its channels or its map. ``lesions`` counts those of the label as it was drawn, where it
    was brought to another grid, and ``lost`` those that are not there any more. Voxels that are
    ``ignored`` count nowhere.
    """

    case: str
    scores: Scores | None = None
    label: NDArray[np.bool_] | None = None
    max_dropped: int = 0
    error: str | None = None
    threshold: float | None = None
    patient: str | None = None
    notes: Sequence[str] = ()
    scan_notes: Sequence[str] = ()
    lesions: int = 0
    lost: int = 0
    ignored: NDArray[np.bool_] | None = None


def score_with_model(
    detector: Detector,
    cases: Sequence[Case],
    grid: str,
    folder: Path | None,
    threshold: float | None,
) -> Iterator[Scored]:
    """Each case searched by a model, on its working ``grid`` (``model``) or the scan's own
    (``input``).

    Previews are written to ``folder``, if there is one.
    """
    for case, volume, _ in read_ahead(cases, detector.read):
        try:
            if isinstance(volume, AnomriError):
                raise volume
            yield _score_volume(detector, case, volume, grid, folder, threshold)
        except Exception as error:
            yield Scored(case.name, error=describe_error(case, error))


def _score_volume(
    detector: Detector,
    case: Case,
    volume: Volume,
    grid: str,
    folder: Path | None,
    threshold: float | None,
) -> Scored:
    label = volume.lesions()
    detection = detector.detect(volume, threshold=threshold)
    if folder is not None:
        save_preview(detection, folder)
    scores, voxel_mm3 = detection.anomaly_map, volume.geometry.voxel_mm3
    ignored = volume.ignored
    lesions = lost = 0
    if grid == "model":
        lesions = count_components(label)
        scores, label, voxel_mm3 = on_published_grid(
            detection.scores, detection.stack, volume, detector.spec.grid
        )
        lost = max(lesions - count_components(label), 0)
        if ignored is not None:
            ignored = mask_on_published_grid(ignored, detection.stack, detector.spec.grid)
    return Scored(
        case.name,
        scores,
        label,
        max_dropped=detector.spec.score.max_dropped(detection.stack.spacing_mm, voxel_mm3),
        threshold=detection.threshold,
        patient=case.patient,
        notes=_notes_on_label(case, volume.notes),
        scan_notes=_notes_on_scan(case, volume.notes),
        lesions=lesions,
        lost=lost,
        ignored=ignored,
    )


def score_maps(
    maps: Path, cases: Sequence[Case], folder: Path | None, threshold: float | None
) -> Iterator[Scored]:
    """Each case with its map in the folder ``maps``, on the label's grid.

    Previews in ``folder`` that a model left are removed: they do not show these maps.
    """
    for case in cases:
        try:
            if folder is not None and folder.resolve() != maps.resolve():
                remove_preview(folder, case.name)
            yield _score_map(maps, case, threshold)
        except Exception as error:
            yield Scored(case.name, error=describe_error(case, error))


def _score_map(maps: Path, case: Case, threshold: float | None) -> Scored:
    if case.problem:
        raise AnomriError(case.problem)
    path, names = find_map(maps, case), _map_names(case)
    if path is None:
        raise AnomriError(f"{maps}: holds no {names[0]} or {names[2]}.")
    label, geometry = read_label(case)
    assert case.label is not None
    size_notes = check_lesion_alone(case.label, label.lesion, geometry.voxel_mm3)
    scores, map_notes = read_map(path, case.label, geometry)
    map_notes += check_map(case, path, scores, label.lesion)
    map_notes += check_map_place(case, path, scores, label.lesion)
    return Scored(
        case.name,
        scores,
        label.lesion,
        max_dropped=Score().max_dropped(PUBLISHED_MM, geometry.voxel_mm3),
        threshold=threshold,
        patient=case.patient,
        notes=_notes_on_label(case, [*case.notes, *label.notes, *size_notes]),
        scan_notes=_name_case(case, map_notes),
        ignored=label.ignored,
    )


def find_map(maps: Path, case: Case) -> Path | None:
    """The map of a case in the folder ``maps``, if it is there."""
    return next((maps / name for name in _map_names(case) if (maps / name).is_file()), None)


def _map_names(case: Case) -> list[str]:
    return [case.name + ending + suffix for ending in ("_anomaly", "") for suffix in SUFFIXES]


def _notes_on_label(case: Case, notes: Sequence[str]) -> list[str]:
    """The ``notes`` about the case's label, each with the case's name: labels may have the same
    name."""
    if case.label is None:
        return []
    return _name_case(case, [note for note in notes if case.label.name in note])


def _notes_on_scan(case: Case, notes: Sequence[str]) -> list[str]:
    """The ``notes`` about the case's channels and brain mask, each with the case's name."""
    names = [path.name for path in (*case.channels.values(), case.mask) if path is not None]
    about = [note for note in notes if any(name in note for name in names)]
    return [note for note in _name_case(case, about) if note not in _notes_on_label(case, notes)]


def _name_case(case: Case, notes: Sequence[str]) -> list[str]:
    start = f"{case.name}: "
    return [start + note.removeprefix(start) for note in notes]
