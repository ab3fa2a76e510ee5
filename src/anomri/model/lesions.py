"""The lesions of a mask: what is known of each, and how tables and pages show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
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

EDGE_MM = 5.0
"""What lies this near to a voxel outside the brain, or in the outermost voxels, is at the edge. A
rim of scalp or marrow that skull stripping leaves is as thin, and few true lesions are:
docs/notes/2026-12-01-rim-after-stripping.md."""
_TOLERANCE_MM = 1e-3
"""Spacings of headers are rounded."""

Show = Callable[[Any, "int | None"], str]
"""A value as a page shows it; the second argument is the number of healthy scans of the model."""


@dataclass(frozen=True)
class Column:
    """How tables, sidecars and pages show one field of a `Lesion`."""

    description: str
    heading: str
    """The column's name on a page."""
    show: Show
    unit: str = ""
    """In the words of BIDS."""
    format: str = ""
    """Of a value in a table."""
    names: tuple[str, ...] = ()
    """Columns of a table, for a field that holds several values; by default the field's own
    name."""


def column(
    description: str,
    heading: str,
    show: Show,
    *,
    default: Any = MISSING,
    unit: str = "",
    format: str = "",
    names: tuple[str, ...] = (),
) -> Any:
    """A field of a `Lesion` with its `Column`."""
    shown = Column(description, heading, show, unit, format, names)
    return field(default=default, metadata={"column": shown})


def show_number(digits: int, scale: float = 1) -> Show:
    """Show a number, multiplied by ``scale``, with so many digits after the point.

    >>> show_number(2, scale=0.001)(4842.0, None)
    '4.84'
    """
    return lambda value, _: f"{value * scale:.{digits}f}"


def show_place(place: tuple[float, ...], _: int | None) -> str:
    """Show coordinates as whole numbers.

    >>> show_place((-24.13, 51.84, 26.29), None)
    '\u221224, 52, 26'
    """
    return ", ".join(str(round(value)) for value in place).replace("-", "\N{MINUS SIGN}")


def show_percent(share: float, _: int | None) -> str:
    """Show a share as a percentage.

    >>> show_percent(0.254, None)
    '25%'
    """
    return f"{share:.0%}"


def show_healthy_below(share: float, healthy_scans: int | None) -> str:
    """Show a confidence k / (n + 1) as "k of n"; as a number if it is not of so many scans.

    >>> show_healthy_below(0.75, 3)
    '3 of 3'
    >>> show_healthy_below(0.75, None)
    '0.75'
    """
    below = share * ((healthy_scans or 0) + 1)
    if healthy_scans is None or abs(below - round(below)) > 1e-6:
        return f"{share:.2f}"
    return f"{round(below)} of {healthy_scans}"


@dataclass(frozen=True)
class Lesion:
    """One 26-connected component of a mask.

    A field is all that a new column needs: ``lesions.tsv``, the JSON of a case, BIDS sidecars, the
    report and the viewer show what is here.
    """

    lesion: int = column("Number; the largest lesion is 1.", "#", show_number(0))
    volume_mm3: float = column("Volume.", "ml", show_number(2, scale=0.001), unit="mm^3")
    centroid_mm: tuple[float, float, float] = column(
        "Centroid in scanner coordinates (RAS+): x to the right, y to the front, z up.",
        "x, y, z (mm)",
        show_place,
        unit="mm",
        names=("x_mm", "y_mm", "z_mm"),
    )
    peak: float = column("Highest anomaly score.", "peak", show_number(2), format=".5g")
    mean: float = column("Mean anomaly score.", "mean", show_number(2), format=".5g")
    confidence: float | None = column(
        "k / (n + 1), where the highest score of k of n held-out healthy scans lies below the peak.",
        "above healthy scans",
        show_healthy_below,
        default=None,
        format=".4g",
    )
    edge_distance_mm: float | None = column(
        "Smallest distance from a voxel of the lesion to a voxel outside the brain, between centres.",
        "from edge (mm)",
        show_number(1),
        default=None,
        unit="mm",
        format=".4g",
    )
    edge_share: float | None = column(
        f"Share of the lesion that lies within {EDGE_MM:g} mm of a voxel outside the brain, or within "
        "a slice's thickness where that is more.",
        "at edge",
        show_percent,
        default=None,
        format=".3g",
    )

    @property
    def at_edge(self) -> bool:
        """Whether most of it lies at the edge of the brain, as what is left of a skull does."""
        return self.edge_share is not None and self.edge_share > 0.5


def lesion_columns() -> dict[str, Column]:
    """The `Column` of each field of a `Lesion`."""
    return {one.name: one.metadata["column"] for one in fields(Lesion)}


def table_columns() -> dict[str, dict[str, str]]:
    """The columns of a table of lesions, each with its description and unit in the words of
    BIDS."""
    described: dict[str, dict[str, str]] = {}
    for name, one in lesion_columns().items():
        unit = {"Units": one.unit} if one.unit else {}
        described |= {part: {"Description": one.description} | unit for part in one.names or [name]}
    return described


def table_row(lesion: Lesion, missing: str = "") -> list[str]:
    """A lesion as texts by `table_columns`; ``missing`` stands for values that are not known."""
    row = []
    for name, one in lesion_columns().items():
        value = getattr(lesion, name)
        values = value if one.names else [value]
        row += [missing if part is None else format(part, one.format) for part in values]
    return row


def healthy_scans(run: Mapping[str, Any]) -> int | None:
    """How many healthy scans the peaks of lesions were compared with, if ``run.json`` says so."""
    thresholds = run.get("thresholds")
    return thresholds.get("healthy_cases") if isinstance(thresholds, dict) else None


def page_row(lesion: Lesion, healthy_scans: int | None, missing: str = "-") -> list[str]:
    """A lesion as a page shows it, by the headings of `lesion_columns`."""
    row = []
    for name, one in lesion_columns().items():
        value = getattr(lesion, name)
        is_known = _is_known(*value) if one.names else _is_known(value)
        row.append(one.show(value, healthy_scans) if is_known else missing)
    return row


def read_lesion(facts: Mapping[str, Any]) -> Lesion:
    """Read back the lesion that ``asdict`` and JSON gave.

    What is missing or not a finite number becomes the field's default, or NaN.
    """
    values: dict[str, Any] = {}
    for one in fields(Lesion):
        parts = one.metadata["column"].names
        value: Any = facts.get(one.name)
        if parts:
            is_sound = isinstance(value, list) and len(value) == len(parts) and _is_known(*value)
            values[one.name] = tuple(value) if is_sound else (math.nan,) * len(parts)
        elif _is_known(value):
            values[one.name] = value
        else:
            values[one.name] = math.nan if one.default is MISSING else one.default
    return Lesion(**values)


def _is_known(*values: object) -> bool:
    """Whether these are finite numbers."""
    try:
        return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    except OverflowError:
        return False


def find_lesions(
    mask: NDArray[np.bool_],
    anomaly_map: NDArray[np.float32],
    geometry: Geometry,
    brain: NDArray[np.bool_] | None = None,
    healthy: HealthyScores | None = None,
) -> tuple[Lesion, ...]:
    """The 26-connected components of a mask (x, y, z) in the working orientation, largest first.

    The ``brain`` (x, y, z) gives their distance from its edge, and what the model knows of
    ``healthy`` scans their confidence; without, these are ``None``.
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
    distances = shares = None
    if brain is not None:
        components = np.zeros(mask.shape, dtype=found.dtype)
        components[box] = found
        edge = find_edge(mask, brain, geometry.spacing_mm)
        distances = smallest_edge_distances(components, edge, geometry.spacing_mm)
        shares = shares_at_edge(components, edge, geometry.spacing_mm)
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
            None if shares is None else round(float(shares[k]), 3),
        )
        for number, k in enumerate(largest_first, start=1)
    )


def lesion_labels(mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The components of a mask (x, y, z) numbered from 1 as `find_lesions` does, the largest first;
    0 elsewhere.

    The data type is the smallest unsigned one that holds all numbers.
    """
    box = box_around(mask)
    part = mask[box]
    if not part.size:
        return np.zeros(mask.shape, dtype=np.uint8)
    components = cc3d.connected_components(part.astype(np.uint8), connectivity=26)
    counts = np.bincount(components[part].astype(np.int64))[1:]
    number = np.zeros(len(counts) + 1, dtype=np.min_scalar_type(len(counts)))
    number[np.argsort(-counts, kind="stable") + 1] = np.arange(1, len(counts) + 1)
    labels = np.zeros(mask.shape, dtype=number.dtype)
    labels[box] = number[components]
    return labels


def find_edge(
    lesions: NDArray[np.bool_], brain: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> KDTree:
    """The voxels next to the brain (x, y, z) and outside it, as places in mm from the first voxel.

    The ``lesions`` (x, y, z) and holes of the brain are inside; what lies beyond the image is
    outside.
    """
    inside = brain | lesions
    box = box_around(inside)
    # Holes of the brain are air that the air around does not reach.
    air = cc3d.connected_components(
        np.pad(~inside[box], 1, constant_values=True).view(np.uint8), connectivity=6
    )
    outside = air == air[0, 0, 0]
    skin = np.argwhere(outside & _rim(outside)) - 1 + [side.start for side in box]
    return KDTree(skin * np.array(spacing_mm), balanced_tree=False, compact_nodes=False)


def smallest_edge_distances(
    components: NDArray[np.integer[Any]], edge: KDTree, spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """For every component 1, 2, ... of (x, y, z), its smallest distance in mm from the ``edge``
    that `find_edge` found.

    Distances are those between centres of voxels.
    """
    # Nearest to each other are a voxel on the rim of a component and one of the edge.
    box = box_around(components > 0)
    near = components[box]
    rim = np.nonzero((near > 0) & _rim(np.pad(near, 1))[1:-1, 1:-1, 1:-1])
    places = (np.stack(rim, 1) + [side.start for side in box]) * spacing_mm
    numbers, smallest = near[rim], np.full(int(components.max()) + 1, np.inf)
    # Further and further until every component has met the edge: what is deep inside one is hardly
    # looked at.
    left, reach = np.arange(len(numbers)), 2 * max(spacing_mm)
    while left.size:
        distances, _ = edge.query(places[left], distance_upper_bound=reach)
        np.minimum.at(smallest, numbers[left], distances)
        left, reach = left[np.isinf(smallest[numbers[left]])], 2 * reach
    return smallest[1:]


def shares_at_edge(
    components: NDArray[np.integer[Any]], edge: KDTree, spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """For every component 1, 2, ... of (x, y, z), the share of its voxels that is at the ``edge``:
    within `EDGE_MM`, or within one voxel where that is more."""
    reach = max(EDGE_MM, *spacing_mm) + _TOLERANCE_MM
    voxels = np.nonzero(components)
    distances, _ = edge.query(np.stack(voxels, 1) * spacing_mm, distance_upper_bound=reach)
    numbers = components[voxels].astype(np.int64)
    near = np.bincount(numbers, weights=np.isfinite(distances))
    return near[1:] / np.bincount(numbers)[1:]


def _rim(parts: NDArray[Any]) -> NDArray[np.bool_]:
    """Voxels of (x, y, z) that differ from one of their six neighbours."""
    differs = np.zeros(parts.shape, dtype=bool)
    for axis in range(3):
        before, after = (np.moveaxis(array, axis, 0) for array in (parts, differs))
        step = before[1:] != before[:-1]
        after[1:] |= step
        after[:-1] |= step
    return differs
