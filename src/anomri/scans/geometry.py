"""Where the voxels of a scan lie: the grid of its file, and the axes that anomri works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.resample import Lattice, resample
from anomri.spec import Grid

TOLERANCE_MM, TOLERANCE = 1e-2, 0.05
"""How far the corners of two images on one grid may lie apart, in mm or as a share of the smallest voxel: headers are rounded."""
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.05, 50.0
"""A header in metres or micrometres lies beyond these."""


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a scan lie, and how to write an image that lies on them.

    ``shape`` is that of the file, ``to_canonical`` the nibabel orientation transform into the working
    orientation, ``header`` the file's own, ``affine`` voxel indices of the file -> scanner mm (RAS+).
    ``working`` replaces the file's own grid inside, where a scan is turned into the model's space: a grid that lies
    oblique in the scan; its axes are those of the working orientation.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    to_canonical: NDArray[np.float64]
    header: nib.Nifti1Header
    working: Lattice | None = None

    @property
    def file_lattice(self) -> Lattice:
        """The grid of the file, on the file's own axes."""
        return Lattice(self.shape, self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along the axes of the working orientation."""
        if self.working is not None:
            return self.working.spacing_mm
        sizes = voxel_sizes(self.affine)
        spacing = np.empty(3)
        spacing[self.to_canonical[:, 0].astype(int)] = sizes
        return float(spacing[0]), float(spacing[1]), float(spacing[2])

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """The shape in the working orientation."""
        if self.working is not None:
            return self.working.shape
        shape = np.empty(3, int)
        shape[self.to_canonical[:, 0].astype(int)] = self.shape
        return int(shape[0]), int(shape[1]), int(shape[2])

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """Voxel indices in the working orientation -> scanner mm (RAS+)."""
        if self.working is not None:
            return self.working.affine
        return self.affine @ orientations.inv_ornt_aff(self.to_canonical, self.shape)

    @property
    def tolerance_mm(self) -> float:
        """How far the corners of another image may lie apart from this one's that is on the same grid."""
        return max(TOLERANCE_MM, TOLERANCE * min(self.spacing_mm))

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel of the working orientation in mm3."""
        return float(abs(np.linalg.det(self.canonical_affine[:3, :3])))

    def canonical(self, data: NDArray[Any]) -> NDArray[Any]:
        """An array on the file's axes turned into the working orientation: a view of it, where that is possible."""
        if self.working is not None:
            return resample(data, self.file_lattice, self.working)
        turned: NDArray[Any] = orientations.apply_orientation(data, self.to_canonical)
        return turned

    def native(self, data: NDArray[Any]) -> NDArray[Any]:
        """An array in the working orientation turned back onto the file's axes, in the order of files."""
        if self.working is not None:
            return resample(data, self.working, self.file_lattice)
        order = self.to_canonical[:, 0].astype(int)
        flip = [axis for axis, (_, sign) in enumerate(self.to_canonical) if sign < 0]
        turned = np.flip(np.transpose(data, order), tuple(flip))
        native = np.empty(turned.shape, dtype=data.dtype, order="F")
        copy_turned(turned, native)
        return native


def copy_turned(values: NDArray[Any], target: NDArray[Any]) -> None:
    """Copy (x, y, z) into ``target`` where one has x next to each other in memory, as files do, and the other z."""
    # Some rows at a time, as many as stay in the processor's cache while they are turned.
    for first in range(0, values.shape[1], 8):
        target[:, first : first + 8] = values[:, first : first + 8]


def geometry_of(path: Path, image: nib.Nifti1Image, grid: Grid) -> Geometry:
    """Where the voxels of the image in a file lie; raises `AnomriError` naming it if its header does not say so."""
    affine = np.asarray(image.affine, dtype=np.float64)
    i, j, k = affine[:3, :3].T
    if not np.isfinite(affine).all() or abs(np.dot(i, np.cross(j, k))) < 1e-9:
        raise AnomriError(
            f"{path}: its header gives no usable position (the affine is singular or not finite)."
        )
    sizes = voxel_sizes(affine)
    if not (sizes.min() >= MIN_VOXEL_MM and sizes.max() <= MAX_VOXEL_MM):
        raise AnomriError(
            f"{path}: its header gives voxels of {' x '.join(f'{mm:.3g}' for mm in sizes)} mm, and a brain scan's have "
            f"{MIN_VOXEL_MM:g} to {MAX_VOXEL_MM:g}; put the header right (it is to be in mm)."
        )
    axes = orientations.io_orientation(affine)
    if np.isnan(axes).any():
        raise AnomriError(
            f"{path}: its header gives two axes of the image the same direction; it is damaged."
        )
    transform = orientations.ornt_transform(
        axes, orientations.axcodes2ornt(tuple(grid.orientation))
    )
    rows, columns, slices = image.shape
    return Geometry((rows, columns, slices), affine, transform, image.header)


def says_where(header: nib.Nifti1Header) -> bool:
    """Whether a header says where its image lies; nibabel makes a place up where it does not."""
    return bool(header["sform_code"] or header["qform_code"])


def check_grid(path: Path, image: nib.Nifti1Image, first_path: Path, first: Geometry) -> None:
    """Raise `AnomriError` unless the image in a file lies on the grid ``first`` of another."""
    if image.shape != first.shape:
        raise AnomriError(
            f"{path}: has {image.shape} voxels, but {first_path.name} has {first.shape}. All images of a case "
            f"lie on one grid; resample this one to that one's."
        )
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (
        *first.shape,
        1,
    )
    apart = float(np.abs(corners @ (np.asarray(image.affine) - first.affine).T).max())
    if not apart <= first.tolerance_mm:
        raise AnomriError(
            f"{path}: its header places it up to {apart:.3g} mm away from {first_path.name}. All images of a "
            f"case lie on one grid; register or resample this one to that one's."
        )
