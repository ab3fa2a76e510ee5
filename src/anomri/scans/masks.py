"""Whether the size of a brain mask or a lesion label fits what it is said to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.names import bare_name

MIN_BRAIN_ML, MIN_BRAIN_SHARE = 300.0, 0.1
"""A mask of less than both, in ml and as a share of the tissue, is not one of a brain. A newborn has
300 to 400 ml; less may be a part of a brain, with a note."""
MAX_MASK_ML = 2500.0
"""A mask of more is noted: no brain is so large (28 patients with tumours have 1,200 to 1,750 ml)."""
MAX_LESION_ML, MAX_LESION_SHARE = 800.0, 0.4
"""A label of more than both is not one of lesions: 33 labels of tumours and of multiple sclerosis
have 0.8 to 232 ml, up to 0.17 of the brain."""
LARGE_LESION_ML = 300.0
"""A label of more, whose image is not read, is noted: it may be the mask of a small brain."""
MAX_LESION_SHARE_OF_ANY = 0.9
"""A label of more than this share of the tissue is not one of lesions, however small the image."""
TISSUE_LEVEL = 0.1
"""Tissue is brighter than this share of the 99.9th percentile; air, which may be noisy, is not."""
BRAIN_MASK_NAME = re.compile("(?:^|[_-])brain[_-]?mask$", re.IGNORECASE)


def check_brain(
    path: Path, mask: NDArray[np.bool_], image: Path, values: NDArray[Any], voxel_mm3: float
) -> list[str]:
    """Notes if a brain mask (x, y, z) is smaller or larger than a brain.

    Raises `AnomriError` if it is too small for a brain's and its name does not say that it is one,
    or if it marks the air: all corners of the image, and not all of it.
    """
    marked_ml = np.count_nonzero(mask) * voxel_mm3 / 1000
    corners = mask[np.ix_(*[[0, -1]] * 3)]
    if corners.all() and not mask.all():
        raise AnomriError(
            f"{path}: marks {marked_ml:,.0f} ml and all corners of {image.name}, but not all of "
            f"it: it marks the air around the brain. Give a mask that is above zero in the brain "
            f"and zero around it."
        )
    if mask.all():
        whole = f"marks all of {image.name} ({marked_ml:,.0f} ml), and so takes nothing away"
        return [f"{path.name} {whole}; look at it."]
    if marked_ml > MAX_MASK_ML:
        return [f"{path.name} marks {marked_ml:,.0f} ml, more than any brain has; look at it."]
    if not (mask & (values > 0)).any():
        return []
    millilitres, share = _measure(mask, values, voxel_mm3)
    found = f"marks {millilitres:.3g} ml, {share:.1%} of the tissue in {image.name}"
    if millilitres >= MIN_BRAIN_ML:
        return []
    if share >= MIN_BRAIN_SHARE or BRAIN_MASK_NAME.search(bare_name(path)):
        return [
            f"{path.name} {found}; a newborn's brain has {MIN_BRAIN_ML:g} ml or more, so it is "
            f"taken for a part of a brain."
        ]
    raise AnomriError(
        f"{path}: {found}; that is not the mask of a brain. If it is a lesion label, name it "
        f"<case>_seg.nii.gz, or list it in a .tsv; if it is a brain mask, name it "
        f"<case>_brain_mask.nii.gz."
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


def check_lesion_alone(path: Path, label: NDArray[np.bool_], voxel_mm3: float) -> list[str]:
    """A note if a label, whose image is not at hand, is very large.

    Raises `AnomriError` if it is too large for one of lesions.
    """
    millilitres = np.count_nonzero(label) * voxel_mm3 / 1000
    if millilitres > MAX_LESION_ML:
        raise AnomriError(
            f"{path}: marks {millilitres:,.0f} ml; that is not a lesion label, but the mask of a "
            f"brain, or tissue. Give the label of the lesions."
        )
    if millilitres <= LARGE_LESION_ML:
        return []
    return [
        f"{path.name} marks {millilitres:,.0f} ml, much for a lesion; if it is the mask of a brain, "
        f"give the label of the lesions instead."
    ]


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
