"""What a model still finds in scans changed as other scanners or protocols would.

python benchmarks/robustness.py ../shared/data/brats18 src/anomri/pretrained/brats18 [--split val]
[--only slices] python benchmarks/robustness.py ../shared/data/brats18 runs/folds/fold* --split test
--lesions

All channels of a scan are changed before the model sees it, in mm on the scan's own voxels; labels
follow where the head is turned. Several models, as `ablation.py --folds` trains them, score each
the patients of the split in its own folder. Beside the lesions of the cohort, spheres with the
contrast of a plaque of multiple sclerosis are sought, planted in the slices without a lesion before
the change (a turned scan has other slices, so that its spheres are not quite the same ones). All
channels, and FLAIR alone; on the working grid.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

import anomri
from anomri.model.detector import Detector
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scans.volume import Volume
from anomri.scoring.metrics import dice, precision_recall
from anomri.slices import intensity_scale, label_slices, slice_volume
from anomri.spec import Scaling

Data = NDArray[np.float32]
Mask = NDArray[np.bool_]
Change = Callable[[Volume, Generator], Volume]
SPHERES = {"spheres of 2 to 4 mm": (16, (2.0, 4.0)), "of 4 to 10 mm": (6, (4.0, 10.0))}
"""How many a scan gets, and their radii."""
PLAQUE = {"flair": 0.35, "t1": -0.15, "t1ce": -0.15, "t2": 0.25}
"""Their mean change of a channel, in units of the scaling ``standard``."""
EDGE_MM = 0.5


def _each(change: Callable[[Data, Mask, Generator], NDArray[Any]]) -> Change:
    """A change of a channel's brain (x, y, z), zero around it, of which it gets the mask."""

    def of(volume: Volume, draw: Generator) -> Volume:
        inside = [
            np.where(
                channel > 0, np.maximum(change(channel, channel > 0, draw), 1e-3 * channel.max()), 0
            )
            for channel in volume.inside
        ]
        return replace(volume, inside=np.stack(inside).astype(np.float32))

    return of


def _within(blur: Callable[[Data], Data]) -> Change:
    """A filter that sees the brain only, so that its edge neither darkens nor grows."""
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
        return np.hypot(
            x + sigma * draw.standard_normal(x.shape), sigma * draw.standard_normal(x.shape)
        )

    return _each(of)


def _gamma(power: float) -> Change:
    """Another contrast: a power of what is divided by the 99th percentile."""

    def of(x: Data, mask: Mask, draw: Generator) -> Data:
        top = float(np.percentile(x[mask], 99))
        return top * (x / top) ** power

    return _each(of)


def _shaded(share: float) -> Change:
    """A coil's field for each channel: up to ``share`` brighter or darker.

    It is a polynomial of the second degree.
    """

    def of(x: Data, mask: Mask, draw: Generator) -> Data:
        axes = np.meshgrid(
            *(np.linspace(-1, 1, n, dtype=np.float32) for n in x.shape), indexing="ij", sparse=True
        )
        field = sum(
            float(draw.normal()) * axis + float(draw.normal()) * (axis**2 - 0.33) for axis in axes
        )
        field = np.broadcast_to(field, x.shape)
        return x * np.exp(np.log1p(share) * field / np.abs(field[mask]).max())

    return _each(of)


def _turned(degrees: float) -> Change:
    """The head nods, leans and turns so far, as in a scan that is in nobody's space."""

    def of(volume: Volume, draw: Generator) -> Volume:
        mm = np.array(volume.geometry.spacing_mm)
        turn = Rotation.from_euler(
            "xyz", draw.choice([-1, 1], 3) * degrees, degrees=True
        ).as_matrix()
        matrix = turn * mm / mm[:, None]
        middle = (np.array(volume.geometry.canonical_shape) - 1) / 2

        def turned(x: NDArray[Any]) -> Data:
            return ndimage.affine_transform(
                x.astype(np.float32), matrix, middle - matrix @ middle, order=1
            )

        pairs = [(turned(channel), turned(channel > 0)) for channel in volume.data]
        data = np.stack(
            [one / np.maximum(share, 0.5) * (share > 0.5) for one, share in pairs]
        ).astype(np.float32)
        label = None if volume.label is None else turned(volume.label) > 0.5
        return replace(volume.with_data(data, "turned"), label=label)

    return of


def _stripped(mm: float) -> Change:
    """A brain mask that takes so much of the brain's rim away; a lesion there counts as missed."""

    def of(volume: Volume, draw: Generator) -> Volume:
        brain = ndimage.binary_fill_holes(np.pad((volume.inside > 0).any(0), 1))
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


def with_spheres(
    volume: Volume, count: int, radii_mm: tuple[float, float], draw: Generator
) -> Volume:
    """A scan with spheres in slices without a lesion, if it has such.

    Its label says where they are.
    """
    assert volume.label is not None
    inside, scales = volume.inside.copy(), intensity_scale(volume.inside, Scaling("standard"))
    healthy = ~np.asarray(volume.label.any((0, 1)))[volume.brain[2]]
    brain = (inside > 0).any(0)
    places, where = np.argwhere(brain & healthy), np.zeros_like(volume.label)
    spacing = volume.geometry.spacing_mm
    for _ in range(count if len(places) else 0):
        centre, radius = places[draw.integers(len(places))], np.exp(draw.uniform(*np.log(radii_mm)))
        grid = np.ogrid[tuple(slice(0, n) for n in brain.shape)]
        squares = [((g - c) * mm) ** 2 for g, c, mm in zip(grid, centre, spacing, strict=True)]
        sphere = brain / (1 + np.exp(-np.clip((radius - np.sqrt(sum(squares))) / EDGE_MM, -30, 30)))
        strength = draw.uniform(0.6, 1.4)
        for number, name in enumerate(volume.channels):
            channel = inside[number]
            changed = channel + sphere * strength * PLAQUE.get(name, 0.0) * scales[number].scale
            inside[number] = np.where(channel > 0, np.maximum(changed, 1e-3), 0)
        where[volume.brain] |= sphere > 0.5
    return replace(volume, inside=inside, label=where)


@dataclass
class Found:
    """Scores and labels of every patient; for lesions, the Dice of each mask and the best."""

    scores: list[Data] = field(default_factory=list)
    labels: list[Mask] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    def add(self, volume: Volume, lesions: Mask | None, detector: Detector) -> None:
        """Score a scan; slices with ``lesions`` do not count, if these are given."""
        stack = slice_volume(volume, detector.spec.grid, detector.spec.scaling)
        assert stack.label is not None
        counted = torch.ones(len(stack.x), dtype=torch.bool)
        if lesions is not None:
            counted = ~label_slices(lesions, stack.window, detector.spec.grid, stack.index).any(
                2
            ).any(1)
        scores, label = detector.score(stack)[0][counted.numpy()], stack.label[counted].numpy()
        self.scores.append(scores.ravel())
        self.labels.append(label.ravel())
        if lesions is None and (thresholds := detector.spec.thresholds_for(volume.present)):
            self.dice.append(dice(scores > thresholds.threshold, label))
            self.best.append(precision_recall(scores, label).ceil_dice)

    def cell(self, ceiling: bool) -> str:
        """Pooled average precision; with ``ceiling``, the best Dice and its share kept."""
        curve = precision_recall(np.concatenate(self.scores), np.concatenate(self.labels))
        kept = f", {np.mean(self.dice) / np.mean(self.best):.3f}" if self.dice else ""
        return f"{curve.average_precision:.3f}" + (
            f" / {curve.ceil_dice:.3f}{kept}" if ceiling else ""
        )


def columns_for(detector: Detector) -> dict[str, tuple[str, ...]]:
    """The channels that a model is shown, by what a column is called."""
    parts = {"all channels": detector.spec.channels}
    if detector.takes_subsets and {"flair"} < set(detector.spec.channels):
        parts["FLAIR"] = ("flair",)
    return parts


def labelled_cases(detector: Detector, cases: Sequence[Case], split: str) -> list[Case]:
    """The cases of a split that have a label.

    Whom a model was trained on, its own folder knows best.
    """
    own = any(case.name in detector.splits for case in cases)
    known = detector.splits if own else {case.name: case.split for case in cases}
    return [case for case in cases if case.label is not None and known.get(case.name) == split]


def main() -> None:
    """Print a table in Markdown.

    Columns: pooled AUPRC / ceil-Dice, mean Dice at the threshold as a share of the best; AP of
    spheres.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cohort", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--split", default="val")
    parser.add_argument("--only", default="", help="changes whose name has this in it")
    parser.add_argument("--lesions", action="store_true", help="no spheres")
    given = parser.parse_args()
    cases = find_cases(given.cohort)
    detectors = map(anomri.load, given.models)
    scans = [
        (detector, case)
        for detector in detectors
        for case in labelled_cases(detector, cases, given.split)
    ]
    changes = {name: change for name, change in CHANGES.items() if given.only in name}
    if not scans or not changes:
        parser.error(
            f"no labelled case of the split {given.split}, or no change with {given.only!r} in its "
            "name."
        )
    kinds = ["lesions", *({} if given.lesions else SPHERES)]
    parts = columns_for(scans[0][0])
    print("| |", " | ".join(f"{kind}, {part}" for kind in kinds for part in parts), "|")
    print("|---" * (1 + len(kinds) * len(parts)) + "|")
    for name, change in changes.items():
        found = {(kind, part): Found() for kind in kinds for part in parts}
        for detector, case in scans:
            volume, seed = read_volume(case, detector.spec.channels), zlib.crc32(case.name.encode())
            changed = change(volume, np.random.default_rng(seed))
            for number, kind in enumerate(kinds):
                scan = changed
                if kind != "lesions":
                    planted = with_spheres(
                        volume, *SPHERES[kind], np.random.default_rng([seed, number])
                    )
                    scan = change(planted, np.random.default_rng(seed))
                for part, shown in parts.items():
                    seen = scan.without(
                        [channel for channel in scan.channels if channel not in shown]
                    )
                    found[kind, part].add(
                        seen, None if kind == "lesions" else changed.label, detector
                    )
        print(
            f"| {name} |",
            " | ".join(one.cell(kind == "lesions") for (kind, _), one in found.items()),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
