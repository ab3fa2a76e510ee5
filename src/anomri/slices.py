"""From a scan to the slices a network sees, and back (Kascenas et al. 2022, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.scans.boxes import box_around
from anomri.scans.geometry import copy_transposed
from anomri.scans.volume import Volume
from anomri.spec import FLOOR, LEVEL, SPREAD, Grid, Scaling

Box = tuple[int, int, int, int]
"""First row, last + 1, first column, last + 1."""


@dataclass(frozen=True)
class Window:
    """The part of an axial slice that is resized to the grid, in voxels; it may reach beyond the slice."""

    top: int
    left: int
    rows: int
    columns: int

    def cut(self, data: NDArray[Any]) -> NDArray[Any]:
        """(c, h, w, n) -> (c, rows, columns, n), zero beyond the slice; a view of it, where it does not reach beyond."""
        starts, sizes = (self.top, self.left), (self.rows, self.columns)
        inside = [
            slice(max(start, 0), max(start + size, 0))
            for start, size in zip(starts, sizes, strict=True)
        ]
        part = data[:, inside[0], inside[1]]
        if part.shape[1:3] == sizes:
            return part
        before = [max(-start, 0) for start in starts]
        after = [
            size - first - have
            for size, first, have in zip(sizes, before, part.shape[1:3], strict=True)
        ]
        return np.pad(part, [(0, 0), *zip(before, after, strict=True), (0, 0)])

    def around(
        self, brain: Sequence[slice], size: tuple[int, int]
    ) -> tuple[Window, tuple[slice, slice]]:
        """The least of this window that holds a part of the slice and becomes whole pixels of a grid of ``size``.

        Returns that and the pixels, which are those the whole window would give, and all others zero.
        """
        rows, across = _steps(brain[0], self.top, self.rows, size[0])
        columns, along = _steps(brain[1], self.left, self.columns, size[1])
        return Window(
            rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        ), (across, along)

    def paste(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(..., rows, columns) -> (..., *size), zero beyond the window: what `cut` took, back in its place."""
        h, w = size
        if self == Window(0, 0, h, w):
            return x
        return functional.pad(
            x, (self.left, w - self.left - self.columns, self.top, h - self.top - self.rows)
        )


class Affine(NamedTuple):
    """How a channel is scaled: voxels above zero become (v - ``offset``) / ``scale``, no less than ``floor``."""

    scale: float
    offset: float = 0.0
    floor: float = 0.0

    def __call__(
        self, values: NDArray[np.float32], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Scaled values of an image (x, ...) >= 0, in ``out`` if that is given; zeros stay zeros."""
        scaled = np.empty_like(values) if out is None else out
        if not self.offset and not self.floor:
            return np.divide(values, np.float32(self.scale), out=scaled)
        # Plane by plane: several passes over what the processor's cache holds are as good as one.
        for plane, target in zip(values, scaled, strict=True):
            np.subtract(plane, np.float32(self.offset), out=target)
            target /= np.float32(self.scale)
            np.maximum(target, np.float32(self.floor), out=target)
            target *= plane > 0
        return scaled

    def inverse(self, scaled: Tensor, foreground: Tensor) -> Tensor:
        """Scaled values of any shape in the scan's own intensities, zero outside the foreground."""
        return (scaled * self.scale + self.offset) * foreground


class Position(NamedTuple):
    """Where slices lie in a brain: the ``box`` around all of it, and each slice's height, from 0 (lowest) to 1 (n,)."""

    box: Box
    heights: Tensor

    @classmethod
    def from_foreground(cls, foreground: Tensor) -> Position:
        """Of all slices of a brain, by their foreground (n, h, w) bool."""
        return cls(
            brain_box(foreground, 1), (torch.arange(len(foreground)) + 0.5) / len(foreground)
        )


@dataclass(frozen=True)
class SliceStack:
    """The axial slices of one scan on the working grid.

    ``x`` (n, c, h, w) float32, scaled; ``foreground`` (n, h, w) bool; ``index`` their place along z; ``scale``
    how each channel was scaled; ``label`` (n, h, w) bool, if the scan has one. ``window`` is what the grid
    shows of the scan; ``spacing_mm`` that of slices, rows and columns. ``part`` says where they lie in the brain, if
    they are not all of it.
    """

    x: Tensor
    foreground: Tensor
    index: range
    scale: tuple[Affine, ...]
    label: Tensor | None
    window: Window
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    part: Position | None = None

    @property
    def position(self) -> Position:
        """Where the slices lie in the brain."""
        return self.part or Position.from_foreground(self.foreground)

    def take(self, numbers: Sequence[int]) -> SliceStack:
        """These slices as if they lay next to each other, without label."""
        chosen = list(numbers)
        part = self.position._replace(heights=self.position.heights[chosen])
        x, foreground = self.x[chosen], self.foreground[chosen]
        return replace(
            self, x=x, foreground=foreground, index=range(len(chosen)), label=None, part=part
        )


def slice_volume(volume: Volume, grid: Grid = Grid(), scaling: Scaling = Scaling()) -> SliceStack:
    """Scale a scan and cut it into slices on the working grid; raises `AnomriError` if no slice holds brain."""
    try:
        window = window_of(volume.geometry.canonical_shape, volume.brain, volume.in_plane_mm, grid)
    except AnomriError as error:
        raise AnomriError(f"{volume.name}: {error}") from error
    # Outside the brain all is zero: that, three fifths of most scans, is neither scaled nor resized.
    across, along, high = volume.brain
    view, pixels = window.around((across, along), grid.size)
    scale = intensity_scale(volume.inside, scaling)
    scaled = np.zeros(
        (len(scale), view.rows, view.columns, high.stop - high.start), dtype=np.float32
    )
    place = scaled[
        :,
        across.start - view.top : across.stop - view.top,
        along.start - view.left : along.stop - view.left,
    ]
    for affine, channel, target in zip(scale, volume.inside, place, strict=True):
        affine(channel, out=target)
    chosen = slice_range(scaled, scaling.slice_sum)
    if not chosen:
        raise AnomriError(f"{volume.name}: no slice holds enough brain; is the image nearly empty?")
    x = _on_grid(scaled, pixels, grid, chosen)
    index = range(high.start + chosen.start, high.start + chosen.stop)
    label = None if volume.label is None else label_slices(volume.label, window, grid, index)
    mm = volume.geometry.spacing_mm
    rows, columns = mm[0] * window.rows / grid.size[0], mm[1] * window.columns / grid.size[1]
    return SliceStack(
        x, foreground_of(x, scaling), index, scale, label, window, (mm[2], rows, columns)
    )


def present_channels(x: Tensor) -> list[bool]:
    """Whether slices (n, c, h, w) show each channel: one that a scan does not have is zero in all of them."""
    # The first slice mostly tells.
    return [any(bool(one.any()) for one in x[:, k]) for k in range(x.shape[1])]


def intensity_scale(data: NDArray[np.float32], scaling: Scaling) -> tuple[Affine, ...]:
    """How each channel of (c, x, y, z) is scaled, by its voxels > 0; one without any stays as it is."""
    if scaling.kind == "percentile":
        return tuple(Affine(scale) for scale in percentile_scale(data, scaling.percentile))
    affines = []
    for channel in data:
        quartiles = _percentiles(channel, [25, 50, 75])
        if quartiles is None:
            affines.append(Affine(1.0))
            continue
        low, median, high = quartiles
        # A channel of one value only has no spread; any will do.
        scale = (high - low or abs(median)) / SPREAD
        affines.append(Affine(scale, median - LEVEL * scale, FLOOR))
    return tuple(affines)


def percentile_scale(data: NDArray[np.float32], percentile: float = 99.0) -> tuple[float, ...]:
    """The ``percentile`` of each channel of (c, x, y, z) over its voxels > 0; 1 for a channel without any."""
    return tuple((_percentiles(channel, [percentile]) or [1.0])[0] for channel in data)


def _percentiles(channel: NDArray[np.float32], percents: Sequence[float]) -> list[float] | None:
    """`numpy.percentile` of the values > 0, linear between ranks; ``None`` if there are none."""
    # NumPy sorts with vector instructions, several times as fast as it looks for two ranks next to each other.
    values = np.sort(channel[channel > 0])
    if not values.size:
        return None
    ranks = (len(values) - 1) * np.asarray(percents) / 100
    lower = ranks.astype(np.intp)
    below, above = (
        values[np.minimum(k, len(values) - 1)].astype(np.float64) for k in (lower, lower + 1)
    )
    return (below + (ranks - lower) * (above - below)).tolist()


def slice_range(scaled: NDArray[np.float32], slice_sum: float = 0.5) -> range:
    """Axial slices from the first to the last whose channel mean sums to more than ``slice_sum``."""
    # In two steps: three times as fast as over all axes but the last at once.
    sums = scaled.sum(axis=(0, 1)).sum(axis=0) / len(scaled)
    (above,) = np.nonzero(sums > slice_sum)
    return range(int(above[0]), int(above[-1]) + 1) if above.size else range(0)


def window_of(
    shape: Sequence[int], brain: Sequence[slice], spacing_mm: tuple[float, float], grid: Grid
) -> Window:
    """The grid's field of view on a scan (x, y, z): in the middle, or around a brain that lies off it.

    Raises `AnomriError` if the brain is larger than the field of view.
    """
    if grid.field_of_view_mm is None:
        return Window(0, 0, *shape[:2])
    starts, sizes = [], []
    for axis, (mm, spacing) in enumerate(zip(grid.field_of_view_mm, spacing_mm, strict=True)):
        have, size = shape[axis], max(round(mm / spacing), 1)
        start = (have - size) // 2 if have > size else -((size - have) // 2)
        if have > size:
            first, stop = brain[axis].start, brain[axis].stop
            if stop - first > size:
                raise AnomriError(
                    f"the image is above zero over {(stop - first) * spacing:.0f} mm, more than the {mm:.0f} mm that "
                    f"the model sees; take the skull and the neck off first."
                )
            if first < start or stop > start + size:
                start = (first + stop - size) // 2
        starts.append(start)
        sizes.append(size)
    return Window(*starts, *sizes)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (n, c, h, w), pixel centres aligned, no antialiasing."""
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def to_slices(data: NDArray[Any], window: Window, grid: Grid, index: range) -> Tensor:
    """Axial slices ``index`` of (c, x, y, z) >= 0 on the working grid: (n, c, *grid.size) float32."""
    chosen = data[..., index.start : index.stop]
    view, pixels = window.around(box_around(chosen)[1:3], grid.size)
    part = view.cut(chosen).astype(np.float32, copy=False)
    return _on_grid(part, pixels, grid, range(len(index)))


def label_slices(label: NDArray[np.bool_], window: Window, grid: Grid, index: range) -> Tensor:
    """A lesion mask (x, y, z) on the working grid, resized like an image and cut at 0.5: (n, *grid.size) bool."""
    return to_slices(label[None], window, grid, index)[:, 0] > 0.5


def from_slices(
    slices: Tensor, shape: tuple[int, int, int], window: Window, index: range
) -> NDArray[np.float32]:
    """Bring (n, h, w) on the working grid back to (x, y, z) = ``shape``; what the grid did not see is zero."""
    z_last = slices[None].float().contiguous(memory_format=torch.channels_last)
    native = window.paste(resize(z_last, (window.rows, window.columns)), shape[:2])
    volume = np.zeros(shape, dtype=np.float32)
    volume[..., index.start : index.stop] = native[0].permute(1, 2, 0).numpy()
    return volume


def foreground_of(slices: Tensor, scaling: Scaling) -> Tensor:
    """Where the channels of (n, c, h, w) sum to more than the scaling's limit: (n, h, w) bool."""
    return slices.sum(dim=1) > scaling.foreground_sum


def brain_box(foreground: Tensor, multiple: int) -> Box:
    """The smallest box (first row, last + 1, first column, last + 1) around (n, h, w) foreground.

    Its sides are rounded up to ``multiple`` (what the network's downsamplings divide by) within the grid.
    """
    _, h, w = foreground.shape
    _, rows, columns = box_around(foreground.numpy())
    if rows.start == rows.stop:
        return 0, h, 0, w
    return (
        *_rounded(rows.start, rows.stop, multiple, h),
        *_rounded(columns.start, columns.stop, multiple, w),
    )


def cut_box(x: Tensor, box: Box | None) -> Tensor:
    """The part of (..., h, w) in a box; all of it without one."""
    return x if box is None else x[..., box[0] : box[1], box[2] : box[3]]


def paste_box(part: Tensor, size: tuple[int, int], box: Box | None) -> Tensor:
    """Zeros of (..., *size) with ``part`` in the box it was cut from; ``part`` itself without one."""
    if box is None:
        return part
    return functional.pad(part, (box[2], size[1] - box[3], box[0], size[0] - box[1]))


def join_boxes(a: Box, b: Box, multiple: int, size: tuple[int, int]) -> Box:
    """The smallest box around two boxes, its sides rounded up to ``multiple`` within a grid of ``size``."""
    return (
        *_rounded(min(a[0], b[0]), max(a[1], b[1]), multiple, size[0]),
        *_rounded(min(a[2], b[2]), max(a[3], b[3]), multiple, size[1]),
    )


def _on_grid(
    part: NDArray[np.float32], pixels: tuple[slice, slice], grid: Grid, index: range
) -> Tensor:
    """The part of slices (c, h, w, n) that becomes ``pixels`` of the grid, and of them those of ``index``."""
    # As they lie in memory, z last: torch resizes "channels last" without turning them first.
    z_last = torch.from_numpy(part).permute(0, 3, 1, 2)
    rows, columns = pixels
    resized = resize(z_last, (rows.stop - rows.start, columns.stop - columns.start))
    x = np.zeros((len(index), len(part), *grid.size), dtype=np.float32)
    # Torch would take four times as long to turn them.
    for number, channel in enumerate(resized[:, index.start : index.stop].numpy()):
        copy_transposed(channel, x[:, number, rows, columns])
    return torch.from_numpy(x)


def _steps(part: slice, start: int, length: int, pixels: int) -> tuple[slice, slice]:
    """Of ``length`` places from ``start`` that become ``pixels``: those around ``part``, in whole steps, and their pixels.

    A step is the least that becomes whole pixels, 15 places to 8 pixels for 240 to 128, so that each pixel is
    interpolated at the very place as without. One place more on either side, a zero, is what a pixel at the end blends with.
    """
    steps = math.gcd(length, pixels)
    places, one = length // steps, pixels // steps
    first = min(max(part.start - 1 - start, 0) // places, steps - 1)
    last = max(min(-(-(part.stop + 1 - start) // places), steps), first + 1)
    return slice(start + first * places, start + last * places), slice(first * one, last * one)


def _rounded(first: int, stop: int, multiple: int, size: int) -> tuple[int, int]:
    length = min(-(-(stop - first) // multiple) * multiple, size)
    first = min(max(first - (length - (stop - first)) // 2, 0), size - length)
    return first, first + length


def on_published_grid(
    scores: NDArray[np.float32], stack: SliceStack, volume: Volume, grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.bool_], float]:
    """Scores and label (n, h, w) on the working ``grid``, but on no finer one than the paper's: figures compare.

    And the volume of a voxel there, in mm3.
    """
    published, voxel_mm3 = Grid().size, math.prod(stack.spacing_mm)
    assert stack.label is not None
    assert volume.label is not None
    if min(grid.size) <= max(published):
        return scores, stack.label.numpy(), voxel_mm3
    coarse = functional.interpolate(
        torch.from_numpy(scores)[:, None],
        size=published,
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )[:, 0]
    label = label_slices(volume.label, stack.window, Grid(published), stack.index)
    return coarse.numpy(), label.numpy(), voxel_mm3 * math.prod(grid.size) / coarse[0].numel()
