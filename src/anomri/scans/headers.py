"""What a header says of the size and place of voxels, before a library repairs it in silence.

nibabel turns sizes of 0 into 1 mm, drops codes that it does not know, and looks at no unit. What
changes volumes in mm3 is refused here, and what moves the image is noted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.resample import VoxelGrid, corner_distance_mm

MAX_SIZE_DIFFERENCE = 0.01
"""Share by which two sizes of a voxel's side may differ, which are rounded (0.9375 and 0.94)."""
MAX_VOLUME_DIFFERENCE = 0.02
"""Share by which two volumes of a voxel may differ."""
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.05, 50.0
"""Voxels beyond these mean that a header is in metres or micrometres."""
UNITS = {1: "metres", 3: "micrometres"}
"""Units of length of a header (``xyzt_units``) that are not mm; 0 is unknown, 2 is mm."""
SPATIAL_UNIT = 7
"""The bits of ``xyzt_units`` that hold the unit of length; the others hold that of time."""
FORMS = ("sform", "qform")
ALIGNED = 2
"""The code of a form that places an image in some space, which is not said."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quiet_nibabel() -> Iterator[None]:
    """Keep nibabel from printing what it repairs, and NumPy what is not finite, in this thread."""
    # Not on import: whoever uses nibabel beside anomri still sees its messages.
    nib.imageglobals.logger.addFilter(_may_print)
    token = _quiet.set(True)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        _quiet.reset(token)


def _may_print(record: logging.LogRecord) -> bool:
    return not _quiet.get()


def check_header(path: Path, stored: nib.Nifti1Header) -> tuple[nib.Nifti1Header, list[str]]:
    """The header of a 3D image as it is used, and notes on what was understood.

    ``stored`` is the header of the file, not checked by nibabel. Raises `AnomriError` naming the
    file and the field if the size of a voxel is not known, or if two sizes are given.
    """
    header = stored.copy()
    notes = _settle_unit(path, header)
    notes += _settle_codes(path, header)
    notes += _settle_direction(path, header)
    notes += _settle_sizes(path, header)
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except ValueError:  # a quaternion longer than one
        affine = np.full((4, 4), np.nan)
    _check_affine(path, affine)
    _check_voxel_size(path, header, affine)
    notes += _compare_forms(path, header)
    return header, notes


def sizes_differ(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two sizes of a voxel (3,) in mm differ by more than rounding.

    >>> sizes_differ(np.array([0.9375, 0.9375, 5]), np.array([0.94, 0.94, 5]))
    False
    >>> sizes_differ(np.array([2.2, 2.2, 3]), np.array([2.29, 2.29, 3.12]))
    True
    """
    sides = np.abs(other / one - 1)
    volume = abs(np.prod(other) / np.prod(one) - 1)
    return bool((sides > MAX_SIZE_DIFFERENCE).any() or volume > MAX_VOLUME_DIFFERENCE)


def format_mm(sizes: NDArray[np.float64]) -> str:
    """Sides of a voxel for a message.

    >>> format_mm(np.array([0.9375, 0.9375, 5]))
    '0.9375 x 0.9375 x 5 mm'
    """
    return " x ".join(f"{size:.4g}" for size in sizes) + " mm"


def _settle_unit(path: Path, header: nib.Nifti1Header) -> list[str]:
    unit = int(header["xyzt_units"]) & SPATIAL_UNIT
    if unit in UNITS:
        raise AnomriError(
            f"{path}: its header gives sizes in {UNITS[unit]} (xyzt_units {unit}); only mm are "
            f"read. If the numbers are in mm, set the unit to mm; if not, convert them."
        )
    if unit in (0, 2):
        return []
    return [f"{path.name} has an unknown unit of length (xyzt_units {unit}); mm is used."]


def _settle_codes(path: Path, header: nib.Nifti1Header) -> list[str]:
    """Keep the forms whose code is above zero, as the standard says; nibabel drops unknown ones."""
    notes = []
    for form in FORMS:
        code = int(header[f"{form}_code"])
        if code in nib.nifti1.xform_codes.value_set():
            continue
        used = code > 0
        header[f"{form}_code"] = ALIGNED if used else 0
        notes.append(
            f"{path.name} has an unknown {form}_code {code}; the {form} is "
            f"{'taken for valid' if used else 'not used'}."
        )
    return notes


def _settle_direction(path: Path, header: nib.Nifti1Header) -> list[str]:
    """Set qfac, by which slices run up or down, to its sign; nibabel sets it to 1."""
    stored = float(header["pixdim"][0])
    if stored in (-1, 1):
        return []
    header["pixdim"][0] = -1 if stored < 0 else 1
    # Where no form counts or the sform does, qfac does not.
    if int(header["sform_code"]) or not int(header["qform_code"]):
        return []
    return [
        f"{path.name} has a qfac (pixdim[0]) of {stored:g}, which has to be 1 or -1; "
        f"{float(header['pixdim'][0]):g} is used. If that is wrong, its map is mirrored."
    ]


def _settle_sizes(path: Path, header: nib.Nifti1Header) -> list[str]:
    """Take sizes that pixdim lacks from the sform; raises `AnomriError` if that is not there."""
    stored = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    usable = np.isfinite(stored) & (stored > 0)
    if usable.all():
        return []
    shown = " x ".join(f"{size:g}" for size in stored)
    if not int(header["sform_code"]):
        raise AnomriError(
            f"{path}: its header gives no size of a voxel: pixdim is {shown}, and there is no "
            f"sform. Volumes depend on it; write the sizes in mm into pixdim, or export the scan "
            f"again from its source."
        )
    affine = np.asarray(header.get_sform(), dtype=np.float64)
    _check_affine(path, affine)
    sizes = voxel_sizes(affine)
    # The size behind a wrong sign is compared with that of the sform later.
    given = np.isfinite(stored) & (stored != 0)
    header["pixdim"][1:4] = np.where(given, np.abs(stored), sizes)
    return [
        f"{path.name} has a pixdim of {shown}, which is not a size; that of the sform is used "
        f"({format_mm(sizes)})."
    ]


def _check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    i, j, k = affine[:3, :3].T
    if not np.isfinite(affine).all() or abs(np.dot(i, np.cross(j, k))) < 1e-9:
        raise AnomriError(
            f"{path}: its header gives no usable position (the affine is singular or not finite); "
            f"correct the header, or convert the scan again."
        )
    sizes = voxel_sizes(affine)
    if not (sizes.min() >= MIN_VOXEL_MM and sizes.max() <= MAX_VOXEL_MM):
        raise AnomriError(
            f"{path}: its header gives voxels of {' x '.join(f'{mm:.3g}' for mm in sizes)} mm; "
            f"those of a brain scan have {MIN_VOXEL_MM:g} to {MAX_VOXEL_MM:g} mm. Correct the "
            f"header; NIfTI headers are in mm."
        )


def _check_voxel_size(path: Path, header: nib.Nifti1Header, affine: NDArray[np.float64]) -> None:
    """Raise `AnomriError` if the sform and pixdim of a header disagree on the size of a voxel.

    Without an sform the affine is made from pixdim, so that they cannot disagree.
    """
    if not int(header["sform_code"]):
        return
    stored = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    sizes, axes = voxel_sizes(affine), affine[:3, :3]
    # Where axes are not at right angles, pixdim may hold their length or their distance.
    distances = np.abs(np.diag(np.linalg.qr(axes).R))
    by_sform, by_pixdim = abs(float(np.linalg.det(axes))), float(np.prod(stored))
    sides = np.minimum(np.abs(stored / sizes - 1), np.abs(stored / distances - 1))
    if sides.max() > MAX_SIZE_DIFFERENCE or abs(by_pixdim / by_sform - 1) > MAX_VOLUME_DIFFERENCE:
        raise AnomriError(
            f"{path}: its header has two voxel sizes: {format_mm(sizes)} ({by_sform:.4g} mm3) by "
            f"the sform, {format_mm(stored)} ({by_pixdim:.4g} mm3) by pixdim. One is wrong, and "
            f"volumes depend on it. Correct the header, for example by exporting the scan again "
            f"from its source."
        )


def _compare_forms(path: Path, header: nib.Nifti1Header) -> list[str]:
    """A note if both forms of a header count and place the image a voxel or more apart."""
    if not (int(header["sform_code"]) and int(header["qform_code"])):
        return []
    sform = np.asarray(header.get_sform(), dtype=np.float64)
    try:
        qform = np.asarray(header.get_qform(), dtype=np.float64)
    except ValueError:  # a quaternion longer than one
        qform = np.full((4, 4), np.nan)
    if not np.isfinite(qform).all():
        return [f"{path.name} has a qform that is damaged; the sform is used."]
    x, y, z = (int(length) for length in header.get_data_shape()[:3])
    by_sform, by_qform = VoxelGrid((x, y, z), sform), VoxelGrid((x, y, z), qform)
    apart = corner_distance_mm(by_sform, by_qform)
    if apart <= min(by_sform.spacing_mm):
        return []
    return [
        f"{path.name} has an sform and a qform that place it up to {apart:.3g} mm apart"
        f"{_describe_turn(by_sform, by_qform)}; the sform is used. Results keep both, and places "
        f"in mm are by the sform."
    ]


def _describe_turn(one: VoxelGrid, other: VoxelGrid) -> str:
    """How two grids of the same shape are turned against each other, if they are."""
    turn = np.linalg.inv(one.affine[:3, :3] / one.spacing_mm) @ (
        other.affine[:3, :3] / other.spacing_mm
    )
    if np.linalg.det(turn) < 0:
        return " and mirrored: left in one is right in the other"
    degrees = float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))
    return f" and turned by {degrees:.0f} degrees" if degrees >= 1 else ""
