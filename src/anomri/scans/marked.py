"""Which voxels a brain mask or a lesion label marks: its values may be classes, shares or noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError

FULL_VALUES = (1, 100, 255)
"""What a soft mask reaches where it marks fully: a probability, per cent, or 8 bits."""
MIN_PEAK, MAX_PEAK = 0.5, 1.45
"""The largest value of a soft mask, as a share of the full one: half of it at least, else nothing
is marked; cubic interpolation overshoots to 1.4."""
MAX_CLASS = 10.5
"""Larger values are not class numbers but shares of a maximum such as 100 or 255."""
MAX_CLASSES = 8
"""This few different whole numbers are classes, however large, as in 85, 170, 255, unless they
look like the steps of a soft mask."""
MIN_STEPS = 3
"""A soft label has at least so many values below its largest one."""
MAX_TOUCHING = 0.05
"""The largest value of a soft mask is reached inside: so few of its outer voxels have it."""
MAX_UNEQUAL_NEIGHBOURS = 0.2
"""A label with a larger share of unequal neighbours is soft; in numbered lesions fewer differ."""
WHOLE_NUMBER = 1e-3
"""Whole numbers that a header scales are only nearly whole, by less than this."""
NOISE = 1e-3
"""Values below this share of the largest one (of 1, if that is larger) are noise of floats."""
ONE_VALUE = 0.01
"""Values within this share of the largest one are one value, as 254 and 255."""
MAX_UNDERSHOOT = 0.35
"""Interpolation leaves no values further below zero than this share of the largest one."""


def find_marked(
    path: Path, values: NDArray[Any], voxel_mm3: float, *, of_brain: bool = False
) -> tuple[NDArray[np.bool_], list[str]]:
    """The voxels that a mask or label marks, and notes on how its values were understood.

    All voxels above zero are marked, unless the values are shares (probabilities, per cent, or of
    255): then those from half of the full value on. ``of_brain`` says that it is a brain mask.
    Raises `AnomriError` if the values are negative, or shares of what nobody knows.

    >>> values = np.array([[[0, 0.2, 0.6, 1]]], dtype=np.float32)
    >>> marked, notes = find_marked(Path("a_seg.nii"), values, 500)
    >>> marked.tolist()
    [[[False, False, True, True]]]
    >>> notes
    ['a_seg.nii has values between whole numbers (up to 1); those from 0.5 on are taken (1 ml).']
    """
    _refuse_negative(path, values)
    most = float(values.max())
    floats = values.dtype.kind == "f"
    marked: NDArray[np.bool_] = values > (NOISE * min(most, 1) if floats else 0)
    if not marked.any():
        return marked, []
    above = values[marked]
    one_value = most - float(above.min()) <= ONE_VALUE * most
    if floats and most < NOISE and not one_value:
        marked = np.zeros_like(marked)
    noise = _note_noise(path, values, marked, voxel_mm3) if floats else []
    if one_value or not marked.any():
        return marked, noise
    whole = _are_whole_numbers(above)
    levels = np.unique(above.round() if whole else above)
    if not whole or _are_shares(values, marked, levels, of_brain):
        cut = _find_cut(path, most, whole)
        marked = np.asarray(values >= cut)
        found = f"up to {most:.3g} that differ from voxel to voxel"
        if not whole:
            found = f"between whole numbers (up to {most:.3g})"
        taken = f"those from {cut:g} on are taken ({_format_ml(marked, voxel_mm3)})"
        return marked, [f"{path.name} has values {found}; {taken}."]
    if not of_brain:
        return marked, noise
    note = (
        f"{path.name} holds {_name_classes(levels)}; all above zero are taken for the brain "
        f"({_format_ml(marked, voxel_mm3)})."
    )
    return marked, [note, *noise]


def full_value(most: float) -> int | None:
    """What a soft mask, whose largest value is ``most``, has where it marks fully, if that is
    known.

    >>> full_value(0.8), full_value(97), full_value(0.3)
    (1, 100, None)
    """
    fits = (full for full in FULL_VALUES if MIN_PEAK * full <= most <= MAX_PEAK * full)
    return next(fits, None)


def split_ignored(
    values: NDArray[Any], ignored: Sequence[int], path: Path
) -> tuple[NDArray[Any], NDArray[np.bool_] | None, list[str]]:
    """The values of a label without those that mean "not assessed", where these are, and notes.

    ``None`` if there are none. Raises `AnomriError` if the label was interpolated: between zero and
    a value that is ignored lie values of lesions.

    >>> values, where, notes = split_ignored(np.array([0, 1, 2]), [2], Path("a_seg.nii"))
    >>> values.tolist(), where.tolist()
    ([0, 1, 0], [False, False, True])
    >>> notes
    ['a_seg.nii: 1 voxels of value 2 are not assessed, and are left out.']
    """
    if not ignored:
        return values, None, []
    where: NDArray[np.bool_] = np.zeros(values.shape, dtype=bool)
    for value in ignored:
        where |= np.abs(values - float(value)) < WHOLE_NUMBER
    named = ", ".join(map(str, ignored))
    positive = [value for value in ignored if value > 0]
    reaches_ignored = bool(positive) and float(values.max()) > min(positive) - 0.5
    if reaches_ignored and not _are_whole_numbers(values):
        raise AnomriError(
            f"{path}: has values between whole numbers, but value {named} means that a voxel was "
            f"not assessed: at its rim the label was interpolated to values of lesions. Resample "
            f"the label by its nearest voxels."
        )
    if not where.any():
        return values, None, []
    note = (
        f"{path.name}: {int(where.sum()):,} voxels of value {named} are not assessed, and are left "
        f"out."
    )
    return np.where(where, values.dtype.type(0), values), where, [note]


def _refuse_negative(path: Path, values: NDArray[Any]) -> None:
    """Raise `AnomriError` if values are further below zero than interpolation leaves them."""
    lowest, most = float(values.min()), float(values.max())
    if lowest < -MAX_UNDERSHOOT * max(most, 0):
        raise AnomriError(
            f"{path}: holds negative values (down to {lowest:.3g}, up to {most:.3g}); it is "
            f"neither a mask nor a label. Set them to zero. If they mark what was not assessed, "
            f"name the value in the column ignored_label of a .tsv."
        )


def _find_cut(path: Path, most: float, whole: bool) -> float:
    """The value from which on a soft mask marks; raises `AnomriError` if nothing says it."""
    if not whole and FULL_VALUES[0] * MAX_PEAK < most <= MAX_CLASS:
        return 0.5  # of classes that were interpolated
    full = full_value(most)
    if full is not None:
        return full / 2
    between = "that differ from voxel to voxel" if whole else "between whole numbers"
    raise AnomriError(
        f"{path}: has values {between}, of up to {most:.3g}: neither classes nor shares of 1, 100 "
        f"or 255, so that half of the full value is not known. Give a mask of 0 and 1."
    )


def _are_whole_numbers(values: NDArray[Any]) -> bool:
    if values.dtype.kind in "iu":
        return True
    return bool((np.abs(values - values.round()) <= WHOLE_NUMBER).all())


def _are_shares(
    values: NDArray[Any], marked: NDArray[np.bool_], levels: NDArray[Any], of_brain: bool
) -> bool:
    """Whether whole numbers are neither classes nor numbers of lesions."""
    most = float(levels[-1])
    if most <= MAX_CLASS:
        return False
    if len(levels) > MAX_CLASSES:
        return _differ_often(values, marked)
    if not any((1 - ONE_VALUE) * full <= most <= full for full in FULL_VALUES):
        return False
    full = values >= (1 - ONE_VALUE) * most
    rim = _outer_voxels(marked)
    if np.count_nonzero(full & rim) > MAX_TOUCHING * np.count_nonzero(rim):
        return len(levels) > MIN_STEPS and _differ_often(values, marked)
    # Nothing but a soft rim lies around most of a brain.
    mostly_full = bool(2 * np.count_nonzero(full) > np.count_nonzero(marked))
    return len(levels) > MIN_STEPS or (of_brain and mostly_full)


def _outer_voxels(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The marked voxels that have an unmarked one beside them, along an axis."""
    outer = np.zeros_like(marked)
    for axis in range(marked.ndim):
        here, rim = np.moveaxis(marked, axis, 0), np.moveaxis(outer, axis, 0)
        rim[1:] |= here[1:] & ~here[:-1]
        rim[:-1] |= here[:-1] & ~here[1:]
    return outer


def _differ_often(values: NDArray[Any], marked: NDArray[np.bool_]) -> bool:
    """Whether neighbouring ``marked`` values, apart from those at the maximum, often differ."""
    below_maximum = marked & (values < values.max())
    pairs = unequal = 0
    for axis in range(marked.ndim):
        moved, inside, below = (
            np.moveaxis(array, axis, 0) for array in (values, marked, below_maximum)
        )
        counted = inside[1:] & inside[:-1] & (below[1:] | below[:-1])
        pairs += int(np.count_nonzero(counted))
        unequal += int(np.count_nonzero(counted & (moved[1:] != moved[:-1])))
    return unequal > MAX_UNEQUAL_NEIGHBOURS * pairs


def _name_classes(levels: NDArray[Any]) -> str:
    if len(levels) > MAX_CLASSES:
        return f"{len(levels)} different values above zero"
    return "the values " + ", ".join(f"{level:.4g}" for level in levels)


def _note_noise(
    path: Path, values: NDArray[Any], marked: NDArray[np.bool_], voxel_mm3: float
) -> list[str]:
    """A note if values that are not zero were taken for zero."""
    noise = values[~marked & (values != 0)]
    if not noise.size:
        return []
    largest = float(np.abs(noise).max())
    return [
        f"{path.name} has {noise.size:,} voxels that are nearly zero (up to {largest:.2g}); they "
        f"are taken for zero, the others mark {_format_ml(marked, voxel_mm3)}."
    ]


def _format_ml(marked: NDArray[np.bool_], voxel_mm3: float) -> str:
    millilitres = np.count_nonzero(marked) * voxel_mm3 / 1000
    return f"{millilitres:,.0f} ml" if millilitres >= 100 else f"{millilitres:.3g} ml"
