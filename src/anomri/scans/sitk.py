"""SimpleITK, set up so that its results are the same every time and on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from numpy.typing import NDArray

from anomri.optional import import_extra

WORKING_MM = 2
"""Images are registered with voxels of about this size."""
SAMPLED = [0.6, 0.3, 0.05]
"""The share of the fixed image's voxels that the metric looks at, from the coarsest level to 2 mm."""
LPS = np.diag([-1.0, -1, 1, 1])
"""Between the coordinates of nibabel (RAS+) and those of SimpleITK."""


def import_sitk(purpose: str) -> Any:
    """SimpleITK with one thread; raises `AnomriError` with the command to install it.

    Several threads sum in an order that changes from run to run. A filter's own
    ``SetNumberOfThreads`` does not reach all of its parts.
    """
    sitk = import_extra("SimpleITK", "register", purpose)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return sitk


def registration_method(sitk: Any) -> Any:
    """Rigid registration by mutual information, whose start is still to be set."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel(SAMPLED, 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-2, 100, gradientMagnitudeTolerance=1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4, 2, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    return method


def shrink(
    sitk: Any, image: Any, spacing_mm: tuple[float, float, float], voxel_mm: float = WORKING_MM
) -> Any:
    """An image blurred and shrunk to voxels of about ``voxel_mm``."""
    factors = [max(1, round(voxel_mm / mm)) for mm in spacing_mm]
    variances = [
        (mm * factor / 2) ** 2 if factor > 1 else 0.0
        for mm, factor in zip(spacing_mm, factors, strict=True)
    ]
    return sitk.Shrink(sitk.DiscreteGaussian(image, variances), factors)


def to_sitk(sitk: Any, data: NDArray[np.float32], affine: NDArray[np.float64]) -> Any:
    """An array (x, y, z) as an image of SimpleITK, whose coordinates are LPS mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T, dtype=np.float32))
    lps = LPS @ affine
    spacing = voxel_sizes(lps)
    image.SetSpacing(spacing.tolist())
    # An affine may hold a shear, which a SimpleITK image cannot; the registration leaves it out.
    u, _, v = np.linalg.svd(lps[:3, :3] / spacing)
    image.SetDirection((u @ v).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def to_matrix(transform: Any) -> NDArray[np.float64]:
    """A transform of SimpleITK that is affine, as a matrix (4, 4) in mm (RAS+)."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(transform.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)]
    return LPS @ from_matvec(np.stack(columns, axis=1), origin) @ LPS
