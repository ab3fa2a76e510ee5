"""What masks of brains and labels of lesions mark, and telling the one from the other by how much that is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.names import bare_name

MIN_BRAIN_ML, MIN_BRAIN_SHARE = 300.0, 0.1
"""A mask that leaves less than both of what an image shows is none of a brain."""
MAX_LESION_ML, MAX_LESION_SHARE, MAX_SHARE = 800.0, 0.4, 0.9
"""No lesion has more than the first two, nor takes more than the last of what an image shows."""
SHOWN = 0.1
"""What an image shows lies above this share of its 99.9th percentile; below is air."""
SURE_MAXIMUM = 0.9
"""Of values that are all lower nobody knows where a half of what is meant by one is."""
MAX_CLASS = 10.5
"""Above this, values are not the numbers of classes but shares of a maximum such as 100 or 255."""
MAX_CLASSES = 8
"""So few whole numbers are classes, however large, as 85, 170 and 255."""
UNLIKE = 0.2
"""Of neighbours in a soft label more than this share differ; along its straightest faces it is a third."""
BRAIN_MASK = re.compile("(?:^|[_-])brain[_-]?mask$", re.IGNORECASE)


def lesion_of(path: Path, values: NDArray[Any], notes: list[str]) -> NDArray[np.bool_]:
    """The voxels above zero of a label; of one that interpolation made soft, those from a half on. A note says so.

    Where all values are so low that nobody knows what a half is, it is all of them. Whole numbers are classes or numbers of
    lesions, but for those above `MAX_CLASS` that differ from voxel to voxel: shares of 255, or per cent.
    """
    inside: NDArray[np.bool_] = values > 0
    if not inside.any():
        return inside
    above = values[inside]
    most = float(above.max())
    if most - float(above.min()) <= 1e-3 * most:
        return inside
    # Whole numbers that a header scales are nearly whole.
    if values.dtype.kind in "iu" or bool((np.abs(above - above.round()) <= 1e-3).all()):
        if (
            most <= MAX_CLASS
            or len(np.unique(above)) <= MAX_CLASSES
            or not _is_soft(values, inside)
        ):
            return inside
        notes.append(
            f"{path.name} has values up to {most:.3g} that differ from voxel to voxel; those from {most / 2:g} on are taken."
        )
        return np.asarray(values >= most / 2)
    if most < SURE_MAXIMUM:
        notes.append(
            f"{path.name} has values between whole numbers, of up to {most:.3g} only; all above zero are taken."
        )
        return inside
    cut = 0.5 if most <= MAX_CLASS else most / 2
    notes.append(
        f"{path.name} has values between whole numbers (up to {most:.3g}); those from {cut:g} on are taken."
    )
    return np.asarray(values >= cut)


def _is_soft(values: NDArray[Any], inside: NDArray[np.bool_]) -> bool:
    """Whether neighbours ``inside``, but for those at the maximum, often differ: of numbered lesions only some that touch do."""
    below = inside & (values < values.max())
    pairs = unlike = 0
    for axis in range(inside.ndim):
        one, marked, low = (np.moveaxis(array, axis, 0) for array in (values, inside, below))
        both = marked[1:] & marked[:-1] & (low[1:] | low[:-1])
        pairs += int(np.count_nonzero(both))
        unlike += int(np.count_nonzero(both & (one[1:] != one[:-1])))
    return unlike > UNLIKE * pairs


def _shown(values: NDArray[Any]) -> NDArray[np.bool_]:
    """What an image shows: all but air, which may be noise."""
    few = values[::3, ::3, ::3]
    few = few[few > 0]
    return np.asarray(values > (SHOWN * float(np.percentile(few, 99.9)) if few.size else 0))


def check_brain(
    path: Path, mask: NDArray[np.bool_], image: Path, values: NDArray[Any], voxel_mm3: float
) -> None:
    """Raise `AnomriError` if a mask leaves so little of an image that it is no brain's, unless its name says it is."""
    if BRAIN_MASK.search(bare_name(path)) or not (mask & (values > 0)).any():
        return
    shown = _shown(values)
    inside, whole = int(np.count_nonzero(mask & shown)), int(np.count_nonzero(shown))
    millilitres = inside * voxel_mm3 / 1000
    if inside < MIN_BRAIN_SHARE * whole and millilitres < MIN_BRAIN_ML:
        raise AnomriError(
            f"{path}: leaves {millilitres:.3g} ml of {image.name}, {inside / whole:.1%} of what is to be seen there; that is no "
            f"mask of a brain. If it is the label of a lesion, call it <case>_seg.nii.gz, or name it so in a .tsv; if it is a "
            f"brain's, <case>_brain_mask.nii.gz."
        )


def check_lesion(
    path: Path, label: NDArray[np.bool_], image: Path, values: NDArray[Any], voxel_mm3: float
) -> None:
    """Raise `AnomriError` if a label marks so much of an image that it is no lesion's."""
    marked = int(np.count_nonzero(label))
    if marked <= MAX_LESION_SHARE * np.count_nonzero(values):
        return
    shown = _shown(values)
    inside = int(np.count_nonzero(label & shown))
    share, millilitres = inside / max(int(np.count_nonzero(shown)), 1), inside * voxel_mm3 / 1000
    if share > MAX_SHARE or (share > MAX_LESION_SHARE and millilitres > MAX_LESION_ML):
        raise AnomriError(
            f"{path}: marks {millilitres:,.0f} ml, {share:.0%} of what is to be seen in {image.name}; that is no label of a "
            f"lesion. If it is the brain's mask, call it <case>_mask.nii.gz; if it shows tissues, take it out of the "
            f"folder or name the files in a .tsv."
        )
