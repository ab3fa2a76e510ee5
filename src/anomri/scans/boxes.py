"""The box that a brain or a mask fills: most of a scan is air."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def box_around(values: NDArray[Any]) -> tuple[slice, ...]:
    """The smallest box that holds all of ``values`` (>= 0) above zero: a slice along each axis.

    >>> mask = np.zeros((5, 4, 3), bool)
    >>> mask[1:4, 2, 0:2] = True
    >>> box_around(mask)
    (slice(1, 4, None), slice(2, 3, None), slice(0, 2, None))
    """
    # Read in the order of memory: NumPy goes through a reversed axis at a fifth of the speed.
    reversed_axes = [axis for axis, stride in enumerate(values.strides) if stride < 0]
    values = np.flip(values, tuple(reversed_axes))
    # The first pass over the array leaves a plane, which bounds all axes but the last.
    plane = values.max(axis=-1, initial=0)
    box = [_first_to_last(plane, axis) for axis in range(plane.ndim)]
    box.append(_first_to_last(values[tuple(box)], values.ndim - 1))
    for axis in reversed_axes:
        side, length = box[axis], values.shape[axis]
        if side.start < side.stop:
            box[axis] = slice(length - side.stop, length - side.start)
    return tuple(box)


def is_empty(box: tuple[slice, ...]) -> bool:
    """Whether a box holds nothing."""
    return any(side.start == side.stop for side in box)


def enclosing_box(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around several that are not empty.

    >>> enclosing_box([(slice(2, 5),), (slice(4, 9),)])
    (slice(2, 9, None),)
    """
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def _first_to_last(values: NDArray[Any], axis: int) -> slice:
    others = tuple(other for other in range(values.ndim) if other != axis)
    (inside,) = np.nonzero(values.max(axis=others, initial=0))
    return slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)
