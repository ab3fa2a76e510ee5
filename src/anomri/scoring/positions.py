"""Statistics by position in the brain, in cells of the box around it.

No common space is needed. In a cohort that is in one space a cell holds the same tissue in every
scan; in another, nearly the same.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from anomri.slices import Position, cut_box

CELLS = 8
"""Cells along each axis of the brain's box, about 2 cm: finer than this, twenty patients do not
tell tissue from chance."""
LEAST = 50
"""Pixels that a cell needs for a mean and a spread of its own; one with fewer takes the
channel's."""


def statistics_by_position(
    residuals: Iterable[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Mean and spread of residuals in each cell, (c, 8, 8, 8) each.

    Both are smoothed over neighbouring cells. Each scan gives the residual (m, c, h, w) of the
    slices that count, the foreground (n, h, w) bool of all slices, and which of them count (n,)
    bool, m of them.
    """
    sums = torch.zeros(())
    for residual, foreground, counted in residuals:
        brain = Position.from_foreground(foreground).box
        inside = cut_box(foreground[counted], brain)[:, None].double()
        residual = cut_box(residual, brain)
        parts = torch.cat([inside, residual * inside, residual.square() * inside], 1)
        # First within each slice, then over slices: others than those that count are zero.
        cells = torch.zeros(len(foreground), parts.shape[1], CELLS, CELLS, dtype=torch.double)
        cells[counted] = functional.adaptive_avg_pool2d(parts, CELLS)
        pooled = functional.adaptive_avg_pool3d(cells.movedim(0, 1), CELLS)
        # A mean over cells, times their size: cells of a scan with few slices count for as many
        # pixels as they have.
        size = len(foreground) * inside[0].numel() / CELLS**3
        sums = sums + pooled * size
    everywhere = sums.sum((1, 2, 3), keepdim=True)
    smooth = ndimage.gaussian_filter(sums.numpy(), (0, 0.7, 0.7, 0.7), mode="nearest")
    total = torch.where(torch.from_numpy(smooth)[:1] >= LEAST, torch.from_numpy(smooth), everywhere)
    count, (first, second) = total[:1].clamp_min(1), total[1:].chunk(2)
    mean = first / count
    return mean.float(), (second / count - mean.square()).clamp_min(1e-12).sqrt().float()


def interpolate_cells(cells: Tensor, position: Position, size: tuple[int, int]) -> Tensor:
    """Values of cells (k, 8, 8, 8) at every pixel of slices, interpolated: (n, k, h, w).

    Outside the brain's box they are those of its edge.
    """
    top, bottom, left, right = position.box
    rows = (torch.arange(size[0]) + 0.5 - top) / (bottom - top)
    columns = (torch.arange(size[1]) + 0.5 - left) / (right - left)
    weights = (_weights(places) for places in (position.heights, rows, columns))
    # Linear in each of three axes by itself: three small matrices, no pixel looked up.
    return torch.einsum("kabc,na,hb,wc->nkhw", cells, *weights)


def _weights(places: Tensor) -> Tensor:
    """Weights (m, 8) of the cells along an axis at places (m,) from 0 to 1."""
    nearest = (places * CELLS - 0.5).clamp(0, CELLS - 1)
    return (1 - (nearest[:, None] - torch.arange(CELLS)).abs()).clamp_min(0)


def pack_maps(mean: Tensor, spread: Tensor) -> str:
    """Both as text: float16, (2, c, 8, 8, 8), base64."""
    return base64.b64encode(torch.stack([mean, spread]).numpy().astype("<f2").tobytes()).decode(
        "ascii"
    )


def unpack_maps(text: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and spread, (channels, 8, 8, 8) float32.

    Raises ``ValueError`` if the text holds anything else.
    """
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float32)
    mean, spread = torch.from_numpy(values.reshape(2, channels, CELLS, CELLS, CELLS))
    return mean, spread
