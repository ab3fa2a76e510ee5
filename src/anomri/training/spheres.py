"""Synthetic spheres in held-out healthy slices: a score, filters and thresholds are chosen on them.

They are not the anomalies of a training (`anomalies.plant_anomalies`) but smooth spheres in three
dimensions, of one brightness each and without texture. A network that knows its own training
anomalies by heart has no advantage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from anomri.methods.anomalies import typical_shifts
from anomri.methods.draws import log_between
from anomri.slices import SliceStack

Spheres = tuple[int, tuple[float, float]]
"""How many spheres a scan gets, and the range of their radii in mm."""
LARGE: Spheres = (3, (4.0, 35.0))
"""Like tumours and infarcts."""
SMALL: Spheres = (12, (2.0, 6.0))
"""Like plaques."""
MAX_SCANS = 8
"""Healthy scans that spheres are planted in."""
SEED = 2022


def planted(
    stacks: Sequence[SliceStack], channels: Sequence[str], spheres: Spheres
) -> Iterator[tuple[SliceStack, Tensor]]:
    """`plant_spheres` in each of several scans; every call plants the same ones."""
    generator = Generator().manual_seed(SEED)
    for stack in stacks:
        yield plant_spheres(stack, channels, generator, spheres)


def plant_spheres(
    stack: SliceStack, channels: Sequence[str], generator: Generator, spheres: Spheres = LARGE
) -> tuple[SliceStack, Tensor]:
    """Shift the brightness in a few smooth spheres; returns the scan and where, (n, h, w) bool."""
    x, inside = stack.x, stack.foreground
    where = torch.zeros_like(inside)
    places = torch.nonzero(inside)
    count, radii = spheres
    for _ in range(count):
        centre = places[torch.randint(len(places), (1,), generator=generator)[0]]
        radius = float(log_between(*radii, (1,), generator))
        # The edge is 2 mm soft.
        blob = torch.sigmoid((radius - _distance(centre, stack)) / 2) * inside
        shift = typical_shifts(1, channels, generator, typical=1.0)
        # A channel that the scan does not cover stays empty.
        x = torch.where(x > 0, (x + blob[:, None] * shift[..., None, None]).clamp_min(0.01), x)
        where = where | (blob > 0.5)
    return replace(stack, x=x), where


def _distance(centre: Tensor, stack: SliceStack) -> Tensor:
    """The distance of each voxel from the voxel ``centre``, (n, h, w) in mm."""
    squares = [
        (torch.arange(size) * mm - float(place) * mm).square()
        for size, place, mm in zip(stack.foreground.shape, centre, stack.spacing_mm, strict=True)
    ]
    z, y, x = squares
    return (z[:, None, None] + y[:, None] + x).sqrt()
