"""The components of a mask, and what a table says of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import cc3d
import edt
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from anomri.boxes import box_around
from anomri.geometry import Geometry
from anomri.sensitivity import confidence
from anomri.spec import HealthyScores


@dataclass(frozen=True)
class Lesion:
    """One 26-connected component of a mask; the centroid is in scanner mm (RAS+), the scores are the map's."""

    lesion: int
    volume_mm3: float
    centroid_mm: tuple[float, float, float]
    peak: float
    mean: float
    confidence: float | None = None
    """Share of healthy held-out scans whose peak lies below this one; see `sensitivity.confidence`."""
    edge_distance_mm: float | None = None
    """The smallest distance of a voxel of the lesion from a voxel outside the brain, between their centres."""


def find_lesions(
    mask: NDArray[np.bool_],
    anomaly_map: NDArray[np.float32],
    geometry: Geometry,
    brain: NDArray[np.bool_] | None = None,
    healthy: HealthyScores | None = None,
) -> tuple[Lesion, ...]:
    """The 26-connected components of a mask (x, y, z) in the working orientation, largest first.

    The ``brain`` (x, y, z) gives their distance from its edge, and what the model knows of ``healthy`` scans their
    confidence; without, these are ``None``.
    """
    box = box_around(mask)
    part = mask[box]
    if not part.size:
        return ()
    found = cc3d.connected_components(part.astype(np.uint8), connectivity=26)
    inside, scores = found[part].astype(np.int64), anomaly_map[box][part]
    counts = np.bincount(inside)[1:]
    means = np.bincount(inside, weights=scores)[1:] / counts
    peaks = np.zeros(len(counts) + 1)
    np.maximum.at(peaks, inside, scores)
    distances = None
    if brain is not None:
        components = np.zeros(mask.shape, dtype=found.dtype)
        components[box] = found
        distances = smallest_edge_distances(components, brain, geometry.spacing_mm)
    centroids = cc3d.statistics(found)["centroids"][1:] + [side.start for side in box]
    centroids_mm = apply_affine(geometry.canonical_affine, centroids).round(2)
    largest_first = np.argsort(-counts, kind="stable")
    return tuple(
        Lesion(
            number,
            round(float(counts[k] * geometry.voxel_mm3), 3),
            tuple(centroids_mm[k].tolist()),
            float(peaks[k + 1]),
            float(means[k]),
            confidence(float(peaks[k + 1]), healthy),
            None if distances is None else round(float(distances[k]), 2),
        )
        for number, k in enumerate(largest_first, start=1)
    )


def smallest_edge_distances(
    components: NDArray[np.integer[Any]], brain: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """For every component 1, 2, ... of (x, y, z), its smallest distance in mm from a voxel outside the brain.

    Distances are those between centres of voxels. Holes of the ``brain`` (x, y, z) are inside; what lies beyond the
    image is outside.
    """
    inside = np.pad(brain | (components > 0), 1)
    box = tuple(slice(side.start - 1, side.stop + 1) for side in box_around(inside))
    air = cc3d.connected_components((~inside[box]).astype(np.uint8), connectivity=6)
    distance = edt.edt(
        np.ascontiguousarray(air != air[0, 0, 0]), anisotropy=spacing_mm, parallel=min(os.cpu_count() or 1, 4)
    )
    inner = components[tuple(slice(side.start, side.stop - 2) for side in box)]
    smallest, there = np.full(int(components.max()) + 1, np.inf), inner > 0
    np.minimum.at(smallest, inner[there], distance[1:-1, 1:-1, 1:-1][there])
    return smallest[1:]
