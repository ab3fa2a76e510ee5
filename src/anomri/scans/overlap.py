"""Whether the images of a case lie on each other: what share of the tissue they have in common.

The bounds were measured on 99 pairs of channels, skull-stripped or whole heads, and on the same
pairs with one channel moved along each axis (the share of the smaller tissue that is in both):
as scanned at least 0.92, also where one is a slab of a quarter of the slices; moved by 5 mm 0.86 to
0.96, by 10 mm 0.81 to 0.92, by 20 mm 0.72 to 0.83, by 50 mm 0.36 to 0.60, by 100 mm at most 0.29.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.resample import VoxelGrid

TISSUE_LEVEL = 0.1
"""Tissue is brighter than this share of the 95th percentile; air, which may be noisy, is not."""
SAMPLES = 40
"""About how many voxels along each axis are looked at."""
MIN_SAMPLED = 1000
"""If fewer of these are above zero, all voxels are looked at."""
MIN_OVERLAP, DOUBTFUL_OVERLAP = 0.6, 0.88
"""Channels with a smaller share of tissue in common are refused, or noted."""
MIN_TISSUE_ML = 1.0
"""Less tissue does not show where a brain lies."""
MIN_COVERED, MIN_COVERED_BY_FIRST = 0.9, 0.65
"""It is noted if a channel shows less of the tissue of the first, or the first less of another's,
which may be stripped less closely."""
MAX_LABEL_OUTSIDE, MIN_LABEL_INSIDE = 0.1, 0.05
"""A label of which a larger share lies outside the brain is noted, one of which a smaller share lies
inside is refused. No voxel of the 33 labels measured lies outside."""


@dataclass(frozen=True)
class PlacedImage:
    """An image and where it lies: ``values`` (x, y, z) >= 0 on ``grid``."""

    path: Path
    values: NDArray[Any]
    grid: VoxelGrid


class Overlap(NamedTuple):
    """How two images lie on each other, as shares (0 to 1) of their tissue."""

    shared: float
    """Tissue that is in both, as a share of the smaller one."""
    in_common_field: float
    """The same, where tissue beyond the field of the other image is not counted."""
    covered: float
    """The tissue of the first at which the second is above zero."""
    covered_of_second: float
    """The tissue of the second, in the field of the first, at which the first is above zero."""
    apart_mm: float
    """How far apart the middles of their tissue lie."""
    smaller_ml: float
    """The volume of the smaller tissue."""


class _Seen(NamedTuple):
    """One image looked up at the tissue of another."""

    millilitres: float
    tissue: float
    in_field: float
    above_zero: float
    middle_mm: NDArray[np.float64]


def measure_overlap(first: PlacedImage, second: PlacedImage) -> Overlap:
    """How two images that are not empty lie on each other.

    >>> values = np.zeros((20, 20, 20))
    >>> values[5:15, 5:15, 5:15] = 1
    >>> moved = np.array([[1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    >>> first = PlacedImage(Path("a_flair.nii"), values, VoxelGrid((20, 20, 20), np.eye(4)))
    >>> second = PlacedImage(Path("a_t1.nii"), values, VoxelGrid((20, 20, 20), moved))
    >>> measure_overlap(first, second)
    Overlap(shared=0.6, in_common_field=0.6, covered=0.6, covered_of_second=0.6, apart_mm=4.0, smaller_ml=1.0)
    """
    thin_first, thin_second = _thin(first), _thin(second)
    level, second_level = _tissue_level(thin_first), _tissue_level(thin_second)
    if _same_grid(first.grid, second.grid) and _same_grid(thin_first.grid, thin_second.grid):
        # What is looked up is then among the voxels that were chosen, which saves time.
        first, second = thin_first, thin_second
    one = _look_up(thin_first, second, level, second_level)
    other = _look_up(thin_second, first, second_level, level)
    return Overlap(
        max(one.tissue, other.tissue),
        max(_divide(one.tissue, one.in_field), _divide(other.tissue, other.in_field)),
        one.above_zero,
        _divide(other.above_zero, other.in_field),
        float(np.linalg.norm(one.middle_mm - other.middle_mm)),
        min(one.millilitres, other.millilitres),
    )


def tissue_points(image: PlacedImage) -> NDArray[np.float64]:
    """Some points of the tissue in mm (n, 3)."""
    thin = _thin(image)
    points: NDArray[np.float64] = apply_affine(
        thin.grid.affine, np.argwhere(thin.values > _tissue_level(thin))
    )
    return points


def check_channels_overlap(first: PlacedImage, second: PlacedImage, advice: str) -> list[str]:
    """Notes on how a channel lies on the first one of its case.

    Raises `AnomriError`, which ends with the ``advice``, if it surely lies elsewhere.
    """
    found = measure_overlap(first, second)
    if found.smaller_ml < MIN_TISSUE_ML:
        return []
    name, first_name = second.path.name, first.path.name
    # Two slabs of one head may have little in common, and fit where they do.
    fits = found.in_common_field >= DOUBTFUL_OVERLAP
    if found.shared < MIN_OVERLAP and not fits:
        what = "hardly overlaps with" if found.shared else "does not overlap with"
        raise AnomriError(
            f"{second.path}: {what} {first_name}: {found.shared:.0%} of the tissue is in both, and "
            f"their middles lie {found.apart_mm:,.0f} mm apart. They are of different scans, or a "
            f"header is wrong. {advice}"
        )
    if not fits:
        return [
            f"{name} may not lie on {first_name}: {found.shared:.0%} of the tissue is in both (as "
            f"scanned it is more than 90%), and their middles lie {found.apart_mm:.0f} mm apart. Look "
            f"at both. {advice}"
        ]
    notes = []
    if found.covered < MIN_COVERED:
        notes.append(_note_covered(name, first_name, found.covered))
    if found.covered_of_second < MIN_COVERED_BY_FIRST:
        notes.append(_note_covered(first_name, name, found.covered_of_second))
    return notes


def check_mask_overlaps(image: PlacedImage, mask: PlacedImage, what: str = "mask") -> list[str]:
    """Notes on how a brain mask lies on an image of its case, or another image (bool) of a brain.

    ``what`` it is stands in the message. Raises `AnomriError` if it surely lies elsewhere.
    """
    found = measure_overlap(image, mask)
    if found.shared >= DOUBTFUL_OVERLAP:
        return []
    where = (
        f"{found.shared:.0%} of the {what}, or of the tissue if that is less, is in both, and their "
        f"middles lie {found.apart_mm:,.0f} mm apart"
    )
    if found.shared < MIN_OVERLAP:
        how = "hardly overlaps with" if found.shared else "does not overlap with"
        raise AnomriError(
            f"{mask.path}: {how} {image.path.name}: {where}. It is of another scan, or a header is "
            f"wrong. Give the {what} that was made from {image.path.name}."
        )
    return [f"{mask.path.name} may not lie on {image.path.name}: {where}. Look at both."]


def check_label_in_brain(
    path: Path, label: NDArray[np.bool_], brain: NDArray[np.bool_], voxel_mm3: float
) -> list[str]:
    """Notes on how a lesion label lies in the brain; both are (x, y, z) on one grid.

    Raises `AnomriError` if next to nothing of it does. An empty label is right.

    >>> brain = np.zeros((4, 4, 4), bool)
    >>> brain[:2] = True
    >>> check_label_in_brain(Path("a_seg.nii"), brain[::-1] | brain, brain, 1000.0)
    ['a_seg.nii: 32 of its 64 ml (50%) lie outside the brain. Look at both.']
    """
    voxels = np.count_nonzero(label)
    outside = voxels - np.count_nonzero(label & brain)
    if outside <= MAX_LABEL_OUTSIDE * voxels:
        return []
    millilitres = voxel_mm3 / 1000
    if voxels - outside < MIN_LABEL_INSIDE * voxels:
        raise AnomriError(
            f"{path}: {outside / voxels:.0%} of it ({outside * millilitres:.3g} ml) lies outside the "
            f"brain. It is of another scan, or a header is wrong; give the label that was drawn on "
            f"this one."
        )
    return [
        f"{path.name}: {outside * millilitres:.3g} of its {voxels * millilitres:.3g} ml "
        f"({outside / voxels:.0%}) lie outside the brain. Look at both."
    ]


def _note_covered(name: str, other: str, share: float) -> str:
    return f"{name} covers {share:.0%} of what {other} shows; the rest is empty in {name}."


def _thin(image: PlacedImage) -> PlacedImage:
    """About `SAMPLES` voxels of an image along each axis; all, if few of those are above zero."""
    steps = [max(1, length // SAMPLES) for length in image.values.shape]
    values = image.values[:: steps[0], :: steps[1], :: steps[2]]
    if np.count_nonzero(values) < MIN_SAMPLED:
        return image
    x, y, z = values.shape
    return replace(
        image, values=values, grid=VoxelGrid((x, y, z), image.grid.affine @ np.diag([*steps, 1]))
    )


def _tissue_level(image: PlacedImage) -> float:
    """The value above which voxels are tissue and not noisy air; of a mask 0."""
    if image.values.dtype == bool:
        return 0.0
    above_zero = image.values[image.values > 0]
    return TISSUE_LEVEL * float(np.percentile(above_zero, 95)) if above_zero.size else 0.0


def _look_up(image: PlacedImage, other: PlacedImage, level: float, other_level: float) -> _Seen:
    """The ``other`` image at the tissue of ``image``."""
    indices = np.argwhere(image.values > level)
    where = np.rint(apply_affine(np.linalg.inv(other.grid.affine) @ image.grid.affine, indices))
    in_field = ((where >= 0) & (where < other.grid.shape)).all(axis=1)
    values = other.values[tuple(where[in_field].astype(np.intp).T)]
    count = len(indices)
    return _Seen(
        count * image.grid.voxel_mm3 / 1000,
        _divide((values > other_level).sum(), count),
        _divide(in_field.sum(), count),
        _divide((values > 0).sum(), count),
        apply_affine(image.grid.affine, indices.mean(axis=0)),
    )


def _same_grid(one: VoxelGrid, other: VoxelGrid) -> bool:
    return one.shape == other.shape and np.array_equal(one.affine, other.affine)


def _divide(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
