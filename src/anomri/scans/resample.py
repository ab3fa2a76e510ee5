"""Voxel grids in scanner space, and bringing an image from one to another by what the headers say.

Nothing is registered here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

PROBES = 24
"""Points along each axis at which `coverage` looks."""


@dataclass(frozen=True)
class VoxelGrid:
    """Where voxels lie: the ``shape``, and the ``affine`` from voxel index to scanner mm (RAS+).

    >>> grid = VoxelGrid((100, 80, 20), np.diag([1.0, 1.0, 2.0, 1.0]))
    >>> grid.spacing_mm, grid.voxel_mm3
    ((1.0, 1.0, 2.0), 2.0)
    >>> print(grid)
    100 x 80 x 20 voxels of 1 x 1 x 2 mm
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each axis."""
        x, y, z = voxel_sizes(self.affine)
        return float(x), float(y), float(z)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def corners_mm(self) -> NDArray[np.float64]:
        """The eight corners of the field in scanner mm (8, 3), at the outer faces of its voxels."""
        ends = [(-0.5, length - 0.5) for length in self.shape]
        return apply_affine(self.affine, np.array(list(itertools.product(*ends))))

    @property
    def centre_mm(self) -> NDArray[np.float64]:
        """The middle of the field in scanner mm (3,)."""
        return apply_affine(self.affine, (np.array(self.shape) - 1) / 2)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{shape} voxels of {' x '.join(f'{mm:.3g}' for mm in self.spacing_mm)} mm"


def corner_distance_mm(one: VoxelGrid, other: VoxelGrid) -> float:
    """How far apart the corners of two grids lie, at most, along an axis of the scanner.

    >>> moved = np.array([[1.0, 0, 0, 3], [0, 1, 0, -4], [0, 0, 1, 0], [0, 0, 0, 1]])
    >>> corner_distance_mm(VoxelGrid((9, 9, 9), np.eye(4)), VoxelGrid((9, 9, 9), moved))
    4.0
    """
    return float(np.abs(one.corners_mm - other.corners_mm).max())


def resample(
    data: NDArray[Any], source: VoxelGrid, target: VoxelGrid, *, nearest: bool = False
) -> NDArray[Any]:
    """Bring an array from the grid ``source`` to ``target``; zero beyond its field.

    ``data`` is (x, y, z) of any real type. Interpolation is trilinear; booleans and integers take
    the value of the nearest voxel and keep their type, and so do floats with ``nearest``.

    >>> fine = VoxelGrid((3, 1, 1), np.diag([0.5, 1.0, 1.0, 1.0]))
    >>> coarse = VoxelGrid((2, 1, 1), np.eye(4))
    >>> resample(np.array([[[1.0]], [[3.0]]]), coarse, fine).ravel().tolist()
    [1.0, 2.0, 3.0]
    """
    nearest = nearest or data.dtype.kind in "bui"
    stored = data.astype(np.uint8) if data.dtype.kind == "b" else data
    matrix = np.linalg.inv(source.affine) @ target.affine
    # A voxel has a width: up to a voxel beyond the rim, the value at the rim counts.
    padded = np.pad(stored, 1, mode="edge")
    resampled = ndimage.affine_transform(
        padded,
        matrix[:3, :3],
        matrix[:3, 3] + 1,
        target.shape,
        order=0 if nearest else 1,
        mode="constant",
        prefilter=False,
    )
    return resampled.astype(data.dtype, copy=False)


def coverage(source: VoxelGrid, target: VoxelGrid) -> float:
    """The share (0 to 1) of the field of ``target`` that ``source`` covers, at sampled points.

    >>> right_half = VoxelGrid((5, 10, 10), np.eye(4))
    >>> coverage(right_half, VoxelGrid((10, 10, 10), np.eye(4)))
    0.5
    """
    axes = [np.linspace(0, length - 1, min(length, PROBES)) for length in target.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    where = apply_affine(np.linalg.inv(source.affine) @ target.affine, points)
    inside = (where >= -0.5) & (where <= np.array(source.shape) - 0.5)
    return float(inside.all(axis=1).mean())
