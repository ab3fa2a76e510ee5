"""The grid of a scan's file, and the axes that anomri works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.nifti import image_class
from anomri.scans.resample import VoxelGrid, corner_distance_mm, resample
from anomri.spec import Grid

TOLERANCE_MM, TOLERANCE = 1e-2, 0.05
"""How far the corners of one grid may differ between two headers, which are rounded: in mm, or as a
share of the smallest voxel."""
RESULT = b"anomri"
"""What the header of a result says, by which it is known if it is given as a scan."""
PRIVATE_FIELDS = ("aux_file", "intent_name", "db_name", "data_type")
"""Free text of a NIfTI header, which may hold the patient's name."""


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a scan lie, and how to write an image that lies on them.

    ``shape``, ``affine`` (voxel index -> scanner mm, RAS+) and ``header`` are those of the file;
    ``to_canonical`` is the nibabel orientation transform from the file's axes to the working
    orientation. A scan that is registered to the model's space has a grid ``working`` instead of
    its own: it lies oblique in the scan, and its axes are those of the working orientation.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    to_canonical: NDArray[np.float64]
    header: nib.Nifti1Header
    working: VoxelGrid | None = None

    @classmethod
    def from_header(cls, path: Path, header: nib.Nifti1Header, grid: Grid) -> Geometry:
        """The geometry of the image in ``path``, whose header was checked as it was read.

        Raises `AnomriError` if two of its axes have the same direction.
        """
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        axes = orientations.io_orientation(affine)
        if np.isnan(axes).any():
            raise AnomriError(
                f"{path}: two axes of the image have the same direction in its header, which is "
                f"damaged; correct the header."
            )
        wanted = orientations.axcodes2ornt(tuple(grid.orientation))
        rows, columns, slices = header.get_data_shape()
        transform = orientations.ornt_transform(axes, wanted)
        return cls((rows, columns, slices), affine, transform, header)

    @property
    def file_grid(self) -> VoxelGrid:
        """The grid of the file, on the file's own axes."""
        return VoxelGrid(self.shape, self.affine)

    @cached_property
    def canonical_grid(self) -> VoxelGrid:
        """The grid in the working orientation."""
        if self.working is not None:
            return self.working
        shape = np.empty(3, int)
        shape[self.to_canonical[:, 0].astype(int)] = self.shape
        x, y, z = (int(length) for length in shape)
        back = orientations.inv_ornt_aff(self.to_canonical, self.shape)
        return VoxelGrid((x, y, z), self.affine @ back)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the axes of the working orientation."""
        return self.canonical_grid.spacing_mm

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """The shape in the working orientation."""
        return self.canonical_grid.shape

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """Voxel index in the working orientation -> scanner mm (RAS+)."""
        return self.canonical_grid.affine

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel of the working orientation."""
        return self.canonical_grid.voxel_mm3

    @property
    def tolerance_mm(self) -> float:
        """How far the corners of another image on the same grid may lie from this one's."""
        return max(TOLERANCE_MM, TOLERANCE * min(self.spacing_mm))

    def canonical(self, data: NDArray[Any]) -> NDArray[Any]:
        """Turn an array from the file's axes to the working orientation; a view where possible."""
        if self.working is not None:
            return resample(data, self.file_grid, self.working)
        turned: NDArray[Any] = orientations.apply_orientation(data, self.to_canonical)
        return turned

    def native(self, data: NDArray[Any]) -> NDArray[Any]:
        """Turn an array from the working orientation back to the file's axes, in Fortran order."""
        if self.working is not None:
            return resample(data, self.working, self.file_grid)
        order = self.to_canonical[:, 0].astype(int)
        flipped = [axis for axis, (_, sign) in enumerate(self.to_canonical) if sign < 0]
        turned = np.flip(np.transpose(data, order), tuple(flipped))
        native = np.empty(turned.shape, dtype=data.dtype, order="F")
        copy_transposed(turned, native)
        return native

    def to_image(
        self, data: NDArray[Any], display: tuple[float, float] | None = None
    ) -> nib.Nifti1Image | nib.Nifti2Image:
        """An array in the working orientation as NIfTI on the file's own grid.

        ``data`` is (x, y, z), or (channels, x, y, z), which becomes a 4D image with the channels
        last. Both header forms and their codes are kept, and the data type is that of ``data``.
        ``display`` is the range that viewers open with (``cal_min`` and ``cal_max``).
        """
        header = self.header.copy()
        header.set_data_dtype(data.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = display or (0, 0)
        header["descrip"] = RESULT
        header.extensions.clear()
        for field in PRIVATE_FIELDS:
            if field in header:
                header[field] = b""
        if data.ndim == 3:
            native = self.native(data)
        else:
            native = np.stack([self.native(channel) for channel in data], axis=-1)
        # Without an affine: with one, nibabel changes the codes where sform and qform differ.
        return image_class(header)(native, None, header)


def copy_transposed(values: NDArray[Any], target: NDArray[Any]) -> None:
    """Copy (x, y, z) between arrays of which one is contiguous in x (as files are), one in z."""
    # A few rows at a time, which stay in the processor's cache while they are transposed.
    for first in range(0, values.shape[1], 8):
        target[:, first : first + 8] = values[:, first : first + 8]


def gives_position(header: nib.Nifti1Header) -> bool:
    """Whether a header says where its image lies; if not, nibabel makes up an affine."""
    return bool(header["sform_code"] or header["qform_code"])


def check_same_grid(
    path: Path, header: nib.Nifti1Header, first_path: Path, first: Geometry
) -> None:
    """Raise `AnomriError` unless the image in ``path`` lies on the grid of ``first_path``."""
    shape = tuple(header.get_data_shape())
    if shape != first.shape:
        raise AnomriError(
            f"{path}: has {shape} voxels, but {first_path.name} has {first.shape}. All images of a "
            f"case lie on one grid; resample this one to that of {first_path.name}."
        )
    own = VoxelGrid(first.shape, np.asarray(header.get_best_affine(), dtype=np.float64))
    grid = first.file_grid
    if not gives_position(header):
        # It lies as another image without a position, also if that was given one since.
        stored = np.asarray(first.header.get_best_affine(), dtype=np.float64)
        grid = VoxelGrid(first.shape, stored)
    apart = corner_distance_mm(own, grid)
    # Not ">": a header that is not finite gives NaN.
    if not apart <= first.tolerance_mm:
        headers = {path.name: header, first_path.name: first.header}
        silent = [name for name, one in headers.items() if not gives_position(one)]
        reason = (
            f" ({silent[0]} does not say how it lies: sform and qform code 0)" if silent else ""
        )
        raise AnomriError(
            f"{path}: its header places it up to {apart:.3g} mm away from {first_path.name}"
            f"{reason}. All images of a case lie on one grid; register or resample this one to that "
            f"one's."
        )
