"""The components of a mask, and what a table says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy.spatial import KDTree

from anomri.model.sensitivity import confidence
from anomri.scans.boxes import box_around
from anomri.scans.geometry import Geometry
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


def lesion_labels(mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The components of a mask (x, y, z) numbered from 1 as `find_lesions` does, the largest first; 0 elsewhere."""
    components = cc3d.connected_components(mask.astype(np.uint8), connectivity=26)
    counts = np.bincount(components[mask].astype(np.int64))[1:]
    number = np.zeros(len(counts) + 1, dtype=np.min_scalar_type(len(counts)))
    number[np.argsort(-counts, kind="stable") + 1] = np.arange(1, len(counts) + 1)
    return np.asarray(number[components])


def smallest_edge_distances(
    components: NDArray[np.integer[Any]],
    brain: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """For every component 1, 2, ... of (x, y, z), its smallest distance in mm from a voxel outside the brain.

    Distances are those between centres of voxels. Holes of the ``brain`` (x, y, z) are inside; what lies beyond the
    image is outside.
    """
    found = components > 0
    inside = brain | found
    box = box_around(inside)
    # Holes of the brain are air that the air around does not reach.
    air = cc3d.connected_components(
        np.pad(~inside[box], 1, constant_values=True).view(np.uint8), connectivity=6
    )
    outside = air == air[0, 0, 0]
    skin = np.argwhere(outside & _rim(outside)) - 1
    # Nearest to each other are a voxel on the rim of a component and one on the rim of the air.
    lesions = box_around(found[box])
    near = components[box][lesions]
    rim = np.nonzero((near > 0) & _rim(np.pad(near, 1))[1:-1, 1:-1, 1:-1])
    places = (np.stack(rim, 1) + [side.start for side in lesions]) * spacing_mm
    tree = KDTree(skin * np.array(spacing_mm), balanced_tree=False, compact_nodes=False)
    numbers, smallest = near[rim], np.full(int(components.max()) + 1, np.inf)
    # Further and further until every component has met the air: what is deep inside one is hardly looked at.
    left, reach = np.arange(len(numbers)), 2 * max(spacing_mm)
    while left.size:
        distances, _ = tree.query(places[left], distance_upper_bound=reach)
        np.minimum.at(smallest, numbers[left], distances)
        left, reach = left[np.isinf(smallest[numbers[left]])], 2 * reach
    return smallest[1:]


def _rim(parts: NDArray[Any]) -> NDArray[np.bool_]:
    """Voxels of (x, y, z) that differ from one of their six neighbours."""
    differs = np.zeros(parts.shape, dtype=bool)
    for axis in range(3):
        before, after = (np.moveaxis(array, axis, 0) for array in (parts, differs))
        step = before[1:] != before[:-1]
        after[1:] |= step
        after[:-1] |= step
    return differs
