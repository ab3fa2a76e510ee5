"""Registration of a channel to the first channel of its case: rigid, by mutual information."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.overlap import DOUBTFUL_OVERLAP, PlacedImage, measure_overlap, tissue_points
from anomri.scans.register import rotation_degrees
from anomri.scans.resample import VoxelGrid
from anomri.scans.sitk import (
    LPS,
    WORKING_MM,
    import_sitk,
    registration_method,
    shrink,
    to_matrix,
    to_sitk,
)

BRIGHTEST = 99.5
"""Brighter voxels than this percentile are cut: mutual information looks at the range of values."""
FINE_MM, FINE_SAMPLED = 1.0, 0.1
"""In the end, voxels have about this size, and this share of them is looked at. Channels of BraTS
that were moved by (20, -10, 5) mm and 8 degrees, or by 100 mm, then lie on average within 0.1 to
0.6 mm of where they lay; with voxels of 2 mm within 0.8 to 1.5 mm."""
MIN_MOVE = 0.5
"""A channel that would be moved by less, on average, as a share of the longest side of a voxel, is
left where it is: that is no more than the registration errs. Between heads in slices of 3 to 4 mm,
three registrations round a triangle of channels end 0.7 to 1.3 mm off, and channels scanned in one
session move by 0.3 to 1.3 mm."""


def align(fixed: PlacedImage, moving: PlacedImage) -> tuple[PlacedImage, str]:
    """``moving`` where it lies on ``fixed``, and a note on how it was moved.

    It is not resampled, and not moved by less than half a voxel (`MIN_MOVE`). Registration starts
    from where the headers place the two and, if they do not overlap there, from where the middles
    of their tissue or of their fields meet. Raises `AnomriError` if SimpleITK is not
    installed, or if the two do not overlap afterwards.
    """
    sitk = import_sitk("--register")
    middle = LPS[:3, :3] @ tissue_points(fixed).mean(axis=0)
    target, source = _prepare(sitk, fixed, WORKING_MM), _prepare(sitk, moving, WORKING_MM)
    best, best_cost = None, np.inf
    reason = "their tissue does not overlap afterwards"
    for shift in _starts(fixed, moving):
        try:
            transform, cost = _search(sitk, target, source, middle, shift)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            continue
        found = measure_overlap(fixed, _move(moving, to_matrix(transform)))
        if found.in_common_field >= DOUBTFUL_OVERLAP and cost < best_cost:
            best, best_cost = transform, cost
    if best is None:
        raise AnomriError(
            f"{moving.path}: cannot be registered to {fixed.path.name} ({reason}). Give the files of "
            f"one scan, or register it by hand."
        )
    matrix = to_matrix(
        _refine(sitk, _prepare(sitk, fixed, FINE_MM), _prepare(sitk, moving, FINE_MM), best)
    )
    before = tissue_points(moving)
    after = apply_affine(np.linalg.inv(matrix), before)
    mean_move = float(np.linalg.norm(after - before, axis=1).mean())
    largest_mm = max(*fixed.grid.spacing_mm, *moving.grid.spacing_mm)
    if mean_move < MIN_MOVE * largest_mm:
        return moving, (
            f"{moving.path.name} lies on {fixed.path.name}: a registration would move it by "
            f"{mean_move:.1f} mm, less than half a voxel, and was not applied."
        )
    distance = np.linalg.norm(after.mean(axis=0) - before.mean(axis=0))
    return _move(moving, matrix), (
        f"{moving.path.name} was registered to {fixed.path.name}: moved by {distance:.1f} mm and "
        f"turned by {rotation_degrees(matrix):.1f} degrees, and resampled to that one's grid."
    )


def _starts(fixed: PlacedImage, moving: PlacedImage) -> list[NDArray[np.float64]]:
    """Shifts in mm (3,), RAS+, that bring points of the fixed image to points of the moving one."""
    by_header = np.zeros(3)
    if measure_overlap(fixed, moving).in_common_field >= DOUBTFUL_OVERLAP:
        return [by_header]
    return [
        by_header,
        tissue_points(moving).mean(axis=0) - tissue_points(fixed).mean(axis=0),
        moving.grid.centre_mm - fixed.grid.centre_mm,
    ]


def _search(
    sitk: Any,
    target: Any,
    source: Any,
    middle: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> tuple[Any, float]:
    """The rigid transform, target -> source, found from a ``shift`` (mm, RAS+) on, and its cost.

    It turns about ``middle`` (mm, LPS+). A lower cost is better.
    """
    start = sitk.Euler3DTransform()
    start.SetCenter(middle.tolist())
    start.SetTranslation((LPS[:3, :3] @ shift).tolist())
    method = registration_method(sitk)
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(target, source)
    return start, float(method.GetMetricValue())


def _refine(sitk: Any, target: Any, source: Any, transform: Any) -> Any:
    """The transform that fits best near ``transform``, on finer images and at the tissue alone."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(sitk.BinaryDilate(target > 0, [3, 3, 3]))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(FINE_SAMPLED, 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(0.5, 1e-3, 200, gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    refined = sitk.Euler3DTransform(transform)
    method.SetInitialTransform(refined, inPlace=True)
    method.Execute(target, source)
    return refined


def _prepare(sitk: Any, image: PlacedImage, voxel_mm: float) -> Any:
    """An image of SimpleITK with voxels of about that size, without its brightest values."""
    above_zero = image.values[image.values > 0]
    clipped = np.minimum(image.values, np.percentile(above_zero, BRIGHTEST)).astype(np.float32)
    prepared = to_sitk(sitk, clipped, image.grid.affine)
    return shrink(sitk, prepared, image.grid.spacing_mm, voxel_mm)


def _move(image: PlacedImage, transform: NDArray[np.float64]) -> PlacedImage:
    """An image moved by the inverse of ``transform``, which leads from where it should lie."""
    grid = VoxelGrid(image.grid.shape, np.linalg.inv(transform) @ image.grid.affine)
    return PlacedImage(image.path, image.values, grid)
