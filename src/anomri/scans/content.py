"""Whether the values of an image are those of a scan or of a mask: a file's name may be wrong.

The bounds were measured on the scans and labels that the project is developed with: 124 scans (8 to
16 bits, also rounded to 16 grey levels), lesion labels, and label maps of the whole head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.marked import NOISE, full_value

PLANES = 8
"""How many planes of an image are looked at."""
MIN_SAMPLE = 2000
"""If fewer voxels than this are above zero in those planes, the whole image is looked at."""
FEW_LEVELS = 8
"""No scan has so few different values above zero; masks, lesion labels and tissue classes do."""
MAX_FLAT = ((24, 0.72), (np.inf, 0.5))
"""Up to how many different values, the share of flat voxels that a scan has at most: scans have up
to 0.05, rounded to 32 or 16 grey levels up to 0.40 or 0.70; label maps have 0.75, at 3 mm 0.53."""
MAX_PLATEAU = 0.12
"""The share at the maximum that a scan has at most: scans have up to 0.002, clipped at their 95th
percentile 0.05; probability maps of the brain have 0.5, of lesions 0.15."""
MIN_HIGH, NOTHING = 0.05, 1e-4
"""A smaller share of voxels above a tenth of the maximum are faulty ones of a scan, unless half of
all voxels are below the second number times the maximum."""
MIN_SCAN_LEVELS = 64
"""An image has more different values than this to be called a scan where a mask is expected."""
MAX_SCAN_FLAT = 0.25
"""A larger share of flat voxels, the commonest value included, is not called one: scans have
0.05."""
MIN_SCAN_SHARE = 0.1
"""A scan is above zero in more of its voxels: a brain in its usual field in 0.11 of some planes."""
MIN_TISSUE_SHARE = 0.07
"""A scan is above a tenth of its 99.9th percentile in more of its voxels: scans in 0.11, soft
labels of lesions in 0.05, also where softmax or cubic interpolation leaves no voxel at zero."""
RELATIVE = 1e-3
"""Values that differ by less than this share are equal."""


def check_scan(path: Path, values: NDArray[Any]) -> None:
    """Raise `AnomriError` if ``values`` (x, y, z) are those of a mask, a label or a probability
    map.

    An image without a voxel above zero passes.
    """
    sample = _choose_planes(values)
    different, counts = np.unique(sample[sample > 0], return_counts=True)
    if not different.size:
        return
    commonest = different[counts.argmax()]
    flat = _share_flat(sample, np.asarray((sample > 0) & (sample != commonest)))
    plateau = _share_at_maximum(different, counts)
    if len(different) <= FEW_LEVELS:
        shown = "one value" if len(different) == 1 else f"{len(different)} different values"
        found = f"holds only {shown} above zero; it is a mask or a label"
    elif flat > next(limit for levels, limit in MAX_FLAT if len(different) <= levels):
        found = f"{flat:.0%} of its voxels equal the ones beside them; it is a label map"
    elif plateau > MAX_PLATEAU:
        found = f"{plateau:.0%} of its voxels are at its maximum; it is a probability map or a mask"
    else:
        return
    raise AnomriError(
        f"{path}: {found}, not a scan. Give the scan itself. A brain mask is named "
        f"<case>_mask.nii.gz or given with --brain-mask, a lesion label is named <case>_seg.nii.gz."
    )


def is_scan(values: NDArray[Any]) -> bool:
    """Whether ``values`` (x, y, z) are surely those of a scan or of a map, and neither of a mask
    nor of a label.

    >>> is_scan(np.random.default_rng(0).normal(500, 50, (20, 20, 20)))
    True
    >>> is_scan(np.arange(20) * np.ones((20, 20, 1)))
    False
    """
    sample = _choose_planes(values)
    different, counts = np.unique(sample[sample > 0], return_counts=True)
    if len(different) <= MIN_SCAN_LEVELS or counts.sum() < MIN_SCAN_SHARE * sample.size:
        return False
    if different[-1] < NOISE:
        return False
    if _share_at_maximum(different, counts) > MAX_PLATEAU:
        return False
    bright = _count_bright(different, counts)
    if bright < MIN_TISSUE_SHARE * sample.size and full_value(float(different[-1])) is not None:
        return False
    return _share_flat(sample, np.asarray(sample > 0)) <= MAX_SCAN_FLAT


def _choose_planes(values: NDArray[Any]) -> NDArray[Any]:
    """Some planes of an image, or all of it if these hold little."""
    chosen = np.linspace(0, values.shape[2] - 1, PLANES + 2).round().astype(int)[1:-1]
    sample = values[:, :, np.unique(chosen)]
    return sample if np.count_nonzero(sample > 0) >= MIN_SAMPLE else values


def _share_at_maximum(different: NDArray[Any], counts: NDArray[np.intp]) -> float:
    """The share within 2 % of the maximum, of the voxels above a tenth of it.

    It is 0 where so few are above a tenth that they may be saturated voxels of a scan: there the
    rest of a probability map is next to nothing.
    """
    most = float(different[-1])
    high = counts[different > 0.1 * most].sum()
    if high < MIN_HIGH * counts.sum():
        median = different[np.searchsorted(counts.cumsum(), counts.sum() / 2)]
        if median > NOTHING * most:
            return 0.0
    return float(counts[different >= 0.98 * most].sum() / high)


def _count_bright(different: NDArray[Any], counts: NDArray[np.intp]) -> int:
    """How many voxels lie above a tenth of the 99.9th percentile."""
    most = different[np.searchsorted(counts.cumsum(), 0.999 * counts.sum())]
    return int(counts[different > 0.1 * most].sum())


def _share_flat(values: NDArray[Any], counted: NDArray[np.bool_]) -> float:
    """The share of rows of three ``counted`` voxels, along x and y, that hold one value."""
    rows = flat = 0
    for axis in (0, 1):
        row, inside = np.moveaxis(values, axis, 0), np.moveaxis(counted, axis, 0)
        whole = inside[2:] & inside[1:-1] & inside[:-2]
        before, middle, after = (
            part[whole].astype(np.float32) for part in (row[:-2], row[1:-1], row[2:])
        )
        near = RELATIVE * middle
        equal = (np.abs(before - middle) <= near) & (np.abs(after - middle) <= near)
        rows += middle.size
        flat += int(np.count_nonzero(equal))
    return flat / max(rows, 1)
