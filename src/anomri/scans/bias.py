"""Bias field correction (N4: Tustison et al., IEEE TMI 2010), by SimpleITK."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.sitk import import_sitk

WORKING_MM = 6.0
"""The field is fitted to voxels of about this size; it varies over centimetres."""
MIN_VOXELS = 8
"""A side of the image is not shrunk to fewer voxels: a scan may have few slices."""
ITERATIONS = [25, 20, 15]
"""At most so many on each level of N4, from coarse to fine."""
MIN_FIELD = 1e-3
"""The field is not taken for less than this when the image is divided by it."""


def correct_bias(
    data: NDArray[np.float32], spacing_mm: tuple[float, float, float], name: str
) -> NDArray[np.float32]:
    """A channel (x, y, z), zero outside the brain, divided by its bias field.

    The field has mean 1 over the brain. Raises `AnomriError` naming the channel if SimpleITK is not
    installed or finds no field.
    """
    sitk = import_sitk("--bias-correction")
    inside = data > 0
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    image.SetSpacing(spacing_mm)
    mask = sitk.GetImageFromArray(np.ascontiguousarray(inside.T.astype(np.uint8)))
    mask.CopyInformation(image)
    factors = [
        max(1, min(round(WORKING_MM / mm), length // MIN_VOXELS))
        for mm, length in zip(spacing_mm, data.shape, strict=True)
    ]
    correct = sitk.N4BiasFieldCorrectionImageFilter()
    correct.SetMaximumNumberOfIterations(ITERATIONS)
    try:
        correct.Execute(sitk.Shrink(image, factors), sitk.Shrink(mask, factors))
        field = sitk.GetArrayFromImage(sitk.Exp(correct.GetLogBiasFieldAsImage(image))).T
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise AnomriError(
            f"{name}: N4 finds no bias field ({reason}); leave --bias-correction out."
        ) from error
    field = field / field[inside].mean()
    return np.where(inside, data / np.maximum(field, MIN_FIELD), 0).astype(np.float32)
