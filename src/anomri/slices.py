"""From a scan to the slices a network sees, and back (Kascenas et al. 2022, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomri.spec import AnomriError, Grid, Scaling
from anomri.volume import Geometry, Volume


@dataclass(frozen=True)
class SliceStack:
    """The axial slices of one scan on the working grid.

    ``x`` (n, c, h, w) float32, scaled; ``foreground`` (n, h, w) bool; ``index`` their place along z; ``scale``
    what each channel was divided by; ``label`` (n, h, w) bool, if the scan has one.
    """

    x: Tensor
    foreground: Tensor
    index: range
    scale: tuple[float, ...]
    label: Tensor | None


def slice_volume(volume: Volume, grid: Grid = Grid(), scaling: Scaling = Scaling()) -> SliceStack:
    """Scale a scan and cut it into slices on the working grid; raises `AnomriError` if no slice holds brain."""
    scale = percentile_scale(volume.data, scaling.percentile)
    scaled = volume.data / np.asarray(scale, dtype=np.float32)[:, None, None, None]
    index = slice_range(scaled, scaling.slice_sum)
    if not index:
        raise AnomriError(f"{volume.name}: no slice holds enough brain; is the image nearly empty?")
    x = to_slices(scaled, volume.in_plane_mm, grid, index)
    label = None if volume.label is None else label_slices(volume.label, volume.in_plane_mm, grid, index)
    return SliceStack(x, foreground_of(x, scaling), index, scale, label)


def percentile_scale(data: NDArray[np.float32], percentile: float = 99.0) -> tuple[float, ...]:
    """The ``percentile`` of each channel of (c, x, y, z) over its voxels > 0; 1 for a channel without any."""
    positive = (channel[channel > 0] for channel in data)
    return tuple(float(np.percentile(values, percentile)) if values.size else 1.0 for values in positive)


def slice_range(scaled: NDArray[np.float32], slice_sum: float = 0.5) -> range:
    """Axial slices from the first to the last whose channel mean sums to more than ``slice_sum``."""
    sums = scaled.mean(axis=0).sum(axis=(0, 1))
    (above,) = np.nonzero(sums > slice_sum)
    return range(int(above[0]), int(above[-1]) + 1) if above.size else range(0)


def field_of_view(shape: tuple[int, int], spacing_mm: tuple[float, float], grid: Grid) -> tuple[int, int]:
    """Size in voxels of the field that is resized to the grid, for slices of ``shape`` and ``spacing_mm``."""
    if grid.field_of_view_mm is None:
        return shape
    rows, columns = (round(mm / spacing) for mm, spacing in zip(grid.field_of_view_mm, spacing_mm, strict=True))
    return max(rows, 1), max(columns, 1)


def centre_pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut or zero-pad the last two axes of ``x`` around their middle to ``size``; undone by the old size."""
    padding: list[int] = []
    for have, want in zip(x.shape[:-3:-1], size[::-1], strict=True):
        before = (want - have) // 2 if want >= have else -((have - want) // 2)
        padding += [before, want - have - before]
    return functional.pad(x, padding) if any(padding) else x


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (n, c, h, w), pixel centres aligned, no antialiasing."""
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def to_slices(data: NDArray[np.float32], spacing_mm: tuple[float, float], grid: Grid, index: range) -> Tensor:
    """Axial slices ``index`` of (c, x, y, z) on the working grid: (n, c, *grid.size) float32."""
    chosen = np.ascontiguousarray(np.moveaxis(data[..., index.start : index.stop], -1, 0))
    field = field_of_view(data.shape[1:3], spacing_mm, grid)
    return resize(centre_pad(torch.from_numpy(chosen), field), grid.size)


def label_slices(label: NDArray[np.bool_], spacing_mm: tuple[float, float], grid: Grid, index: range) -> Tensor:
    """A lesion mask (x, y, z) on the working grid, resized like an image and cut at 0.5: (n, *grid.size) bool."""
    return to_slices(label[None].astype(np.float32), spacing_mm, grid, index)[:, 0] > 0.5


def from_slices(
    slices: Tensor, shape: tuple[int, int, int], spacing_mm: tuple[float, float], grid: Grid, index: range
) -> NDArray[np.float32]:
    """Bring (n, h, w) on the working grid back to (x, y, z) = ``shape``; other slices are zero."""
    field = field_of_view(shape[:2], spacing_mm, grid)
    native = centre_pad(resize(slices[:, None].float(), field), shape[:2])
    volume = np.zeros(shape, dtype=np.float32)
    volume[..., index.start : index.stop] = np.moveaxis(native[:, 0].numpy(), 0, -1)
    return volume


def pixels_per_voxel(geometry: Geometry, grid: Grid) -> float:
    """How many in-plane pixels of a scan one pixel of the working grid covers."""
    shape, spacing = geometry.canonical_shape[:2], geometry.spacing_mm[:2]
    field = field_of_view(shape, spacing, grid)
    return field[0] * field[1] / (grid.size[0] * grid.size[1])


def foreground_of(slices: Tensor, scaling: Scaling) -> Tensor:
    """Where the channels of (n, c, h, w) sum to more than the scaling's limit: (n, h, w) bool."""
    return slices.sum(dim=1) > scaling.foreground_sum


def brain_box(foreground: Tensor, multiple: int) -> tuple[int, int, int, int]:
    """The smallest box (first row, last + 1, first column, last + 1) around (n, h, w) foreground.

    Its sides are rounded up to ``multiple`` (what the network's downsamplings divide by) within the grid.
    """
    _, h, w = foreground.shape
    rows = torch.nonzero(foreground.any(dim=0).any(dim=1)).flatten()
    columns = torch.nonzero(foreground.any(dim=0).any(dim=0)).flatten()
    if not len(rows):
        return 0, h, 0, w
    return (
        *_rounded(int(rows[0]), int(rows[-1]) + 1, multiple, h),
        *_rounded(int(columns[0]), int(columns[-1]) + 1, multiple, w),
    )


def join_boxes(
    a: tuple[int, int, int, int], b: tuple[int, int, int, int], multiple: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The smallest box around two boxes, its sides rounded up to ``multiple`` within a grid of ``size``."""
    return (
        *_rounded(min(a[0], b[0]), max(a[1], b[1]), multiple, size[0]),
        *_rounded(min(a[2], b[2]), max(a[3], b[3]), multiple, size[1]),
    )


def _rounded(first: int, stop: int, multiple: int, size: int) -> tuple[int, int]:
    length = min(-(-(stop - first) // multiple) * multiple, size)
    first = min(max(first - (length - (stop - first)) // 2, 0), size - length)
    return first, first + length
