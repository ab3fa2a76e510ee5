"""Synthetic spheres in held-out healthy slices: a score, filters and thresholds are chosen on them.

They are not the anomalies of a training (`anomalies.plant_anomalies`) but smooth spheres in three
dimensions, of one brightness each and without texture. A network that knows its own training
anomalies by heart has no advantage.

What is wanted are the figures of a mean scan with three large spheres, and of one with twelve small
ones. Most of such a scan is healthy tissue, which is scored once, without spheres. Beside that only
slabs go through the network: a few slices of one large sphere, or small spheres close together.
Weighted counts of their voxels stand for whole scans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from anomri.methods.anomalies import typical_shifts
from anomri.methods.draws import between, log_between
from anomri.scoring.metrics import Curve, count_at
from anomri.slices import SliceStack

Scores = NDArray[np.float32]

LARGE_RADII_MM, LARGE_IN_A_SCAN = (4.0, 35.0), 3
"""Radii and number of the spheres that are like tumours and infarcts."""
SMALL_RADII_MM, SMALL_IN_A_SCAN = (2.0, 6.0), 12
"""The same of those that are like plaques."""
LARGE_SLAB_MM, SMALL_SLAB_MM = 6.0, 16.0
"""Heights of the slabs."""
FEWEST_SLICES = 3
"""Of a slab, however thick the slices are."""
MAX_SCANS = 8
"""Healthy scans that spheres are planted in."""
SEED = 2022
SOFTNESS_MM = 2.0
"""Width of a sphere's soft edge."""
EDGE_MM = 14.0
"""A sphere ends this far outside its radius, where a thousandth of its shift is left."""
APART_MM = 8.0
"""Room between the small spheres of a slab, so that none lies in the soft edge of another."""


@dataclass(frozen=True)
class Sphere:
    """A sphere around a voxel (slice, row, column) that shifts the brightness of each channel."""

    centre: tuple[int, int, int]
    radius_mm: float
    shift: Tensor
    """(c,)."""


@dataclass(frozen=True)
class Slab:
    """Neighbouring slices of a healthy scan with spheres in them."""

    scan: int
    """The number of the scan."""
    slices: slice
    """Which of its slices."""
    stack: SliceStack
    where: Tensor
    """(n, h, w) bool: the voxels in a sphere."""
    weight: float
    """The mean over slabs of a number of voxels times this weight is the mean over scans."""


@dataclass(frozen=True)
class ScoredSlabs:
    """Slabs and their scores, (n, h, w) each."""

    slabs: Sequence[Slab]
    scores: Sequence[Scores]


@dataclass(frozen=True)
class HealthyScans:
    """Scores (n, h, w) of scans without spheres, and their foreground (n, h, w) bool."""

    scores: Sequence[Scores]
    foreground: Sequence[NDArray[np.bool_]]

    def rising(self, scan: int, slices: slice = slice(None)) -> Scores:
        """The rising scores of the foreground of some slices of a scan."""
        return np.sort(self.scores[scan][slices][self.foreground[scan][slices]])

    def counts(self, steps: Scores) -> NDArray[np.float64]:
        """`metrics.count_at` for the foreground of a mean scan."""
        counts = [count_at(self.rising(scan), steps) for scan in range(len(self.scores))]
        return np.asarray(np.mean(counts, axis=0))


def large_spheres(
    scans: Sequence[SliceStack], channels: Sequence[str], count: int, seed: int = SEED
) -> list[Slab]:
    """Slabs with one large sphere each, in the scans in turn."""
    return _slabs(_large_slab, scans, channels, count, seed)


def small_spheres(
    scans: Sequence[SliceStack], channels: Sequence[str], count: int, seed: int = SEED
) -> list[Slab]:
    """Slabs with up to `SMALL_IN_A_SCAN` small spheres each, in the scans in turn."""
    return _slabs(_small_slab, scans, channels, count, seed + 1)


def slab_slices(height_mm: float, spacing_mm: float) -> int:
    """The number of slices of a slab.

    >>> slab_slices(16, 2), slab_slices(16, 6)
    (8, 3)
    """
    return max(math.ceil(height_mm / spacing_mm), FEWEST_SLICES)


def plant(stack: SliceStack, spheres: Sequence[Sphere]) -> tuple[SliceStack, Tensor]:
    """Shift the brightness in smooth spheres; returns the slices and where, (n, h, w) bool."""
    x, inside = stack.x.clone(), stack.foreground
    where = torch.zeros_like(inside)
    for sphere in spheres:
        around = _voxels_within(sphere.radius_mm + EDGE_MM, sphere.centre, stack)
        z, rows, columns = (slice(axis.start, axis.stop) for axis in around)
        distance = _distance(sphere.centre, around, stack.spacing_mm)
        blob = torch.sigmoid((sphere.radius_mm - distance) / SOFTNESS_MM) * inside[z, rows, columns]
        values = x[z, :, rows, columns]
        shifted = (values + blob[:, None] * sphere.shift[:, None, None]).clamp_min(0.01)
        # A channel that the scan does not cover stays empty.
        x[z, :, rows, columns] = torch.where(values > 0, shifted, values)
        where[z, rows, columns] |= blob > 0.5
    return replace(stack, x=x), where


def sphere_curve(scored: ScoredSlabs, healthy: HealthyScans, steps: Scores) -> Curve:
    """True and false positives of a mean scan with spheres at rising thresholds, ``steps``.

    ``healthy`` are the scores of all scans that the slabs lie in.
    """
    found, positives = np.zeros(len(steps)), 0.0
    # False positives are those of a healthy scan, and what the spheres change in their slab.
    false = healthy.counts(steps)
    for slab, scores in zip(scored.slabs, scored.scores, strict=True):
        weight = slab.weight / len(scored.slabs)
        inside = scores[slab.where.numpy()]
        outside = scores[(slab.stack.foreground & ~slab.where).numpy()]
        found += weight * count_at(np.sort(inside), steps)
        positives += weight * inside.size
        false += weight * count_at(np.sort(outside), steps)
        false -= weight * count_at(healthy.rising(slab.scan, slab.slices), steps)
    # Differences of weighted counts: rounded, and none is below zero.
    cumulated = [np.rint(counts[::-1].cumsum()).astype(np.int64) for counts in (found, false)]
    return Curve(steps[::-1], cumulated[0], cumulated[1].clip(0), round(positives))


def steps_inside(scored: Sequence[ScoredSlabs], count: int) -> Scores:
    """Rising thresholds worth trying: quantiles of the scores of the voxels in spheres."""
    inside = [
        scores[slab.where.numpy()]
        for one in scored
        for slab, scores in zip(one.slabs, one.scores, strict=True)
    ]
    return np.unique(np.quantile(np.concatenate(inside), np.linspace(0, 1, count)))


MakeSlab = Callable[[SliceStack, int, Sequence[str], Generator], Slab]


def _slabs(
    make: MakeSlab, scans: Sequence[SliceStack], channels: Sequence[str], count: int, seed: int
) -> list[Slab]:
    generator = Generator().manual_seed(seed)
    numbers = [number % len(scans) for number in range(count)]
    return [make(scans[number], number, channels, generator) for number in numbers]


def _large_slab(
    scan: SliceStack, number: int, channels: Sequence[str], generator: Generator
) -> Slab:
    # Drawn by volume, since voxels are counted: few would be as large as those that matter.
    smallest, largest = (radius**3 for radius in LARGE_RADII_MM)
    cube = float(between(smallest, largest, (1,), generator))
    radius = cube ** (1 / 3)
    sphere = _random_sphere(scan, range(len(scan.x)), radius, channels, generator)
    # All slices that the sphere and most of its edge touch, in blocks of like size; one is taken.
    spacing = scan.spacing_mm[0]
    touched = _places_within(radius + SOFTNESS_MM, sphere.centre[0], len(scan.x), spacing)
    blocks = math.ceil(len(touched) / slab_slices(LARGE_SLAB_MM, spacing))
    block = int(torch.randint(blocks, (1,), generator=generator))
    first, end = (touched.start + len(touched) * place // blocks for place in (block, block + 1))
    # By its weight every octave of radii is as likely as any other.
    mean_cube = (largest - smallest) / math.log(largest / smallest)
    weight = LARGE_IN_A_SCAN * blocks * mean_cube / cube
    return _cut(scan, number, range(first, end), [sphere], weight)


def _small_slab(
    scan: SliceStack, number: int, channels: Sequence[str], generator: Generator
) -> Slab:
    spacing = scan.spacing_mm[0]
    height = min(slab_slices(SMALL_SLAB_MM, spacing), len(scan.x))
    # Around a voxel of the foreground: an empty slab shows nothing.
    middle = _random_voxel(scan, range(len(scan.x)), generator)[0]
    first = min(max(middle - height // 2, 0), len(scan.x) - height)
    spheres: list[Sphere] = []
    for _ in range(SMALL_IN_A_SCAN):
        radius = float(log_between(*SMALL_RADII_MM, (1,), generator))
        margin = min(math.ceil(radius / spacing), (height - 1) // 2)
        layers = range(first + margin, first + height - margin)
        if not scan.foreground[layers.start : layers.stop].any():
            layers = range(middle, middle + 1)
        one = _random_sphere(scan, layers, radius, channels, generator)
        if all(_gap_mm(one, other, scan.spacing_mm) > APART_MM for other in spheres):
            spheres.append(one)
    weight = SMALL_IN_A_SCAN / len(spheres)
    return _cut(scan, number, range(first, first + height), spheres, weight)


def _cut(
    scan: SliceStack, number: int, slices: range, spheres: Sequence[Sphere], weight: float
) -> Slab:
    moved = [
        replace(one, centre=(one.centre[0] - slices.start, *one.centre[1:])) for one in spheres
    ]
    stack, where = plant(scan.take(slices), moved)
    return Slab(number, slice(slices.start, slices.stop), stack, where, weight)


def _random_sphere(
    scan: SliceStack, layers: range, radius: float, channels: Sequence[str], generator: Generator
) -> Sphere:
    """A sphere around a random voxel of the foreground in some slices, which have some."""
    centre = _random_voxel(scan, layers, generator)
    return Sphere(centre, radius, typical_shifts(1, channels, generator, typical=1.0)[0])


def _random_voxel(scan: SliceStack, layers: range, generator: Generator) -> tuple[int, int, int]:
    inside = scan.foreground[layers.start : layers.stop]
    numbers = inside.flatten().cumsum(0)
    drawn = torch.randint(int(numbers[-1]), (1,), generator=generator)
    place = int(torch.searchsorted(numbers, drawn, right=True))
    z, y, x = np.unravel_index(place, inside.shape)
    return layers.start + int(z), int(y), int(x)


def _gap_mm(one: Sphere, other: Sphere, spacing_mm: Sequence[float]) -> float:
    """The distance between the surfaces of two spheres."""
    offsets = [(a - b) * mm for a, b, mm in zip(one.centre, other.centre, spacing_mm, strict=True)]
    return math.hypot(*offsets) - one.radius_mm - other.radius_mm


def _voxels_within(mm: float, centre: Sequence[int], stack: SliceStack) -> list[range]:
    """The places along each axis that lie within ``mm`` of the voxel ``centre``."""
    axes = zip(centre, stack.foreground.shape, stack.spacing_mm, strict=True)
    return [_places_within(mm, place, size, spacing) for place, size, spacing in axes]


def _places_within(mm: float, place: int, size: int, spacing: float) -> range:
    """The places of an axis that lie within ``mm`` of ``place``."""
    reach = math.ceil(mm / spacing)
    return range(max(place - reach, 0), min(place + reach + 1, size))


def _distance(
    centre: Sequence[int], around: Sequence[range], spacing_mm: Sequence[float]
) -> Tensor:
    """The distance in mm of each voxel of a box, ``around``, from the voxel ``centre``."""
    z, y, x = (
        ((torch.arange(axis.start, axis.stop) - place) * mm).square()
        for axis, place, mm in zip(around, centre, spacing_mm, strict=True)
    )
    return (z[:, None, None] + y[:, None] + x).sqrt()
