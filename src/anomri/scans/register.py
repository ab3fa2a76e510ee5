"""Registration to the model's space: rigid, to a template made from nilearn's MNI152.

Nothing is deformed or scaled. The result is a grid that lies oblique in the scan, so that all
measures on it (mm, mm3, centroids) are the scan's own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.optional import import_extra
from anomri.scans.resample import VoxelGrid, resample
from anomri.scans.sitk import (
    LPS,
    WORKING_MM,
    import_sitk,
    registration_method,
    shrink,
    to_matrix,
    to_sitk,
)
from anomri.scans.volume import Volume

SHAPE, CENTRE, PITCH = (240, 240, 155), (118.2, 128.1, 69.5), 10.6
"""The grid of BraTS (1 mm, axes L, P, S), and how the template lies on it: the voxel at the middle
of its brain's box, and the degrees by which its head is tilted. Both are means of ten BraTS
patients registered to it (standard deviations 0.6, 1.5, 1.5 mm and 3.3 degrees)."""
MAX_DEGREES, MIN_OVERLAP = 75.0, 0.6
"""A registration failed if it turns further, or if the Dice overlap of the brains is lower."""
BRAIN_LEVEL = 0.01
"""Brain, after smoothing, is brighter than this share of the brightest voxel."""


@lru_cache(maxsize=1)
def template() -> tuple[nib.Nifti1Image, VoxelGrid]:
    """The brain of the MNI152 T1 template at 2 mm, and the model's grid around it."""
    datasets = import_extra("nilearn.datasets", "register", "--register")
    image = datasets.load_mni152_template(resolution=WORKING_MM)
    # nilearn's resampling leaves values a little above zero in the whole field.
    brain = np.asanyarray(datasets.load_mni152_brain_mask(resolution=WORKING_MM).dataobj) > 0
    image = nib.Nifti1Image(np.asanyarray(image.dataobj, dtype=np.float32) * brain, image.affine)
    inside = np.argwhere(np.asanyarray(image.dataobj) > 0)
    middle = apply_affine(image.affine, (inside.min(axis=0) + inside.max(axis=0)) / 2)
    cos, sin = np.cos(np.radians(PITCH)), np.sin(np.radians(PITCH))
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ LPS[:3, :3]
    return image, VoxelGrid(SHAPE, from_matvec(turn, middle - turn @ np.array(CENTRE)))


def register(volume: Volume) -> tuple[Volume, NDArray[np.float64]]:
    """The scan on the model's grid, and the rigid transform (4, 4), template mm -> scan mm (RAS+).

    ``volume`` is a brain without its skull. T1 is registered if there is one, else the first
    channel, by mutual information. ``geometry.native`` of the result brings a map back to the grid
    of the file. Raises `AnomriError` if SimpleITK is not installed or no plausible transform is
    found.
    """
    fixed, model_grid = template()
    moving = volume.channel(volume.channels.index("t1") if "t1" in volume.channels else 0)
    own_grid = volume.geometry.canonical_grid
    transform = _find_transform(fixed, moving, own_grid, volume.name)
    _check_transform(fixed, moving > 0, own_grid, transform, volume.name)
    working = VoxelGrid(model_grid.shape, transform @ model_grid.affine)
    data = np.stack([resample(channel, own_grid, working) for channel in volume.data])
    label = None if volume.label is None else resample(volume.label, own_grid, working)
    moved = replace(volume, label=label, geometry=replace(volume.geometry, working=working))
    return moved.with_data(data, _describe(own_grid, working)), transform


def rotation_degrees(transform: NDArray[np.float64]) -> float:
    """The angle by which a rigid transform (4, 4) turns.

    >>> rotation_degrees(np.array([[0.0, -1, 0, 9], [1, 0, 0, 9], [0, 0, 1, 9], [0, 0, 0, 1]]))
    90.0
    """
    return float(np.degrees(np.arccos(np.clip((np.trace(transform[:3, :3]) - 1) / 2, -1, 1))))


def _find_transform(
    fixed: nib.Nifti1Image, moving: NDArray[np.float32], grid: VoxelGrid, name: str
) -> NDArray[np.float64]:
    """The rigid transform template mm -> scan mm (RAS+), by SimpleITK."""
    sitk = import_sitk("--register")
    target = to_sitk(sitk, np.asanyarray(fixed.dataobj, dtype=np.float32), fixed.affine)
    source = shrink(sitk, to_sitk(sitk, moving, grid.affine), grid.spacing_mm)
    try:
        # The middles of both brains meet first.
        start = sitk.CenteredTransformInitializer(
            target > 0,
            source > BRAIN_LEVEL * float(moving.max()),
            sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
        method = registration_method(sitk)
        method.SetInitialTransform(sitk.Euler3DTransform(start), inPlace=True)
        found = method.Execute(target, source)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise AnomriError(
            f"{name}: cannot be registered to the template ({reason}); register it by hand, or "
            f"leave --register out."
        ) from error
    return to_matrix(found)


def _check_transform(
    fixed: nib.Nifti1Image,
    brain: NDArray[np.bool_],
    grid: VoxelGrid,
    transform: NDArray[np.float64],
    name: str,
) -> None:
    target = np.asanyarray(fixed.dataobj) > 0
    moved = resample(brain, grid, VoxelGrid(target.shape, transform @ fixed.affine))
    overlap = 2 * float((target & moved).sum()) / float(target.sum() + moved.sum())
    degrees = rotation_degrees(transform)
    if degrees > MAX_DEGREES or overlap < MIN_OVERLAP:
        raise AnomriError(
            f"{name}: the registration to the template failed (it turns by {degrees:.0f} degrees, "
            f"and the brains overlap by {overlap:.0%}). Check that the scan is a whole brain "
            f"without its skull and that its header is right, or leave --register out."
        )


def _describe(own: VoxelGrid, working: VoxelGrid) -> str:
    turn = np.eye(4)
    turn[:3, :3] = (working.affine[:3, :3] / working.spacing_mm) @ np.linalg.pinv(
        own.affine[:3, :3] / own.spacing_mm
    )
    shift = np.linalg.norm(working.centre_mm - own.centre_mm)
    return (
        f"turned into the model's space by a rigid registration: {rotation_degrees(turn):.1f} "
        f"degrees against the scan's own axes, {shift:.1f} mm between the middles of the two "
        f"fields; the map was brought back onto the scan's own grid."
    )
