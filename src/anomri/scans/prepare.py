"""What is done to a scan before a model sees it: brain mask, skull, shading, space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anomri.errors import AnomriError
from anomri.scans.bias import correct_bias
from anomri.scans.case import Case
from anomri.scans.register import register
from anomri.scans.skull import brain_mask, check_skull
from anomri.scans.volume import Volume, read_volume
from anomri.spec import Grid

CEILING = 6.0
"""Voxels above this many times a channel's 99th percentile are taken for faults; 115 clean images reach 3.3."""


@dataclass(frozen=True)
class Preparation:
    """Steps between a scan's files and what a model sees, in this order; the default takes a brain as it is.

    ``brain_mask`` is a file whose voxels above zero are brain, instead of the case's own mask; ``skull_strip`` finds
    the brain in the first channel; ``bias_correction`` runs N4 on every channel; ``register`` turns the scan into
    the model's space and its map back.
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


def prepare(
    case: Case,
    channels: Sequence[str],
    grid: Grid = Grid(),
    preparation: Preparation = Preparation(),
    *,
    resampled: bool = True,
) -> Volume:
    """Read ``channels`` of a case as a model should see them, to learn or to detect; ``notes`` say what was done.

    Channels on other grids are ``resampled`` to the first one's, or refused. Raises `AnomriError` if a file is missing or
    damaged, if the scan plainly has its skull and nothing says where its brain is, or if a step fails.
    """
    if preparation.brain_mask is not None:
        case = replace(case, mask=preparation.brain_mask)
    volume = read_volume(case, channels, grid, resampled=resampled)
    if preparation.skull_strip:
        mask, tool = brain_mask(volume)
        note = f"the brain was found by {tool} in channel {channels[0]}: {mask.sum() * volume.geometry.voxel_mm3 / 1000:,.0f} ml."
        volume = volume.with_data(volume.data * mask, note)
        for name, channel in zip(channels, volume.inside, strict=True):
            if not channel.any():
                raise AnomriError(
                    f"{case.channels[name]}: is zero in all of the brain that {tool} found; look at both."
                )
    else:
        check_skull(case, volume)
    volume = without_spikes(volume)
    if preparation.bias_correction:
        spacing = volume.geometry.spacing_mm
        corrected = [
            correct_bias(channel, spacing, f"{case.name}, channel {name}")
            for name, channel in zip(channels, volume.data, strict=True)
        ]
        volume = volume.with_data(np.stack(corrected), "shading was corrected by N4.")
    if preparation.register:
        volume, _ = register(volume)
    return volume


def without_spikes(volume: Volume) -> Volume:
    """The scan with voxels above `CEILING` replaced by the median of the 27 around them, with a note; else as it is.

    A saturated voxel is worth hundreds of times what a network has seen, and would fill its surroundings with
    score. Where the median is no lower, as in a saturated patch, the ceiling itself is taken.
    """
    notes, inside = list(volume.notes), volume.inside
    for number, channel in enumerate(volume.inside):
        most, above_zero = float(channel.max()), np.count_nonzero(channel > 0)
        # If p is the 99th percentile, mean <= 0.99 p + 0.01 max: mostly that spares a sort.
        if most <= CEILING * (float(channel.sum(dtype=np.float64)) / above_zero - 0.01 * most):
            continue
        ceiling = CEILING * float(np.percentile(channel[channel > 0], 99))
        places = np.argwhere(channel > ceiling)
        if not len(places):
            continue
        if inside is volume.inside:
            inside = volume.inside.copy()
        around = np.pad(volume.channel(number), 1, mode="edge")
        around = around[tuple(slice(side.start, side.stop + 2) for side in volume.brain)]
        for x, y, z in places:
            inside[number, x, y, z] = min(
                float(np.median(around[x : x + 3, y : y + 3, z : z + 3])), ceiling
            )
        notes.append(
            f"channel {volume.channels[number]} has {len(places):,} voxels above {CEILING:g} times its 99th percentile (up "
            f"to {channel.max():.4g}), saturated or faulty; they were given the values around them."
        )
    return volume if inside is volume.inside else replace(volume, inside=inside, notes=tuple(notes))
