"""What is done to a scan before a model sees it: brain mask, skull, faulty voxels, bias, space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.bias import correct_bias
from anomri.scans.case import Case
from anomri.scans.headers import format_mm
from anomri.scans.overlap import check_label_in_brain
from anomri.scans.read import read_volume
from anomri.scans.register import register, template
from anomri.scans.sitk import import_sitk
from anomri.scans.skull import check_skull, check_skull_strippers, find_brain
from anomri.scans.volume import Volume
from anomri.spec import Grid

CEILING = 6.0
"""Voxels above this many times the 99th percentile are faulty; 115 clean images reach 3.3."""
SHORTEST_MM, LONGEST_MM = 50.0, 600.0
"""The longest side of what is above zero in a scan: a small child's brain, a head in a noisy field
of view."""


@dataclass(frozen=True)
class Preparation:
    """Steps between a scan's files and what a model sees, in this order; by default none.

    ``brain_mask`` is a file whose voxels above zero are brain, used instead of the case's own mask.
    ``skull_strip`` finds the brain, in T1 or the first channel, as `skull.find_brain` says.
    ``bias_correction`` runs N4 on every channel. ``register`` aligns the channels with the first
    one, turns the scan into the model's space, and its map back.
    """

    brain_mask: Path | None = None
    skull_strip: bool = False
    bias_correction: bool = False
    register: bool = False

    def __post_init__(self) -> None:
        if self.brain_mask is not None and self.skull_strip:
            raise AnomriError(
                "a brain mask is given and skull stripping is asked for; one of the two is enough."
            )

    def check_tools(self) -> None:
        """Raise `AnomriError` if a step needs a library that is not installed.

        For a run this is known before the first scan is read, and said once.
        """
        if self.skull_strip:
            check_skull_strippers()
        if self.bias_correction:
            import_sitk("--bias-correction")
        if self.register:
            import_sitk("--register")
            template()


def prepare(
    case: Case,
    channels: Sequence[str],
    grid: Grid = Grid(),
    preparation: Preparation = Preparation(),
    *,
    resampled: bool = True,
) -> Volume:
    """Read ``channels`` of a case as a model should see them; its ``notes`` say what was done.

    Channels on other grids are ``resampled`` to the first one's, or refused. Raises `AnomriError`
    if a file is missing or damaged, if the scan has its skull and nothing says where the brain is,
    or if a step fails.
    """
    preparation.check_tools()
    if preparation.brain_mask is not None:
        case = replace(case, mask=preparation.brain_mask)
    volume = read_volume(case, channels, grid, resampled=resampled, aligned=preparation.register)
    volume = _check_length(case, volume)
    if preparation.skull_strip:
        volume = _strip_skull(case, volume)
    else:
        check_skull(case, volume)
    volume = _check_label(case, volume, refused=not resampled)
    volume = replace_faulty_voxels(volume)
    if preparation.bias_correction:
        volume = _correct_bias(volume)
    if preparation.register:
        volume, _ = register(volume)
    return volume


def _check_label(case: Case, volume: Volume, *, refused: bool) -> Volume:
    """The scan without its label if that lies elsewhere, with a note.

    With ``refused``, it raises `AnomriError` instead.
    """
    if volume.label is None or case.label is None:
        return volume
    try:
        notes = check_label_in_brain(
            case.label, volume.label, volume.foreground, volume.geometry.voxel_mm3
        )
        return replace(volume, notes=(*volume.notes, *notes))
    except AnomriError as error:
        if refused:
            raise
        note = f"its label was left out: {error}"
        return replace(
            volume,
            label=None,
            ignored=None,
            label_error=str(error),
            notes=(*volume.notes, note),
        )


def _check_length(case: Case, volume: Volume) -> Volume:
    """The scan, with a note if its brain is very short: the voxel size may be wrong.

    Raises `AnomriError` if it is longer than any head.
    """
    sides = zip(volume.brain, volume.geometry.spacing_mm, strict=True)
    longest = max((side.stop - side.start) * mm for side, mm in sides)
    voxel = format_mm(np.array(volume.geometry.spacing_mm))
    path = case.channels[volume.channels[0]]
    found = f"what is above zero is {longest:,.0f} mm long, with voxels of {voxel}"
    if longest > LONGEST_MM:
        raise AnomriError(
            f"{path}: {found}; no head is so long. Correct the voxel size in the header."
        )
    if longest >= SHORTEST_MM:
        return volume
    note = f"{path.name}: {found}; if the voxel size in the header is wrong, so are volumes in mm3."
    return replace(volume, notes=(*volume.notes, note))


def replace_faulty_voxels(volume: Volume) -> Volume:
    """Replace voxels above `CEILING` by the median of the 27 around them, with a note.

    A saturated voxel is hundreds of times brighter than anything a network has seen, and would
    spread over the map. Where the median is no lower, as in a saturated patch, the ceiling itself
    is taken.
    """
    notes, inside = list(volume.notes), volume.inside
    for number, channel in enumerate(volume.inside):
        ceiling = _find_ceiling(channel)
        if ceiling is None:
            continue
        if inside is volume.inside:
            inside = volume.inside.copy()
        faulty = np.argwhere(channel > ceiling)
        padded = np.pad(volume.channel(number), 1, mode="edge")
        around = padded[tuple(slice(side.start, side.stop + 2) for side in volume.brain)]
        for x, y, z in faulty:
            median = float(np.median(around[x : x + 3, y : y + 3, z : z + 3]))
            inside[number, x, y, z] = min(median, ceiling)
        notes.append(
            f"channel {volume.channels[number]} has {len(faulty):,} voxels above {CEILING:g} times "
            f"its 99th percentile (up to {channel.max():.4g}), saturated or faulty; they were "
            f"given the values around them."
        )
    return volume if inside is volume.inside else replace(volume, inside=inside, notes=tuple(notes))


def _find_ceiling(channel: NDArray[np.float32]) -> float | None:
    """The value above which voxels are faulty; ``None`` if none is above it."""
    most, above_zero = float(channel.max()), np.count_nonzero(channel > 0)
    # The mean is at most 0.99 p + 0.01 max, p being the 99th percentile: this mostly spares a sort.
    if most <= CEILING * (float(channel.sum(dtype=np.float64)) / above_zero - 0.01 * most):
        return None
    ceiling = CEILING * float(np.percentile(channel[channel > 0], 99))
    return ceiling if (channel > ceiling).any() else None


def _strip_skull(case: Case, volume: Volume) -> Volume:
    mask, note = find_brain(volume)
    stripped = volume.with_data(volume.data * mask, note)
    for name, channel in zip(stripped.channels, stripped.inside, strict=True):
        if not channel.any():
            raise AnomriError(
                f"{case.channels[name]}: is zero in all of the brain that skull stripping found; "
                "look at both."
            )
    return stripped


def _correct_bias(volume: Volume) -> Volume:
    spacing_mm = volume.geometry.spacing_mm
    corrected = [
        correct_bias(channel, spacing_mm, f"{volume.name}, channel {name}")
        for name, channel in zip(volume.channels, volume.data, strict=True)
    ]
    return volume.with_data(np.stack(corrected), "shading was corrected by N4.")
