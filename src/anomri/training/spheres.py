"""Synthetic spheres in held-out healthy slices: what scores, filters and thresholds are chosen on, without a label.

They are not the anomalies of a training (`anomalies.plant_anomalies`): smooth spheres in three dimensions, of one
brightness each and without texture, so that a network that knows its own blobs by heart has no advantage.
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
LARGE, SMALL = (3, (4.0, 35.0)), (12, (2.0, 6.0))
"""How many spheres a scan gets, and their radii in mm: like tumours and infarcts, and like plaques."""
MAX_SCANS = 8
SEED = 2022


def planted(
    stacks: Sequence[SliceStack], channels: Sequence[str], spheres: Spheres
) -> Iterator[tuple[SliceStack, Tensor]]:
    """`plant_spheres` in each of several scans, the same ones at every call."""
    generator = Generator().manual_seed(SEED)
    for stack in stacks:
        yield plant_spheres(stack, channels, generator, spheres)


def plant_spheres(
    stack: SliceStack, channels: Sequence[str], generator: Generator, spheres: Spheres = LARGE
) -> tuple[SliceStack, Tensor]:
    """Shift the brightness in a few smooth spheres of a scan; returns the scan and where it changed (n, h, w) bool."""
    x, inside = stack.x, stack.foreground
    where = torch.zeros_like(inside)
    axes = [
        torch.arange(size) * mm for size, mm in zip(inside.shape, stack.spacing_mm, strict=True)
    ]
    places = torch.nonzero(inside)
    for _ in range(spheres[0]):
        centre = places[torch.randint(len(places), (1,), generator=generator)[0]]
        radius = float(log_between(*spheres[1], (1,), generator))
        offsets = [axis - float(centre[k]) * stack.spacing_mm[k] for k, axis in enumerate(axes)]
        away = sum(
            offset.square().reshape([-1 if k == j else 1 for j in range(3)])
            for k, offset in enumerate(offsets)
        )
        blob = torch.sigmoid((radius - torch.as_tensor(away).sqrt()) / 2) * inside
        shift = typical_shifts(1, channels, generator, typical=1.0)
        # A channel that the scan does not cover stays empty.
        x = torch.where(x > 0, (x + blob[:, None] * shift[..., None, None]).clamp_min(0.01), x)
        where = where | (blob > 0.5)
    return replace(stack, x=x), where
