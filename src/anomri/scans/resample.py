"""Bringing an image onto another grid by what the two headers say; nothing is registered here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

PROBES = 24
"""Points an axis at which `covered` looks."""


@dataclass(frozen=True)
class Lattice:
    """Where the voxels of an array lie: its ``shape`` and ``affine``, voxel indices -> scanner mm (RAS+)."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres in mm along each axis."""
        x, y, z = voxel_sizes(self.affine)
        return float(x), float(y), float(z)

    @property
    def corners_mm(self) -> NDArray[np.float64]:
        """The centres of the eight corner voxels in scanner mm (8, 3)."""
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        return apply_affine(self.affine, corners * (np.array(self.shape) - 1))


def resample(
    data: NDArray[Any], source: Lattice, target: Lattice, *, nearest: bool = False
) -> NDArray[Any]:
    """An array on ``source`` brought onto ``target``: trilinear, or the nearest voxel's value; zero beyond it.

    ``data`` is (x, y, z) of any real type; booleans and integers keep their values and their type.
    """
    nearest = nearest or data.dtype.kind in "bui"
    stored = data.astype(np.uint8) if data.dtype.kind == "b" else data
    matrix = np.linalg.inv(source.affine) @ target.affine
    # Up to a voxel beyond the rim the rim's own value counts: a voxel has a width.
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


def covered(source: Lattice, target: Lattice) -> float:
    """The share of the volume of ``target`` that ``source`` covers, from a regular sample of its points."""
    axes = [np.linspace(0, n - 1, min(n, PROBES)) for n in target.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    where = apply_affine(np.linalg.inv(source.affine) @ target.affine, points)
    inside = (where >= -0.5) & (where <= np.array(source.shape) - 0.5)
    return float(inside.all(axis=1).mean())
