"""Brain masks and lesion labels: what they mark, and whether their size fits what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.names import bare_name

MIN_BRAIN_ML, MIN_BRAIN_SHARE = 300.0, 0.1
"""A mask of less than both, in ml and as a share of the tissue, is not one of a brain."""
MAX_LESION_ML, MAX_LESION_SHARE = 800.0, 0.4
"""A label of more than both is not one of lesions."""
MAX_LESION_SHARE_OF_ANY = 0.9
"""A label of more than this share of the tissue is not one of lesions, however small the image."""
TISSUE_LEVEL = 0.1
"""Tissue is brighter than this share of the 99.9th percentile; air, which may be noisy, is not."""
MIN_PROBABILITY_PEAK = 0.9
"""Values that stay below this are not probabilities: half of what they should reach is unknown."""
MAX_CLASS = 10.5
"""Larger values are not class numbers but shares of a maximum such as 100 or 255."""
MAX_CLASSES = 8
"""This few different whole numbers are classes, however large, as in 85, 170, 255."""
MAX_UNEQUAL_NEIGHBOURS = 0.2
"""A label with a larger share of unequal neighbours is soft; in numbered lesions fewer differ."""
WHOLE_NUMBER = 1e-3
"""Whole numbers that a header scales are only nearly whole, by less than this."""
BRAIN_MASK_NAME = re.compile("(?:^|[_-])brain[_-]?mask$", re.IGNORECASE)


def binarise_label(values: NDArray[Any], name: str) -> tuple[NDArray[np.bool_], list[str]]:
    """The voxels that a label marks, and notes on how its values were understood.

    All voxels above zero are marked, unless the values are shares (probabilities, per cent, or of
    255): then those from half of the full value on. ``name`` is what the notes call the label.

    >>> marked, notes = binarise_label(np.array([0, 0.2, 0.6, 1]), "a_seg.nii")
    >>> marked.tolist()
    [False, False, True, True]
    >>> notes
    ['a_seg.nii has values between whole numbers (up to 1); those from 0.5 on are taken.']
    """
    inside: NDArray[np.bool_] = values > 0
    if not inside.any():
        return inside, []
    above = values[inside]
    most = float(above.max())
    if most - float(above.min()) <= 1e-3 * most:
        return inside, []
    if _are_whole_numbers(above):
        if _are_classes(values, inside, most):
            return inside, []
        half = most / 2
        return np.asarray(values >= half), [
            f"{name} has values up to {most:.3g} that differ from voxel to voxel; those from "
            f"{half:g} on are taken."
        ]
    if most < MIN_PROBABILITY_PEAK:
        return inside, [
            f"{name} has values between whole numbers, of up to {most:.3g} only; all above zero "
            f"are taken."
        ]
    half = 0.5 if most <= MAX_CLASS else most / 2
    return np.asarray(values >= half), [
        f"{name} has values between whole numbers (up to {most:.3g}); those from {half:g} on are "
        f"taken."
    ]


def split_ignored(
    values: NDArray[Any], ignored: Sequence[int], name: str
) -> tuple[NDArray[Any], NDArray[np.bool_] | None, list[str]]:
    """The values of a label without those that mean "not assessed", where these are, and notes.

    ``None`` if there are none.

    >>> values, where, notes = split_ignored(np.array([0, 1, 2]), [2], "a_seg.nii")
    >>> values.tolist(), where.tolist()
    ([0, 1, 0], [False, False, True])
    >>> notes
    ['a_seg.nii: 1 voxels of value 2 are not assessed, and are left out.']
    """
    where: NDArray[np.bool_] = np.zeros(values.shape, dtype=bool)
    for value in ignored:
        where |= np.abs(values - float(value)) < WHOLE_NUMBER
    if not where.any():
        return values, None, []
    named = ", ".join(map(str, ignored))
    note = (
        f"{name}: {int(where.sum()):,} voxels of value {named} are not assessed, and are left out."
    )
    return np.where(where, values.dtype.type(0), values), where, [note]


def check_brain(
    path: Path, mask: NDArray[np.bool_], image: Path, values: NDArray[Any], voxel_mm3: float
) -> None:
    """Raise `AnomriError` if a mask is too small for a brain's, unless its name says it is one."""
    if BRAIN_MASK_NAME.search(bare_name(path)) or not (mask & (values > 0)).any():
        return
    millilitres, share = _measure(mask, values, voxel_mm3)
    if share < MIN_BRAIN_SHARE and millilitres < MIN_BRAIN_ML:
        raise AnomriError(
            f"{path}: marks {millilitres:.3g} ml, {share:.1%} of the tissue in {image.name}; that "
            f"is not the mask of a brain. If it is a lesion label, name it <case>_seg.nii.gz, or "
            f"list it in a .tsv; if it is a brain mask, name it <case>_brain_mask.nii.gz."
        )


def check_lesion(
    path: Path, label: NDArray[np.bool_], image: Path, values: NDArray[Any], voxel_mm3: float
) -> None:
    """Raise `AnomriError` if a label is too large for one of lesions."""
    if np.count_nonzero(label) <= MAX_LESION_SHARE * np.count_nonzero(values):
        return
    millilitres, share = _measure(label, values, voxel_mm3)
    too_large = share > MAX_LESION_SHARE and millilitres > MAX_LESION_ML
    if too_large or share > MAX_LESION_SHARE_OF_ANY:
        raise AnomriError(
            f"{path}: marks {millilitres:,.0f} ml, {share:.0%} of the tissue in {image.name}; that "
            f"is not a lesion label. If it is a brain mask, name it <case>_mask.nii.gz; if it "
            f"shows tissues, take it out of the folder or list the files in a .tsv."
        )


def _are_whole_numbers(values: NDArray[Any]) -> bool:
    if values.dtype.kind in "iu":
        return True
    return bool((np.abs(values - values.round()) <= WHOLE_NUMBER).all())


def _are_classes(values: NDArray[Any], inside: NDArray[np.bool_], most: float) -> bool:
    """Whether whole numbers, of up to ``most``, are classes or numbers of lesions."""
    if most <= MAX_CLASS or len(np.unique(values[inside])) <= MAX_CLASSES:
        return True
    return not _is_soft(values, inside)


def _is_soft(values: NDArray[Any], inside: NDArray[np.bool_]) -> bool:
    """Whether neighbouring values ``inside``, apart from those at the maximum, often differ."""
    below_maximum = inside & (values < values.max())
    pairs = unequal = 0
    for axis in range(inside.ndim):
        moved, marked, below = (
            np.moveaxis(array, axis, 0) for array in (values, inside, below_maximum)
        )
        counted = marked[1:] & marked[:-1] & (below[1:] | below[:-1])
        pairs += int(np.count_nonzero(counted))
        unequal += int(np.count_nonzero(counted & (moved[1:] != moved[:-1])))
    return unequal > MAX_UNEQUAL_NEIGHBOURS * pairs


def _measure(
    mask: NDArray[np.bool_], values: NDArray[Any], voxel_mm3: float
) -> tuple[float, float]:
    """The tissue inside a mask, in ml and as a share of all tissue in the image."""
    sample = values[::3, ::3, ::3]
    sample = sample[sample > 0]
    level = TISSUE_LEVEL * float(np.percentile(sample, 99.9)) if sample.size else 0.0
    tissue = values > level
    inside = int(np.count_nonzero(mask & tissue))
    return inside * voxel_mm3 / 1000, inside / max(int(np.count_nonzero(tissue)), 1)
