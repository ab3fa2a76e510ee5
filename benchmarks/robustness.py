"""What a model still finds in scans that are changed as other scanners, protocols and preparations would change them.

python benchmarks/robustness.py ../shared/data/brats18 src/anomri/models/brats18 [--split val] [--only slices]

All channels of a scan are changed before the model sees it, in mm on the scan's own voxels; labels follow where the head
is turned. Beside the lesions of the cohort, balls with the contrast of a plaque of multiple sclerosis are sought, planted
in the slices without a lesion before the change. All channels, and FLAIR alone; on the working grid.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

import anomri
from anomri.cases import find_cases
from anomri.detector import Detector
from anomri.metrics import precision_recall
from anomri.slices import intensity_scale, label_slices, slice_volume
from anomri.volume import Volume, read_volume

Data = NDArray[np.float32]
Mask = NDArray[np.bool_]
Change = Callable[[Volume, Generator], Volume]
PARTS = {"all channels": None, "FLAIR": ("flair",)}
BALLS = {"balls of 2 to 4 mm": (16, (2.0, 4.0)), "of 4 to 10 mm": (6, (4.0, 10.0))}
"""How many a scan gets, and their radii."""
PLAQUE = {"flair": 0.35, "t1": -0.15, "t1ce": -0.15, "t2": 0.25}
"""Their mean change of a channel, in units of the scaling ``standard``."""
EDGE_MM = 0.5


def _each(change: Callable[[Data, Mask, Generator], NDArray[Any]]) -> Change:
    """A change of a channel's brain (x, y, z), zero around it, of which it gets the mask."""

    def of(volume: Volume, draw: Generator) -> Volume:
        inside = [
            np.where(channel > 0, np.maximum(change(channel, channel > 0, draw), 1e-3 * channel.max()), 0)
            for channel in volume.inside
        ]
        return replace(volume, inside=np.stack(inside).astype(np.float32))

    return of


def _within(blur: Callable[[Data], Data]) -> Change:
    """A filter that sees the brain alone: what lies around it neither darkens its edge nor grows."""
    return _each(lambda x, mask, draw: blur(x) / np.maximum(blur(mask.astype(np.float32)), 0.05))


def _thick(mm: float) -> Change:
    """Slices so thick, interpolated back as a registration does."""

    def blur(volume: Volume) -> Callable[[Data], Data]:
        n = max(round(mm / volume.geometry.spacing_mm[2]), 1)

        def of(x: Data) -> Data:
            slabs = np.add.reduceat(x, np.arange(0, x.shape[2], n), axis=2) / n
            middle = np.arange(slabs.shape[2]) * n + (n - 1) / 2
            place = np.interp(np.arange(x.shape[2]), middle, np.arange(slabs.shape[2]))
            low = np.floor(place).astype(int)
            high, share = np.minimum(low + 1, slabs.shape[2] - 1), (place - low).astype(np.float32)
            return slabs[..., low] * (1 - share) + slabs[..., high] * share

        return of

    return lambda volume, draw: _within(blur(volume))(volume, draw)


def _soft(mm: float) -> Change:
    """In the slice of so much full width at half maximum."""

    def of(volume: Volume, draw: Generator) -> Volume:
        sigma = [mm / 2.355 / size for size in volume.geometry.spacing_mm[:2]] + [0.0]
        return _within(lambda x: ndimage.gaussian_filter(x, sigma))(volume, draw)

    return of


def _noisy(share: float) -> Change:
    """Rician noise, its deviation that share of the brain's median."""

    def of(x: Data, mask: Mask, draw: Generator) -> Data:
        sigma = share * float(np.median(x[mask]))
        return np.hypot(x + sigma * draw.standard_normal(x.shape), sigma * draw.standard_normal(x.shape))

    return _each(of)


def _gamma(power: float) -> Change:
    """Another contrast: a power of what is divided by the 99th percentile."""

    def of(x: Data, mask: Mask, draw: Generator) -> Data:
        top = float(np.percentile(x[mask], 99))
        return top * (x / top) ** power

    return _each(of)


def _shaded(share: float) -> Change:
    """A coil's field, a smooth polynomial of the second degree: so much brighter at most, and darker."""

    def of(x: Data, mask: Mask, draw: Generator) -> Data:
        axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in x.shape), indexing="ij", sparse=True)
        field = sum(float(draw.normal()) * axis + float(draw.normal()) * (axis**2 - 0.33) for axis in axes)
        field = np.broadcast_to(field, x.shape)
        return x * np.exp(np.log1p(share) * field / np.abs(field[mask]).max())

    return _each(of)


def _turned(degrees: float) -> Change:
    """The head nods and leans so far, as in a scan that is in nobody's space."""

    def of(volume: Volume, draw: Generator) -> Volume:
        data, label = volume.data, volume.label
        for axes in ((1, 2), (0, 2), (0, 1)):
            angle = float(draw.choice([-1, 1])) * degrees

            def turned(x: Data, angle: float = angle, axes: tuple[int, int] = axes) -> Data:
                return ndimage.rotate(x, angle, axes, reshape=False, order=1)

            shares = [turned((channel > 0).astype(np.float32)) for channel in data]
            pairs = zip(data, shares, strict=True)
            data = np.stack([turned(one) / np.maximum(share, 0.5) * (share > 0.5) for one, share in pairs])
            label = None if label is None else turned(label.astype(np.float32)) > 0.5
        return replace(volume.with_data(data.astype(np.float32), "turned"), label=label)

    return of


def _stripped(mm: float) -> Change:
    """A brain mask that takes so much of the brain's rim away."""

    def of(volume: Volume, draw: Generator) -> Volume:
        brain = np.pad((volume.inside > 0).any(0), 1)
        depth = ndimage.distance_transform_edt(brain, volume.geometry.spacing_mm)[1:-1, 1:-1, 1:-1]
        return replace(volume, inside=volume.inside * (depth > mm))

    return of


CHANGES: dict[str, Change] = {
    "as it is": lambda volume, draw: volume,
    "slices of 3 mm": _thick(3),
    "slices of 6 mm": _thick(6),
    "soft, 2.5 mm": _soft(2.5),
    "noise of 5 %": _noisy(0.05),
    "noise of 10 %": _noisy(0.10),
    "gamma 0.75": _gamma(0.75),
    "gamma 1.33": _gamma(1.33),
    "shading of 10 %": _shaded(0.10),
    "shading of 25 %": _shaded(0.25),
    "turned by 8 degrees": _turned(8),
    "turned by 15 degrees": _turned(15),
    "3 mm of the rim gone": _stripped(3),
}


def with_balls(
    volume: Volume, count: int, radii_mm: tuple[float, float], detector: Detector, draw: Generator
) -> Volume:
    """A scan with balls in slices without a lesion; its label says where they are."""
    assert volume.label is not None
    inside, scales = volume.inside.copy(), intensity_scale(volume.inside, detector.spec.scaling)
    healthy = ~np.asarray(volume.label.any((0, 1)))[volume.brain[2]]
    brain = (inside > 0).any(0)
    places, where = np.argwhere(brain & healthy), np.zeros_like(volume.label)
    spacing = volume.geometry.spacing_mm
    for _ in range(count):
        centre, radius = places[draw.integers(len(places))], np.exp(draw.uniform(*np.log(radii_mm)))
        grid = np.ogrid[tuple(slice(0, n) for n in brain.shape)]
        squares = [((g - c) * mm) ** 2 for g, c, mm in zip(grid, centre, spacing, strict=True)]
        ball = brain / (1 + np.exp(-np.clip((radius - np.sqrt(sum(squares))) / EDGE_MM, -30, 30)))
        strength = draw.uniform(0.6, 1.4)
        for number, name in enumerate(volume.channels):
            channel = inside[number]
            changed = channel + ball * strength * PLAQUE.get(name, 0.0) * scales[number].scale
            inside[number] = np.where(channel > 0, np.maximum(changed, 1e-3), 0)
        where[volume.brain] |= ball > 0.5
    return replace(volume, inside=inside, label=where)


def scored(volume: Volume, lesions: Mask | None, detector: Detector) -> Iterator[tuple[str, Data, Mask]]:
    """Scores and label of the pixels on the working grid, for every part of the channels; no slices with ``lesions``."""
    for part, names in PARTS.items():
        seen = volume.without([name for name in volume.channels if name not in (names or volume.channels)])
        stack = slice_volume(seen, detector.spec.grid, detector.spec.scaling)
        assert stack.label is not None
        counted = torch.ones(len(stack.x), dtype=torch.bool)
        if lesions is not None:
            counted = ~label_slices(lesions, stack.window, detector.spec.grid, stack.index).any(2).any(1)
        yield part, detector.score(stack)[0][counted.numpy()].ravel(), stack.label[counted].numpy().ravel()


def main() -> None:
    """Print a table in Markdown: AUPRC / ceil-Dice of the lesions, average precision of the balls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--only", default="", help="changes whose name has this in it")
    given = parser.parse_args()
    detector = anomri.load(given.model)
    cases = [case for case in find_cases(given.cohort) if case.split == given.split and case.label is not None]
    kinds = ["lesions", *BALLS]
    print("| |", " | ".join(f"{kind}, {part}" for kind in kinds for part in PARTS), "|")
    print("|---" * (1 + len(kinds) * len(PARTS)) + "|")
    for name, change in CHANGES.items():
        if given.only not in name:
            continue
        found: dict[tuple[str, str], list[list[NDArray[Any]]]] = {}
        for case in cases:
            volume, seed = read_volume(case, detector.spec.channels), zlib.crc32(case.name.encode())
            changed = {"lesions": change(volume, np.random.default_rng(seed))}
            for number, (balls, (count, radii)) in enumerate(BALLS.items()):
                planted = with_balls(volume, count, radii, detector, np.random.default_rng([seed, number]))
                changed[balls] = change(planted, np.random.default_rng(seed))
            for kind, scan in changed.items():
                lesions = None if kind == "lesions" else changed["lesions"].label
                for part, *scores_and_label in scored(scan, lesions, detector):
                    found.setdefault((kind, part), []).append(scores_and_label)
        row = []
        for kind in kinds:
            for part in PARTS:
                curve = precision_recall(*map(np.concatenate, zip(*found[kind, part], strict=True)))
                row.append(
                    f"{curve.average_precision:.3f}" + (f" / {curve.ceil_dice:.3f}" if kind == "lesions" else "")
                )
        print(f"| {name} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
