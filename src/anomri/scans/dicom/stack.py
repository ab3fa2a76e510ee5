"""The slices of a series in order, and where they lie; gaps and mixed series are found here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.files import describe_error

STEP_TOLERANCE = 0.05
"""How much the distance between two slices may differ from the others, as a share of it."""
PLANE_TOLERANCE = 1e-3
"""How much orientation (unitless) and pixel size (mm) may differ between slices."""
NO_POSITION = (
    "a file gives no usable position, orientation or pixel size; it is not a slice of a scan. "
    "Export the series again with these headers"
)


def stack_slices(series: Series, headers: Sequence[Any]) -> tuple[list[Any], NDArray[np.float64]]:
    """The slices in order, and the affine (column, row, slice) -> scanner mm (RAS+).

    ``headers`` are those of its slices, one a file, or one a frame of enhanced MR. The order is that of dicom2nifti: upwards along the
    axis on which they lie farthest apart. Raises `AnomriError` if orientation, pixel size or matrix
    differ, or if a slice is missing, is there twice or is shifted sideways.
    """
    planes, positions = _read_planes(series, headers)
    along, down = _check_planes(series, planes)
    order = np.argsort(positions[:, np.abs(np.ptp(positions, axis=0)).argmax()], kind="stable")
    positions = positions[order]
    names = [series.slice_names[number] for number in order]
    _check_steps(series.place, positions, np.cross(along, down), names)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    between_rows, between_columns = planes[0, 6:8]
    lps = np.eye(4)
    # A column index runs along a row.
    lps[:3] = np.stack([along * between_columns, down * between_rows, step, positions[0]], axis=1)
    return [headers[number] for number in order], np.diag([-1.0, -1, 1, 1]) @ lps


def _read_planes(
    series: Series, headers: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orientation (6), pixel size (2), matrix (2) of each slice (n, 10); positions (n, 3)."""
    try:
        planes = np.array(
            [
                (*one.ImageOrientationPatient, *one.PixelSpacing, one.Rows, one.Columns)
                for one in headers
            ],
            dtype=np.float64,
        )
        positions = np.array([one.ImagePositionPatient for one in headers], dtype=np.float64)
    except Exception as error:  # values are parsed when asked for, and can raise anything
        raise AnomriError(f"{series.place}: {NO_POSITION} ({describe_error(error)}).") from None
    if planes.shape[1:] != (10,) or positions.shape[1:] != (3,):
        raise AnomriError(f"{series.place}: {NO_POSITION}.")
    if not np.isfinite(np.hstack([planes, positions])).all():
        raise AnomriError(f"{series.place}: {NO_POSITION}.")
    return planes, positions


def _check_planes(
    series: Series, planes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The directions of rows and columns in LPS, which all slices share."""
    different = np.abs(planes - planes[0]).max(axis=1)
    if different.max() > PLANE_TOLERANCE:
        names = series.slice_names
        raise AnomriError(
            f"{series.place}: its slices differ in orientation, pixel size or matrix "
            f"({names[int(different.argmax())]} and {names[0]}); several "
            f"scans are mixed in it. Hand in one of them in its own folder."
        )
    along, down, spacing = planes[0, :3], planes[0, 3:6], planes[0, 6:8]
    products = [along @ along, down @ down, along @ down]
    if not np.allclose(products, [1, 1, 0], atol=1e-2) or spacing.min() <= 0:
        raise AnomriError(f"{series.place}: {NO_POSITION}.")
    return along, down


def _check_steps(
    where: str, positions: NDArray[np.float64], normal: NDArray[np.float64], names: Sequence[str]
) -> None:
    """Check that sorted ``positions`` (n, 3) in mm are at one distance along ``normal``."""
    steps = np.diff(positions, axis=0)
    distances = np.abs(steps @ normal)
    usual = float(np.median(distances))
    if (distances < 1e-3).any():
        number = int(distances.argmin())
        raise AnomriError(
            f"{where}: {names[number]} and {names[number + 1]} lie at one position; it "
            f"holds several volumes (echoes, time points, magnitude and phase). Hand in one volume "
            f"in its own folder."
        )
    odd = int(np.abs(distances - usual).argmax())
    if abs(distances[odd] - usual) > STEP_TOLERANCE * usual:
        missing = max(round(distances[odd] / usual) - 1, 1)
        raise AnomriError(
            f"{where}: {distances[odd]:.2f} mm lie between {names[odd]} and "
            f"{names[odd + 1]}, elsewhere {usual:.2f} mm; about {missing} slices are missing. "
            f"Copy the series again."
        )
    sideways = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1)
    if sideways.max() > STEP_TOLERANCE * usual:
        raise AnomriError(
            f"{where}: its slices are shifted sideways by {sideways.max():.2f} mm each; resample "
            "it."
        )
