"""A scan turned into the model's space: a rigid registration to a template made from nilearn's MNI152.

Nothing is deformed or scaled. What comes out is a grid that lies oblique in the scan, so that everything measured on
it (mm, mm3, centroids) is the scan's own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.optional import import_extra
from anomri.scans.resample import Lattice, resample
from anomri.scans.volume import Volume

TEMPLATE_MM = 2
SHAPE, CENTRE, PITCH = (240, 240, 155), (118.2, 128.1, 69.5), 10.6
"""The grid of BraTS (1 mm, axes L, P, S), and how the template lies on it: the voxel on which the middle of its
brain's box comes to lie, and by how many degrees its head is tilted against it, both the means of ten patients of BraTS
registered to it (standard deviations 0.6, 1.5, 1.5 mm and 3.3 degrees)."""
MAX_DEGREES, MIN_OVERLAP = 75.0, 0.6
"""A turn further than this, or less of the template's brain inside the scan's, is a registration that went astray."""
SAMPLED = [0.6, 0.3, 0.05]
"""The share of the template's voxels that the metric looks at, from the coarsest level to 2 mm."""
LEVEL = 0.01
"""What counts as brain after smoothing, as a share of the brightest voxel."""
LPS = np.diag([-1.0, -1, 1, 1])


@lru_cache(maxsize=1)
def template() -> tuple[nib.Nifti1Image, Lattice]:
    """The brain of the MNI152 T1 template at 2 mm, and the model's grid placed around it."""
    datasets = import_extra("nilearn.datasets", "register", "--register")
    image = datasets.load_mni152_template(resolution=TEMPLATE_MM)
    # Resampled by nilearn, the template is a little above zero in all of its field.
    brain = np.asanyarray(datasets.load_mni152_brain_mask(resolution=TEMPLATE_MM).dataobj) > 0
    image = nib.Nifti1Image(np.asanyarray(image.dataobj, dtype=np.float32) * brain, image.affine)
    inside = np.argwhere(np.asanyarray(image.dataobj) > 0)
    middle = nib.affines.apply_affine(image.affine, (inside.min(axis=0) + inside.max(axis=0)) / 2)
    cos, sin = np.cos(np.radians(PITCH)), np.sin(np.radians(PITCH))
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ LPS[:3, :3]
    return image, Lattice(SHAPE, from_matvec(turn, middle - turn @ np.array(CENTRE)))


def register(volume: Volume) -> tuple[Volume, NDArray[np.float64]]:
    """The scan on the model's grid, and the rigid transform (4, 4), template mm -> scan mm (RAS+).

    ``volume`` holds a brain alone. T1 is registered if there is one, else the first channel, by mutual information
    from where the middles of both brains meet. ``geometry.native`` of the result brings a map back onto the input's
    grid. Raises `AnomriError` if SimpleITK is not installed or no plausible transform is found.
    """
    fixed, grid = template()
    number = volume.channels.index("t1") if "t1" in volume.channels else 0
    here = Lattice(volume.geometry.canonical_shape, volume.geometry.canonical_affine)
    moving = volume.channel(number)
    transform = _rigid(fixed, moving, here, volume.name)
    _check(fixed, moving > 0, here, transform, volume.name)
    working = Lattice(grid.shape, transform @ grid.affine)
    data = np.stack([resample(channel, here, working) for channel in volume.data])
    label = None if volume.label is None else resample(volume.label, here, working)
    moved = replace(volume, label=label, geometry=replace(volume.geometry, working=working))
    return moved.with_data(data, _words(here, working)), transform


def _rigid(
    fixed: nib.Nifti1Image, moving: NDArray[np.float32], lattice: Lattice, name: str
) -> NDArray[np.float64]:
    """Template mm -> scan mm, found by SimpleITK."""
    sitk = import_extra("SimpleITK", "register", "--register")
    target = _image(sitk, np.asanyarray(fixed.dataobj, dtype=np.float32), fixed.affine)
    source = _image(sitk, moving, lattice.affine)
    step = [max(1, round(TEMPLATE_MM / mm)) for mm in lattice.spacing_mm]
    blur = [
        (mm * n / 2) ** 2 if n > 1 else 0.0 for mm, n in zip(lattice.spacing_mm, step, strict=True)
    ]
    source = sitk.Shrink(sitk.DiscreteGaussian(source, blur), step)
    try:
        start = sitk.CenteredTransformInitializer(
            target > 0,
            source > LEVEL * float(moving.max()),
            sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
        method = sitk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)  # sums in one order: the same map every time
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentagePerLevel(SAMPLED, 1)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(
            1.0, 1e-2, 100, gradientMagnitudeTolerance=1e-6
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([4, 2, 0])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        method.SetInitialTransform(sitk.Euler3DTransform(start), inPlace=True)
        found = method.Execute(target, source)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise AnomriError(
            f"{name}: cannot be registered to the template ({reason}); register it by hand, or leave --register out."
        ) from error
    origin = np.array(found.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(found.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)]
    return LPS @ from_matvec(np.stack(columns, axis=1), origin) @ LPS


def _image(sitk: Any, data: NDArray[np.float32], affine: NDArray[np.float64]) -> Any:
    """An array (x, y, z) as an image of SimpleITK, which thinks in LPS mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T, dtype=np.float32))
    lps = LPS @ affine
    spacing = nib.affines.voxel_sizes(lps)
    image.SetSpacing(spacing.tolist())
    # A shear, which an affine may hold and this image may not, is left out of the registration.
    u, _, v = np.linalg.svd(lps[:3, :3] / spacing)
    image.SetDirection((u @ v).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def _check(
    fixed: nib.Nifti1Image,
    brain: NDArray[np.bool_],
    lattice: Lattice,
    transform: NDArray[np.float64],
    name: str,
) -> None:
    target = np.asanyarray(fixed.dataobj) > 0
    there = resample(brain, lattice, Lattice(target.shape, transform @ fixed.affine))
    overlap = 2 * float((target & there).sum()) / float(target.sum() + there.sum())
    if degrees_of(transform) > MAX_DEGREES or overlap < MIN_OVERLAP:
        raise AnomriError(
            f"{name}: the registration to the template went astray (turned by {degrees_of(transform):.0f} degrees, the "
            f"brains overlap by {overlap:.0%}). Is it a whole brain without its skull, and is its header right?"
        )


def degrees_of(transform: NDArray[np.float64]) -> float:
    """The angle by which a rigid transform (4, 4) turns."""
    return float(np.degrees(np.arccos(np.clip((np.trace(transform[:3, :3]) - 1) / 2, -1, 1))))


def _words(here: Lattice, working: Lattice) -> str:
    turn = np.eye(4)
    turn[:3, :3] = (working.affine[:3, :3] / working.spacing_mm) @ np.linalg.pinv(
        here.affine[:3, :3] / here.spacing_mm
    )
    middles = [
        nib.affines.apply_affine(one.affine, (np.array(one.shape) - 1) / 2)
        for one in (here, working)
    ]
    return (
        f"turned into the model's space by a rigid registration: {degrees_of(turn):.1f} degrees against the scan's own "
        f"axes, {np.linalg.norm(middles[1] - middles[0]):.1f} mm between the middles of the two fields; the map was brought "
        f"back onto the scan's own grid."
    )
