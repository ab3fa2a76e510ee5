"""The box that a brain, or a mask, fills of an array: most of a scan is air."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def box_around(values: NDArray[Any]) -> tuple[slice, ...]:
    """The smallest box, a slice along each axis, that holds all of ``values`` >= 0 above zero; empty if nothing is."""
    # As it lies in memory: NumPy goes through an array backwards at a fifth of the speed.
    backwards = [axis for axis, stride in enumerate(values.strides) if stride < 0]
    values = np.flip(values, tuple(backwards))
    # Two passes over the array, of which the first leaves one plane.
    plane = values.max(axis=-1, initial=0)
    box = [_first_to_last(plane, axis) for axis in range(plane.ndim)]
    box.append(_first_to_last(values[tuple(box)], values.ndim - 1))
    for axis in backwards:
        if not is_empty((box[axis],)):
            box[axis] = slice(
                values.shape[axis] - box[axis].stop, values.shape[axis] - box[axis].start
            )
    return tuple(box)


def is_empty(box: tuple[slice, ...]) -> bool:
    """Whether nothing is in a box."""
    return any(side.start == side.stop for side in box)


def join(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around some that are not empty."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def _first_to_last(values: NDArray[Any], axis: int) -> slice:
    others = tuple(other for other in range(values.ndim) if other != axis)
    (inside,) = np.nonzero(values.max(axis=others, initial=0))
    return slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)
