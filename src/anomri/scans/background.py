"""The air around a brain: zero in most images, another constant after some ways of scaling them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomri.errors import AnomriError

MIN_FACE_SHARE = 0.5
"""A background covers at least this share of the outermost voxels; a brain cropped to its box
touches few of them."""
MAX_BELOW = 0.01
"""A background is the lowest value but for this share of the voxels, where interpolation
undershot."""
MAX_GAP = 0.5
"""A negative background belongs to the brain's scale if the darkest tissue lies within this share
of the range above it."""
ZERO_MEAN = 0.01
"""The mean of a standardised image is less than this share of its standard deviation."""


def zero_background(path: Path, values: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """An image whose constant background is zero, and a note if it was another value.

    An image whose background was zero before it was scaled (by ``a * x + b``, as standardising
    does) is brought back by taking the background off all of it. NaN around the brain becomes zero.
    An image whose corners are zero or differ is returned as it is. Raises `AnomriError` if the
    background is not of the scale of the brain.

    >>> image = np.full((4, 4, 4), -0.5, np.float32)
    >>> image[1:3, 1:3, 1:3] = [[[-0.25, 1], [2, 3]], [[-0.25, 1], [2, 3]]]
    >>> zeroed, notes = zero_background(Path("a_t1.nii"), image)
    >>> zeroed[0, 0, 0].item(), zeroed[1, 2, 2].item()
    (0.0, 3.5)
    >>> notes
    ['a_t1.nii has a background of -0.5; it was taken off all values, so that it is zero.']
    """
    if values.ndim != 3 or values.dtype.kind not in "iuf" or not values.size:
        return values, []
    ends = [[0, -1]] * 3
    corners = values[np.ix_(*ends)].ravel()
    if np.isnan(corners).all():
        return without_nan_around(path, values)
    level = corners[0]
    if level == 0 or (corners != level).any() or not np.isfinite(level):
        return values, []
    share = np.mean([np.mean(face == level) for face in _faces(values)])
    if share < MIN_FACE_SHARE:
        return values, []
    return _without_level(path, values, float(level))


def _faces(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The six sides of an image."""
    for axis in range(3):
        for end in (0, -1):
            yield np.take(values, end, axis)


def _without_level(
    path: Path, values: NDArray[Any], level: float
) -> tuple[NDArray[Any], list[str]]:
    """The image without its background, which is ``level`` and not zero."""
    tissue = values[values != level].astype(np.float32)
    tissue = tissue[np.isfinite(tissue)]
    if not tissue.size:
        return values, []
    below = float((tissue < level).sum()) / values.size
    if below > MAX_BELOW:
        raise AnomriError(
            f"{path}: the background is {level:g}, and {below:.0%} of the voxels are darker; give "
            f"an image whose background is zero and whose tissue is above it."
        )
    if level < 0 and tissue.min() >= 0 and not _is_standardised(values):
        # Only the background was filled: what is above zero has its own scale.
        note = f"{path.name} has a background of {level:g}; it was set to zero."
        return np.where(values == level, np.float32(0), values.astype(np.float32)), [note]
    low, high = np.percentile(tissue, [0.1, 99]) - level
    if level < 0 and low > MAX_GAP * high:
        raise AnomriError(
            f"{path}: the background is {level:g}, far below the darkest tissue ({low + level:.3g}, "
            f"the brightest is {high + level:.3g}): it was filled in after the image was "
            f"standardised. Give the image before that step, with a background of zero."
        )
    note = (
        f"{path.name} has a background of {level:g}; it was taken off all values, so that it is "
        f"zero."
    )
    shifted = values.astype(np.float32) - np.float32(level)
    return np.maximum(shifted, 0), [note]


def _is_standardised(values: NDArray[Any]) -> bool:
    """Whether the mean of the whole image is zero, compared with its spread."""
    mean = float(values.mean(dtype=np.float64))
    return abs(mean) < ZERO_MEAN * float(values.std(dtype=np.float64))


def without_nan_around(path: Path, values: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """An image with zero for the NaN that reach its faces, and a note; those inside stay."""
    missing = np.isnan(values)
    parts, _ = ndimage.label(missing)
    outside = np.unique(np.concatenate([face.ravel() for face in _faces(parts)]))
    around = missing & np.isin(parts, outside)
    note = f"{path.name} has a background of NaN; it was set to zero."
    return np.where(around, values.dtype.type(0), values), [note]
