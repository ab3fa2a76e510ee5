"""What masks of brains and labels of lesions mark, and telling the one from the other by how much that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.naming import TISSUE, bare_name
from anomri.spec import AnomriError

MIN_BRAIN_ML, MIN_BRAIN_SHARE = 300.0, 0.1
"""A mask that leaves less than both of what an image shows is none of a brain."""
SHOWN = 0.1
"""What an image shows lies above this share of its 99.9th percentile; below is air."""
MAX_LESION_SHARE = 0.6
"""No lesion takes more of a brain, or of a head."""
SURE, WHITE = 0.9, 255.0
"""The least maximum of a soft mask of which a half is 0.5; and the maximum of one whose half is that of 255."""


def marked(path: Path, values: NDArray[Any], notes: list[str]) -> NDArray[np.bool_]:
    """The voxels above zero of a mask or label; of one that interpolation made soft, those from a half on, with a note."""
    inside: NDArray[np.bool_] = values > 0
    if values.dtype.kind in "iu" or not inside.any():
        return inside
    above = values[inside]
    most = float(above.max())
    # Headers may scale whole numbers; and of probabilities that are all low nobody knows where a half is.
    if most < SURE or bool((np.abs(above - above.round()) <= 0.01 * above).all()):
        return inside
    cut = WHITE / 2 if WHITE - 55 < most < WHITE + 45 else 0.5
    notes.append(f"{path.name} has values between whole numbers (up to {most:.3g}); those from {cut:g} on are taken.")
    return np.asarray(values >= cut)


def _shown(values: NDArray[Any]) -> NDArray[np.bool_]:
    """What an image shows: all but air, which may be noise."""
    few = values[::3, ::3, ::3]
    few = few[few > 0]
    return np.asarray(values > (SHOWN * float(np.percentile(few, 99.9)) if few.size else 0))


def check_brain(path: Path, mask: NDArray[np.bool_], image: Path, values: NDArray[Any], voxel_mm3: float) -> None:
    """Raise `AnomriError` if a mask leaves so little of an image that it is no brain's, unless its name says it is."""
    if TISSUE.search(bare_name(path)):
        return
    shown = _shown(values)
    inside, whole = int(np.count_nonzero(mask & shown)), int(np.count_nonzero(shown))
    millilitres = inside * voxel_mm3 / 1000
    if inside and inside < MIN_BRAIN_SHARE * whole and millilitres < MIN_BRAIN_ML:
        raise AnomriError(
            f"{path}: leaves {millilitres:.3g} ml of {image.name}, {inside / whole:.1%} of what is to be seen there; that is no "
            f"mask of a brain. If it is the label of a lesion, call it <case>_seg.nii.gz, or name it so in a .tsv; if it is a "
            f"brain's, <case>_brain_mask.nii.gz."
        )


def check_lesion(path: Path, label: NDArray[np.bool_], image: Path, values: NDArray[Any]) -> None:
    """Raise `AnomriError` if a label marks so much of an image that it is no lesion's."""
    if np.count_nonzero(label) <= MAX_LESION_SHARE * np.count_nonzero(values):
        return
    shown = _shown(values)
    share = np.count_nonzero(label & shown) / max(int(np.count_nonzero(shown)), 1)
    if share > MAX_LESION_SHARE:
        raise AnomriError(
            f"{path}: marks {share:.0%} of what is to be seen in {image.name}; that is no label of a lesion. If it is the brain's "
            f"mask, call it <case>_mask.nii.gz; if it shows tissues, take it out of the folder, or name the files in a .tsv."
        )
