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
    """The part of an axial slice that is resized to the grid, in voxels.

    It may reach beyond the slice.
    """

    top: int
    left: int
    rows: int
    columns: int

    def cut(self, data: NDArray[Any]) -> NDArray[Any]:
        """(c, h, w, n) -> (c, rows, columns, n), zero beyond the slice.

        A view, if it does not reach beyond.
        """
        bottom, right = self.top + self.rows, self.left + self.columns
        part = data[:, max(self.top, 0) : max(bottom, 0), max(self.left, 0) : max(right, 0)]
        if part.shape[1:3] == (self.rows, self.columns):
            return part
        above, before = max(-self.top, 0), max(-self.left, 0)
        below = self.rows - above - part.shape[1]
        after = self.columns - before - part.shape[2]
        return np.pad(part, [(0, 0), (above, below), (before, after), (0, 0)])

    def around(
        self, brain: Sequence[slice], size: tuple[int, int]
    ) -> tuple[Window, tuple[slice, slice]]:
        """The smallest part of this window that holds the brain and becomes whole pixels.

        Returns it and these pixels, which have the values that the whole window would give; all
        others are zero.
        """
        rows, across = _in_whole_pixels(brain[0], self.top, self.rows, size[0])
        columns, along = _in_whole_pixels(brain[1], self.left, self.columns, size[1])
        part = Window(
            rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        )
        return part, (across, along)

    def paste(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """What `cut` took, back in its place: (..., rows, columns) -> (..., *size), zero beyond."""
        h, w = size
        if self == Window(0, 0, h, w):
            return x
        right, bottom = w - self.left - self.columns, h - self.top - self.rows
        return functional.pad(x, (self.left, right, self.top, bottom))


class IntensityScale(NamedTuple):
    """How a channel is scaled: voxels above zero become (v - ``offset``) / ``scale``.

    They are at least ``floor``.
    """

    scale: float
    offset: float = 0.0
    floor: float = 0.0

    def __call__(
        self, values: NDArray[np.float32], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Scaled values of an image (x, ...) >= 0, in ``out`` if that is given.

        Zeros stay zeros.
        """
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
    """Where slices lie in a brain: the box around all of it, and their heights (n,).

    Heights go from 0 (lowest) to 1.
    """

    box: Box
    heights: Tensor

    @classmethod
    def from_foreground(cls, foreground: Tensor) -> Position:
        """The position of all slices of a brain, from their foreground (n, h, w) bool."""
        heights = (torch.arange(len(foreground)) + 0.5) / len(foreground)
        return cls(brain_box(foreground, 1), heights)

    def within(self, box: Box) -> Position:
        """The same for slices of which only ``box`` is left."""
        top, bottom, left, right = self.box
        return self._replace(box=(top - box[0], bottom - box[0], left - box[2], right - box[2]))


@dataclass(frozen=True)
class SliceStack:
    """The axial slices of one scan on the working grid."""

    x: Tensor
    """(n, c, h, w) float32, scaled."""
    foreground: Tensor
    """(n, h, w) bool."""
    index: range
    """Their places along z."""
    scale: tuple[IntensityScale, ...]
    """How each channel was scaled."""
    label: Tensor | None
    """(n, h, w) bool, if the scan has one."""
    window: Window
    """The part of the scan that the grid shows."""
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of slices, rows and columns."""
    part: Position | None = None
    """Where the slices lie in the brain, if they are not all of it."""

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
    """Scale a scan and cut it into slices on the working grid.

    Raises `AnomriError` if no slice holds brain.
    """
    try:
        window = find_window(
            volume.geometry.canonical_shape, volume.brain, volume.in_plane_mm, grid
        )
    except AnomriError as error:
        raise AnomriError(f"{volume.name}: {error}") from error
    # Three fifths of most scans lie outside the brain: all zero, neither scaled nor resized.
    rows, columns, high = volume.brain
    view, pixels = window.around((rows, columns), grid.size)
    scale = intensity_scale(volume.inside, scaling)
    shape = (len(scale), view.rows, view.columns, high.stop - high.start)
    scaled = np.zeros(shape, dtype=np.float32)
    down = slice(rows.start - view.top, rows.stop - view.top)
    across = slice(columns.start - view.left, columns.stop - view.left)
    for rescale, channel, target in zip(scale, volume.inside, scaled[:, down, across], strict=True):
        rescale(channel, out=target)
    chosen = slice_range(scaled, scaling.slice_sum)
    if not chosen:
        raise AnomriError(f"{volume.name}: no slice holds enough brain; is the image nearly empty?")
    x = _resize_to_grid(scaled, pixels, grid, chosen)
    index = range(high.start + chosen.start, high.start + chosen.stop)
    label = None if volume.label is None else label_slices(volume.label, window, grid, index)
    mm = volume.geometry.spacing_mm
    row_mm, column_mm = mm[0] * window.rows / grid.size[0], mm[1] * window.columns / grid.size[1]
    foreground = find_foreground(x, scaling)
    return SliceStack(x, foreground, index, scale, label, window, (mm[2], row_mm, column_mm))


def present_channels(x: Tensor) -> list[bool]:
    """Whether slices (n, c, h, w) show each channel: a missing one is zero in all of them."""
    # The first slice mostly decides.
    return [any(bool(one.any()) for one in x[:, k]) for k in range(x.shape[1])]


def intensity_scale(data: NDArray[np.float32], scaling: Scaling) -> tuple[IntensityScale, ...]:
    """How each channel of (c, x, y, z) is scaled, from its voxels > 0.

    One without any stays as it is.
    """
    if scaling.kind == "percentile":
        return tuple(IntensityScale(scale) for scale in percentile_scale(data, scaling.percentile))
    scales = []
    for channel in data:
        quartiles = _percentiles(channel, [25, 50, 75])
        if quartiles is None:
            scales.append(IntensityScale(1.0))
            continue
        low, median, high = quartiles
        # A channel of one value only has no spread; any will do.
        scale = (high - low or abs(median)) / SPREAD
        scales.append(IntensityScale(scale, median - LEVEL * scale, FLOOR))
    return tuple(scales)


def percentile_scale(data: NDArray[np.float32], percentile: float = 99.0) -> tuple[float, ...]:
    """The ``percentile`` of each channel of (c, x, y, z) over its voxels > 0.

    1 for a channel without any.
    """
    return tuple((_percentiles(channel, [percentile]) or [1.0])[0] for channel in data)


def _percentiles(channel: NDArray[np.float32], percents: Sequence[float]) -> list[float] | None:
    """`numpy.percentile` of the values > 0, linear between ranks; ``None`` if there are none."""
    # NumPy sorts with vector instructions, several times as fast as it looks for two ranks next to
    # each other.
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
    """Axial slices from the first to the last with a channel mean above ``slice_sum``.

    The mean is summed over the slice.
    """
    # In two steps: three times as fast as over all axes but the last at once.
    sums = scaled.sum(axis=(0, 1)).sum(axis=0) / len(scaled)
    (above,) = np.nonzero(sums > slice_sum)
    return range(int(above[0]), int(above[-1]) + 1) if above.size else range(0)


def find_window(
    shape: Sequence[int], brain: Sequence[slice], spacing_mm: tuple[float, float], grid: Grid
) -> Window:
    """The grid's field of view on a scan: in the middle, or around a brain that lies off it.

    Raises `AnomriError` if the brain is larger than the field of view.
    """
    if grid.field_of_view_mm is None:
        return Window(0, 0, *shape[:2])
    rows, columns = (
        _field_of_view(shape[axis], brain[axis], grid.field_of_view_mm[axis], spacing_mm[axis])
        for axis in (0, 1)
    )
    return Window(rows.start, columns.start, len(rows), len(columns))


def _field_of_view(length: int, brain: slice, mm: float, spacing_mm: float) -> range:
    """The voxels of an axis of ``length`` that ``mm`` cover.

    They may reach beyond it at both ends.
    """
    size = max(round(mm / spacing_mm), 1)
    if length <= size:
        start = -((size - length) // 2)
        return range(start, start + size)
    brain_size = brain.stop - brain.start
    if brain_size > size:
        raise AnomriError(
            f"the image is above zero over {brain_size * spacing_mm:.0f} mm, more than the "
            f"{mm:.0f} mm that "
            f"the model sees; take the skull and the neck off first."
        )
    start = (length - size) // 2
    if brain.start < start or brain.stop > start + size:
        start = (brain.start + brain.stop - size) // 2
    return range(start, start + size)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (n, c, h, w), pixel centres aligned, no antialiasing."""
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def to_slices(data: NDArray[Any], window: Window, grid: Grid, index: range) -> Tensor:
    """Axial slices of (c, x, y, z) >= 0 on the working grid: (n, c, *grid.size) float32."""
    chosen = data[..., index.start : index.stop]
    view, pixels = window.around(box_around(chosen)[1:3], grid.size)
    part = view.cut(chosen).astype(np.float32, copy=False)
    return _resize_to_grid(part, pixels, grid, range(len(index)))


def label_slices(label: NDArray[np.bool_], window: Window, grid: Grid, index: range) -> Tensor:
    """A lesion mask (x, y, z) on the working grid, cut at 0.5: (n, *grid.size) bool."""
    return to_slices(label[None], window, grid, index)[:, 0] > 0.5


def from_slices(
    slices: Tensor, shape: tuple[int, int, int], window: Window, index: range
) -> NDArray[np.float32]:
    """Bring (n, h, w) on the working grid back to (x, y, z) = ``shape``.

    What the grid did not see is zero.
    """
    z_last = slices[None].float().contiguous(memory_format=torch.channels_last)
    native = window.paste(resize(z_last, (window.rows, window.columns)), shape[:2])
    volume = np.zeros(shape, dtype=np.float32)
    volume[..., index.start : index.stop] = native[0].permute(1, 2, 0).numpy()
    return volume


def find_foreground(slices: Tensor, scaling: Scaling) -> Tensor:
    """Where the channels of (n, c, h, w) sum to more than the scaling's limit: (n, h, w) bool."""
    return slices.sum(dim=1) > scaling.foreground_sum


def brain_box(foreground: Tensor, multiple: int) -> Box:
    """The smallest box (first row, last + 1, first column, last + 1) around (n, h, w) foreground.

    Its sides are rounded up to ``multiple`` (what the network's downsamplings divide by) within the
    grid.
    """
    _, h, w = foreground.shape
    _, rows, columns = box_around(foreground.numpy())
    if rows.start == rows.stop:
        return 0, h, 0, w
    return (
        *_round_up(rows.start, rows.stop, multiple, h),
        *_round_up(columns.start, columns.stop, multiple, w),
    )


def cut_box(x: Tensor, box: Box | None) -> Tensor:
    """The part of (..., h, w) in a box; all of it without one."""
    return x if box is None else x[..., box[0] : box[1], box[2] : box[3]]


def paste_box(part: Tensor, size: tuple[int, int], box: Box | None) -> Tensor:
    """Zeros of (..., *size) with ``part`` in the box it was cut from.

    ``part`` itself without one.
    """
    if box is None:
        return part
    return functional.pad(part, (box[2], size[1] - box[3], box[0], size[0] - box[1]))


def widen_box(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """A box with ``margin`` pixels more on every side, within a grid of ``size``.

    >>> widen_box((2, 10, 30, 40), 5, (128, 128))
    (0, 15, 25, 45)
    """
    top, bottom, left, right = box
    return (
        max(top - margin, 0),
        min(bottom + margin, size[0]),
        max(left - margin, 0),
        min(right + margin, size[1]),
    )


def join_boxes(a: Box, b: Box, multiple: int, size: tuple[int, int]) -> Box:
    """The smallest box around two boxes, with sides that are a ``multiple``.

    It stays within a grid of ``size``.
    """
    return (
        *_round_up(min(a[0], b[0]), max(a[1], b[1]), multiple, size[0]),
        *_round_up(min(a[2], b[2]), max(a[3], b[3]), multiple, size[1]),
    )


def _resize_to_grid(
    part: NDArray[np.float32], pixels: tuple[slice, slice], grid: Grid, index: range
) -> Tensor:
    """The slices ``index`` of (c, h, w, n), which become ``pixels`` of the grid."""
    # As they lie in memory, z last: torch resizes "channels last" without turning them first.
    z_last = torch.from_numpy(part).permute(0, 3, 1, 2)
    rows, columns = pixels
    resized = resize(z_last, (rows.stop - rows.start, columns.stop - columns.start))
    x = np.zeros((len(index), len(part), *grid.size), dtype=np.float32)
    # Torch would take four times as long to turn them.
    for number, channel in enumerate(resized[:, index.start : index.stop].numpy()):
        copy_transposed(channel, x[:, number, rows, columns])
    return torch.from_numpy(x)


def _in_whole_pixels(part: slice, start: int, length: int, pixels: int) -> tuple[slice, slice]:
    """The voxels around ``part`` that become whole pixels, and these pixels.

    All ``length`` voxels would become ``pixels``. They are taken in steps, the fewest voxels that
    become whole pixels (15 voxels to 8 pixels for 240 to 128): each pixel is then interpolated at
    the very place as without. One voxel more on either side, a zero, is what a pixel at the end
    blends with.

    >>> _in_whole_pixels(slice(40, 100), 0, 240, 128)
    (slice(30, 105, None), slice(16, 56, None))
    """
    steps = math.gcd(length, pixels)
    voxels_a_step, pixels_a_step = length // steps, pixels // steps
    first = min(max(part.start - 1 - start, 0) // voxels_a_step, steps - 1)
    last = max(min(math.ceil((part.stop + 1 - start) / voxels_a_step), steps), first + 1)
    voxels = slice(start + first * voxels_a_step, start + last * voxels_a_step)
    return voxels, slice(first * pixels_a_step, last * pixels_a_step)


def _round_up(first: int, stop: int, multiple: int, size: int) -> tuple[int, int]:
    """``first`` to ``stop``, made longer on both sides to a ``multiple``, within 0 to ``size``.

    >>> _round_up(3, 13, 8, 20)
    (0, 16)
    """
    length = min(-(-(stop - first) // multiple) * multiple, size)
    first = min(max(first - (length - (stop - first)) // 2, 0), size - length)
    return first, first + length


def mask_on_published_grid(
    mask: NDArray[np.bool_], stack: SliceStack, grid: Grid
) -> NDArray[np.bool_]:
    """A mask (x, y, z) as `on_published_grid` gives the label: (n, h, w)."""
    published = Grid().size
    size = grid.size if min(grid.size) <= max(published) else published
    return label_slices(mask, stack.window, replace(grid, size=size), stack.index).numpy()


def on_published_grid(
    scores: NDArray[np.float32], stack: SliceStack, volume: Volume, grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.bool_], float]:
    """Scores and label (n, h, w) on the working ``grid``, or on the paper's if it is coarser.

    Figures of models with different grids compare this way. And the volume of a voxel there, in
    mm3.
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
