"""Whether the file in a folder of maps is a map: a label or a mask may have that name."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.content import FEW_LEVELS
from anomri.scans.overlap import PlacedImage, check_label_in_brain, check_mask_overlaps
from anomri.scans.read import read_volume

MIN_EQUAL_VOXELS = 100
"""A mask that marks the label exactly is the label itself, unless it marks fewer voxels."""
SAMPLE = 10_000
"""So many values are looked at before all are sorted."""


def check_map(
    case: Case, path: Path, scores: NDArray[np.floating[Any]], label: NDArray[np.bool_]
) -> list[str]:
    """Notes on a map (x, y, z) that is a mask or a channel of the case.

    Both are scored as they are. Raises `AnomriError` if the map is the case's label or brain mask,
    by its bytes or by what it marks.
    """
    for what, file in (("label", case.label), ("brain mask", case.mask)):
        if file is not None and _is_same(path, file):
            raise AnomriError(
                f"{path}: is the {what} of {case.name}, not an anomaly map ({file} is the same "
                f"image). Give the map of that case."
            )
    notes = [
        f"{path.name} is channel {channel} of {case.name} itself: its intensities are scored."
        for channel, file in case.channels.items()
        if _is_same(path, file)
    ]
    marked: NDArray[np.bool_] = scores > 0
    if not marked.any() or scores.min() < 0:
        return notes
    above = scores[marked]
    levels = np.unique(above[:SAMPLE])
    if len(levels) > FEW_LEVELS:
        return notes
    levels = np.unique(above)
    if len(levels) > FEW_LEVELS:
        return notes
    voxels = above.size
    if voxels >= MIN_EQUAL_VOXELS and np.array_equal(marked, label):
        raise AnomriError(
            f"{path}: marks exactly the {voxels:,} voxels of the label of {case.name}; it is the "
            f"label, not an anomaly map. Give the map of that case."
        )
    named = ", ".join(f"{level:.4g}" for level in levels)
    return [
        *notes,
        f"{path.name} holds only {named} above zero: it is a mask, and is scored as a map of so few "
        f"levels.",
    ]


def check_map_place(
    case: Case, path: Path, scores: NDArray[np.floating[Any]], label: NDArray[np.bool_]
) -> list[str]:
    """Notes on where a map and a label (x, y, z) lie, if the map is zero in most of the label.

    Then they are held against the case's first channel, if it can be read. Raises `AnomriError` if
    one of them surely lies elsewhere.
    """
    assert case.label is not None
    marked: NDArray[np.bool_] = scores > 0
    lesion, scored = np.count_nonzero(label), np.count_nonzero(label & marked)
    if 2 * scored >= lesion or not marked.any():
        return []
    notes = [] if scored else [f"{path.name}: no voxel of the label has a score above zero."]
    channel = next(iter(case.channels), None)
    try:
        volume = read_volume(case, [channel or ""], with_label=False)
    except AnomriError:
        return notes
    if volume.geometry.canonical_shape != marked.shape:
        return notes
    grid = volume.geometry.canonical_grid
    image = PlacedImage(case.channels[channel or ""], volume.channel(0), grid)
    notes += check_mask_overlaps(image, PlacedImage(path, marked, grid), "map")
    return notes + check_label_in_brain(case.label, label, volume.foreground, grid.voxel_mm3)


def _is_same(path: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    try:
        return filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False
